"""A part of `make faults`, small enough for every day: SIGKILL at random moments."""

from pathlib import Path

from faults.kills import SHORT, kill
from faults.outcomes import Ledger


def test_nothing_is_lost_by_a_kill(tmp_path: Path) -> None:
    ledger = Ledger()
    kill(ledger, tmp_path, SHORT, seed=1)
    assert ledger.losses == []
    assert ledger.tried == sum(SHORT.values())
