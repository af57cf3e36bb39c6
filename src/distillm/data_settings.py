"""The settings of the data: where the rows are, and how they are read. Never imports torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from .client import secrets_in
from .known import Known, known
from .method_settings import NonNegativeFloat, Number, PositiveFloat, PositiveInt, Section
from .paths import FILE_NAME, is_file
from .tasks import TaskSpec, is_jinja, load_task, near

HELD_OUT = "held_out"
"""The test set that is held out of the training rows."""


class Source(Section):
    """Rows by what holds them and, where that has several parts, which one."""

    model_config = ConfigDict(frozen=True)

    path: str
    """JSON Lines, CSV or Parquet file, saved dataset folder, a data set's name (`distillm datasets`) or `datasets`
    name."""
    split: str | None = None
    """The split of a folder or data set."""
    name: str | None = None
    """The configuration of a `datasets` name; of a known translation its languages, such as de-en."""

    def __str__(self) -> str:
        parts = {"configuration": self.name, "split": self.split}
        return ", ".join([self.path, *(f"{what} {part}" for what, part in parts.items() if part is not None)])


class CompletionsServer(Section):
    """A server that speaks OpenAI's completions."""

    url: str
    """Its address, which usually ends in /v1."""
    model: str
    """The model's name there."""
    key_env: str | None = None
    """The environment variable that has the key, where the server wants one."""
    jobs: PositiveInt = 16
    """Prompts asked at a time."""
    timeout: PositiveFloat = 600.0
    """Seconds after which a request is made again."""
    attempts: PositiveInt = 6
    """Requests made for one answer at most."""
    body: dict[str, Any] = {}
    """Further fields of a request; null leaves one out."""

    @model_validator(mode="after")
    def _holds_no_secret(self) -> "CompletionsServer":
        if found := secrets_in(self.url, self.body):  # all settings are written into the run folder
            raise ValueError(f"{found} belongs into an environment variable; name that in key_env")
        return self


class ResponsesServer(CompletionsServer):
    """A server that runs the teacher, or a model with its tokenizer, and writes responses."""

    prompt: Literal["tokens", "text"] = "tokens"
    """How prompts travel: as tokens, which is exact, or as text that the server tokenises (`transformers serve`)."""

    @model_validator(mode="after")
    def _asks_what_is_read(self) -> "ResponsesServer":
        fixed = [name for name in self.body if name in ("model", "prompt", "stream", "n", "best_of", "echo")]
        fixed += [n for n in ("max_tokens", "temperature", "top_p", "top_k", "seed") if self.body.get(n) is not None]
        if fixed:
            raise ValueError(f"body: {fixed[0]} cannot be set there; generation.* and responses_temperature say it")
        return self

    @property
    def name(self) -> str:
        """All that the responses depend on beside prompts and decoding; the same model may be served elsewhere."""
        return f"{self.model}, asked by {self.prompt}{f' with {self.body}' if self.body else ''}"


class Data(Section):
    """Where the rows are and how they are read."""

    train: str | Source
    """JSON Lines, CSV or Parquet file, saved dataset folder, the name of a data set that `distillm datasets` lists (its
    split is the one that fits: train, validation, test), or `datasets` name; or {path, split, name} of a folder or data
    set, where it holds several parts."""
    validation: str | Source | None = None
    """Rows for validation, named as in `train`; unset holds `validation_size` rows of `train` out."""
    validation_size: PositiveInt = 100
    """How many rows validation uses at most."""
    test: dict[str, str | Source] = {}
    """Rows scored at the end, by a name of your choice: {dolly: data/dolly/test.jsonl, other: {path: p, split: s}}."""
    test_size: PositiveInt | None = None
    """Hold so many rows of `train` out (a fifth at most), and score them at the end as the test set held_out."""
    limit: PositiveInt | None = None
    """Use only the first rows of `train`."""
    task: str = ""
    """What the rows are for: instruction, summarization, translation, chat, or a YAML file of your own (docs/tasks.md).
    Unset, that of the known data set in `train`, else instruction."""
    variables: dict[str, str] = {}
    """What the task's templates see besides the row's fields: {target_language: French}. A known translation brings its
    languages."""
    folder: str = "."
    """Where known data sets may lie, as NAME/train.jsonl and so on; those that are not there come from the hub."""
    template: str | None = None
    """A name that the task knows (`alpaca` for instruction), `chat` (the tokenizer's own chat template around what the
    user says), or a Jinja template that sees the row's fields and the variables; the task's own unless set."""
    system: str | None = None
    """A system message, with the chat template."""
    teacher_system: str | None = None
    """A system message that only the teacher reads, in place of `system`; for the template `chat`."""
    teacher_template: str | None = None
    """A template for what the teacher reads, where it is to see more than the student; like `template`."""
    fields: dict[str, str] = {}
    """Your names for the task's fields: {instruction: question, output: answer}. Known data sets need none."""
    max_prompt: PositiveInt = 256
    """Longest prompt in tokens; a longer one is cut inside its text, so that the template stays whole, or loses its
    oldest turns."""
    max_length: PositiveInt = 512
    """Longest prompt and response of the data together, in tokens; generation.max_new_tokens bounds what a model
    writes."""
    responses: Literal["dataset", "teacher"] = "dataset"
    """Who wrote the responses: the dataset, or the teacher (once, before training). Test rows keep their own."""
    responses_file: str | None = None
    """Where the teacher's responses are kept; responses.jsonl in the run folder unless set. Reused if it is there."""
    responses_temperature: NonNegativeFloat = 0.0
    """How the teacher writes them; 0 is greedy."""
    responses_server: ResponsesServer | None = None
    """Have them written by a server: {url: http://127.0.0.1:8000/v1, model: NAME}. Fine-tuning on them then needs no
    `teacher`."""
    text: str | Source | None = None
    """A plain-text corpus for the language-model loss: .txt, or anything `train` may be, with a field `text`."""
    text_length: Annotated[int, Field(ge=2), Number] = 512
    """Tokens per row of plain text."""
    text_weight: NonNegativeFloat = 1.0
    """Weight of the language-model loss on plain text."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Data":
        if self.max_prompt >= self.max_length:
            raise ValueError(f"max_prompt ({self.max_prompt}) must be below max_length ({self.max_length})")
        train = self.known_in(self.train)
        if not self.task:
            self.task = (train and train.task) or "instruction"
        spec = self.spec
        self.variables = self.languages_of(self.train) | self.variables
        unknown = sorted(self.fields.keys() - spec.fields.keys())
        if unknown:
            raise ValueError(f"fields: {unknown[0]} is not a field of the task ({', '.join(spec.fields)})")
        if spec.conversation is not None and (self.teacher_system or self.teacher_template):
            key = "teacher_system" if self.teacher_system else "teacher_template"
            raise ValueError(f"{key}: in a chat the teacher reads what the student reads; leave it out")
        unknown = sorted(self.variables.keys() - spec.variables.keys())
        own = self.template is not None and is_jinja(self.template) and not spec.owns(self.template)
        if unknown and not own:  # a template of the user's may see more
            allowed = [*spec.variables]
            said = f"its variables are {', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"variables: {unknown[0]} is not one of the task; {said}{near(unknown[0], allowed)}")
        if self.test_size is not None and HELD_OUT in self.test:
            raise ValueError(f"test: {HELD_OUT} is the name of what test_size holds out; choose another")
        for name in self.test:
            if not re.fullmatch(FILE_NAME, name):
                raise ValueError(
                    f"test: {name!r:.120} cannot name a file of scores; use at most 100 letters, digits and _ - . (no "
                    "sign but _ first)"
                )
        return self

    @property
    def spec(self) -> TaskSpec:
        """The task that the rows are for. Raises ConfigError where there is none of that name."""
        return load_task(self.task)

    @property
    def prompt(self) -> str:
        """The template that is used: the one that was asked for, or the task's own."""
        return self.template or self.spec.template

    def known_in(self, given: "str | Source | None") -> Known | None:
        """The known data set that ``given`` names, unless a file lies there."""
        path = None if given is None else part(given).path
        return None if path is None or is_file(Path(path)) else known().get(path)

    def languages_of(self, given: "str | Source") -> dict[str, str]:
        """Those of the task's variables that the known data set in ``given`` brings."""
        entry = self.known_in(given)
        brought = {} if entry is None else entry.variables(part(given).name)
        return {name: value for name, value in brought.items() if name in self.spec.variables}


def part(given: str | Source) -> Source:
    """A source in full, of which a text is the path."""
    return Source(path=given) if isinstance(given, str) else given
