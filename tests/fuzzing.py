"""What the fuzz tests share: how many examples, odd values and bytes, and what may come of them."""

import os
import random
import re
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from distillm.errors import DistillmError

ODD_TEXTS = [
    "", " ", "\n", "\t", "\r\n", "\u2028", "\x85", "\x1b[31mred\x1b[0m", "\x1b]8;;http://evil.example\x07", "a\x00b",
    "\ud800", "\ufeff", "\u202e", "é" * 30, "[bold]", "{{ a }}", "{% for", "${HOME}", "../../x", "/etc/passwd",
    "~nobody",
    "NaN", "null", "~", "yes", "1e999", "0x" + "f" * 5000, "9" * 5000, "1:1:1", "2024-13-45", "!!int x", "a" * 20_000,
    "http://user:hunter2@example.org/v1", "<script>alert(1)</script>",
]  # fmt: skip
"""Texts that steer terminals, leave folders, are no numbers, or are long."""

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, -(10**310), 1.5, float("nan"), float("inf"), [], {}, [[]],
    [None], {"a": 1},
    {"": {}}, {1: 2}, {None: 3}, [1, "a", None], {"name": "distillm"}, {"path": None}, {"path": {"path": "x"}},
]  # fmt: skip

PUT_IN = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"{", b"[", b"]", b":", b"&a ", b"*a", b"!!",
    b"\xed\xa0\x80", b"[" * 3000, b"9" * 5000, b"\\ud800", b"NaN", b"\t", b"- ", b"? ", b"%", b"<<: ", b"|", b"---\n",
    b"a" * 9000,
]  # fmt: skip
"""Bytes that mean something in a format, or are many."""

odd_texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
odd_values = st.sampled_from(ODD_VALUES) | odd_texts


TIMES = int(os.environ.get("DISTILLM_FUZZ", "1"))
"""More examples than `make test` takes, and others each time: DISTILLM_FUZZ=20 pytest tests/test_fuzz.py."""


def fuzz(examples: int) -> settings:
    """The same examples every time, and as many as are asked for."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=slow,
    )


def outcome(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or the error that a user can mend; every other exception goes on and fails the test."""
    try:
        return work()
    except DistillmError as error:
        found = error
    assert found.exit_code in (2, 3, 4, 5)
    check_message(str(found))
    return found


def check_message(text: str) -> None:
    """It says something, within a screen, and steers no terminal."""
    lines = text.splitlines()
    assert text.strip()
    assert len(lines) <= 25, text
    assert all(len(line) <= 420 for line in lines), text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text), ascii(text)
    assert "hunter2" not in text


def damaged(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one to three things broken: bytes lost, doubled, changed, or put in."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.randint(0, 12))
        way = draw.randrange(5)
        if way == 0:
            content = content[:at] + content[end:]
        elif way == 1:
            content = content[:end] + content[at:]
        elif way == 2:
            content = content[:at] + draw.choice(PUT_IN) + content[at:]
        elif way == 3:
            content = content[:at]
        else:
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    return content
