"""Hugging Face datasets, by name or local folder. Only this module knows the library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.tables import check_columns, row_document, wanted_columns, without_nulls


class HuggingFaceDataset:
    """One split of a dataset: on disk, or streamed.

    Raises ValueError if the dataset does not exist or cannot be read, or if `datasets` is not installed.
    """

    def __init__(self, config: DataConfig) -> None:
        try:
            import datasets  # type: ignore[import-untyped]
        except ImportError as error:
            hint = "pip install 'memorizing_transformers_pytorch[datasets]'"
            raise ValueError(f"expected the library datasets for {config.source!r}, got none; {hint}") from error
        self._config = config
        self._name = config.source.removeprefix("hf:")
        with _failures(f"expected a dataset, got {self._name!r}"):
            self._builder = datasets.load_dataset_builder(self._name, config.subset)

    def __iter__(self) -> Iterator[TextDocument]:
        rows = enumerate(self._rows())
        source, config = self._config.source, self._config
        return without_nulls((row_document(row, f"{source}, row {number:,}", config) for number, row in rows), config)

    def fingerprint(self) -> str:
        """The builder's own: its hash is that of the revision, or of the local files and their times of change."""
        builder = self._builder
        version = builder.config.version
        return f"{self._config.source} {builder.config_id} {version} {builder.hash} {self._config.hf_split}"

    @cached_property
    def _dataset(self) -> Any:
        if self._config.streaming:
            return self._builder.as_streaming_dataset(self._config.hf_split)
        self._builder.download_and_prepare()
        return self._builder.as_dataset(self._config.hf_split)

    def _rows(self) -> Iterator[Any]:
        error = f"expected to read the dataset {self._name!r}, got an error"
        with _failures(error):
            columns = self._dataset.column_names  # None if only the rows tell
        if columns is not None:
            check_columns(columns, self._config.source, self._config)
        with _failures(error):
            yield from self._dataset if columns is None else self._dataset.select_columns(wanted_columns(self._config))


@contextmanager
def _failures(expected: str) -> Iterator[None]:
    """As a ValueError of one line. What reads underneath (HTTP, Arrow, gzip) has no exception in common."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        causes = (error, error.__cause__)
        reasons = [(str(cause).splitlines() or [type(cause).__name__])[0] for cause in causes if cause is not None]
        raise ValueError(f"{expected}: {': '.join(reasons)}") from error
