"""A part of `make faults`, small enough for every day: the same functions, fewer cases."""

from pathlib import Path

import pytest

from faults import damage, disks, kills, not_finite, ranks, servers
from faults.outcomes import AGAIN, ERROR, ERROR_THEN_SAME, IMPOSSIBLE, LOST, SAME, ImpossibleHereError, Ledger

SEED = 1


@pytest.fixture(name="ledger")
def _ledger() -> Ledger:
    return Ledger()


def test_nothing_is_lost_by_a_kill(ledger: Ledger, tmp_path: Path) -> None:
    kills.kill(ledger, tmp_path, kills.SHORT, SEED)
    assert ledger.losses == []
    assert ledger.tried == sum(kills.SHORT.values())


def test_nothing_is_lost_by_a_bad_disk(ledger: Ledger, tmp_path: Path) -> None:
    disks.spoil_disks(ledger, tmp_path, disks.SHORT, disks.SHORT_HARMED, SEED)
    assert ledger.losses == []
    assert ledger.of([ERROR_THEN_SAME]) >= 1, "at least the limit on files needs no permission"


def test_damage_is_noticed_or_does_no_harm(ledger: Ledger, tmp_path: Path) -> None:
    damage.damage(ledger, tmp_path, damage.SHORT)
    assert ledger.losses == []
    assert ledger.tried >= 20
    assert ledger.of([AGAIN, ERROR_THEN_SAME]) >= 6


def test_no_number_that_is_not_finite_is_saved(ledger: Ledger, tmp_path: Path) -> None:
    not_finite.spoil_numbers(ledger, tmp_path, not_finite.SHORT, SEED)
    assert ledger.losses == []
    assert ledger.of([ERROR_THEN_SAME]) >= 7


def test_a_process_that_dies_is_told_by_the_other(ledger: Ledger, tmp_path: Path) -> None:
    ranks.disturb(ledger, tmp_path, ranks.SHORT, SEED)
    assert ledger.losses == []
    assert ledger.tried == 1


def test_no_answer_is_asked_for_twice(ledger: Ledger, tmp_path: Path) -> None:
    pytest.importorskip("httpx", reason="needs the package httpx, of the extras server and dev")
    servers.trouble(ledger, tmp_path, servers.SHORT, SEED)
    assert ledger.losses == []
    assert ledger.tried == sum(servers.SHORT.values())


def test_the_ledger_counts_what_it_is_told_and_takes_any_exception_for_a_loss() -> None:
    ledger = Ledger()

    def breaks() -> None:
        raise KeyError("gone")

    def impossible() -> None:
        raise ImpossibleHereError("no")

    ledger.case("a", lambda: (SAME, "here"))
    ledger.case("a", breaks, "seed 3")  # pyright: ignore[reportArgumentType]
    ledger.case("b", impossible)  # pyright: ignore[reportArgumentType]
    ledger.case("c", lambda: ERROR)
    assert (ledger.tried, ledger.of([LOST]), ledger.of([IMPOSSIBLE])) == (3, 1, 1)
    assert "a (seed 3): KeyError: 'gone'" in ledger.losses[0]
    assert "| a | 2 | same result: 1; LOST: 1 (here 1) |" in ledger.table()
    assert "| b | 0 | not possible here: 1 |" in ledger.table()
