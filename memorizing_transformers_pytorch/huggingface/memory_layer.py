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

from memorizing_transformers_pytorch.attention.ops import found_weights, gated, memory_attention, merged, shares
from memorizing_transformers_pytorch.huggingface import interface
from memorizing_transformers_pytorch.huggingface.calls import Call, Shared
from memorizing_transformers_pytorch.huggingface.interface import Extension, Local
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Options, Shape, of_rows, parameters_in_use
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.huggingface.rotary import CosSin
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import POSITION, StagedEntries, Vectors

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


class MemoryLayer(Extension, BaseLayer):
    """The memory of one layer, taking part in its attention.

    context: the longest that the model was made for, if it says.
    Entries that are older than `recent` ones lie in a memory of their own, turned back to position 0.
    """

    options: Options

    def __init__(self, layer: Layer, options: Options, shared: Shared, context: int | None) -> None:
        self.layer, self.context = layer, context
        recent = options.recent or (None if context is None else max(context // 2, 1))
        true_places = layer.rotary is not None and options.positions == "true"
        parted = true_places and recent is not None and recent < options.max_memories
        self._recent_of_new = recent if parted else None
        shape = Shape(layer.kv_heads, layer.width, layer.device, layer.dtype)
        super().__init__(layer.index, layer.module, shape, options, shared)
        self._far: CosSin | None = None  # the table that turns by `distance`
        self._hook: Any = None

    def attach(self) -> None:
        start = 0.0 if self.options.combine == "softmax" else GATE_START
        self.module.add_module(BIAS, HeadBias(self.layer.heads, start, self.layer.device))
        interface.use(self.module, self)
        self._hook = self.module.register_forward_pre_hook(self._note_positions, with_kwargs=True)

    def detach(self) -> None:
        self._hook.remove()
        interface.leave(self.module)
        delattr(self.module, BIAS)

    def parameters(self) -> list[nn.Parameter]:
        return parameters_in_use(self.module.get_submodule(BIAS))

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

    def commit(self, memories: list[KNNMemory], entries: StagedEntries) -> None:
        """As `BaseLayer.commit`. Recent entries that are about to be overwritten are demoted."""
        recent = memories[0]
        if len(memories) == 1:
            recent.commit(entries)
            return
        for some in entries.portions(recent.max_memories):
            for row, count in zip(some.rows, some.counts(), strict=True):
                self._copy_to_older(memories, row, recent.num_entries[row] + count - recent.max_memories)
            recent.commit(some)

    def demote(self, memories: list[KNNMemory], row: int, place: int) -> None:
        """Entries more than `recent` places before this one are old, however few there are. Where documents in between
        were forgotten, or others merged, they would else stand at distances that the model has never seen."""
        if len(memories) == 1:
            return
        recent = memories[0]
        order = recent.store.places_in_order(row)
        positions = recent.store.origins[row, :, POSITION]
        if len(order) == 0 or place - int(positions[order[0]]) <= recent.max_memories:
            return  # nor are those after it
        too_far = int((place - positions[order] > recent.max_memories).sum())
        self._copy_to_older(memories, row, too_far)
        recent.remove(
            row, torch.zeros(len(order), dtype=torch.bool, device=order.device).index_fill_(0, order[:too_far], True)
        )

    def _copy_to_older(self, memories: list[KNNMemory], row: int, count: int) -> None:
        """The oldest `count` of the recent entries, turned back to position 0."""
        recent, older = memories
        if count > 0 and self.layer.rotary is not None:
            leaving = recent.store.oldest(row, count)
            bare = self.layer.rotary.turned(leaving.keys.floats(), -leaving.origins[..., POSITION])
            older.commit(leaving._replace(keys=Vectors.of(bare, older.dtype)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_positions(self, _module: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        call = self.shared.call.now
        if call is not None:
            call.position_embeddings[self.index] = options.get("position_embeddings")

    def needs_lse(self) -> bool:
        """As `Extension.needs_lse`. (The paper's gate needs none.)"""
        call = self.running_call()
        return self.options.combine == "softmax" and call is not None and not self.found(call).is_empty

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        """As `Extension.joined`."""
        join: Any = self._joined
        if torch.compiler.is_compiling():  # a search cannot be compiled
            join = torch.compiler.disable(join)  # type: ignore[no-untyped-call]
        joined: Tensor = join(module.get_submodule(BIAS), out, query, local)
        return joined

    def _joined(self, head_bias: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        call = self.running_call()
        if call is None:
            return out
        if call.keeps_pairs and self.index not in call.pairs:
            count = query.shape[2]
            keys = self._placed(call, local.key[:, :, -count:].detach())
            call.pairs[self.index] = keys, local.value[:, :, -count:].detach()
        bias: Tensor = head_bias(query)
        if not self.found(call).is_empty:
            return self._join(call, out, query, local, bias)
        # The same numbers, but with the bias in the graph, as DistributedDataParallel needs.
        return out + 0 * bias.sum().to(out) if torch.is_grad_enabled() and bias.requires_grad else out

    def _join(self, call: Call, out: Tensor, query: Tensor, local: Local, bias: Tensor) -> Tensor:
        multiplier, softcap = local.multiplier(query), local.options.get("softcap")
        found, corrections = (
            self.look_up(call, self._queries(call, query), self.options.topk),
            self._length_corrections(call, query),
        )
        parts = [
            memory_attention(own, lookup, multiplier, less=less, softcap=softcap)
            for (own, lookup), less in zip(found, corrections, strict=True)
        ]
        here = out.transpose(1, 2)
        if self.options.combine == "softmax":
            every = [*((each, lse + bias.squeeze(-1)) for each, lse in parts), (here, local.lse(query))]
            together, of_each = merged(every)[0], shares(every)[:-1]
        else:
            together = gated(here, merged(parts), bias)
            of_each = [each * bias.sigmoid() for each in shares(parts)]
        if call.keeps_weights:
            weights = [
                found_weights(lookup, multiplier, lse, less=less, softcap=softcap) * each
                for (_, lookup), (_, lse), less, each in zip(found, parts, corrections, of_each, strict=True)
            ]
            self.found(call).weights = torch.cat(weights, dim=-1).detach()
        return together.transpose(1, 2).to(out.dtype)

    def _length_corrections(self, call: Call, query: Tensor) -> list[Tensor | None]:
        """log(N / context) for each memory, (B, 1, 1, 1): one whose rows hold N entries, more than that; else None.

        Of more tokens than the model has ever seen at once, more fit a query by chance; all together should weigh as
        much as those of one context.
        """
        corrections: list[Tensor | None] = []
        for counts in self.found(call).counts:
            less = [math.log(max(count / (self.context or math.inf), 1.0)) for count in counts]
            corrections.append(of_rows(less, len(query), query).view(-1, 1, 1, 1) if any(less) else None)
        return corrections

    def _queries(self, call: Call, query: Tensor) -> list[Tensor]:
        """Queries (B, H, T, D) for each of the memories: turned to where they stand, or to one distance."""
        rotary, memories = self.layer.rotary, call.memories[self.index]
        if rotary is None:
            return [query]
        here = [self._turned_on(call, query)] if self.options.positions == "true" else []
        if here and len(memories) == 1:
            return here
        bare = rotary.unturned(query, call.position_embeddings[self.index])
        if self._far is None:
            with torch.inference_mode(False):  # it outlives this call
                self._far = rotary.table(torch.full((1, 1), self.options.distance, device=query.device))
        return [*here, rotary.turned_as(bare, self._far)]

    def _placed(self, call: Call, keys: Tensor) -> Tensor:
        """Keys (B, G, T, D), turned to where they stand in the row, or to position 0."""
        rotary = self.layer.rotary
        if rotary is None:
            return keys
        if self.options.positions == "true":
            return self._turned_on(call, keys)
        return rotary.unturned(keys, call.position_embeddings[self.index])

    def _turned_on(self, call: Call, x: Tensor) -> Tensor:
        """x (B, H or G, T, D), turned on by as many positions as were read before."""
        assert self.layer.rotary is not None
        return self.layer.rotary.turned(x, of_rows(call.offsets, len(x), x).unsqueeze(1))
