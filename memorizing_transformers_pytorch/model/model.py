"""MemorizingTransformer: tokens to logits. The model holds parameters; memories and other state are passed in.

Shapes: B rows, T tokens of a segment, E model width, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memorizing_transformers_pytorch.attention.attention import (
    Attention,
    AttentionBlock,
    FeedForward,
    FeedForwardBlock,
    Search,
)
from memorizing_transformers_pytorch.attention.causal import RelativePositionBias
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, warn_once
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX, ModelConfig, ModelFields
from memorizing_transformers_pytorch.model.segment import (
    Segment,
    check_devices,
    check_memories,
    check_rows,
    check_tokens,
    find_boundaries,
    hidden_from_memory,
    make_look_ups,
    make_segment,
    shifted,
)
from memorizing_transformers_pytorch.model.state import Written, XLMemories, check_state, hand_over


class Context(NamedTuple):
    """What the layers see besides the segment itself.

    pasts: the past pairs (B, G, P, 2, D) of each layer, or None.
    distances, xl_distances: (1 or B, T, S), for layers without and with XL memory; see `attention.causal`.
    look_ups, conv_states: how each memorizing layer searches, and the state of its convolution, or None.
    documents: (B, T), that of each token, where convolutions must keep them apart; see `Boundaries`.
    """

    pasts: Sequence[Tensor | None]
    distances: Tensor
    xl_distances: Tensor
    look_ups: Sequence[Search | None]
    conv_states: Sequence[Tensor | None]
    documents: Tensor | None = None


class MemorizingTransformer(nn.Module):
    """A decoder-only transformer, some of whose layers also attend to what they retrieve from a memory.

    Wu et al., "Memorizing Transformers", ICLR 2022. The arguments are the fields of `ModelConfig`: those of the package
    memorizing-transformers-pytorch 0.4.1 with their defaults, and some more. One default differs: memories live in RAM
    unless `knn_memories_directory` is given. `knn_memory_multiprocessing` is accepted and has no effect.
    Raises ValueError for values that make no sense.
    """

    def __init__(self, *, knn_memory_multiprocessing: bool = False, **fields: Unpack[ModelFields]) -> None:
        super().__init__()
        if knn_memory_multiprocessing:
            warn_once("knn_memory_multiprocessing has no effect: the exact search already uses every core")
        self.config = config = ModelConfig.from_dict(fields)
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        self.rel_pos_bias = RelativePositionBias(config.dim_head**0.5, config.heads)
        self.knn_rel_pos_bias = RelativePositionBias(config.dim_head**0.5, config.memory_heads)
        self.layers = nn.ModuleList(self._make_layer(number) for number in range(1, config.depth + 1))
        self.to_logits = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.num_tokens))
        # Kept under their names for checkpoints, but not trained where no layer uses them.
        self.rel_pos_bias.requires_grad_(len(config.layers_with_memory) < config.depth)
        self.knn_rel_pos_bias.requires_grad_(len(config.layers_with_memory) > 0)
        if config.tie_embeddings:
            nn.init.normal_(self.token_emb.weight, std=config.dim**-0.5)
            cast(nn.Linear, self.to_logits[1]).weight = self.token_emb.weight

    @classmethod
    def from_config(cls, config: ModelConfig) -> MemorizingTransformer:
        """A new model of this configuration."""
        return cls(**config.to_dict())

    def _make_layer(self, number: int) -> nn.ModuleList:
        config = self.config
        shared: dict[str, Any] = {
            "dim": config.dim,
            "dim_head": config.dim_head,
            "dropout": config.attn_dropout,
            "num_kv_heads": config.num_kv_heads,
            "xl_max_memories": config.xl_max_memories if number in config.layers_with_xl else 0,
        }
        attention: Attention | KNNAttention
        if number in config.layers_with_memory:
            attention = KNNAttention(
                heads=config.memory_heads,
                num_retrieved_memories=config.num_retrieved_memories,
                combine=config.combine,
                short_conv=config.short_conv,
                qk_init=config.qk_init,
                **shared,
            )
        else:
            attention = Attention(heads=config.heads, **shared)
        feed_forward = FeedForward(config.dim, config.ff_mult, config.ff_dropout)
        blocks = (AttentionBlock(config.dim, attention), FeedForwardBlock(config.dim, feed_forward))
        return nn.ModuleList(blocks)

    @property
    def device(self) -> torch.device:
        return self.token_emb.weight.device

    @property
    def carries_state(self) -> bool:
        """Whether `forward` returns, besides its result, something to be passed to the next call."""
        config = self.config
        return bool(config.layers_with_xl) or (config.short_conv > 0 and bool(config.layers_with_memory))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    # Memories

    def create_knn_memories(self, *, batch_size: int, max_memories: int | None = None) -> KNNMemoryList:
        """Empty memories for a batch of this many rows, one per memorizing layer: in RAM or on the model's device, or
        memory-mapped below `knn_memories_directory`; call `cleanup()` on those when done.

        max_memories: entries that each row can keep; `max_knn_memories` of the configuration unless given.
        """
        config = self.config
        return KNNMemoryList(
            KNNMemory(
                dim=config.dim_head,
                max_memories=config.max_knn_memories if max_memories is None else max_memories,
                num_indices=batch_size,
                num_kv_heads=config.num_kv_heads,
                dtype=getattr(torch, config.memory_dtype),
                index=config.memory_index,
                device=self.device if config.knn_memories_directory is None else None,
                directory=config.knn_memories_directory,
            )
            for _ in config.layers_with_memory
        )

    def knn_memories_context(
        self, *, batch_size: int, max_memories: int | None = None
    ) -> AbstractContextManager[KNNMemoryList]:
        """`create_knn_memories` for a `with` statement: cleaned up at the end, also after an exception."""
        return self.create_knn_memories(batch_size=batch_size, max_memories=max_memories)

    def initial_state(self, batch_size: int) -> XLMemories:
        """What the first segment of a document starts from: no XL memory, and convolutions at zero."""
        config, device, dtype = self.config, self.device, self.token_emb.weight.dtype
        pairs = torch.zeros(batch_size, config.num_kv_heads, 0, 2, config.dim_head, device=device, dtype=dtype)
        channels = (config.memory_heads + config.num_kv_heads) * config.dim_head
        conv_state = torch.zeros(batch_size, max(config.short_conv - 1, 0), channels, device=device, dtype=dtype)
        return XLMemories(
            [pairs] * len(config.layers_with_xl),
            origins=torch.zeros(batch_size, 0, 3, device=device, dtype=torch.int64),
            mask=None,
            conv_states=[conv_state] * (len(config.layers_with_memory) if config.short_conv > 0 else 0),
        )

    # One segment

    def forward(
        self,
        x: Tensor,
        knn_memories: Sequence[KNNMemory] | None = None,
        xl_memories: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        add_knn_memory: bool = True,
        mask: Tensor | None = None,
        origins: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        hide_memory: Tensor | None = None,
    ) -> Any:
        """One segment of each row: search the memories, attend, then store the pairs of the segment.

        x: (B, T) token ids.
        knn_memories: one per memorizing layer, with B rows in scope; None for local attention only.
        xl_memories: what the call for the preceding segment returned; None at the beginning.
        labels: (B, T) target ids, that of each position (not shifted here); positions with -100 are not scored.
        add_knn_memory: False leaves the memories as they are.
        mask: (B, T) bool, False for padding, anywhere in a row; without it a run of pad_id at the end of a row is
            padding. It is not attended to, stored or scored, nor is a label pad_id at the last token before it scored.
        origins: (B, T, 3) integers stored with the entries: document id, position in the document, token id.
        starts: (B, T) bool, tokens with which a document begins, also several in a row. A token sees nothing of another
            document: no token of the segment, no state, and memory only if its own began in an earlier call. Of a row
            with starts only the last document is kept, in memory and state; the rest is cleared. Those on padding
            count for nothing.
        hide_memory: (B,) bool, rows that find nothing in memory in this call. They are stored as ever.

        Returns logits (B, T, num_tokens), or with labels their mean cross-entropy in nats; and if the model carries
        state (XL memory or convolutions) a pair of that and the new `xl_memories`. Raises ValueError, before any memory
        changes, for shapes, token ids, memories or state that do not fit.
        """
        config = self.config
        tensors = {"labels": labels, "mask": mask, "origins": origins, "starts": starts, "hide_memory": hide_memory}
        check_devices(self.device, x=x, **tensors)
        segment = make_segment(x, mask, origins, config.pad_id, starts)
        labels = check_tokens(config, segment.tokens, labels)
        check_rows(hide_memory, batch_size=x.shape[0])
        memories = check_memories(config, knn_memories, batch_size=x.shape[0])
        state = check_state(config, xl_memories, self.initial_state(x.shape[0]))
        boundaries = find_boundaries(segment, config)
        if boundaries.starts is not None:
            state = state.cleared(boundaries.starts)
        look_ups = make_look_ups(config, memories, hidden_from_memory(boundaries, hide_memory))
        context = self._context(state, x.shape[1], look_ups, boundaries.documents)
        hidden, written = self.run_layers(segment.tokens, context)
        logits = self.to_logits(segment.unpack(hidden))
        result = logits if labels is None else self._loss(logits, labels, segment)
        state = hand_over(config, segment, boundaries, state, written, memories if add_knn_memory else None)
        return (result, state) if self.carries_state else result

    def _context(
        self, state: XLMemories, num_tokens: int, look_ups: Sequence[Search | None], documents: Tensor | None
    ) -> Context:
        read = shifted(state, self.config.shift_xl_memories_down)
        past_of = dict(zip(self.config.layers_with_xl, read, strict=True)) if state.length > 0 else {}
        return Context(
            pasts=[past_of.get(number) for number in range(1, self.config.depth + 1)],
            distances=state.distances(num_tokens, documents, with_past=False),
            xl_distances=state.distances(num_tokens, documents, with_past=True),
            look_ups=look_ups,
            conv_states=state.conv_states or [None] * len(self.config.layers_with_memory),
            documents=documents,
        )

    def run_layers(self, tokens: Tensor, context: Context) -> tuple[Tensor, Written]:
        """tokens (B, T) -> hidden states (B, T, E), and what is to be stored. Nothing is stored."""
        config = self.config
        biases: dict[tuple[bool, bool], Tensor] = {}
        written = Written([], [])
        x = self.token_emb(tokens)
        for number, past in enumerate(context.pasts, start=1):
            memorizing, has_xl = number in config.layers_with_memory, number in config.layers_with_xl
            if (memorizing, has_xl) not in biases:
                bias = self.knn_rel_pos_bias if memorizing else self.rel_pos_bias
                biases[memorizing, has_xl] = bias(context.xl_distances if has_xl else context.distances)
            arguments: dict[str, Any] = {"past": past, "bias": biases[memorizing, has_xl]}
            if memorizing:
                i = config.layers_with_memory.index(number)
                arguments |= {"look_up": context.look_ups[i], "conv_state": context.conv_states[i]}
                arguments["documents"] = context.documents
            x, pairs, conv_inputs = self._run_layer(self.layers[number - 1], x, arguments)
            written.pairs.append(pairs)
            if conv_inputs is not None:
                written.conv_inputs.append(conv_inputs)
        return x, written

    def _run_layer(self, layer: Any, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            attention, feed_forward = layer
            out, pairs, conv_inputs = attention(x, **arguments)[:3]  # what it read is for hooks: let it go
            return feed_forward(out), pairs, conv_inputs

        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return cast(tuple[Tensor, Tensor, Tensor | None], checkpoint(run, x, use_reentrant=False))
        return run(x)

    def _loss(self, logits: Tensor, labels: Tensor, segment: Segment) -> Tensor:
        if segment.mask is not None:
            real = segment.unpack(segment.mask)
            unscored = ~real
            if self.config.pad_id is not None:
                unscored |= F.pad(~real[:, 1:], (0, 1)) & (labels == self.config.pad_id)
            labels = labels.masked_fill(unscored, IGNORE_INDEX)
        total = F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (labels != IGNORE_INDEX).sum().clamp_min(1)


# So that help() and notebooks show the arguments.
MemorizingTransformer.__signature__ = inspect.signature(ModelConfig)  # type: ignore[attr-defined]
