"""The pictures of docs/report.md, of a demonstration's report: ``python tests/screenshots.py demo docs/images``."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from browser import browser, opened
from distillm.report import write_report

MOST = 300_000


def take(of: Any, report: Path, target: Path, top: str | None, **how: Any) -> None:
    """A picture of ``report`` from the first element that ``top`` finds on; from its beginning without one."""
    found = opened(of, report, **how)
    if top is not None:
        found.page.locator(top).first.evaluate("(each) => scrollTo(0, each.getBoundingClientRect().top - 24)")
        found.page.wait_for_timeout(300)
    found.page.screenshot(path=target)
    found.page.context.close()
    assert target.stat().st_size < MOST, f"{target} has {target.stat().st_size} bytes"


def main(demo: Path, target: Path) -> None:
    """All pictures of the demonstration in ``demo``, into the folder ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    with browser() as started, TemporaryDirectory() as made:
        runs = [demo / name for name in ("distillm", "sft", "first")]
        one, several = (write_report(of, Path(made) / f"{len(of)}.html") for of in (runs[:1], runs))
        for name, report, top, how in (
            ("light", one, None, {}),
            ("training", one, "figure", {"height": 1100}),
            ("tokens", one, ".heat", {}),
            ("dark", one, ".heat", {"color_scheme": "dark"}),
            ("samples", one, "[id$=-samples]", {}),
            ("phone", one, ".heat", {"width": 380, "height": 800, "device_scale_factor": 2}),
            ("several", several, None, {"height": 1500}),
        ):
            take(started, report, target / f"report-{name}.png", top, **how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
