"""What came of each fault, counted. A case returns the outcome it has checked; whatever it raises is a loss."""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal[
    "same result",
    "ended well",
    "clear error, then the same result",
    "clear error",
    "noticed and made again",
    "went on without, and said so",
    "not possible here",
    "LOST",
]
SAME: Outcome = "same result"
WELL: Outcome = "ended well"
ERROR_THEN_SAME: Outcome = "clear error, then the same result"
ERROR: Outcome = "clear error"
AGAIN: Outcome = "noticed and made again"
WITHOUT: Outcome = "went on without, and said so"
IMPOSSIBLE: Outcome = "not possible here"
LOST: Outcome = "LOST"


class ImpossibleHereError(Exception):
    """The system does not allow this fault to be made; the message has the reason."""


@dataclass
class Ledger:
    """The outcomes of every fault, in the order in which faults were first tried."""

    say: Callable[[str], None] = lambda _: None
    counts: dict[str, Counter[Outcome]] = field(default_factory=dict[str, Counter[Outcome]])
    hits: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    losses: list[str] = field(default_factory=list[str])
    reasons: set[str] = field(default_factory=set[str])
    seconds: Counter[str] = field(default_factory=Counter[str])

    def case(self, fault: str, act: Callable[[], Outcome | tuple[Outcome, str]], about: str = "") -> None:
        """Try ``fault`` once; ``about`` is what a report of a loss needs for doing it again.

        ``act`` may also return what exactly the fault hit.
        """
        began = time.monotonic()
        try:
            found = act()
            outcome, hit = found if isinstance(found, tuple) else (found, "")
            self.hits.setdefault(fault, Counter())[hit] += bool(hit)
        except ImpossibleHereError as reason:
            outcome = IMPOSSIBLE
            self.reasons.add(f"{fault}: {reason}")
        except Exception as error:
            outcome = LOST
            where = traceback.extract_tb(error.__traceback__)[-4:]
            trace = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(where))
            self.losses.append(f"{fault} ({about}): {type(error).__name__}: {error} [{trace}]")
            self.say(f"LOST {self.losses[-1]}")
        self.counts.setdefault(fault, Counter())[outcome] += 1
        self.seconds[fault] += time.monotonic() - began

    @property
    def tried(self) -> int:
        """How many faults were made, whatever came of them."""
        return sum(n for found in self.counts.values() for outcome, n in found.items() if outcome != IMPOSSIBLE)

    def of(self, outcomes: Sequence[Outcome]) -> int:
        """How often one of ``outcomes`` came."""
        return sum(found[outcome] for found in self.counts.values() for outcome in outcomes)

    def table(self) -> str:
        """Fault, times tried, what happened, as Markdown."""
        rows = ["| fault | times tried | what happened |", "|---|---|---|"]
        for fault, found in self.counts.items():
            made = sum(n for outcome, n in found.items() if outcome != IMPOSSIBLE)
            shown = "; ".join(f"{outcome}: {n}" for outcome, n in found.most_common())
            hit = ", ".join(f"{name} {n}" for name, n in self.hits.get(fault, Counter()).most_common() if n)
            shown += f" ({hit})" if hit else ""
            rows.append(f"| {fault} | {made} | {shown} |")
        return "\n".join(rows)
