"""Models that read documents into a memory of one row: models of this package, and models of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.data.texts import NoText
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.load import state_of
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.model.generation import sample
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.training.run import CONFIG, LoadedRun, load_run, run_named
from memorizing_transformers_pytorch.utils.fingerprint import Weights

COMPLETE = "complete"  # in `about` of a document that was read to its end
PIECES = 4  # of a document, read between two chances to save
OF_RUN = "of a run"
MAX_MEMORIES = 262_144  # as of an attached memory
CHUNK = 512  # tokens of a text, for models of transformers that take as many


class RunReader:
    """The model of a run. A document that was not read to its end is read again from its beginning."""

    def __init__(self, run: LoadedRun, max_memories: int | None, index: str | None = None) -> None:
        self.run, self.model, self.tokenizer, self._index = run, run.model, run.tokenizer, index
        self.is_of_spans = False
        self.memory = run.model.create_knn_memories(batch_size=1, max_memories=max_memories or MAX_MEMORIES)
        if index is None and run.model.config.memory_index == "exact":  # good for training, slow in a library
            for memory in self.memory:
                memory.search_with("auto")
        self.memory.fingerprint = Weights(run.model).fingerprint()
        self.memory.extra = {"kind": OF_RUN, "layers": list(run.model.config.layers_with_memory)}

    def load(self, folder: Path, *, mmap: bool = False) -> None:
        """Use the memory in a folder instead. mmap: leave it on disk (on a CPU). Raises ValueError for that of another
        model."""
        self.memory = load_memories(self.run, folder, mmap=mmap, index=self._index)

    def merge(self, folder: Path) -> None:
        """Add the memory in another folder."""
        self.memory.merge(load_memories(self.run, folder))

    @property
    def longest(self) -> int:
        """How many tokens the model takes at once."""
        return self.run.config.training.segment_length

    def remembers(self, tokens: int) -> bool:
        """Whether a document of this length leaves entries in the memory."""
        config = self.model.config
        with_xl = set(config.layers_with_memory) <= set(config.layers_with_xl)  # XL memory keeps the last tokens
        return tokens > (config.xl_max_memories if with_xl else 0)

    def read(self, title: str, text: str, about: Mapping[str, str], known: Document | None) -> Iterator[float]:
        """Read a document, or the rest of a known one. Yields how much of it has been read, at the end 1.

        Raises NoText, changing nothing, for a text without tokens.
        """
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise NoText(f"{title}: no tokens")
        if known is not None:
            self.memory.forget(known.number)
        ledger, length = self.memory.ledger, self.longest
        number = ledger.begin(title, 0, 0, about)
        session = Session(self.model, self.memory, batch_size=1, segment_length=length, documents=[number])
        for start in range(0, len(tokens), PIECES * length):
            portion = tokens[start : start + PIECES * length]
            ledger.grow(number, len(portion))
            session.read([portion])
            session.close()
            if (stop := start + len(portion)) == len(tokens):
                ledger.note(number, {COMPLETE: "yes"})
            yield stop / len(tokens)


def load_memories(run: LoadedRun, folder: Path, *, mmap: bool = False, index: str | None = None) -> KNNMemoryList:
    """The memory that the model of a run has built. mmap: leave it on disk (on a CPU). index: how it is searched, if
    not as before. Raises ValueError for that of another model."""
    device = run.model.device
    memories = KNNMemoryList.load(folder, mmap=mmap and device.type == "cpu", device=device)
    weights = Weights(run.model)
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


class HubReader:
    """A causal language model of transformers, from a folder or the hub. Its methods do what those of `RunReader` do,
    but a document that was not read to its end is continued."""

    def __init__(self, name: str, device: str, options: Mapping[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from memorizing_transformers_pytorch.huggingface import attach_memory
        from memorizing_transformers_pytorch.huggingface.models import positions_of

        gguf = next(Path(name).glob("*.gguf"), None) if Path(name).is_dir() else None
        where = {} if gguf is None else {"gguf_file": gguf.name}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa", **where)
            self.tokenizer = AutoTokenizer.from_pretrained(name, **where)
        except OSError as error:
            raise ValueError(f"{name} is neither the folder of a run nor a model of transformers: {error}") from None
        self.model.requires_grad_(False).train(False).to(device)
        self._index: str | None = options.get("index")
        self.longest: int | None = positions_of(self.model)
        most = self.longest or CHUNK
        if options.get("retrieve") == "spans":
            most //= 2  # passages stand before what is read
        self.memory = attach_memory(
            self.model,
            tokenizer=self.tokenizer,
            **{"retrieve": "tokens", "chunk": min(CHUNK, max(most, 1)), **options},
        )

    def load(self, folder: Path, *, mmap: bool = False) -> None:
        self.memory.load(folder, mmap=mmap)
        if self._index is not None:
            self.memory.search_with(self._index)

    def merge(self, folder: Path) -> None:
        self.memory.merge(folder)

    def remembers(self, tokens: int) -> bool:
        return tokens > (0 if self.is_of_spans else self._overlap)

    @property
    def is_of_spans(self) -> bool:
        """Whether the memory finds passages."""
        return hasattr(self.memory.options, "span")

    @property
    def _overlap(self) -> int:
        """By how many tokens chunks overlap."""
        options: Any = self.memory.options
        return int(options.overlap if self.is_of_spans else options.skip_first)

    def read(self, title: str, text: str, about: Mapping[str, str], known: Document | None) -> Iterator[float]:
        from memorizing_transformers_pytorch.huggingface.reading import stops_of
        from memorizing_transformers_pytorch.huggingface.texts import document_tokens

        try:
            ids = document_tokens(text, self.tokenizer)
        except NoText:
            raise NoText(f"{title}: no tokens") from None
        memory, read = self.memory, 0
        last = memory.last_document
        if known is not None and last is not None and last.number == known.number:
            read = last.tokens
        elif known is not None:
            memory.forget(known.number)
        for stop in stops_of(len(ids), memory.options.chunk, self._overlap, PIECES):
            if stop <= read:
                continue
            if read:
                memory.go_on(memory.ledger.last.number, ids[:stop], progress=False)
            else:
                memory.read(ids[:stop], document=title, progress=False)
            memory.ledger.note(memory.ledger.last.number, {**about, **({COMPLETE: "yes"} if stop == len(ids) else {})})
            read = stop
            yield stop / len(ids)

    @torch.no_grad()
    def written(
        self,
        tokens: Sequence[int],
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """The tokens with which the model continues these, without end, or until it ends the text."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        device: Any = self.model.get_input_embeddings().weight.device
        pending, cache = torch.tensor([list(tokens)], device=device), None
        while True:
            result = self.model(input_ids=pending, past_key_values=cache, use_cache=True)
            cache, logits = result.past_key_values, result.logits[:, -1]
            pending = sample(logits, temperature, top_k, top_p, generator)[:, None].to(pending.device)
            if (token := int(pending)) in ends:
                return
            yield token


DocumentReader = RunReader | HubReader


def open_reader(
    model: str,
    device: str,
    *,
    max_memories: int | None,
    dtype: torch.dtype | None,
    index: str | None,
    spans: Mapping[str, Any] | None = None,
) -> DocumentReader:
    """The model of a run's folder, or "shipped", or else one of transformers. Raises ValueError if it is neither.

    spans: options of a memory of spans, which a run cannot have.
    """
    run = run_named(model)
    if (run / CONFIG).is_file():
        if spans is not None:
            raise ValueError(f"passages (retrieve spans) need a model of transformers, got the run {str(run)!r}")
        if dtype is not None:
            raise ValueError("--dtype is only for models of transformers: a run keeps the dtype of its own memory")
        return RunReader(load_run(run, device=device, index=index), max_memories, index)
    options = {"max_memories": max_memories, "dtype": dtype, "index": index}
    if spans is not None:
        options |= {"retrieve": "spans", **spans}
    try:
        return HubReader(model, device, {name: each for name, each in options.items() if each is not None})
    except ImportError as error:
        raise ValueError(f"{model} is not a run; other models need the extra 'huggingface' ({error})") from error


def spans_in(folder: Path) -> dict[str, Any] | None:
    """Options of the memory of spans in a folder; None for any other memory. Raises ValueError where there is none."""
    extra = state_of(folder).extra
    if extra.get("arranged") is None:
        return None
    from memorizing_transformers_pytorch.huggingface.span_layer import options_for

    return options_for(extra["arranged"])


def spans_of(folder: Path | None, retrieve: str | None, model: str | Path) -> dict[str, Any] | None:
    """Options of the memory of spans in a folder, or of a new one; None for a memory of tokens. retrieve: which one is
    wanted; unless given, a model of transformers gets one of spans, and a run one of tokens."""
    if folder is not None:
        return spans_in(folder)
    if retrieve is None:
        retrieve = "tokens" if (run_named(model) / CONFIG).is_file() else "spans"
    return {} if retrieve == "spans" else None
