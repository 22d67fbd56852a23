"""Rows with a column of text: JSON lines and Parquet, one row or a small batch in memory at a time."""

from __future__ import annotations

import gzip
import hashlib
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument, decode, text_bytes, without_surrogates
from memorizing_transformers_pytorch.utils.plain_json import parse_object

_ROWS_AT_ONCE = 64


def is_table(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def read_table(path: Path, config: DataConfig) -> Iterator[TextDocument | None]:
    """What `row_document` makes of each row. Raises ValueError for a file that is damaged or lacks the columns."""
    rows = _parquet_rows(path, config) if path.suffix == ".parquet" else _json_rows(path, config)
    for where, row in rows:
        yield row_document(row, where, config)


def row_document(row: Mapping[str, Any], where: str, config: DataConfig) -> TextDocument | None:
    """The document of a row, named by its column, or without a name by a hash of its text, whatever its place.

    None if its text is null and such rows are skipped. Raises ValueError for a column that is missing or no text.
    """
    check_columns(row, where, config)
    text = row[config.text_column]
    if text is None and config.nulls == "skip":
        return None
    if not isinstance(text, str):
        raise ValueError(f"expected text in column {config.text_column!r} of {where}, got {type(text).__name__}")
    text = without_surrogates(text, where, config.errors)
    if config.name_column is not None and row[config.name_column] is not None:
        return TextDocument(str(row[config.name_column]), text)
    return TextDocument(hashlib.sha256(text_bytes(text)).hexdigest()[:16], text)


def without_nulls(documents: Iterable[TextDocument | None], config: DataConfig) -> Iterator[TextDocument]:
    """The documents of rows that have text. At the end a warning says how many had none."""
    skipped = 0
    try:
        for document in documents:
            if document is None:
                skipped += 1
            else:
                yield document
    finally:
        if skipped:
            what = f"rows of {config.source!r} whose column {config.text_column!r} is null"
            warnings.warn(f"skipped {skipped:,} {what}", stacklevel=1)


def wanted_columns(config: DataConfig) -> list[str]:
    return [name for name in (config.text_column, config.name_column) if name is not None]


def check_columns(columns: Iterable[str], where: str, config: DataConfig) -> None:
    """Raises ValueError for a wanted column that is not among these."""
    present = list(columns)
    for column in wanted_columns(config):
        if column not in present:
            raise ValueError(f"expected a column {column!r} in {where}, got {', '.join(map(repr, present))}")


def _json_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{str(path)!r}, line {number:,}"
                    yield where, parse_object(decode(line, where, config.errors), where)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"expected a readable file, got {str(path)!r}: {error}") from error


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'memorizing_transformers_pytorch[datasets]'"
        raise ValueError(f"expected pyarrow to read {str(path)!r}, got none; {hint}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, repr(str(path)), config)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted_columns(config)):
                for row in batch.to_pylist():
                    yield f"{str(path)!r}, row {number:,}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a Parquet file, got {str(path)!r}: {str(error).splitlines()[0]}") from error
