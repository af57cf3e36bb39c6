"""Plain text: a corpus for the language-model loss, and all the text of some files for training a tokenizer."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..paths import home
from ..types import Example
from .read import listed, read_rows, read_text
from .tokenize import encode_responses

SHORTEST = 2  # tokens: the first of a chunk is predicted by nothing
FIELD = "text"


def text_examples(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    end_id: int,
    split: str | None = None,
    name: str | None = None,
) -> list[Example]:
    """Chunks of ``length`` tokens (the last may be shorter) of all documents, each followed by its end token.

    A .txt file is one document; any other source is read by ``read_rows`` (with ``split`` and ``name``), a document in
    the field ``text`` of each row. Every token but the first of a chunk is a target. Raises DataError where a source
    has no text.
    """
    if length < SHORTEST:
        raise ConfigError(f"the length of a text chunk is {length}; it must be at least {SHORTEST}")
    paths = [sources] if isinstance(sources, str | Path) else list(sources)
    documents = [document for path in paths for document in _documents(path, split, name)]
    if not documents:
        raise DataError(f"no text in {listed([str(path) for path in paths])}; give at least one document")
    tokens = list(chain.from_iterable(encode_responses(tokenizer, documents, end_id)))
    chunks = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    return [
        Example(f"text:{i}", chunk, [False] + [True] * (len(chunk) - 1), origin="text")
        for i, chunk in enumerate(chunks)
        if len(chunk) >= SHORTEST
    ]


def all_texts(sources: Sequence[str | Path], *, split: str | None = None, name: str | None = None) -> Iterator[str]:
    """Every text in ``sources``: a .txt file whole, otherwise each text of each row, whatever its field.

    ``split`` and ``name`` are for ``read_rows``. Raises DataError as that does, and where there is no text at all.
    """
    found = False
    for source in sources:
        path = home(source)
        plain = _is_plain(path, split, name)
        values = [read_text(path)] if plain else chain(*map(dict.values, read_rows(source, split=split, name=name)))
        for value in values:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and text.strip():
                    found = True
                    yield text
    if not found:
        raise DataError(f"no text in {listed([str(source) for source in sources])}; give at least one text")


def _is_plain(path: Path, split: str | None, name: str | None) -> bool:
    """Whether the file is one text; with a part chosen, ``read_rows`` says that a file has none."""
    return path.suffix.lower() == ".txt" and split is None and name is None


def _documents(source: str | Path, split: str | None, name: str | None) -> list[str]:
    path = home(source)
    if _is_plain(path, split, name):
        text = read_text(path)
        if not text.strip():
            raise DataError(f"{path}: the file holds only white space; give one with text")
        return [text]
    documents: list[str] = []
    for i, row in enumerate(read_rows(source, split=split, name=name)):
        if not isinstance(row.get(FIELD), str):
            what = f"the field '{FIELD}' holds no text" if FIELD in row else f"there is no field '{FIELD}'"
            raise DataError(f"{source}:{i}: {what}; the fields there are: {listed([str(key) for key in row])}")
        if row[FIELD].strip():
            documents.append(row[FIELD])
    return documents
