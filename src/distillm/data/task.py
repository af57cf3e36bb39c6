"""The instruction task: rows -> prompts by a template -> ``Example``, within the length limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..types import Example
from .read import listed
from .tokenize import encode_prompts, encode_responses, longest_fit

NAMED = ("alpaca", "chat")
ROLES = ("instruction", "input", "output")
ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class LengthReport:
    """What the length limits did to ``rows`` rows. Cuts are counted in rows that are used."""

    rows: int
    cut_prompts: int = 0
    cut_responses: int = 0
    dropped: int = 0
    empty_responses: int = 0
    prompt_only: int = 0

    @property
    def used(self) -> int:
        """Number of rows that became examples."""
        return self.rows - self.dropped - self.empty_responses

    def __str__(self) -> str:
        counts = {
            "with a cut prompt": self.cut_prompts,
            "with a cut response (no end token)": self.cut_responses,
            "without a response, for a model to write": self.prompt_only,
            "dropped because the limit leaves no room for the user's text, or there is none": self.dropped,
            "left out because the response is empty": self.empty_responses,
        }
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{self.used} of {self.rows} rows used" + (f": {said}." if said else ", all whole.")


@dataclass(frozen=True)
class InstructionTask:
    """An instruction, sometimes an input, and the response to learn.

    ``fields`` maps instruction, input and output to the names in the data; input and output may be absent.
    ``template`` is "alpaca", "chat" (the tokenizer's own, with ``system`` as its first message) or the text of a Jinja
    template, which sees the row's fields under both kinds of name, except the response. Raises ConfigError on
    settings that do not fit together.
    """

    fields: Mapping[str, str] = field(default_factory=lambda: {role: role for role in ROLES})
    template: str = "alpaca"
    system: str | None = None

    def __post_init__(self) -> None:
        for role in self.fields:
            if role not in ROLES:
                raise ConfigError(f"fields: unknown key '{role}'; allowed are {listed(ROLES)}{_nearest(role, ROLES)}")
        if self.system is not None and self.template != "chat":
            raise ConfigError("system applies to template 'chat' only; leave it out, or write it into the template")
        if self.template in NAMED:
            if "instruction" not in self.fields:
                raise ConfigError(f"fields: template '{self.template}' needs a field for 'instruction'; add it")
            return
        if "{{" not in self.template and "{%" not in self.template:
            raise ConfigError(
                f"template {self.template!r} is neither a known name ({listed(NAMED)}) nor a Jinja template with "
                f"{{{{ fields }}}}, given as text, not as a file{_nearest(self.template, NAMED)}"
            )
        try:
            _compile(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"template: line {error.lineno}: {error.message}; mend the Jinja template") from None

    def prompt_text(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, *, row_id: str = "row"
    ) -> str:
        """The prompt before tokenisation; "chat" needs the tokenizer. Raises DataError naming ``row_id``."""
        return self._render(row, self._content(row, row_id), tokenizer, row_id)

    def user_text(self, row: Mapping[str, Any], *, row_id: str = "row") -> str:
        """What the user wrote, without the template: instruction and input, apart by an empty line."""
        return "\n\n".join(text for text in self._content(row, row_id).values() if text.strip())

    def references(self, row: Mapping[str, Any], *, row_id: str = "row") -> list[str]:
        """The acceptable responses of ``row``; none where it has no output. Training learns the first."""
        value = row.get(self.fields["output"]) if "output" in self.fields else None
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str):
                raise _not_text(row_id, self.fields["output"], text)
        return list(values)

    def examples(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt: int,
        max_length: int,
        end_id: int,
        source: str,
    ) -> tuple[list[Example], LengthReport]:
        """An example ``source:i`` for every usable row ``i``, and what became of the others.

        A prompt over ``max_prompt`` tokens is cut at the end of the input, then of the instruction, so that the
        template stays whole; a response that goes beyond ``max_length`` tokens in all is cut and gets no end token.
        A row without output has no targets. Raises DataError, naming the row, where a field is missing or not text,
        and where no row is usable.
        """
        if not 1 <= max_prompt < max_length:
            raise ConfigError(f"max_prompt={max_prompt} must be at least 1 and below max_length={max_length}")
        self._check_fields(rows, source)
        ids = [f"{source}:{i}" for i in range(len(rows))]
        outputs = [self.references(row, row_id=i)[:1] for row, i in zip(rows, ids, strict=True)]
        prompts = self._prompts(rows, ids, tokenizer, max_prompt)
        responses = iter(encode_responses(tokenizer, [output[0] for output in outputs if output], end_id))
        examples: list[Example] = []
        counts = dict.fromkeys(("cut_prompts", "cut_responses", "dropped", "empty_responses", "prompt_only"), 0)
        for i, output, (prompt, was_cut) in zip(ids, outputs, prompts, strict=True):
            response = next(responses) if output else []
            room = max_length - len(prompt)
            if output and not output[0].strip():
                counts["empty_responses"] += 1
            elif not prompt:
                counts["dropped"] += 1
            else:
                counts["cut_prompts"] += was_cut
                counts["cut_responses"] += len(response) > room
                counts["prompt_only"] += not output
                targets = [False] * len(prompt) + [True] * len(response[:room])
                examples.append(Example(i, prompt + response[:room], targets))
        report = LengthReport(len(rows), **counts)
        if not examples:
            raise DataError(f"{source}: no row is usable: {report} {_advice(report)}")
        return examples, report

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_prompt: int, source: str
    ) -> dict[str, tuple[list[int], bool]]:
        """By row id the prompt and whether it was cut to ``max_prompt``; none where nothing of the user's text fits."""
        ids = [f"{source}:{i}" for i in range(len(rows))]
        return dict(zip(ids, self._prompts(rows, ids, tokenizer, max_prompt), strict=True))

    def _prompts(
        self, rows: Sequence[Mapping[str, Any]], ids: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_prompt: int
    ) -> list[tuple[list[int], bool]]:
        """Each prompt's ids (none where nothing of the user's text fits) and whether it was cut."""
        contents = [self._content(row, i) for row, i in zip(rows, ids, strict=True)]
        texts = [self._render(row, text, tokenizer, i) for row, text, i in zip(rows, contents, ids, strict=True)]
        encoded = encode_prompts(tokenizer, texts, has_specials=self.template == "chat")
        prompts: list[tuple[list[int], bool]] = []
        for row, content, prompt, i in zip(rows, contents, encoded, ids, strict=True):
            if self.template in NAMED and not any(text.strip() for text in content.values()):
                prompts.append(([], False))
            elif len(prompt) <= max_prompt:
                prompts.append((prompt, False))
            else:
                prompts.append((self._shortened(row, content, tokenizer, max_prompt, i), True))
        return prompts

    def _shortened(
        self,
        row: Mapping[str, Any],
        content: dict[str, str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt: int,
        row_id: str,
    ) -> list[int]:
        def encode(content: dict[str, str]) -> list[int]:
            text = self._render(row, content, tokenizer, row_id)
            return encode_prompts(tokenizer, [text], has_specials=self.template == "chat")[0]

        def fits(content: dict[str, str], role: str, text: str) -> bool:
            return len(encode({**content, role: text})) <= max_prompt

        for role in reversed(content):  # the input first
            if fits(content, role, ""):
                kept = longest_fit(tokenizer, content[role], partial(fits, content, role), max_prompt)
                content = {**content, role: kept}
                return encode(content) if any(text.strip() for text in content.values()) else []
            content = {**content, role: ""}
        return []

    def _content(self, row: Mapping[str, Any], row_id: str) -> dict[str, str]:
        """The user's text by role: what may be cut."""
        content: dict[str, str] = {}
        for role in ("instruction", "input"):
            name = self.fields.get(role)
            value = None if name is None else row.get(name)
            if isinstance(value, str):
                content[role] = value
            elif value is not None:
                raise _not_text(row_id, str(name), value)
            elif role == "input":
                content |= {} if name is None else {role: ""}
            elif self.template in NAMED:
                what = "is null" if name in row else "is missing"
                raise DataError(
                    f"{row_id}: the field '{name}' (for {role}) {what}; the fields there are: {listed(list(row))}; "
                    f"give its name in fields.{role}"
                )
        return content

    def _render(
        self,
        row: Mapping[str, Any],
        content: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase | None,
        row_id: str,
    ) -> str:
        if self.template == "alpaca":
            given = bool(content.get("input", "").strip())
            return ALPACA.format(
                paired=", paired with an input that provides further context" if given else "",
                instruction=content["instruction"],
                input=f"### Input:\n{content['input']}\n\n" if given else "",
            )
        if self.template == "chat":
            return self._chat(content, tokenizer, row_id)
        seen = {**row, **{self.fields[role]: text for role, text in content.items() if role in self.fields}, **content}
        for name in ("output", self.fields.get("output", "output")):
            seen.pop(name, None)  # the response must not be in its own prompt
        try:
            return _compile(self.template).render(seen)
        except Exception as error:  # a user's template can raise anything
            raise DataError(
                f"{row_id}: the template failed: {error}; the fields it can use are: {listed(sorted(seen))}"
            ) from error

    def _chat(self, content: Mapping[str, str], tokenizer: PreTrainedTokenizerBase | None, row_id: str) -> str:
        if tokenizer is None or not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; choose template: alpaca, or write one in Jinja")
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = "\n\n".join(text for text in content.values() if text.strip())
        messages.append({"role": "user", "content": text})
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, ValueError) as error:
            raise DataError(
                f"{row_id}: the tokenizer's chat template failed: {error}; choose template: alpaca"
                + ("" if self.system is None else ", or leave system out")
            ) from error

    def _check_fields(self, rows: Sequence[Mapping[str, Any]], source: str) -> None:
        if not rows:
            raise DataError(f"{source}: there are no rows; give at least one")
        there = sorted({str(name) for row in rows for name in row})
        for role, name in self.fields.items():
            # The default names may be absent (instruction is checked row by row); a name the user chose may not.
            if role != name and name not in there:
                raise DataError(
                    f"{source}: no row has the field '{name}' (for {role}); the fields there are: {listed(there)}"
                    f"{_nearest(name, there)}"
                )


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    # A template's last line end belongs to the prompt; nothing is escaped, because this is no web page.
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.from_string(template)


def _not_text(row_id: str, name: str, value: Any) -> DataError:
    return DataError(f"{row_id}: the field '{name}' is {value!r:.40}, not a text; write it as a text in the data")


def _nearest(word: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _advice(report: LengthReport) -> str:
    if report.empty_responses == report.rows:
        return "Leave the output field out of the data if a model is to write the responses."
    return "Raise max_prompt, or choose a shorter template."
