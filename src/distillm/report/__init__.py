"""What a run folder says, as one HTML file or as a table; reads files only, and never imports torch."""

from .compare import Row, as_csv, as_markdown, compare_table, table_cells
from .page import write_report
from .read import RunFolder, Score, Scores, read_run

__all__ = [
    "Row",
    "RunFolder",
    "Score",
    "Scores",
    "as_csv",
    "as_markdown",
    "compare_table",
    "read_run",
    "table_cells",
    "write_report",
]
