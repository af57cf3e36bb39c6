"""A task at work: rows -> prompts by a template -> ``Example``, within the length limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..tasks import CHAT, TaskSpec, broken_in, is_jinja, load_task, near, rendered
from ..types import Example
from .conversation import Conversation, Message, Unfit, asked_of, messages_of, render, written
from .read import listed
from .tokenize import encode_prompts, encode_responses, longest_fit


@dataclass(frozen=True)
class LengthReport:
    """What the length limits did to ``rows`` rows. Cuts are counted in rows that are used."""

    rows: int
    cut_prompts: int = 0
    cut_responses: int = 0
    dropped: int = 0
    empty_responses: int = 0
    prompt_only: int = 0
    shortened: int = 0

    @property
    def used(self) -> int:
        """Number of rows that became examples."""
        return self.rows - self.dropped - self.empty_responses

    def __str__(self) -> str:
        counts = {
            "with a cut prompt": self.cut_prompts,
            "without their oldest turns": self.shortened,
            "with a cut response (no end token)": self.cut_responses,
            "without a response, for a model to write": self.prompt_only,
            "dropped because the limit leaves no room for the user's text, or there is none": self.dropped,
            "left out because the response is empty": self.empty_responses,
        }
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{self.used} of {self.rows} rows used" + (f": {said}." if said else ", all whole.")


@dataclass(frozen=True)
class _Made:
    """What a row became: its prompt (none where nothing fits), its response if it has one, and what was left out.

    ``context`` says of each token of the prompt whether it is to be learned, where some are.
    """

    prompt: list[int]
    response: list[int] | None
    empty: bool = False
    cut: bool = False
    shortened: bool = False
    context: list[bool] = field(default_factory=list[bool])


def eights(length: int) -> int:
    """``length`` in tokens, rounded up to a multiple of eight."""
    return max(8, math.ceil(length / 8) * 8)


def roomy(lengths: Sequence[int]) -> int:
    """A limit, in eights, that all but 2 of 100 of ``lengths`` are within."""
    return eights(sorted(lengths)[math.ceil(0.98 * len(lengths)) - 1])


class _Unset(dict[str, str]):
    """Fields that were not given, as against none."""


@dataclass(frozen=True)
class Task:
    """A task with its settings: by default instructions in the Alpaca wording.

    ``fields`` maps the task's fields to the names in the data; those that are not in it are absent. ``template`` is a
    name that the task knows, "chat" (the tokenizer's own, with ``system`` as its first message) or the text of a Jinja
    template, which sees the row's fields under both kinds of name, except the response. ``variables`` are for
    templates. Raises ConfigError on settings that do not fit together.
    """

    spec: TaskSpec = field(default_factory=lambda: load_task("instruction"))
    fields: Mapping[str, str] = field(default_factory=_Unset)
    template: str = ""
    system: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        spec, roles = self.spec, list(self.spec.fields)
        object.__setattr__(self, "fields", dict(spec.fields if isinstance(self.fields, _Unset) else self.fields))
        object.__setattr__(self, "template", self.template or spec.template)
        object.__setattr__(self, "variables", {**spec.variables, **self.variables})
        for role in self.fields:
            if role not in roles:
                raise ConfigError(f"fields: unknown key '{role}'; allowed are {listed(roles)}{near(role, roles)}")
        if spec.conversation is not None and self.template != CHAT:
            raise ConfigError(f"template: task {spec.name} knows none but 'chat', the tokenizer's own; leave it out")
        if self.system is not None and self.template != CHAT:
            raise ConfigError("system applies to template 'chat' only; leave it out, or write it into the template")
        if spec.owns(self.template):
            for role in spec.required:
                if role not in self.fields:
                    raise ConfigError(f"fields: template '{self.template}' needs a field for '{role}'; add it")
            return
        if not is_jinja(self.template):
            raise ConfigError(
                f"template {self.template!r} is neither a known name ({listed(spec.named)}) nor a Jinja template with "
                f"{{{{ fields }}}}, given as text, not as a file{near(self.template, spec.named)}"
            )
        if said := broken_in(self.template):
            raise ConfigError(f"template: {said}; mend the Jinja template")

    @property
    def chats(self) -> bool:
        """Whether prompts are in the tokenizer's chat template, so that a response ends as its turns do."""
        return self.template == CHAT

    @property
    def answer(self) -> str | None:
        """The column of the response, or of the conversation that holds it; None where rows have none."""
        return self.fields.get(self.spec.response or self.spec.conversation or "")

    def prompt_text(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, *, row_id: str = "row"
    ) -> str:
        """The prompt before tokenisation; "chat" needs the tokenizer. Raises DataError naming ``row_id``."""
        if self.spec.conversation is not None:
            return self._chat(asked_of(self._messages(row, row_id)), tokenizer, row_id)
        return self._render(row, self._content(row, row_id), tokenizer, row_id)

    def user_text(self, row: Mapping[str, Any], *, row_id: str = "row") -> str:
        """What the user wrote, without the template: the texts of the prompt, apart by an empty line; of a longer
        conversation a line for each message."""
        if self.spec.conversation is not None:
            return written(asked_of(messages_of(self._conversation(row, row_id), row_id)))
        return "\n\n".join(text for text in self._content(row, row_id).values() if text.strip())

    def references(self, row: Mapping[str, Any], *, row_id: str = "row") -> list[str]:
        """The acceptable responses of ``row``; none where it has none. Training learns the first."""
        if self.spec.conversation is not None:
            last = messages_of(self._conversation(row, row_id), row_id)[-1]
            return [last["content"]] if last["role"] == "assistant" else []
        name = self.answer
        value = None if name is None else row.get(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str):
                raise _not_text(row_id, str(name), text)
        return list(values)

    def only_asked(self, rows: Sequence[Mapping[str, Any]]) -> "tuple[Task, list[dict[str, Any]]]":
        """``rows`` without their responses, and the task of such rows."""
        name = self.answer
        if self.spec.conversation is not None and name is not None:
            return self, [{**row, name: self._unanswered(row.get(name))} for row in rows]
        fields = {role: column for role, column in self.fields.items() if role != self.spec.response}
        return replace(self, fields=fields), [{k: v for k, v in row.items() if k != name} for row in rows]

    def any_answered(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a row has a response, if an empty one."""
        if self.spec.conversation is not None:
            given = [row.get(str(self.answer)) for row in rows]
            return any(self._unanswered(messages) is not messages for messages in given)
        return any(self.answer in row for row in rows)

    def without_missing(self, rows: Sequence[Mapping[str, Any]]) -> "Task":
        """The task of ``rows``, of which none may have a field that is not required."""
        there = {name for row in rows for name in row}
        kept = {role: name for role, name in self.fields.items() if role in self.spec.required or name in there}
        return replace(self, fields=kept)

    def row_of(self, text: str) -> dict[str, Any]:
        """A row of which ``text`` is all that the user says."""
        if self.spec.conversation is not None:
            return {self.fields[self.spec.conversation]: [{"role": "user", "content": text}]}
        first = self.spec.required[0] if self.spec.required else self.spec.asked[0]
        return {self.fields.get(first, first): text}

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

        A prompt over ``max_prompt`` tokens is cut at the end of the fields that may be cut, in the task's order (the
        input, then the instruction), so that the template stays whole; a conversation loses its oldest turns. A
        response that goes beyond ``max_length`` tokens in all is cut and gets no end token. A row without response has
        no targets. Raises DataError, naming the row, where a field is missing or not text, and where no row is usable.
        """
        if not 1 <= max_prompt < max_length:
            raise ConfigError(f"max_prompt={max_prompt} must be at least 1 and below max_length={max_length}")
        self._check_fields(rows, source)
        ids = [f"{source}:{i}" for i in range(len(rows))]
        if self.spec.conversation is None:
            made = self._made(rows, ids, tokenizer, max_prompt, end_id)
        else:
            made = [
                self._talk(row, i, tokenizer, max_prompt, max_length, end_id) for row, i in zip(rows, ids, strict=True)
            ]
        names = ("cut_prompts", "shortened", "cut_responses", "dropped", "empty_responses", "prompt_only")
        counts = dict.fromkeys(names, 0)
        examples: list[Example] = []
        for i, one in zip(ids, made, strict=True):
            response = one.response or []
            room = max_length - len(one.prompt)
            if one.empty:
                counts["empty_responses"] += 1
            elif not one.prompt:
                counts["dropped"] += 1
            else:
                counts["cut_prompts"] += one.cut
                counts["shortened"] += one.shortened
                counts["cut_responses"] += len(response) > room
                counts["prompt_only"] += one.response is None
                targets = (one.context or [False] * len(one.prompt)) + [True] * len(response[:room])
                examples.append(Example(i, one.prompt + response[:room], targets))
        report = LengthReport(len(rows), **counts)
        if not examples:
            raise DataError(f"{source}: no row is usable: {report} {self._advice(report)}")
        return examples, report

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_prompt: int, source: str
    ) -> dict[str, tuple[list[int], bool]]:
        """By row id the prompt and whether it was cut to ``max_prompt``; none where nothing of the user's text fits."""
        ids = [f"{source}:{i}" for i in range(len(rows))]
        return dict(zip(ids, self._prompts(rows, ids, tokenizer, max_prompt), strict=True))

    def _made(
        self,
        rows: Sequence[Mapping[str, Any]],
        ids: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt: int,
        end_id: int,
    ) -> list[_Made]:
        outputs = [self.references(row, row_id=i)[:1] for row, i in zip(rows, ids, strict=True)]
        prompts = self._prompts(rows, ids, tokenizer, max_prompt)
        responses = iter(encode_responses(tokenizer, [output[0] for output in outputs if output], end_id))
        return [
            _Made(prompt, next(responses) if output else None, empty=bool(output) and not output[0].strip(), cut=cut)
            for output, (prompt, cut) in zip(outputs, prompts, strict=True)
        ]

    def _talk(
        self,
        row: Mapping[str, Any],
        row_id: str,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt: int,
        max_length: int,
        end_id: int,
    ) -> _Made:
        self._need_template(tokenizer)
        messages = self._messages(row, row_id)
        answered = messages[-1]["role"] == "assistant"
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            return _Made([], None, empty=True)
        if not any(m["role"] == "user" and m["content"].strip() for m in messages):
            return _Made([], None)
        try:
            kept, left_out = Conversation(tokenizer, messages, end_id, row_id).fitting(max_prompt, max_length)
        except Unfit as error:
            raise self._refused(error) from error
        if kept is None:
            return _Made([], None)
        before = kept.segments[:-1] if answered else kept.segments
        # Without a last turn there is nothing to learn: a model is to write it.
        marks = [answered and said for ids, said in before for _ in ids]
        prompt = [token for ids, _ in before for token in ids]
        return _Made(prompt, kept.response if answered else None, shortened=left_out > 0, context=marks)

    def _prompts(
        self, rows: Sequence[Mapping[str, Any]], ids: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_prompt: int
    ) -> list[tuple[list[int], bool]]:
        """Each prompt's ids (none where nothing of the user's text fits) and whether it was cut."""
        contents = [self._content(row, i) for row, i in zip(rows, ids, strict=True)]
        texts = [self._render(row, text, tokenizer, i) for row, text, i in zip(rows, contents, ids, strict=True)]
        encoded = encode_prompts(tokenizer, texts, has_specials=self.chats)
        prompts: list[tuple[list[int], bool]] = []
        for row, content, prompt, i in zip(rows, contents, encoded, ids, strict=True):
            if self.spec.owns(self.template) and not any(text.strip() for text in content.values()):
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
            return encode_prompts(tokenizer, [text], has_specials=self.chats)[0]

        def fits(content: dict[str, str], role: str, text: str) -> bool:
            return len(encode({**content, role: text})) <= max_prompt

        for role in [role for role in self.spec.cut if role in content]:
            if fits(content, role, ""):
                kept = longest_fit(tokenizer, content[role], partial(fits, content, role), max_prompt)
                content = {**content, role: kept}
                return encode(content) if any(text.strip() for text in content.values()) else []
            content = {**content, role: ""}
        return []

    def _content(self, row: Mapping[str, Any], row_id: str) -> dict[str, str]:
        """The texts of the prompt by field: what may be cut."""
        content: dict[str, str] = {}
        for role in self.spec.asked:
            name = self.fields.get(role)
            value = None if name is None else row.get(name)
            if isinstance(value, str):
                content[role] = value
            elif value is not None:
                raise _not_text(row_id, str(name), value)
            elif role in self.spec.optional:
                content |= {} if name is None else {role: ""}
            elif self.spec.owns(self.template):
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
        spec, mine = self.spec, {**self.variables, **dict.fromkeys(self.spec.asked, ""), **content}
        if self.chats:
            said = "\n\n".join(text for text in content.values() if text.strip())
            text = said if spec.user is None else _rendered(spec.user, mine, row_id)
            return self._chat([*self._system(), {"role": "user", "content": text}], tokenizer, row_id)
        if spec.owns(self.template):
            return _rendered(spec.text_of(self.template), mine, row_id)
        named = {self.fields[role]: text for role, text in content.items() if role in self.fields}
        seen = {**row, **named, **self.variables, **content}
        learned = str(spec.response)
        for name in (learned, self.fields.get(learned, learned)):
            seen.pop(name, None)  # the response must not be in its own prompt
        return _rendered(self.template, seen, row_id)

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _chat(self, messages: list[Message], tokenizer: PreTrainedTokenizerBase | None, row_id: str) -> str:
        self._need_template(tokenizer)
        try:
            return render(cast(PreTrainedTokenizerBase, tokenizer), messages, ask=True, row_id=row_id)
        except Unfit as error:
            raise self._refused(error) from error

    def _need_template(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is None or not tokenizer.chat_template:
            raise DataError(f"the tokenizer has no chat template; {self._instead()}")

    def _instead(self) -> str:
        names = [*self.spec.templates]
        if self.spec.conversation is not None:
            return f"task {self.spec.name} needs one: put a chat_template.jinja that fits the model into its folder"
        return f"choose template: {names[0] if names else 'null'}, or write one in Jinja"

    def _refused(self, error: Unfit) -> DataError:
        return DataError(f"{error}; {self._instead()}" + ("" if self.system is None else ", or leave system out"))

    def _messages(self, row: Mapping[str, Any], row_id: str) -> list[Message]:
        """The conversation, after ``system`` where it has no system message of its own."""
        messages = messages_of(self._conversation(row, row_id), row_id)
        return messages if messages[0]["role"] == "system" else [*self._system(), *messages]

    def _conversation(self, row: Mapping[str, Any], row_id: str) -> Any:
        name = str(self.answer)
        if name not in row:
            raise DataError(
                f"{row_id}: the field '{name}' (for {self.spec.conversation}) is missing; the fields there are: "
                f"{listed(list(row))}; give its name in fields.{self.spec.conversation}"
            )
        return row[name]

    def _unanswered(self, given: Any) -> Any:
        """The messages as they were given, without the assistant's last turn: what is wrong in them is said later."""
        if not isinstance(given, list) or not given or not isinstance(given[-1], Mapping):
            return given
        last = given[-1].get("role", given[-1].get("from"))
        return given[:-1] if last in ("assistant", "gpt") and len(given) > 1 else given

    def _check_fields(self, rows: Sequence[Mapping[str, Any]], source: str) -> None:
        if not rows:
            raise DataError(f"{source}: there are no rows; give at least one")
        there = sorted({str(name) for row in rows for name in row})
        for role, name in self.fields.items():
            # The task's names may be absent (required ones are checked row by row); one that the user chose may not.
            if self.spec.fields[role] != name and name not in there:
                raise DataError(
                    f"{source}: no row has the field '{name}' (for {role}); the fields there are: {listed(there)}"
                    f"{near(name, there)}"
                )

    def _advice(self, report: LengthReport) -> str:
        if report.empty_responses == report.rows:
            return (
                f"Leave the {self.spec.response or 'last'} field out of the data if a model is to write the responses."
            )
        return "Raise max_prompt, or choose a shorter template."


def _rendered(template: str, seen: Mapping[str, Any], row_id: str) -> str:
    try:
        return rendered(template, seen)
    except Exception as error:  # a user's template can raise anything
        raise DataError(
            f"{row_id}: the template failed: {error}; the fields it can use are: {listed(sorted(map(str, seen)))}"
        ) from error


def _not_text(row_id: str, name: str, value: Any) -> DataError:
    return DataError(f"{row_id}: the field '{name}' is {value!r:.40}, not a text; write it as a text in the data")
