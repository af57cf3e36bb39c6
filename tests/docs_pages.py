"""The pages of the documentation, taken apart: the commands, YAML and Python that a reader would copy."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))]

PROGRAMS = "distillm|torchrun|accelerate|python|make|pip|git|bash|hf|vllm|transformers|llama-[a-z]+|lm_eval|studies/.*"
COMMAND = re.compile(rf"(?:{PROGRAMS})(?:\s|$)")
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the file that its title names (if any), its text."""

    language: str
    title: str | None
    text: str


def fences(page: str) -> list[Fence]:
    """The fenced blocks of a page, in order."""
    found = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    titles = [re.search(r'title="([^"]+)"', rest) for _, rest, _ in found]
    return [
        Fence(language, title and title.group(1), text)
        for (language, _, text), title in zip(found, titles, strict=True)
    ]


def commands(page: str) -> list[str]:
    """The command lines of a page, in order: in indented blocks, and in fences of a shell or of nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    kept = FENCE.sub(lambda m: _indented(m[3]) if m[1] in ("", "bash", "sh", "console", "text") else "", text)
    lines = [line[4:].rstrip() for line in kept.splitlines() if line.startswith("    ")]
    return [line for line in lines if COMMAND.match(line)]


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
