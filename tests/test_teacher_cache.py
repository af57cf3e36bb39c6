"""The teacher cache gives what the teacher says, bit for bit, whatever happens to its files."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from command_line import done, refused
from distillm.errors import StorageError
from distillm.kernels import logits
from distillm.models import fingerprint
from distillm.pipeline import distill
from distillm.scoring import Pair
from distillm.teacher_cache import Disk, Memory, Store, TeacherCache, content, entries, teachers
from distillm.types import Example, State
from kept_states import never, saying, states_of
from rows import row, teacher_of, text_row, tiny_pair, tokens
from tiny import tiny_causal
from tiny_run import lines, materials, rows, settings, tiny_run, weights, write_rows

STATE = State()
ROWS = [
    row(0, 5, 3),
    row(1, 2, 6, "student"),
    Example("chat", tokens(3, 8), [False, False, True, True, False, False, True, True]),
    row(2, 4, 4, teacher_context=tokens(8, 9)),
    text_row(0, 7),
]


def heard() -> tuple[list[str], Any]:
    said: list[str] = []
    return said, said.append


def disk(root: Path, limit: int = 2**30, note: Any = print) -> Disk:
    return Disk(root, "teacher", limit, note)


def cached(pair: Pair, store: Store | None, replayed: Store | None = None, batch_size: int = 1) -> Pair:
    return replace(pair, cache=TeacherCache("teacher", store, replayed or Memory(2**20), batch_size))


def said_by_teacher(pair: Pair, rows: Sequence[Example]) -> Tensor:
    """What its unembedding is fed: the logits of a row depend in their last bit on how many rows are multiplied."""
    head = pair.score(rows, STATE, with_teacher=True).teacher
    assert head is not None
    assert head.weight is not None
    return head.hidden


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5", "bart", "marian"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_kept_states_are_the_teachers_own_to_the_last_bit(tmp_path: Path, kind: str, where: str) -> None:
    rows = ROWS if kind in ("llama", "gemma2") else [ROWS[0], ROWS[1], ROWS[3]]
    plain = tiny_pair(kind, teacher_kind=kind)
    pair = cached(plain, Memory(2**20) if where == "memory" else disk(tmp_path))
    alone = torch.cat([said_by_teacher(plain, [r]) for r in rows])
    assert torch.equal(said_by_teacher(pair, rows), alone)
    teacher_of(pair).register_forward_pre_hook(never)
    assert torch.equal(said_by_teacher(pair, rows), alone)
    assert torch.equal(said_by_teacher(pair, rows[::-1]), torch.cat([said_by_teacher(pair, [r]) for r in rows[::-1]]))


def test_rows_read_in_batches_differ_by_rounding_alone(tmp_path: Path) -> None:
    plain = tiny_pair(dtype=torch.float32)
    pair = cached(plain, disk(tmp_path), batch_size=8)
    torch.testing.assert_close(said_by_teacher(pair, ROWS), said_by_teacher(plain, ROWS))


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("method", ["distillm", "gkd", "kd", "minillm", "distillm2"])
def test_a_run_with_the_cache_is_the_run_without_it(tmp_path: Path, where: str, method: str) -> None:
    # Read one row at a time, both ways: then the teacher's rounding does not depend on the rows beside it.
    made = materials(tmp_path)
    changes: dict[str, Any] = {"train.micro_batch_size": 1, "train.steps": 10, "method": {"name": method}}
    if method == "distillm":
        changes["method"] |= {"initial_probability": 0.7, "capacity": 6, "replay_ratio": "constant"}
    without = distill(tiny_run(made, tmp_path / "without", changes | {"teacher.cache": "off"}))
    changes |= {"teacher.cache": where, "teacher.cache_folder": str(tmp_path / "cache")}
    found = distill(tiny_run(made, tmp_path / "with", changes))
    assert all(torch.equal(a, weights(found)[name]) for name, a in weights(without).items())
    for kind in ("step", "validation"):
        left_out = ("seconds",)
        a, b = (
            [{k: v for k, v in e.items() if k not in left_out} for e in lines(f / "metrics.jsonl", kind)]
            for f in (without, found)
        )
        assert a == b
    assert any((tmp_path / "cache").rglob("*.safetensors")) == (where == "disk")


def test_a_second_run_has_the_teacher_read_nothing_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = materials(tmp_path)
    changes = {"method": {"name": "kd"}, "teacher.cache": "disk", "teacher.cache_folder": str(tmp_path / "cache")}
    first = distill(tiny_run(made, tmp_path / "first", changes))
    monkeypatch.setattr("distillm.teacher_cache.Disk.put", never)
    second = distill(tiny_run(made, tmp_path / "second", changes))
    assert all(torch.equal(a, weights(second)[name]) for name, a in weights(first).items())


def test_a_step_on_kept_rows_costs_the_teachers_unembedding_alone() -> None:
    pair = cached(tiny_pair(dtype=torch.float32), Memory(2**20))
    rows = [row(0, 5, 3), row(1, 7, 6)]

    def flops(with_teacher: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            scored = pair.score(rows, STATE, with_teacher=with_teacher)
            for head in (scored.student, scored.teacher):
                if head is not None:
                    logits(head)
        return counter.get_total_flops()

    cold, warm = flops(True), flops(True)
    weight = teacher_of(pair).get_output_embeddings()
    assert warm - flops(False) == 2 * 9 * pair.num_tokens * weight.weight.shape[1]
    assert cold > warm


# -------------------------------------------------------------------------------------------------------- identity


def test_states_belong_to_the_teacher_the_precision_the_tokens_and_the_targets() -> None:
    store = Memory(2**20)
    reads: list[str] = []

    def read(rows: Sequence[Example]) -> list[Tensor]:
        reads.extend(r.id for r in rows)
        return states_of(rows)

    example = row(0, 3, 4)
    cache = TeacherCache("one", store, store)
    cache.states([example], saying(read))
    cache.states([replace(example, id="other", born=9, origin="student")], saying(read))
    assert reads == ["row:0"]
    others = [
        replace(example, tokens=[*example.tokens[:-1], 5]),
        replace(example, targets=[False] * 4 + [True] * 3),
        replace(example, teacher_context=[7, 8]),
    ]
    cache.states(others, saying(read))
    TeacherCache("two", store, store).states([example], saying(read))
    with torch.autocast("cpu", torch.bfloat16):
        cache.states([example], saying(read))
    assert len(reads) == 6


def test_a_row_that_comes_twice_is_read_once_and_rows_read_but_once_are_not_kept() -> None:
    store, parts = Memory(2**20), []

    def read(rows: Sequence[Example]) -> list[Tensor]:
        parts.append([r.id for r in rows])
        return states_of(rows)

    cache = TeacherCache("one", store, None, 2, once=frozenset(content(row(i)) for i in (8, 9)))
    rows = [row(i) for i in (0, 1, 0, 2, 8, 9)] + [row(3, origin="student")]
    found = cache.states(rows, saying(read))
    assert parts == [["row:0", "row:1"], ["row:2"], ["row:8", "row:9", "row:3"]]
    assert all(torch.equal(a, b) for a, b in zip(found, states_of(rows), strict=True))
    assert len(store.held) == 3
    cache.states(rows, saying(read))
    assert parts[3:] == [["row:8", "row:9", "row:3"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_changed_weight_makes_another_teacher(dtype: torch.dtype) -> None:
    model = tiny_causal().to(dtype)
    first = fingerprint(model)
    parameters = list(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters:
        flat = parameter.data.view(-1)
        place = int(torch.randint(flat.numel(), (), generator=generator))
        kept = flat[place].clone()
        flat[place] = kept * 1.01 + 0.01
        assert fingerprint(model) != first, name
        flat[place] = kept
    flat = parameters[0][1].data.view(-1)
    flat[[3, 4]] = flat[[4, 3]]
    assert fingerprint(model) != first
    flat[[3, 4]] = flat[[4, 3]]
    assert fingerprint(model) == first


# ------------------------------------------------------------------------------------------------------ robustness


FILL = """
import sys, torch
from pathlib import Path
from distillm.teacher_cache import Disk, TeacherCache
from kept_states import row, saying, states_of
torch.set_num_threads(1)
cache = TeacherCache("teacher", Disk(Path(sys.argv[1]), "teacher", 2**30, print), None)
print("ready", flush=True)
sys.stdin.readline()
cache.states([row(i) for i in range(int(sys.argv[2]))], saying(states_of))
"""


def filling(root: Path, count: int) -> subprocess.Popen[str]:
    """A process that fills the cache at ``root`` when it is told to."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-c", FILL, str(root), str(count)], env={**os.environ, "PYTHONPATH": path}, **pipes
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_fill_one_cache_at_once(tmp_path: Path) -> None:
    both = [filling(tmp_path, 200) for _ in range(2)]
    for process in both:
        tell(process)
    assert [process.communicate()[0] for process in both] == ["", ""]
    rows = [row(i) for i in range(200)]
    found = TeacherCache("teacher", disk(tmp_path), None).states(rows, saying(never))
    assert all(torch.equal(a, b) for a, b in zip(found, states_of(rows), strict=True))
    assert len(list(entries(tmp_path))) == 200
    assert not list(tmp_path.rglob(".*"))


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read_wrongly(tmp_path: Path) -> None:
    process = filling(tmp_path, 5000)
    tell(process)
    while len(list(entries(tmp_path))) < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = len(list(entries(tmp_path)))
    assert 5 <= written < 5000
    said, note = heard()
    rows = [row(i) for i in range(written + 5)]
    found = TeacherCache("teacher", disk(tmp_path, note=note), None).states(rows, saying(states_of))
    assert all(torch.equal(a, b) for a, b in zip(found, states_of(rows), strict=True))
    assert said == []


@pytest.mark.parametrize("harm", ["flip", "tear", "empty", "foreign", "exchange"])
def test_a_damaged_file_is_told_and_made_again_never_read(tmp_path: Path, harm: str) -> None:
    said, note = heard()
    cache = TeacherCache("teacher", disk(tmp_path, note=note), None)
    rows = [row(0), row(1)]
    right = cache.states(rows, saying(states_of))
    one, other = sorted(entry.path for entry in entries(tmp_path))
    whole = one.read_bytes()
    places = range(len(whole)) if harm == "flip" else [0]
    for place in places:
        content = {
            "flip": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
            "tear": whole[:-3],
            "empty": b"",
            "foreign": b"something else",
            "exchange": other.read_bytes(),
        }[harm]
        one.write_bytes(content)
        again = cache.states(rows, saying(states_of))
        assert all(torch.equal(a, b) for a, b in zip(again, right, strict=True)), place
        assert load_file(one).keys() == {"states"}
    # A flipped bit of the header may spell the same header, such as another kind of white space.
    assert len(said) >= 0.9 * len(places)
    assert all("damaged" in message for message in said)


def test_a_file_of_the_same_shape_with_no_checksum_is_not_believed(tmp_path: Path) -> None:
    said, note = heard()
    cache = TeacherCache("teacher", disk(tmp_path, note=note), None)
    (right,) = cache.states([row(0)], saying(states_of))
    (entry,) = entries(tmp_path)
    save_file({"states": torch.zeros_like(right)}, entry.path)
    assert torch.equal(cache.states([row(0)], saying(states_of))[0], right)
    assert len(said) == 1


def test_a_file_of_another_type_with_the_same_bits_is_not_believed(tmp_path: Path) -> None:
    said, note = heard()
    cache = TeacherCache("teacher", disk(tmp_path, note=note), None)
    (right,) = cache.states([row(0)], saying(states_of))
    (entry,) = entries(tmp_path)
    entry.path.write_bytes(entry.path.read_bytes().replace(b'"F32"', b'"I32"'))
    (again,) = cache.states([row(0)], saying(states_of))
    assert again.dtype == right.dtype
    assert torch.equal(again, right)
    assert len(said) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_never_kept(tmp_path: Path, value: float) -> None:
    cache = TeacherCache("teacher", disk(tmp_path), None)
    (bad,) = cache.states([row(0)], saying(lambda rows: [states * value for states in states_of(rows)]))
    assert not bool(bad.isfinite().all())
    assert list(entries(tmp_path)) == []
    assert torch.equal(cache.states([row(0)], saying(states_of))[0], states_of([row(0)])[0])


FULL = """
import resource, sys, torch
from pathlib import Path
from distillm.teacher_cache import Disk, TeacherCache
from kept_states import row, saying, states_of
cache = TeacherCache("teacher", Disk(Path(sys.argv[1]), "teacher", 2**30, print), None)
cache.states([row(0)], saying(states_of))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # from here on no file can grow beyond 64 bytes
rows = [row(i) for i in range(9)]
found = cache.states(rows, saying(states_of))
assert all(torch.equal(a, b) for a, b in zip(found, states_of(rows), strict=True))
"""


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("takes nothing more") == 1
    assert len(list(entries(tmp_path))) == 1
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"teacher\.cache_folder"):
        disk(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------- bounds


def test_what_was_used_longest_ago_leaves_when_the_folder_is_full(tmp_path: Path) -> None:
    cache = TeacherCache("teacher", disk(tmp_path), None)
    cache.states([row(i) for i in range(20)], saying(states_of))
    sizes = [entry.size for entry in entries(tmp_path)]
    for number, entry in enumerate(sorted(entries(tmp_path), key=lambda e: e.used)):
        os.utime(entry.path, (number, number))
    oldest = sorted(entries(tmp_path), key=lambda e: e.used)
    full = sum(sizes)
    bounded = TeacherCache("teacher", disk(tmp_path, limit=full), None)
    bounded.states([row(i) for i in range(20)], saying(never))
    for number, entry in enumerate(oldest):
        os.utime(entry.path, (number, number))
    bounded.states([row(100)], saying(states_of))
    left = list(entries(tmp_path))
    assert sum(entry.size for entry in left) <= full
    gone = {entry.path for entry in oldest} - {entry.path for entry in left}
    assert gone == {entry.path for entry in oldest[: len(gone)]}
    assert 0 < len(gone) < 6


def test_memory_keeps_what_was_used_last_within_its_bound() -> None:
    memory = Memory(3 * 32)
    for name in "abc":
        memory.put(name, torch.zeros(4, 2))
    memory.get("a")
    memory.put("d", torch.zeros(4, 2))
    assert list(memory.held) == ["c", "a", "d"]
    assert memory.size == 3 * 32
    memory.put("large", torch.zeros(400, 2))
    assert memory.size <= 3 * 32


# ---------------------------------------------------------------------------------------------------- what auto does


def test_auto_says_in_one_line_where_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distillm import caching
    from distillm.project import build
    from test_resume import Heard

    made, built = materials(tmp_path), list[Any]()

    def chosen(**changes: Any) -> tuple[Any, list[str]]:
        display = Heard()
        run = tiny_run(made, tmp_path / "run", {"teacher.cache_folder": str(tmp_path / "cache"), **changes})
        built.append(build(run, display))
        return built[-1].models.pair.cache, [text for text in display.said if "teacher cache" in text]

    cache, said = chosen()
    assert isinstance(cache.lasting, Memory)
    assert len(said) == 1
    assert "in memory" in said[0]
    assert len(cache.once) == 3  # the test rows
    for size in (4, 5, 20):  # also where the last batch has fewer rows, or all have not enough for one
        changes = {"method": {"name": "kd"}, "train": {"epochs": 1, "batch_size": size}}
        cache, _ = chosen(**changes)
        assert len(cache.once) == 3 + 12  # and the rows of the only epoch
    assert cache.replayed is None
    (tmp_path / "other").mkdir()
    named = write_rows(tmp_path / "other" / "train.jsonl", rows(3, 40))  # whose ids are those of training rows
    cache, _ = chosen(**{"data.test": {"numbers": str(named)}})
    assert len(cache.once) == 3
    with_ids = [e for e in built[-1].train.examples if e.id in ("train:0", "train:1", "train:2")]
    assert len(with_ids) == 3
    assert not any(content(e) in cache.once for e in with_ids)
    free = caching.memory_for_states()
    monkeypatch.setattr(caching, "count_here", lambda: 8)
    assert caching.memory_for_states() < free / 4
    cache, _ = chosen(**{"teacher.cache": "off"})
    assert cache is None
    monkeypatch.setattr(caching, "MEMORY_SHARE", 0.0)
    cache, said = chosen()
    assert isinstance(cache.lasting, Disk)
    assert str(tmp_path / "cache") in said[0]
    cache, said = chosen(**{"teacher.cache_gib": 1e-9})
    assert cache is None
    assert "off" in said[0]


# ------------------------------------------------------------------------------------------------ the command line


def test_a_cache_is_filled_listed_used_and_cleared_by_command(tmp_path: Path) -> None:
    made = materials(tmp_path)
    cache = tmp_path / "cache"
    changes = {"teacher.cache_folder": str(cache), "train.mixed_precision": "bf16", "method": {"name": "kd"}}
    written = tmp_path / "run.yaml"
    written.write_text(json.dumps(settings(made, tmp_path / "run", changes)), encoding="utf-8")
    assert "nothing is kept" in done("cache", "--folder", cache)
    assert "19 rows are kept" in done("cache", "warm", written)
    assert not (tmp_path / "run" / "run.yaml").exists()
    (kept,) = teachers(cache)
    assert (kept.rows, kept.teacher) == (19, str(made / "teacher"))
    shown = done("cache", "--folder", cache)
    assert kept.name in shown
    assert str(kept.rows) in shown
    before = {entry.path: entry.path.stat().st_ino for entry in entries(cache)}
    done("train", written, "teacher.cache=disk")
    after = {entry.path: entry.path.stat().st_ino for entry in entries(cache)}
    assert before.items() <= after.items()
    assert len(after) == 19  # of the test rows, too
    assert "keeps nothing of other" in refused("cache", "clear", "--teacher", "other", "--folder", cache)
    (cache / kept.name / "mine.txt").write_text("not of the cache")
    done("cache", "clear", "--teacher", kept.name, "--folder", cache)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["mine.txt"]


def test_warming_needs_a_teacher(tmp_path: Path) -> None:
    made = materials(tmp_path)
    written = tmp_path / "run.yaml"
    found = settings(made, tmp_path / "run", {"method": {"name": "sft"}})
    del found["teacher"]
    written.write_text(json.dumps(found), encoding="utf-8")
    refused("cache", "warm", written)
