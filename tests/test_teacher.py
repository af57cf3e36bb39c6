"""The teacher's responses: written once, kept in portions, reused, and never mistaken for another teacher's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillm.errors import DataError, Interrupted, StorageError
from distillm.generation import Sampling
from distillm.teacher import Responses, Write
from distillm.types import Example, answer
from rows import prompts, row

SAMPLING = Sampling(8, temperature=0.0)


class Teacher:
    """Answers with the prompt reversed, and keeps what it was asked."""

    def __init__(self, fail_at: int | None = None):
        self.asked: list[list[str]] = []
        self.fail_at = fail_at

    def __call__(self, rows: Sequence[Example], _: Any) -> list[Example]:
        self.asked.append([r.id for r in rows])
        if self.fail_at == len(self.asked):
            raise Interrupted("stopped")
        return [answer(r, [*r.prompt[::-1], 1], "teacher") for r in rows]


def spelled(tokens: list[int]) -> str:
    return "é\u2028" + " ".join(map(str, tokens))


def responses(path: Path, write: Write, **changes: object) -> Responses:
    options: dict[str, object] = {"teacher": "models/big", "weights": "abc", "sampling": SAMPLING}
    options |= {"decode": spelled, "portion": 2}
    return Responses(path, write=write, **options | changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.jsonl"


ROWS = prompts(3, 5, 2, 4, 6)
ANSWERS = [answer(r, [*r.prompt[::-1], 1], "teacher") for r in ROWS]


def test_responses_are_written_once_and_then_read_from_the_file(path: Path) -> None:
    first, second = Teacher(), Teacher()
    asked = responses(path, first)
    assert asked(ROWS) == ANSWERS
    assert asked(ROWS[::-1]) == ANSWERS[::-1]
    assert first.asked == [["row:0", "row:1"], ["row:2", "row:3"], ["row:4"]]
    again = responses(path, second)
    assert again(ROWS) == ANSWERS
    assert second.asked == []
    assert again([*ROWS, row(9, 4, 0)])[-1].prompt == row(9, 4, 0).prompt
    assert second.asked == [["row:9"]]


def test_the_file_says_by_whom_and_how_and_can_be_read(path: Path) -> None:
    responses(path, Teacher())(ROWS)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert lines[0]["teacher"] == "models/big"
    assert lines[0]["decoding"] == {"max_new_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    assert [line["id"] for line in lines[1:]] == [r.id for r in ROWS]
    assert [line["tokens"] for line in lines[1:]] == [a.response for a in ANSWERS]
    assert lines[1]["response"] == spelled(ANSWERS[0].response)


def test_what_was_written_before_an_interrupt_is_kept(path: Path) -> None:
    stopped, later = Teacher(fail_at=2), Teacher()
    with pytest.raises(Interrupted):
        responses(path, stopped)(ROWS)
    assert responses(path, later)(ROWS) == ANSWERS
    assert later.asked == [["row:2", "row:3"], ["row:4"]]


@pytest.mark.parametrize("keep", ["header", "first row", "all but a character"])
def test_a_torn_last_line_is_written_again(path: Path, keep: str) -> None:
    responses(path, Teacher())(ROWS)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    # In the middle of a line, and once within the two bytes of a letter.
    cut = {"header": 9, "first row": whole.index("é".encode(), ends[1]) + 1, "all but a character": len(whole) - 1}[
        keep
    ]
    path.write_bytes(whole[:cut])
    missing = {"header": 5, "first row": 4, "all but a character": 1}[keep]
    later = Teacher()
    assert responses(path, later)(ROWS) == ANSWERS
    assert sum(map(len, later.asked)) == missing
    assert path.read_bytes() == whole


def test_an_empty_file_is_begun(path: Path) -> None:
    path.touch()
    assert responses(path, Teacher())(ROWS) == ANSWERS
    assert responses(path, Teacher(fail_at=1))(ROWS) == ANSWERS


def test_what_is_kept_on_the_way_outlives_a_failure(path: Path) -> None:
    def failing(rows: Sequence[Example], keep: Callable[[list[Example]], None]) -> list[Example]:
        keep([answer(rows[1], [7, 1], "teacher")])
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        responses(path, failing)(ROWS)
    teacher = Teacher()
    found = responses(path, teacher)(ROWS)
    assert found[1].response == [7, 1]
    assert [found[0], *found[2:]] == [ANSWERS[0], *ANSWERS[2:]]
    assert [name for rows in teacher.asked for name in rows] == ["row:0", "row:2", "row:3", "row:4"]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"teacher": "models/other", "weights": "def"}, "models/other (def)"),
        ({"weights": "def"}, "models/big (def)"),
        ({"sampling": replace(SAMPLING, temperature=1.0)}, "'temperature': 1.0"),
        ({"sampling": replace(SAMPLING, max_new_tokens=9)}, "'max_new_tokens': 9"),
    ],
    ids=["teacher", "weights", "temperature", "length"],
)
def test_the_responses_of_another_teacher_or_decoding_are_refused(
    path: Path, change: dict[str, object], shown: str
) -> None:
    responses(path, Teacher())(ROWS)
    kept = path.read_bytes()
    with pytest.raises(DataError) as raised:
        responses(path, Teacher(), **change)
    assert str(path) in str(raised.value)
    assert "models/big" in str(raised.value)
    assert shown in str(raised.value)
    assert "data.responses_file" in str(raised.value)
    assert path.read_bytes() == kept


def test_sampled_responses_are_of_a_seed_and_the_same_weights_may_lie_elsewhere(path: Path) -> None:
    sampled = {"sampling": replace(SAMPLING, temperature=1.0)}
    responses(path, Teacher(), **sampled, seed=1)(ROWS)
    again = Teacher()
    assert responses(path, again, **sampled, seed=1, teacher="copies/big")(ROWS) == ANSWERS
    assert again.asked == []
    with pytest.raises(DataError, match="seed 1"):
        responses(path, Teacher(), **sampled, seed=2)


@pytest.mark.parametrize(("old", "new"), [('"tokens": [', '"tokens": [3'), ("}", ""), ('"prompt"', '"prompf"')])
def test_a_damaged_response_is_told_and_it_alone_written_again(path: Path, old: str, new: str) -> None:
    responses(path, Teacher())(ROWS)
    before = path.read_text().split("\n")
    assert old in before[2]
    path.write_text("\n".join([*before[:2], before[2].replace(old, new), *before[3:]]))
    again, said = Teacher(), list[str]()
    assert responses(path, again, note=said.append)(ROWS) == ANSWERS
    assert again.asked == [["row:1"]]
    assert len(said) == 1
    assert "1 responses are damaged and are written again" in said[0]
    assert sorted(path.read_text().split("\n")) == sorted(before)


def test_responses_from_before_there_were_checksums_are_read(path: Path) -> None:
    responses(path, Teacher())(ROWS)
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "crc32"}) + "\n" for e in lines))
    later = Teacher()
    assert responses(path, later)(ROWS) == ANSWERS
    assert later.asked == []


@pytest.mark.parametrize(
    "text",
    ["not json\n", '{"teacher": "x"}\n{"prompt": "y"}\n', "[1, 2]\n", '{"a": 1}\n[3]\n', '{"instruction": "Hi"}\n'],
)
def test_another_kind_of_file_is_refused_and_left_alone(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match="delete it"):
        responses(path, Teacher())
    assert path.read_text() == text


@pytest.mark.parametrize("text", ['{"instruction": "Hi"}\n{"instruction": "Bye"}', '{"instruction": "Hi"}', "Hello"])
def test_another_kind_of_file_is_left_alone_even_without_a_last_newline(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match="delete it"):
        responses(path, Teacher())
    assert path.read_text() == text


def test_the_same_prompt_is_answered_once_whatever_interrupts(path: Path) -> None:
    twice = [replace(ROWS[i], id=f"row:{n}") for n, i in enumerate([0, 1, 0, 2, 1])]
    calls = list[str]()

    def sampled(rows: Sequence[Example], _: Any) -> list[Example]:
        calls.extend(r.id for r in rows)
        return [answer(r, [20 + int(r.id[4:]), 1], "teacher") for r in rows]

    whole = responses(path, sampled)(twice)
    assert calls == ["row:0", "row:1", "row:3"]
    assert [r.response[0] for r in whole] == [20, 21, 20, 23, 21]
    assert [r.id for r in whole] == [r.id for r in twice]
    assert responses(path, Teacher(fail_at=1))(twice) == whole


def test_prompts_are_told_apart_by_what_the_teacher_reads(path: Path) -> None:
    one, other = row(1, 4, 0, teacher_context=[5, 6]), row(1, 4, 0, teacher_context=[7])
    teacher = Teacher()
    asked = responses(path, teacher)
    assert [r.teacher_context for r in asked([one, other, row(1, 4, 0)])] == [[5, 6], [7], None]
    assert sum(map(len, teacher.asked)) == 3


def test_a_file_that_cannot_be_written_or_read_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not write"):
        responses(tmp_path / "file" / "responses.jsonl", Teacher())(ROWS)
    with pytest.raises(StorageError, match="could not read"):
        responses(tmp_path, Teacher())
