"""Hugging Face datasets, by name or local folder. Only this module knows the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import Document
from memorizing_transformers_pytorch.data.tables import row_document


class HuggingFaceDataset:
    """One split of a dataset: on disk, or streamed. Raises ValueError if there is none, or if `datasets` is missing."""

    def __init__(self, config: DataConfig) -> None:
        try:
            import datasets  # type: ignore[import-untyped]
        except ImportError as error:
            hint = "pip install 'memorizing_transformers_pytorch[datasets]'"
            raise ValueError(f"expected the library datasets for {config.source!r}, got none; {hint}") from error
        self._config = config
        name = config.source.removeprefix("hf:")
        try:
            self._builder = datasets.load_dataset_builder(name, config.subset)
        except OSError as error:
            raise ValueError(f"expected a dataset, got {name!r}: {str(error).splitlines()[0]}") from error
        self._dataset: Any = None

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows()):
            yield row_document(row, f"{self._config.source}, row {number:,}", self._config)

    def fingerprint(self) -> str:
        """The builder's own: its hash is that of the revision, or of the local files and their times of change."""
        builder = self._builder
        version = builder.config.version
        return f"{self._config.source} {builder.config_id} {version} {builder.hash} {self._config.hf_split}"

    def _rows(self) -> Any:
        if self._dataset is None and self._config.streaming:
            self._dataset = self._builder.as_streaming_dataset(self._config.hf_split)
        elif self._dataset is None:
            self._builder.download_and_prepare()
            self._dataset = self._builder.as_dataset(self._config.hf_split)
        return self._dataset
