"""A teacher of which only what was kept is here: its states in the cache, and beside them what makes heads of those.

``keep`` writes that beside a teacher's states; ``KeptTeacher`` reads it where the teacher itself is not.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import ConfigError, StorageError
from .models import load_tokenizer
from .readers import LocalTeacher
from .teacher_cache import HEAD
from .types import Example, Head, Layout
from .writing import flush, replacing, write_text


def keep(folder: Path, teacher: LocalTeacher, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    """Write all that a run without ``teacher`` needs beside its states to ``folder``, unless it is there.

    Raises:
        ConfigError: its logits are formed whole, so that there are no states.
        StorageError: writing failed.
    """
    if not teacher.keeps:
        raise ConfigError("this teacher's states are not kept: its logits are formed whole")
    about = folder / HEAD / "head.json"
    if about.exists():
        return
    head = teacher.head(torch.empty(0))
    assert head.weight is not None
    weights = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    saved = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    said: dict[str, Any] = {"sha256": hashlib.sha256(saved).hexdigest()}
    said |= {"scale": head.scale, "softcap": head.softcap, "layout": teacher.layout, "end_ids": list(ends)}
    try:
        about.parent.mkdir(exist_ok=True)
        tokenizer.save_pretrained(about.parent)
        with replacing(about.parent / "head.safetensors") as scratch:
            scratch.write_bytes(saved)
            flush(scratch)
        write_text(about, json.dumps(said))  # last: where it is, the others are
    except (OSError, SafetensorError) as error:
        raise StorageError(f"could not write {about.parent}: {error}") from error


class KeptTeacher:
    """A teacher that reads nothing more: what it said of each row is in the cache, or missing."""

    keeps, packed, joint = True, True, False

    def __init__(self, root: Path, name: str, device: torch.device):
        """Raises ConfigError where ``root`` keeps no such teacher, or its states alone."""
        self.root, self.name = root, name
        folder = root / name / HEAD
        if not (folder / "head.json").is_file():
            there = sorted(path.parent.parent.name for path in root.glob(f"*/{HEAD}/head.json"))
            raise ConfigError(
                f"teacher.cached={name}: {root} keeps no such teacher that can do without its model (it keeps "
                f"{', '.join(there) or 'none'}). Where the model is, run: distillm cache warm run.yaml; then copy "
                "the folder, and name it by teacher.cache_folder"
            )
        try:
            about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
            found = (folder / "head.safetensors").read_bytes()
            if hashlib.sha256(found).hexdigest() != about["sha256"]:
                raise ValueError("head.safetensors is not as it was written")
            weights = load(found)
            pad_id, start, close = about["layout"]
            self.layout = Layout(pad_id, tuple(start), tuple(close))
            self.end_ids: tuple[int, ...] = tuple(about["end_ids"])
            head: Any = weights["weight"], weights.get("bias"), about["scale"], about["softcap"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise StorageError(f"{folder} is damaged ({error}): copy it again from where the teacher is") from error
        weight, bias, scale, softcap = head
        bias = None if bias is None else bias.to(device)
        self._head = Head(torch.empty(0, device=device), weight.to(device), bias, scale, softcap)
        self.tokenizer = load_tokenizer(folder)

    @property
    def vocabulary(self) -> int:
        """The entries of its head."""
        assert self._head.weight is not None
        return len(self._head.weight)

    def states(self, rows: Sequence[Example]) -> Sequence[Tensor]:
        """Raises ConfigError: nobody is here who could read ``rows``."""
        raise ConfigError(missing(self.root, [row.id for row in rows]))

    def head(self, states: Tensor) -> Head:
        """As in ``Teacher``."""
        return self._head._replace(hidden=states)

    def lend(self) -> None:
        """As in ``Teacher``: never asked for."""


def missing(root: Path, ids: Sequence[str]) -> str:
    """What is said where a teacher that is not here was to read rows."""
    shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
    return (
        f"{root} has nothing of {shown}, and teacher.cached means that the teacher itself is not here. Run `distillm "
        "cache warm` where it is, with the same data settings and train.mixed_precision, and copy the folder again"
    )
