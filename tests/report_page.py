"""A report read back as a browser's parser would read it, without a browser."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from distillm.report import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind, and the rows of each labelled table."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[int] = []
        self.texts: dict[int, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts[len(self.elements) - 1] = ""
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.elements[self.open[-1]][0] == tag, f"</{tag}> closes {self.elements[self.open[-1]]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def all(self, tag: str, **attributes: str) -> list[str]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            self.texts[index]
            for index, (name, attrs) in enumerate(self.elements)
            if name == tag and all(attrs.get(key) == value for key, value in wanted.items())
        ]

    def table(self, label: str) -> list[list[str]]:
        rows: list[list[str]] = []
        inside = False
        for index, (tag, attrs) in enumerate(self.elements):
            if tag == "table":
                inside = str(attrs.get("aria-label")).startswith(label)
            elif inside and tag == "tr":
                rows.append([])
            elif inside and tag in ("td", "th"):
                rows[-1].append(self.texts[index])
        assert rows, f"no table {label!r}"
        return rows

    def column(self, label: str, heading: str) -> list[str]:
        header, *rows = self.table(label)
        return [row[header.index(heading)] for row in rows]

    @property
    def verdict(self) -> dict[str, str]:
        found = [n for n, (tag, attrs) in enumerate(self.elements) if tag in ("dt", "dd") and "class" not in attrs]
        texts = [self.texts[n] for n in found]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    @property
    def charts(self) -> dict[str, Any]:
        return {chart["id"]: chart for chart in json.loads(self.all("script", id="charts")[0])}


def report(*runs: Path) -> Page:
    output = write_report(runs, runs[0].parent / "pages" / "report.html")
    return Page(output.read_text(encoding="utf-8"))


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]
