"""What a run folder says, as one HTML file or as a table; reads files only, and never imports torch."""

from .compare import Row, compare_table
from .differences import with_differences
from .formats import FORMATS, as_csv, as_json, as_latex, as_markdown, legend, said_once, table_cells
from .page import write_report
from .read import RunFolder, Score, Scores, read_run

__all__ = [
    "FORMATS",
    "Row",
    "RunFolder",
    "Score",
    "Scores",
    "as_csv",
    "as_json",
    "as_latex",
    "as_markdown",
    "compare_table",
    "legend",
    "read_run",
    "said_once",
    "table_cells",
    "with_differences",
    "write_report",
]
