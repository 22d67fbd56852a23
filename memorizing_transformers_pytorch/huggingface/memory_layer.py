"""What one layer of a Hugging Face model does with its memory: search, join, and keep aside what shall be remembered.

The layer's own attention and what was found are joined as in one softmax over both: by g = sigmoid(lse_found + b -
lse_local), where lse is the logarithm of a sum of exponentials and b a parameter for each head that starts at 0; or by
the paper's gate g = sigmoid(b) (Wu et al. 2022, section 3.1), which starts at 0.12.

Shapes: B rows of the batch, R rows of the memory, H query heads, G key/value heads, T queries, S local keys,
K retrieved, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.attention.merge import gated, merged, share
from memorizing_transformers_pytorch.attention.ops import found_weights, memory_attention
from memorizing_transformers_pytorch.huggingface import interface
from memorizing_transformers_pytorch.huggingface.devices import device_of
from memorizing_transformers_pytorch.huggingface.interface import Extension, Local
from memorizing_transformers_pytorch.huggingface.options import Options
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.huggingface.rotary import CosSin
from memorizing_transformers_pytorch.huggingface.site import Reading, Shape, Site, parameters_in_use
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import POSITION, StagedEntries
from memorizing_transformers_pytorch.memory.vectors import Vectors

GATE_START = -2.0
BIAS = "memory_bias"  # the name of the added module in an attention module


class HeadBias(nn.Module):
    """A number for each head, read by calling it: so that it is the one of the adapter in use (PEFT), and where it is
    needed when a model is offloaded."""

    def __init__(self, heads: int, start: float, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((heads,), start, device=device))

    def forward(self, like: Tensor) -> Tensor:
        """(H, 1, 1) float32, on the device of the other tensor."""
        return self.bias.to(like.device, torch.float32).view(-1, 1, 1)


class MemoryLayer(Extension, Site):
    """The memory of one layer, taking part in its attention.

    context: the longest that the model was made for, if it says.
    Entries that are older than `recent` ones lie in a memory of their own, turned back to position 0.
    """

    def __init__(self, layer: Layer, options: Options, reading: Reading, context: int | None) -> None:
        weight = next(layer.module.parameters())
        self.layer = layer
        true_places = layer.rotary is not None and options.positions == "true"
        self.context = context
        recent = options.recent or (None if context is None else max(context // 2, 1))
        parted = true_places and recent is not None and recent < options.max_memories
        self._recent_of_new = recent if parted else None
        shape = Shape(layer.kv_heads, layer.width, device_of(layer.module), weight.dtype)
        super().__init__(layer.index, shape, options, reading)
        self._position_embeddings: Any = None
        self._far: CosSin | None = None  # the table that turns by `distance`
        self._hook: Any = None

    def attach(self) -> None:
        start = 0.0 if self.options.combine == "softmax" else GATE_START
        self.layer.module.add_module(BIAS, HeadBias(self.layer.heads, start, device_of(self.layer.module)))
        interface.use(self.layer.module, self)
        self._hook = self.layer.module.register_forward_pre_hook(self._remember_positions, with_kwargs=True)

    def detach(self) -> None:
        self._hook.remove()
        interface.leave(self.layer.module)
        delattr(self.layer.module, BIAS)
        self.close()

    def new_memories(self, rows: int) -> list[KNNMemory]:
        recent = self._recent_of_new
        if recent is None:
            return super().new_memories(rows)
        older = self.options.max_memories - recent
        return [
            self.new_memory(rows, recent, "exact"),
            self.new_memory(rows, older, self.options.index, self.options.policy),
        ]

    @property
    def recent(self) -> int | None:
        """Of how many entries the keys are turned to where they stand; None where all are alike."""
        return self.memories[0].max_memories if len(self.memories) > 1 else None

    @property
    def arrangement(self) -> str:
        if self.layer.rotary is None:
            return super().arrangement
        at = "true positions" if self.options.positions == "true" else "position 0"
        return at if self.recent is None else f"recent at {at}, older at position 0"

    def _moved(self, entries: StagedEntries, places: int, part: int) -> StagedEntries:
        if self.layer.rotary is None or self.options.positions != "true" or part == 1:
            return entries
        turns = torch.full_like(entries.origins[..., POSITION], places)
        if self.recent is not None:
            turns = -entries.origins[..., POSITION]
        turned = self.layer.rotary.turned(entries.keys.floats(), turns)
        return entries._replace(keys=Vectors.of(turned, self.memories[-1].dtype))

    def commit(self, entries: StagedEntries) -> None:
        """As `Site.commit`. Entries that must make room grow old."""
        if self.recent is None:
            super().commit(entries)
            return
        recent = self.memories[0]
        for some in entries.portions(self.recent):
            for row, count in zip(some.rows, some.counts(), strict=True):
                self._copy_to_older(row, recent.num_entries[row] + count - recent.max_memories)
            super().commit(some)

    def let_grow_old(self, row: int, place: int) -> None:
        """Entries more than `recent` places before this one are old, however few there are. Where documents in between
        were forgotten, or others merged, they would else stand at distances that the model has never seen."""
        if self.recent is None:
            return
        recent = self.memories[0]
        positions = recent.store.origins[row, recent.store.places_in_order(row), POSITION]
        too_far = int((place - positions > recent.max_memories).sum())
        if too_far:
            self._copy_to_older(row, too_far)
            oldest = recent.store.places_in_order(row)[:too_far]
            recent.remove(row, torch.zeros_like(positions, dtype=torch.bool).index_fill_(0, oldest, True))

    def _copy_to_older(self, row: int, count: int) -> None:
        """The oldest of the recent entries, so many, turned back to position 0."""
        recent, older = self.memories
        if count > 0 and self.layer.rotary is not None:
            leaving = recent.store.oldest(row, count)
            bare = self.layer.rotary.turned(leaving.keys.floats(), -leaving.origins[..., POSITION])
            older.commit(leaving._replace(keys=Vectors.of(bare, older.dtype)))

    def parameters(self) -> list[nn.Parameter]:
        return parameters_in_use(self.layer.module.get_submodule(BIAS))

    def _remember_positions(self, _module: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        self._position_embeddings = options.get("position_embeddings")

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        """As `Extension.joined`."""
        self.begin_call(len(query))
        if self.reading.staging:
            count = query.shape[2]
            self.arrived = self._placed(local.key[:, :, -count:]), local.value[:, :, -count:].detach()
        bias: Tensor = module.get_submodule(BIAS)(query)
        if self.is_silent:  # the same numbers, but with the bias in the graph, as DistributedDataParallel needs
            return out + 0 * bias.sum().to(out) if torch.is_grad_enabled() and bias.requires_grad else out
        join: Any = self._join
        if torch.compiler.is_compiling():  # a search cannot be compiled
            join = torch.compiler.disable(join)  # type: ignore[no-untyped-call]
        joined: Tensor = join(out, query, local, bias)
        return joined

    def _join(self, out: Tensor, query: Tensor, local: Local, bias: Tensor) -> Tensor:
        options, holding = self.options, filter(self._holds_something, self.memories)
        multiplier, softcap = local.multiplier(query), local.options.get("softcap")
        found, parts = self.look_up(self._queries(query)), []
        corrections = [self._length_corrections(memory, query) for memory in holding]
        for (own, lookup), less in zip(found, corrections, strict=True):
            parts.append(memory_attention(own, lookup, multiplier, less=less, softcap=softcap))
        here = out.transpose(1, 2), local.total(query).squeeze(-1)
        if options.combine == "softmax":
            together, total = merged([*((each, lse + bias.squeeze(-1)) for each, lse in parts), here])
            shares = [share(lse + bias.squeeze(-1), total) for _, lse in parts]
        else:
            of_memory, total = merged(parts)
            together = gated(here[0], (of_memory, total), bias)
            shares = [share(lse, total) * bias.sigmoid() for _, lse in parts]
        if self.keeps_weights:
            weights = [
                found_weights(lookup, multiplier, lse, less=less, softcap=softcap) * each
                for (_, lookup), (_, lse), less, each in zip(found, parts, corrections, shares, strict=True)
            ]
            self.last_weights = torch.cat(weights, dim=-1).detach()
        return together.transpose(1, 2).to(out.dtype)

    def _length_corrections(self, memory: KNNMemory, query: Tensor) -> Tensor | None:
        """(B, 1, 1, 1) log(N / context) for rows with more entries N than that; None if there are none.

        Of more tokens than the model has ever seen at once, more fit a query by chance; all together should weigh as
        much as those of one context.
        """
        counts = [memory.num_entries[row] for row in self.reading.rows]
        less = [math.log(max(count / (self.context or math.inf), 1.0)) for count in counts]
        if not any(less):
            return None
        return self.of_rows(torch.tensor(less), len(query)).view(-1, 1, 1, 1).to(query.device)

    def _queries(self, query: Tensor) -> list[Tensor]:
        """Queries (B, H, T, D) for each of the memories: turned to where they stand, or to one distance."""
        rotary = self.layer.rotary
        if rotary is None:
            return [query]
        offsets = self.of_rows(self.reading.offsets, len(query)).unsqueeze(1)
        here = [rotary.turned(query, offsets)] if self.options.positions == "true" else []
        if self.recent is None and here:
            return here
        bare = rotary.unturned(query, self._position_embeddings)
        if self._far is None:
            self._far = rotary.table(torch.full((1, 1), self.options.distance, device=query.device))
        return [*here, rotary.turned_as(bare, self._far)]

    def _placed(self, keys: Tensor) -> Tensor:
        """Keys (B, G, T, D), turned to where they stand in the document, or to position 0."""
        rotary = self.layer.rotary
        if rotary is None:
            return keys
        if self.options.positions == "true":
            return rotary.turned(keys, self.of_rows(self.reading.offsets, len(keys)).unsqueeze(1))
        return rotary.unturned(keys, self._position_embeddings)
