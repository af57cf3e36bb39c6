"""Data sets that are known by name: where they are, what their columns are called, and what task they are for."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from ..errors import ConfigError
from ..settings_text import load_yaml
from ..tasks import near

LANGUAGES = {
    "ar": "Arabic",
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "ro": "Romanian",
    "ru": "Russian",
    "zh": "Chinese",
}


class Known(BaseModel):
    """A data set as `known/datasets.yaml` describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    path: str | None
    configuration: str | None = None
    revision: str | None = None
    files: dict[str, str] = {}
    splits: dict[str, int | None]
    columns: dict[str, str]
    pairs: dict[str, str | None] = {}
    task: str | None
    min_words: int | None = None
    licence: str

    @model_validator(mode="after")
    def _fits_together(self) -> "Known":
        for pair in self.pairs:
            if not {*pair.split("-")} <= LANGUAGES.keys():
                raise ValueError(f"{pair}: a language without a name")
        if self.files and self.files.keys() != self.splits.keys():
            raise ValueError("each split needs its files")
        return self

    @property
    def pair(self) -> str | None:
        """The languages unless others are asked for, such as en-de."""
        return next(iter(self.pairs), None)

    def asked_pair(self, name: str | None) -> str | None:
        """The languages that ``name``, the configuration that was asked for, means. Raises ConfigError on others."""
        if name is None or name in self.pairs:
            return name or self.pair
        allowed = ", ".join(self.pairs)
        said = f"its pairs of languages are {allowed}{near(name, [*self.pairs])}" if allowed else "it has but one form"
        raise ConfigError(f"{self.name}: name={name!r} does not apply; {said}")

    def variables(self, name: str | None) -> dict[str, str]:
        """What templates see: the names of both languages, for a translation."""
        pair = self.asked_pair(name)
        if pair is None:
            return {}
        source, target = pair.split("-")
        return {"source_language": LANGUAGES[source], "target_language": LANGUAGES[target]}

    def columns_of(self, name: str | None) -> dict[str, str]:
        """The task's fields by their column on the hub."""
        source, _, target = (self.asked_pair(name) or "").partition("-")
        return {role: column.format(source=source, target=target) for role, column in self.columns.items()}


@cache
def known() -> dict[str, Known]:
    """Every known data set by name."""
    path = Path(str(resources.files("distillm"))) / "known" / "datasets.yaml"
    entries: dict[str, Any] = load_yaml(path.read_text(encoding="utf-8"))
    return {name: Known.model_validate({"name": name, **entry}) for name, entry in entries.items()}
