"""SIGKILL at random moments: of training, saving, caching, generating and scoring."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from distillm.checkpoint import check, list_checkpoints, step_of
from distillm.teacher_cache import entries
from faults.children import Child, Count, DieAt, distillm, on
from faults.outcomes import SAME, Ledger, Outcome
from tiny_run import assert_same_run, figures, lines, materials, rows, scores, settings, write_rows

SHORT = {"training with a cache on disk": 2}
FULL = {
    "training": 20,
    "saving": 20,
    "filling the cache": 12,
    "training with a cache on disk": 10,
    "generating the teacher's responses": 12,
    "generating responses of both models": 8,
    "scoring": 12,
    "scoring by distillm eval": 6,
}


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON Lines file, but for a last line that a kill has torn."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def assert_saved(folder: Path, whole: Path) -> None:
    """What a killed run had said is saved is there, and is that of the run that nothing stopped."""
    made = list_checkpoints(folder / "checkpoints")
    for checkpoint in made:
        check(checkpoint)
    newest = step_of(made[-1]) if made else 0
    told = whole_lines(folder / "metrics.jsonl")
    # This line is the log's word that a checkpoint of the step is there.
    assert max((entry["step"] for entry in told if entry["kind"] == "time"), default=0) <= newest
    if made:
        kept = [entry for entry in told if entry["kind"] in ("step", "validation") and entry["step"] <= newest]
        mine = [{k: v for k, v in entry.items() if k != "seconds"} for entry in kept]
        assert mine == [entry for entry in figures(whole) if entry["step"] <= newest]
        samples = [entry for entry in whole_lines(folder / "samples.jsonl") if entry["step"] <= newest]
        assert samples == [entry for entry in lines(whole / "samples.jsonl") if entry["step"] <= newest]
    if (folder / "eval").exists():
        expected = scores(whole)
        for name, found in scores(folder).items():
            assert found | {"model": ""} == expected[name] | {"model": ""}
    responses = whole_lines(folder / "responses.jsonl")
    assert responses == whole_lines(whole / "responses.jsonl")[: len(responses)]


def assert_cached(cache: Path, whole: Path) -> None:
    """Every file of states has a name only if it is whole, and holds what it does in ``whole``."""
    for entry in entries(cache):
        mine, theirs = load_file(entry.path), load_file(whole / entry.path.relative_to(cache))
        assert torch.equal(mine["states"], theirs["states"])


def times(kills: int) -> str:
    """How often a case was killed: a moment may come when the work has ended."""
    return ["had ended before", "killed once", "killed twice", "killed three times"][kills]


@dataclass
class Work:
    """A command that can be killed and given again; its files are below a folder that ``arguments`` is told."""

    fault: str
    arguments: Callable[[Path], Sequence[object]]
    watched: Callable[[Path], Sequence[Path]]
    kept: Callable[[Path, Path], None]
    same: Callable[[Path, Path], None]
    whole: Path = field(default_factory=Path)
    seconds: float = 0.0
    operations: int = 0

    def prepare(self, folder: Path) -> None:
        """Do the work once unharmed: what everything else is compared with, and how long it takes."""
        self.whole, counted = folder / "whole", folder / "operations"
        self.whole.mkdir(parents=True)
        distillm(folder / "log", "--version").well()  # the first child waits for all imports; the next one does not
        counting = Count(on(self.watched(self.whole)), counted)
        ended = distillm(folder / "log", *self.arguments(self.whole), prepare=[counting]).well()
        self.seconds, self.operations = ended.seconds, int(counted.read_text())

    def killed_and_done_again(self, folder: Path, draw: random.Random) -> tuple[Outcome, str]:
        """Killed at one to three random moments, looked at after each, then done to the end."""
        folder.mkdir(parents=True)
        log, arguments, kills = folder / "log", self.arguments(folder), 0
        for _ in range(draw.choice([1, 1, 2, 3])):
            if draw.random() < 0.5:
                moment = DieAt(on(self.watched(folder)), draw.randint(1, self.operations))
                ended = Child(log, *arguments, prepare=[moment]).wait()
            else:
                ended = Child(log, *arguments).kill_after(draw.uniform(0.05, 0.9 * self.seconds))
            # A second try has less to do, and may have ended before the moment came.
            assert ended.code in (0, -signal.SIGKILL), (ended.code, ended.said[-2000:])
            kills += ended.code != 0
            self.kept(folder, self.whole)
        ended = distillm(log, *arguments).well()
        assert "Traceback" not in ended.said
        self.same(folder, self.whole)
        return SAME, times(kills)


def works(made: Path) -> list[Work]:
    """Everything that is killed."""
    many = write_rows(made / "many.jsonl", rows(40, 50))
    student = made / "student"

    def train(**changes: Any) -> Callable[[Path], Sequence[object]]:
        def arguments(folder: Path) -> Sequence[object]:
            wanted = settings(made, folder / "run", {k.replace("__", "."): v for k, v in changes.items()})
            if changes.get("teacher__cache") == "disk":
                wanted["teacher"]["cache_folder"] = str(folder / "cache")
            (folder / "wanted.yaml").write_text(yaml.safe_dump(wanted), encoding="utf-8")
            return ["train", folder / "wanted.yaml", "resume=auto"]

        return arguments

    def warm(folder: Path) -> Sequence[object]:
        return ["cache", "warm", train(teacher__cache="disk", data__train=str(many))(folder)[1]]

    def evaluate(folder: Path) -> Sequence[object]:
        options = ["--data", made / "test.jsonl", "--output", folder / "scores.json", "--seeds", "1,2,3"]
        return ["eval", student, *options, "--template", "Q: {{ instruction }}\nA: ", "--max-new-tokens", 8]

    def run(folder: Path) -> list[Path]:
        return [folder / "run"]

    def saved(folder: Path, whole: Path) -> None:
        assert_saved(folder / "run", whole / "run")

    def same(folder: Path, whole: Path) -> None:
        assert_same_run(folder / "run", whole / "run")

    def cached(folder: Path, whole: Path) -> None:
        assert_cached(folder / "cache", whole / "cache")

    def all_cached(folder: Path, whole: Path) -> None:
        cached(folder, whole)
        assert len(list(entries(folder / "cache"))) == len(list(entries(whole / "cache"))) > 0

    def both(folder: Path, whole: Path) -> None:
        saved(folder, whole)
        cached(folder, whole)

    def scored(folder: Path, whole: Path) -> None:
        if (folder / "scores.json").exists():
            all_scored(folder, whole)

    def all_scored(folder: Path, whole: Path) -> None:
        mine, theirs = (json.loads((each / "scores.json").read_text()) for each in (folder, whole))
        assert mine | {"speed": 0} == theirs | {"speed": 0}

    writes = train(
        method={"name": "seqkd"}, data__train=str(many), data__text=None, generation__batch_size=1, train__steps=4
    )
    distillm2 = train(method={"name": "distillm2"}, data__text=None)
    seeds = train(train__steps=2, validation__every=2, evaluation__seeds=list(range(12)))
    places = ["checkpoints", "student"]
    return [
        Work("training", train(), run, saved, same),
        Work("saving", train(), lambda folder: [folder / "run" / name for name in places], saved, same),
        Work("filling the cache", warm, lambda folder: [folder / "cache"], cached, all_cached),
        Work("training with a cache on disk", train(teacher__cache="disk"), lambda f: [f / "run", f / "cache"], both,
             lambda folder, whole: (same(folder, whole), cached(folder, whole))[0]),
        Work("generating the teacher's responses", writes, run, saved, same),
        Work("generating responses of both models", distillm2, run, saved, same),
        Work("scoring", seeds, lambda folder: [folder / "run" / "eval"], saved, same),
        Work("scoring by distillm eval", evaluate, lambda folder: [folder], scored, all_scored),
    ]  # fmt: skip


def kill(ledger: Ledger, folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Kill each kind of work as often as ``counts`` says."""
    made = materials(folder / "made")
    for number, work in enumerate(works(made)):
        if work.fault not in counts:
            continue
        work.prepare(folder / f"work-{number}")
        for count in range(counts[work.fault]):
            draw = random.Random(f"{seed}/{work.fault}/{count}")
            place = folder / f"work-{number}" / f"case-{count}"
            ledger.case(
                f"SIGKILL while {work.fault}",
                lambda work=work, place=place, draw=draw: work.killed_and_done_again(place, draw),
                f"seed {seed}, case {count}",
            )


def kill_real(ledger: Ledger, folder: Path, count: int, seed: int = 0) -> None:
    """The same for processes that a shell would start, with all their imports."""
    made = materials(folder / "made")
    work = works(made)[0]
    work.prepare(folder / "work")

    def once(place: Path, draw: random.Random) -> tuple[Outcome, str]:
        place.mkdir()
        command = [sys.executable, "-m", "distillm", *map(str, work.arguments(place))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        log = place / "run" / "metrics.jsonl"
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not log.exists():  # how long imports take depends on what runs beside
                try:
                    process.wait(0.02)
                except subprocess.TimeoutExpired:
                    continue
            try:
                process.wait(draw.uniform(0, 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
        assert process.returncode in (0, -signal.SIGKILL), process.returncode
        work.kept(place, work.whole)
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        work.same(place, work.whole)
        return SAME, times(int(process.returncode != 0))

    for number in range(count):
        draw = random.Random(f"{seed}/real/{number}")
        place = folder / f"case-{number}"
        ledger.case(
            "SIGKILL of `python -m distillm train`", lambda place=place, draw=draw: once(place, draw), f"case {number}"
        )
