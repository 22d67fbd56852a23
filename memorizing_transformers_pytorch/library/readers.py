"""Models that read documents into a memory on disk: those of this package, and those of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.documents import DocumentTable
from memorizing_transformers_pytorch.memory.ledger import Document, Ledger
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.training.run import CONFIG, LoadedRun, load_run, run_named
from memorizing_transformers_pytorch.utils.fingerprint import Weights

PIECES = 4  # of a document, read between two chances to save
OF_RUN = "of a run"
MAX_MEMORIES = 262_144  # as of an attached memory
CHUNK = 512  # of a text, for models of transformers that can be given so many tokens


class DocumentReader(ABC):
    """A model, its tokenizer, and its memory of one row."""

    @abstractmethod
    def load(self, folder: Path, *, mmap: bool = False) -> None:
        """Remember what the folder holds, with mmap (on a CPU) where it lies; searched as before, unless an index was
        given. Raises ValueError for a memory of another model."""

    @abstractmethod
    def save(self, folder: Path, *, compact: bool = False) -> None:
        """Write what is remembered."""

    @property
    @abstractmethod
    def ledger(self) -> Ledger:
        """Which documents are remembered."""

    @abstractmethod
    def documents(self) -> DocumentTable:
        """The same, with what is held of each."""

    @abstractmethod
    def merge(self, folder: Path) -> None:
        """Add what another folder holds."""

    @abstractmethod
    def forget(self, document: int) -> None:
        """Remove all of a document."""

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """How many tokens the model can be given at once; None if it does not say."""

    @abstractmethod
    def remembers(self, tokens: int) -> bool:
        """Whether anything is remembered of a document with so many tokens."""

    @abstractmethod
    def parts(self) -> tuple[Any, Any, Any]:
        """The model, its tokenizer and its memory, as `explain` takes them."""

    @abstractmethod
    def read(self, title: str, text: str, about: Mapping[str, str], known: Document | None) -> Iterator[float]:
        """Read a document, or the rest of the known one. Gives after each portion the part of it that has been read."""


class RunReader(DocumentReader):
    """The model of a run. What it has read of a document when it is broken off is read again."""

    def __init__(self, run: LoadedRun, max_memories: int | None, index: str | None = None) -> None:
        self.run, self._index = run, index
        self.memories = run.model.create_knn_memories(batch_size=1, max_memories=max_memories or MAX_MEMORIES)
        self.memories.fingerprint = Weights(run.model).fingerprint()
        self.memories.extra = {"kind": OF_RUN, "layers": list(run.model.config.layers_with_memory)}

    def load(self, folder: Path, *, mmap: bool = False) -> None:
        self.memories = load_memories(self.run, folder, mmap=mmap, index=self._index)

    def merge(self, folder: Path) -> None:
        self.memories.merge(load_memories(self.run, folder))

    def save(self, folder: Path, *, compact: bool = False) -> None:
        self.memories.save(folder, compact=compact)

    @property
    def ledger(self) -> Ledger:
        return self.memories.ledger

    def documents(self) -> DocumentTable:
        return self.memories.documents()

    def forget(self, document: int) -> None:
        self.memories.forget(document)

    @property
    def longest(self) -> int:
        return self.run.config.training.segment_length

    def remembers(self, tokens: int) -> bool:
        config = self.run.model.config
        with_xl = set(config.layers_with_memory) <= set(config.layers_with_xl)  # then it has the last tokens instead
        return tokens > (config.xl_max_memories if with_xl else 0)

    def parts(self) -> tuple[Any, Any, Any]:
        return self.run.model, self.run.tokenizer, self.memories

    def read(self, title: str, text: str, about: Mapping[str, str], known: Document | None) -> Iterator[float]:
        if known is not None:
            self.forget(known.number)
        tokens, length = self.run.tokenizer.encode(text), self.run.config.training.segment_length
        number = self.ledger.begin(title, 0, 0, about)
        session = Session(self.run.model, self.memories, batch_size=1, segment_length=length, documents=[number])
        for start in range(0, len(tokens), PIECES * length):
            portion = tokens[start : start + PIECES * length]
            self.ledger.grow(number, len(portion))
            session.read([portion])
            session.close()
            yield (start + len(portion)) / len(tokens)


def load_memories(run: LoadedRun, folder: Path, *, mmap: bool = False, index: str | None = None) -> KNNMemoryList:
    """The memory that the model of a run has built; with mmap (on a CPU) where it lies. index: how it is searched, if
    not as before. Raises ValueError for that of another model."""
    device = run.model.device
    memories, weights = (
        KNNMemoryList.load(folder, mmap=mmap and device.type == "cpu", device=device),
        Weights(run.model),
    )
    weights.check(memories.fingerprint)
    memories.fingerprint = weights.fingerprint()
    own = run.model.create_knn_memories(batch_size=1, max_memories=1)
    expected, got = ([(m.num_indices, m.num_kv_heads, m.dim) for m in each] for each in (own, memories))
    if memories.extra.get("kind") != OF_RUN or expected != got:
        raise ValueError(f"expected a memory of the model of {str(run.folder)!r}, got one {memories.extra.get('kind')}")
    if index is not None:
        for memory in memories:
            memory.search_with(index)
    return memories


class HubReader(DocumentReader):
    """A causal language model of transformers, from a folder or the hub."""

    def __init__(self, name: str, device: str, options: Mapping[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from memorizing_transformers_pytorch.huggingface import attach_memory
        from memorizing_transformers_pytorch.huggingface.probe import positions_of

        gguf = next(Path(name).glob("*.gguf"), None) if Path(name).is_dir() else None
        where = {} if gguf is None else {"gguf_file": gguf.name}
        try:
            model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa", **where)
            self.tokenizer = AutoTokenizer.from_pretrained(name, **where)
        except OSError as error:
            raise ValueError(
                f"expected the folder of a run, or a model of transformers, got {name!r}: {error}"
            ) from None
        model.requires_grad_(False).train(False).to(device)
        self._index: str | None = options.get("index")
        chunk = min(CHUNK, positions_of(model) or CHUNK)
        self.memory = attach_memory(model, **{"chunk": chunk, **options})

    def load(self, folder: Path, *, mmap: bool = False) -> None:
        self.memory.load(folder, mmap=mmap)
        if self._index is not None:
            self.memory.search_with(self._index)

    def merge(self, folder: Path) -> None:
        self.memory.merge(folder)

    def save(self, folder: Path, *, compact: bool = False) -> None:
        self.memory.save(folder, compact=compact)

    @property
    def ledger(self) -> Ledger:
        return self.memory.ledger

    def documents(self) -> DocumentTable:
        return self.memory.documents()

    def forget(self, document: int) -> None:
        self.memory.forget(document)

    @property
    def longest(self) -> int | None:
        from memorizing_transformers_pytorch.huggingface.probe import positions_of

        return positions_of(self.memory.model)

    def remembers(self, tokens: int) -> bool:
        return tokens > self.memory.options.skip_first

    def parts(self) -> tuple[Any, Any, Any]:
        return self.memory.model, self.tokenizer, self.memory

    def read(self, title: str, text: str, about: Mapping[str, str], known: Document | None) -> Iterator[float]:
        from memorizing_transformers_pytorch.huggingface.reading import stops_of

        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        options = self.memory.options
        stops = stops_of(len(ids), options.chunk, options.skip_first, PIECES)
        last = self.memory.last_document
        if known is None or last is None or last.number != known.number:
            if known is not None:
                self.forget(known.number)
            self.memory.read(ids[: stops[0]], document=title, progress=False)
            last = self.memory.last_document
            assert last is not None
            self.ledger.note(last.number, about)
            yield stops[0] / len(ids)
        for stop in stops:
            if stop > last.tokens:
                self.memory.go_on(last.number, ids[:stop], progress=False)
                yield stop / len(ids)


def open_reader(
    model: str, device: str, *, max_memories: int | None, dtype: torch.dtype | None, index: str | None
) -> DocumentReader:
    """The model of a run's folder, or "shipped", or else one of transformers. Raises ValueError if it is neither."""
    run = run_named(model)
    if (run / CONFIG).is_file():
        if dtype is not None:
            raise ValueError("expected the dtype of a run's own memory, got another")
        return RunReader(load_run(run, device=device, index=index), max_memories, index)
    options = {"max_memories": max_memories, "dtype": dtype, "index": index}
    try:
        return HubReader(model, device, {name: each for name, each in options.items() if each is not None})
    except ImportError as error:
        raise ValueError(f"expected a run, or the extra 'huggingface' to be installed, got {error}") from error
