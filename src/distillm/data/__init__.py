"""Files -> rows -> ``Example`` -> ``Batch``: reading, templates, tokenisation and collation."""

from .collate import collate, lay_out_prompts
from .known import known_rows, located
from .read import read_rows
from .task import LengthReport, Task, eights, roomy
from .text import all_texts, text_examples
from .tokenize import encode_prompts, encode_responses, pieces, text_of

__all__ = [
    "LengthReport",
    "Task",
    "all_texts",
    "collate",
    "eights",
    "encode_prompts",
    "encode_responses",
    "known_rows",
    "lay_out_prompts",
    "located",
    "pieces",
    "read_rows",
    "roomy",
    "text_examples",
    "text_of",
]
