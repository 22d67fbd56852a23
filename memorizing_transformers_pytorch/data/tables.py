"""Rows with a column of text: JSON lines and Parquet, one row or a small batch in memory at a time."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import Document
from memorizing_transformers_pytorch.data.text import decode, text_bytes, without_surrogates

_ROWS_AT_ONCE = 64


def is_table(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def read_table(path: Path, config: DataConfig) -> Iterator[Document]:
    """A document for each row. Raises ValueError for a file that is damaged or lacks the columns."""
    rows = _parquet_rows(path, config) if path.suffix == ".parquet" else _json_rows(path, config)
    for where, row in rows:
        yield row_document(row, where, config)


def row_document(row: Mapping[str, Any], where: str, config: DataConfig) -> Document:
    """The document of a row, named by its column or by a hash of its text, whatever its place among the others.

    Raises ValueError for a column that is missing or no text.
    """
    _check_columns(row, where, config)
    text = row[config.text_column]
    if not isinstance(text, str):
        raise ValueError(f"expected text in column {config.text_column!r} of {where}, got {type(text).__name__}")
    text = without_surrogates(text, where, config.errors)
    if config.name_column is not None:
        return Document(str(row[config.name_column]), text)
    return Document(hashlib.sha256(text_bytes(text)).hexdigest()[:16], text)


def _check_columns(columns: Iterable[str], where: str, config: DataConfig) -> None:
    present = list(columns)
    for column in (config.text_column, config.name_column):
        if column is not None and column not in present:
            raise ValueError(f"expected a column {column!r} in {where}, got {', '.join(map(repr, present))}")


def _json_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{str(path)!r}, line {number:,}"
                    yield where, _json_row(line, where, config)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"expected a readable file, got {str(path)!r}: {error}") from error


def _json_row(line: bytes, where: str, config: DataConfig) -> dict[str, Any]:
    try:
        row = json.loads(decode(line, where, config.errors))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {where}, got an error: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected an object in {where}, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'memorizing_transformers_pytorch[datasets]'"
        raise ValueError(f"expected pyarrow to read {str(path)!r}, got none; {hint}") from error
    wanted = [name for name in (config.text_column, config.name_column) if name is not None]
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, repr(str(path)), config)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    yield repr(str(path)), row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"expected a Parquet file, got {str(path)!r}: {str(error).splitlines()[0]}") from error
