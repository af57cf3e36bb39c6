"""Everything a run needs to continue, in safetensors and JSON, each checkpoint there whole or not at all."""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import StorageError, TrainingError
from .processes import by_first, rank, together
from .sharding import gathered, like
from .sources import ReplayBuffer
from .types import Example, State
from .writing import flush

_NAME = re.compile(r"step-(\d{8})")
CHECKSUMS = "checksums.json"
DAMAGED = "damaged-"


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that ``checkpoint`` was made after."""
    return int(checkpoint.name.removeprefix("step-"))


def check(checkpoint: Path) -> None:
    """Compare every file of ``checkpoint`` with the checksum that was written with it.

    Raises:
        StorageError: one is missing or has changed.
    """
    with _whole(checkpoint):
        wanted = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        found = _checksums(checkpoint)
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            raise ValueError(f"{', '.join(odd)} is not as it was written")


def _checksums(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that is as it was written, and what is wrong with those that are not.

    Those are set aside as ``damaged-step-N``.
    """
    said: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            check(checkpoint)
        except StorageError as error:
            aside = checkpoint.with_name(DAMAGED + checkpoint.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            said.append(f"{error} It is set aside as {aside.name}.")
        else:
            return checkpoint, said
    return None, said


def remove(folder: Path) -> None:
    """Delete ``folder`` so that a kill on the way leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.gone")  # which, unlike .old, never comes back
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete the scratch of killed processes in ``folder``; what was set aside goes back if nothing took its place."""
    for path in folder.glob(".*.old"):
        target = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if not target.exists():
            os.replace(path, target)
    for path in [each for kind in ("partial", "old", "gone") for each in folder.glob(f".*.{kind}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def written_aside(target: Path) -> Generator[Path]:
    """A scratch folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Raises:
        StorageError: writing failed, as on a full disk; what stood at ``target`` before is untouched.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in scratch.rglob("*"):
            flush(path)
        if target.exists():
            os.replace(target, old)
        os.replace(scratch, target)
        flush(target.parent)
    except Exception as error:
        # A full disk is an Exception without a type of its own to the tokenizers package, with the system's words.
        if not (isinstance(error, OSError | SafetensorError) or "(os error " in str(error)):
            raise
        raise StorageError(f"could not write {target}: {error}. Nothing that was saved before is lost.") from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def save_checkpoint(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: State, buffer: ReplayBuffer, extra: Any
) -> Path:
    """Write ``folder/step-N``. ``extra`` is JSON that the caller gets back from ``load_checkpoint``.

    Of several processes the first one writes, with the generators of all; none goes on before it has.

    Raises:
        StorageError: it could not be written.
        TrainingError: a weight, or one of AdamW's averages, is not finite: no run can go on from there.
    """
    target, everyone = folder / f"step-{state.step:08d}", together(_generators)
    generators = {
        f"{number}:{name}" if number else name: x for number, own in enumerate(everyone) for name, x in own.items()
    }

    weights, moments = gathered(student_tensors(student)), gathered(_moments(optimizer))
    learned = {name for name, _ in student.named_parameters()}  # a constant beside them may be infinite

    def write() -> None:
        parameters = {name: each for name, each in weights.items() if name in learned}
        for what, tensors in {"the student's weights": parameters, "the optimizer's averages": moments}.items():
            odd = next((name for name, each in tensors.items() if not bool(each.isfinite().all())), None)
            if odd is not None:
                raise TrainingError(
                    f"step {state.step}: {what} are no longer finite ({odd}), so no checkpoint was written.\n"
                    "Try a lower optim.lr, or train in float32."
                )
        with written_aside(target) as scratch:
            save_file(weights, scratch / "student.safetensors")
            save_file(moments, scratch / "optimizer.safetensors")
            save_file(generators, scratch / "generators.safetensors")
            saved = {
                "state": asdict(state),
                "python_random": random.getstate(),
                "numpy_random": _numpy_position(),
                "buffer": [asdict(row) for row in buffer.rows],
                "ahead": {step: [asdict(row) for row in rows] for step, rows in buffer.ahead.items()},
                "threads": torch.get_num_threads(),
                "processes": len(everyone),
                "extra": extra,
            }
            (scratch / "state.json").write_text(json.dumps(saved), encoding="utf-8")
            (scratch / CHECKSUMS).write_text(json.dumps(_checksums(scratch)), encoding="utf-8")

    by_first(write)
    return target


def load_checkpoint(
    checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: State, buffer: ReplayBuffer
) -> dict[str, Any]:
    """Put everything back as it was when ``checkpoint`` was made; returns ``extra``, and how many threads and processes
    there were. A process that was not there keeps its own generators.

    Raises:
        StorageError: a file of the checkpoint is missing or damaged.
    """
    check(checkpoint)
    with _whole(checkpoint):
        saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        moments = load_file(checkpoint / "optimizer.safetensors")
        generators = load_file(checkpoint / "generators.safetensors")
        _load_student(student, checkpoint)
        _restore_moments(optimizer, moments)
        for name in ("step", "total_steps", "validation", "observed"):
            setattr(state, name, saved["state"][name])
        buffer.rows.clear()
        buffer.rows.extend(Example(**row) for row in saved["buffer"])
        buffer.ahead.clear()
        buffer.ahead.update(
            {int(step): [Example(**row) for row in rows] for step, rows in saved.get("ahead", {}).items()}
        )
        version, internal, gauss = saved["python_random"]
        random.setstate((version, tuple(internal), gauss))
        _restore_generators(generators, saved["numpy_random"])
        return {name: saved[name] for name in ("extra", "threads", "processes")}


def load_student(student: nn.Module, checkpoint: Path) -> None:
    """Load only the weights of ``checkpoint``.

    Raises:
        StorageError: they are missing or damaged, or of another model.
    """
    check(checkpoint)
    _load_student(student, checkpoint)


def _load_student(student: nn.Module, checkpoint: Path) -> None:
    with _whole(checkpoint):
        tensors = load_file(checkpoint / "student.safetensors")
    own = student_tensors(student)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise StorageError(
            f"{checkpoint} is of another model: {odd} has the shape {found.get(odd, 'of nothing')} there and "
            f"{wanted.get(odd, 'of nothing')} here. Give the student it was made with, or choose another output"
        )
    student.load_state_dict({name: like(tensor, own[name]) for name, tensor in tensors.items()}, strict=False)


@contextmanager
def _whole(checkpoint: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"{checkpoint} is damaged ({type(error).__name__}: {error}).") from error


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """What is saved of ``student`` by name, each tensor once; of several processes each has its part."""
    # Of a model with an adapter only what is trained: the rest is where it came from.
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    whole = all(parameter.requires_grad for parameter in student.parameters())
    # Tied weights are one tensor under two names, which safetensors refuses: the first name keeps it.
    names = [{name for name, _ in student.named_parameters(remove_duplicate=once)} for once in (True, False)]
    tied = names[1] - names[0]
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if (whole or name in trained) and name not in tied
    }


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    saved = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value.contiguous() for i, entry in saved.items() for key, value in entry.items()}


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        own = parameters[int(index)]
        entries.setdefault(int(index), {})[key] = like(value, own) if value.shape == own.shape else value
    # The groups stay those of the settings, so that a changed weight decay is in force after a resume.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda/{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    keys = cast(np.ndarray, np.random.get_state(legacy=False)["state"]["key"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    return states | {"numpy": torch.from_numpy(keys.astype(np.int64))}


def _numpy_position() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    return {"pos": int(state["state"]["pos"]), "has_gauss": state["has_gauss"], "gauss": state["gauss"]}


def _restore_generators(everyone: dict[str, Tensor], numpy_position: dict[str, Any]) -> None:
    prefix = f"{rank()}:" if rank() else ""
    tensors = {name.removeprefix(prefix): value for name, value in everyone.items() if name.startswith(prefix)}
    if "cpu" not in tensors:
        return
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda/{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy_position["pos"], numpy_position["has_gauss"], numpy_position["gauss"]))
