"""A part of `make faults`, small enough for every day: damaged files."""

from pathlib import Path

from faults.damage import SHORT, damage
from faults.outcomes import AGAIN, ERROR_THEN_SAME, Ledger


def test_damage_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    ledger = Ledger()
    damage(ledger, tmp_path, SHORT)
    assert ledger.losses == []
    assert ledger.tried >= 30
    assert ledger.of([AGAIN, ERROR_THEN_SAME]) >= 8
