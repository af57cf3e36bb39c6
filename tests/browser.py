"""A system's Chromium without a window, and pages that are opened in it from files."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-quic"),
]

# What a script in the page measures: the lowest contrast of its visible texts, each against the ground behind it.
CONTRAST = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = parts(color).slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (of) => {
    for (let at = of; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((parts(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let least = [Infinity, ""];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !each.checkVisibility() || /script|style/i.test(each.tagName)) continue;
    const ink = getComputedStyle(each)[each.namespaceURI.endsWith("svg") ? "fill" : "color"];
    const [a, b] = [light(ink), light(ground(each))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const where = `${each.tagName}.${each.getAttribute("class")} ${each.textContent.slice(0, 40)}`;
    if (ratio < least[0]) least = [ratio, where];
  }
  return least;
}"""


def chromium() -> str | None:
    """Where Chromium is, named by ``DISTILLM_CHROMIUM`` or on the path; None where there is none."""
    named = os.environ.get("DISTILLM_CHROMIUM")
    return next((path for name in ([named] if named else NAMES) if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Generator[Any]:
    """A playwright browser: the system's own, nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield started
        started.close()


@dataclass
class Opened:
    """A page with all that went wrong on it, and all that it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list[str])
    requests: list[str] = field(default_factory=list[str])
    dialogs: list[str] = field(default_factory=list[str])

    def styled(self, selector: str, name: str) -> str:
        """The computed value of a property of the first element that ``selector`` finds."""
        found: str = self.page.eval_on_selector(selector, "(of, name) => getComputedStyle(of)[name]", name)
        return found

    def drawn(self) -> "Opened":
        """The same page once every chart that is not folded away is drawn."""
        script = """() => [...document.querySelectorAll('.chart')]
            .every((each) => each.closest('details:not([open])') || each.querySelector('.main-svg'))"""
        self.page.wait_for_function(script)
        return self


def opened(of: Any, path: Path, *, width: int = 1200, height: int = 900, **context: Any) -> Opened:
    """The page at ``path``, wholly loaded, in a context of its own with so many pixels."""
    page = of.new_context(viewport={"width": width, "height": height}, **context).new_page()
    found = Opened(page)
    page.set_default_timeout(20_000)
    page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))

    def dismiss(dialog: Any) -> None:
        found.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(path.resolve().as_uri())
    return found.drawn() if context.get("java_script_enabled", True) else found
