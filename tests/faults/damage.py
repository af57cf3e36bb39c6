"""Files changed behind a run's back: flipped, cut, zeroed, deleted and lengthened, as hypothesis draws it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from distillm import pipeline
from distillm.checkpoint import list_checkpoints
from distillm.errors import DistillmError
from distillm.pipeline import distill
from distillm.teacher_cache import entries
from faults.outcomes import AGAIN, ERROR, ERROR_THEN_SAME, SAME, WELL, WITHOUT, Ledger, Outcome
from tiny_run import Heard, figures, lines, materials, same_weights, scores, tiny_run, weights

SHORT = {"the newest checkpoint": 5, "the teacher cache": 3, "the responses": 4, "the run folder": 5, "the data": 4}
FULL = {"the newest checkpoint": 90, "every checkpoint": 30, "the teacher cache": 60, "the responses": 60}
FULL |= {"the run folder": 120, "the student": 20, "the data": 100}
QUICK: dict[str, Any] = {"evaluation.seeds": [1], "evaluation.compare": []}


@dataclass(frozen=True)
class Damage:
    """What is done to a file's bytes; places and lengths are parts of the whole."""

    kind: str
    at: float
    length: float
    noise: bytes

    def applied(self, content: bytes) -> bytes | None:
        """The bytes after it; None is no file at all."""
        first = int(self.at * len(content))
        last = min(len(content), first + max(1, int(self.length * len(content))))
        changed: dict[str, Callable[[], bytes | None]] = {
            "flip a bit": lambda: _overlaid(content, first, bytes([_at(content, first) ^ 1 << self.noise[0] % 8])),
            "overwrite": lambda: _overlaid(content, first, self.noise),
            "zero": lambda: content[:first] + bytes(last - first) + content[last:],
            "cut out": lambda: content[:first] + content[last:],
            "insert": lambda: content[:first] + self.noise + content[first:],
            "repeat": lambda: content[:last] + content[first:],
            "truncate": lambda: content[:first],
            "append": lambda: content + self.noise,
            "delete": lambda: None,
        }
        return changed[self.kind]()

    def __call__(self, path: Path) -> bool:
        """Damage ``path``; whether that changed anything."""
        before = path.read_bytes()
        after = self.applied(before)
        path.unlink()
        if after is not None:
            path.write_bytes(after)
        return after != before


def _at(content: bytes, place: int) -> int:
    return content[place] if content else 0


def _overlaid(content: bytes, place: int, noise: bytes) -> bytes:
    return content[:place] + noise[: len(content) - place] + content[place + len(noise) :]


KINDS = ["flip a bit", "overwrite", "zero", "cut out", "insert", "repeat", "truncate", "append", "delete"]
DAMAGES = st.builds(
    Damage,
    kind=st.sampled_from(KINDS),
    at=st.floats(0, 1, exclude_max=True),
    length=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    # Signs of JSON, CSV and YAML are as likely as any byte.
    noise=st.one_of(st.binary(min_size=1, max_size=12), st.text('{}[]",:-\n 0159.eu\\', min_size=1).map(str.encode)),
)


@dataclass
class Bench:
    """Runs to be damaged, and the one that nothing damaged."""

    folder: Path

    def __post_init__(self) -> None:
        self.made = materials(self.folder / "made")
        self.count = 0
        self.whole = distill(tiny_run(self.made, self.folder / "whole", QUICK))
        self.half = self.folder / "half"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, "_log_step", _stop_at(7, pipeline._log_step))
            distill(tiny_run(self.made, self.half, QUICK))
        assert [path.name for path in list_checkpoints(self.half / "checkpoints")] == ["step-00000004", "step-00000006"]
        self.cache = self.folder / "cache"
        self.filling = distill(tiny_run(self.made, self.folder / "filling", self.cached(self.cache)))
        self.written = distill(tiny_run(self.made, self.folder / "written", SEQKD))

    @staticmethod
    def cached(cache: Path) -> dict[str, Any]:
        """Settings of a run whose teacher's states are kept in ``cache``."""
        return QUICK | {"teacher.cache": "disk", "teacher.cache_folder": str(cache)}

    def copy(self, source: Path) -> Path:
        """A copy of ``source`` to be damaged; the one before is deleted."""
        shutil.rmtree(self.folder / f"copy-{self.count}", ignore_errors=True)
        self.count += 1
        return Path(shutil.copytree(source, self.folder / f"copy-{self.count}"))

    def resumed(self, folder: Path, changes: dict[str, Any] | None = None) -> list[str]:
        """Finish the run in ``folder`` by the command that began it; what it said."""
        display = Heard()
        distill(tiny_run(self.made, folder, (QUICK if changes is None else changes) | {"resume": "auto"}), display)
        assert (folder / "report.html").is_file()
        return display.said

    def finished(self, folder: Path, whole: Path | None = None) -> None:
        """The student and its scores are those of the undamaged run."""
        whole = self.whole if whole is None else whole
        assert same_weights(weights(folder), weights(whole))
        for name, result in scores(whole).items():
            assert scores(folder)[name] | {"model": ""} == result | {"model": ""}


SEQKD = QUICK | {"method": {"name": "seqkd"}, "data.text": None, "train.steps": 2, "validation.samples": 0}


def _stop_at(step: int, original: Callable[..., None]) -> Callable[..., None]:
    def stopping(project: Any, made: Any) -> None:
        if made.step == step:
            raise KeyboardInterrupt
        original(project, made)

    return stopping


def newest_checkpoint(bench: Bench, damage: Damage, which: int) -> Outcome:
    folder = bench.copy(bench.half)
    files = sorted(list_checkpoints(folder / "checkpoints")[-1].iterdir())
    changed = damage(files[which % len(files)])
    said = bench.resumed(folder)
    bench.finished(folder)
    assert figures(folder) == figures(bench.whole)
    noticed = any("is damaged" in text and "set aside" in text for text in said)
    assert noticed == changed
    return AGAIN if changed else SAME


def every_checkpoint(bench: Bench, damage: Damage, which: int) -> Outcome:
    folder = bench.copy(bench.half)
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        files = sorted(checkpoint.iterdir())
        if not damage(files[which % len(files)]):
            return SAME
    with pytest.raises(DistillmError, match="No whole checkpoint is left"):
        bench.resumed(folder)
    bench.resumed(folder)
    bench.finished(folder)
    return ERROR_THEN_SAME


def teacher_cache(bench: Bench, damage: Damage, which: int) -> Outcome:
    cache = bench.copy(bench.cache)
    files = sorted(cache.rglob("teacher.json")) + sorted(entry.path for entry in entries(cache))
    chosen = files[which % len(files)]
    whole = chosen.read_bytes()
    damage(chosen)
    run, said = cache.with_name("run"), Heard()
    distill(tiny_run(bench.made, run, bench.cached(cache) | {"overwrite": True}), said)
    bench.finished(run, bench.filling)
    assert figures(run) == figures(bench.filling)
    return AGAIN if any("is damaged" in text for text in said.said) or not damage_kept(chosen, whole) else SAME


def damage_kept(path: Path, whole: bytes) -> bool:
    """Whether ``path`` is still there, with other bytes or the old ones (a file of no consequence is left alone)."""
    return path.exists() and path.read_bytes() != whole


def responses(bench: Bench, damage: Damage, _: int) -> Outcome:
    kept = bench.copy(bench.written) / "responses.jsonl"
    damage(kept)
    run, changes = kept.parent / "run", SEQKD | {"data.responses_file": str(kept)}
    try:
        said = bench.resumed(run, changes)
    except DistillmError as error:
        assert str(kept) in str(error)
        assert "delete it" in str(error)
        kept.unlink()
        bench.resumed(run, changes)
        outcome = ERROR_THEN_SAME
    else:
        outcome = AGAIN if any("are damaged and are written again" in text for text in said) else SAME
    bench.finished(run, bench.written)
    tokens = [
        {entry["prompt"]: entry["tokens"] for entry in lines(path)[1:]} for path in (kept, bench.written / kept.name)
    ]
    assert tokens[0] == tokens[1]
    return outcome


def run_folder(bench: Bench, damage: Damage, which: int) -> Outcome:
    """The log, the samples, the scores or the settings of a run; the first two of an unfinished one."""
    name = ["metrics.jsonl", "samples.jsonl", "eval/numbers-student.json", "run.yaml", "metrics.jsonl"][which % 5]
    folder = bench.copy(bench.whole if "eval" in name or which % 2 else bench.half)
    finished = (folder / "student").exists()
    damage(folder / name)
    left = (folder / name).read_bytes().split(b"\n") if (folder / name).exists() else []
    outcome = SAME
    try:
        said = bench.resumed(folder)
    except DistillmError as error:
        assert str(folder / name) in str(error)
        (folder / name).unlink()
        said, outcome = bench.resumed(folder), ERROR_THEN_SAME
    assert same_weights(weights(folder), weights(bench.whole))
    assert (folder / "run.yaml").is_file()
    assert all(isinstance(result["scores"], dict) for result in scores(folder).values())
    if not name.endswith(".jsonl"):
        return outcome
    whole = (bench.whole if finished else bench.half) / name
    intact = {line for line in whole.read_bytes().split(b"\n")[:-1] if line in left and b'"step": 7' not in line}
    after = set((folder / name).read_bytes().split(b"\n")) if (folder / name).exists() else set[bytes]()
    assert intact <= after, "a line that could be read is gone"
    if name == "samples.jsonl":
        return outcome
    steps = [entry["step"] for entry in lines(folder / name, "step")]
    if set(range(1, 9)) <= set(steps):
        return SAME
    assert any("metrics.jsonl lacks" in text for text in said), said
    return WITHOUT


def student(bench: Bench, damage: Damage, which: int) -> Outcome:
    folder = bench.copy(bench.whole)
    files = sorted(path for path in (folder / "student").iterdir() if path.is_file())
    chosen = files[which % len(files)]
    changed, before = damage(chosen), (bench.whole / "student" / chosen.name).read_bytes()
    bench.resumed(folder)
    bench.finished(folder)
    assert chosen.read_bytes() == before
    return AGAIN if changed else SAME


def data(bench: Bench, damage: Damage, which: int) -> Outcome:
    """Other rows, or none: all that is asked for is an ordinary end."""
    made = bench.copy(bench.made)
    damage(made / ["train.jsonl", "valid.jsonl", "test.jsonl", "text.txt"][which % 4])
    changes = QUICK | {"train.steps": 1, "validation.samples": 0}
    try:
        distill(tiny_run(made, made / "run", changes))
    except DistillmError as error:
        assert 10 < len(str(error)) < 4000
        return ERROR
    return WELL


TARGETS: dict[str, Callable[[Bench, Damage, int], Outcome]] = {
    "the newest checkpoint": newest_checkpoint,
    "every checkpoint": every_checkpoint,
    "the teacher cache": teacher_cache,
    "the responses": responses,
    "the run folder": run_folder,
    "the student": student,
    "the data": data,
}


def damage(ledger: Ledger, folder: Path, counts: dict[str, int]) -> None:
    """Damage a file of each kind as often as ``counts`` says."""
    bench = Bench(folder)
    for name, count in counts.items():
        draws = examples(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        draws(given(DAMAGES, st.integers(0, 59))(_trial(ledger, bench, name)))()


def _trial(ledger: Ledger, bench: Bench, name: str) -> Callable[[Damage, int], None]:
    def tried(drawn: Damage, which: int) -> None:
        ledger.case(f"a damaged file of {name}", lambda: TARGETS[name](bench, drawn, which), f"{drawn}, {which}")

    return tried
