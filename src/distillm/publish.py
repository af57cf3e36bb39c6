"""A student goes to the hub: what would be uploaded is looked at first, and nothing but the model is. Without torch."""

import fnmatch
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .card import NAME, card_of, is_hub_name, write_card
from .errors import ConfigError, DataError, DistillmError, ModelError, ServerError
from .paths import home, is_dir, is_file
from .report.read import read_run

MODEL_FILES = (
    NAME, "config.json", "generation_config.json", "adapter_config.json", "*.safetensors",
    "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja", "LICENSE", "LICENSE.*", "NOTICE",
    "NOTICE.*",
)  # fmt: skip
"""What a model is made of; whatever else lies in a folder stays where it is."""
_ORIGINS = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}


@dataclass(frozen=True)
class Parcel:
    """What is to be uploaded: files of one folder by name, with their bytes, and what of it is left out."""

    folder: Path
    files: dict[str, int]
    left_out: list[str]
    notes: list[str]


def parcel_of(source: str) -> Parcel:
    """The student of a run folder, or a model folder, looked through; a run's student without a card gets one.

    Raises:
        DataError: there is no such folder, or the run has no student yet.
        ModelError: it is no model, or it names a place on this machine.
    """
    folder = home(source)
    if not is_dir(folder):
        raise DataError(f"{source} is no folder: give a run or a model folder")
    changed: list[str] = []
    if is_file(folder / "run.yaml"):
        run, folder = folder, folder / "student"
        if not is_dir(folder):
            raise DataError(f"{source} has no student yet: the run has not ended. Go on with it by resume=auto")
        changed = _brought_up(run, folder / NAME)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    kept = [entry for entry in entries if entry.is_file() and _is_models(entry.name) and _is_here(entry)]
    files = {entry.name: entry.stat().st_size for entry in kept}
    _check_is_model(folder, files)
    left_out = [_left_out(entry) for entry in entries if entry.name not in files]
    return Parcel(folder, files, left_out, changed + _notes(folder, files))


def _brought_up(run: Path, card: Path) -> list[str]:
    """Write a card where there is none; say where the one there is another than the run would have."""
    if not is_file(card):
        write_card(run)
    elif card.read_text(encoding="utf-8", errors="replace") != card_of(read_run(run)):
        said = "was edited, or scores were added since it was written; delete it to have it written anew"
        return [f"{NAME} is not what the run would write now: it {said}"]
    return []


def address_of(repository: str) -> str:
    """``repository`` if it is OWNER/NAME as the hub takes it. Raises ConfigError otherwise."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository}: the hub takes no such name ({error})") from error
    if "/" not in repository:
        raise ConfigError(f"{repository}: give OWNER/{repository}, where OWNER is your name on the hub, or a group's")
    return repository


def upload(parcel: Parcel, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload ``parcel``, to a repository that is made if there is none, and return its address.

    The token is huggingface_hub's own (``hf auth login``, ``HF_TOKEN``). ``revision`` is a branch, made if need be.

    Raises:
        ConfigError: nobody is logged in, the token has no right to do it, or the repository is public and
            ``private`` was asked for.
        DataError: the hub does not take the files.
        ServerError: the hub does not answer.
    """
    token = get_token()
    if token is None:
        raise ConfigError(
            "not logged in to the hub: run `hf auth login`, or give a token with write access in HF_TOKEN"
        )
    api = HfApi(token=token)
    with _explained(repository, token, api.endpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a card lacks, such as a licence, was said before
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ConfigError(f"{repository} is there already, and public; nothing was uploaded")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=parcel.folder,
            allow_patterns=list(parcel.files),
            revision=revision,
            commit_message="Upload a student made with distillm",
        )
    return f"{api.endpoint}/{repository}" + ("" if revision is None else f"/tree/{revision}")


def _is_models(name: str) -> bool:
    # Such signs mean something in the patterns that the uploading is told.
    return not set("*?[]") & set(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _is_here(entry: Path) -> bool:
    """Whether it is of its folder, or of the hub's cache, whose folders hold links: others may lead to any file."""
    folder, target = entry.parent.resolve(), entry.resolve()
    return target.is_relative_to(folder) or target.parent == folder.parent.parent / "blobs"


def _left_out(entry: Path) -> str:
    if not _is_here(entry):
        return f"{entry.name}, a link out of the folder"
    return entry.name + ("/" if entry.is_dir() else "")


def _check_is_model(folder: Path, files: dict[str, int]) -> None:
    described = "config.json" in files or "adapter_config.json" in files
    if not described or not any(name.endswith(".safetensors") for name in files):
        raise ModelError(
            f"{folder} is no model folder: config.json (or adapter_config.json) and weights as safetensors belong in "
            f"it; it holds {', '.join(list(files)[:8]) or 'none of the files of a model'}, links out of it aside"
        )
    for name, key in _ORIGINS.items():
        origin = _read(folder / name).get(key) if name in files else None
        if isinstance(origin, str) and origin and not is_hub_name(origin):
            raise ModelError(
                f"{folder / name} names a place on this machine ({key}: {origin}), which means nothing to others: "
                + ("give the base model's hub name there, or merge the adapter (student.lora.merge)"
                   if name == "adapter_config.json" else "take that line out")
            )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _notes(folder: Path, files: dict[str, int]) -> list[str]:
    if NAME not in files:
        return [f"there is no {NAME}: the hub will know nothing of the model"]
    try:
        card = ModelCard.load(folder / NAME)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(f"{folder / NAME}: its metadata cannot be read ({error})") from error
    return [] if card.data.get("license") else [f"{NAME} states no license; see its last section"]


@contextmanager
def _explained(repository: str, token: str, endpoint: str) -> Generator[None]:
    """Errors of the hub's client as errors that say what to do, the token taken out of them."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set: nothing can be uploaded. Unset it") from error
    except HfHubHTTPError as error:
        raise _refusal(error, repository, token, endpoint) from None
    except RuntimeError as error:  # a large file that did not go through
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refusal(error.__cause__, repository, token, endpoint) from None
        raise ServerError(
            f"the upload broke off ({_without(token, error)}). The same command begins it again"
        ) from None
    except (_no_answer(), ConnectionError, TimeoutError) as error:
        said = _without(token, error) or type(error).__name__
        raise ServerError(f"{endpoint} does not answer ({said}). The same command goes on when it does") from None
    except (ValueError, KeyError, OSError) as error:  # the hub does not take the card, or is no hub
        raise DataError(f"{repository}: {_without(token, error)}") from None


def _without(token: str, error: object) -> str:
    return str(error).replace(token, "...")


def _no_answer() -> type[Exception]:
    """The root of what the client raises where no answer comes: that of httpx, under whatever name it is used."""
    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _refusal(error: HfHubHTTPError, repository: str, token: str, endpoint: str) -> DistillmError:
    status = error.response.status_code
    said = _without(token, error.server_message or "").strip()
    reason = f" ({status}{f': {said}' if said else ''})"
    if status == 401:
        return ConfigError(
            f"{endpoint} does not accept the token{reason}: run `hf auth login` again, or give another one in HF_TOKEN"
        )
    if status == 403:
        return ConfigError(
            f"no right to write to {repository}{reason}: OWNER must be you or a group of yours, and the token needs "
            "write access"
        )
    if status == 404:
        return ConfigError(f"{endpoint} knows no {repository}, or does not show it to you{reason}")
    if status == 429 or status >= 500:
        return ServerError(f"{endpoint} cannot do it now{reason}. The same command goes on later")
    return DataError(f"{endpoint} does not take it{reason}")
