"""Files -> rows -> ``Example`` -> ``Batch``: reading, templates, tokenisation and collation."""

from .collate import collate, lay_out_prompts
from .read import read_rows
from .task import InstructionTask, LengthReport
from .text import all_texts, text_examples
from .tokenize import encode_prompts, encode_responses

__all__ = [
    "InstructionTask",
    "LengthReport",
    "all_texts",
    "collate",
    "encode_prompts",
    "encode_responses",
    "lay_out_prompts",
    "read_rows",
    "text_examples",
]
