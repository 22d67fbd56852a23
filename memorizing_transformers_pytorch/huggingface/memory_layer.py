"""What one layer of a Hugging Face model does with its memory: search, join, and stage what shall be remembered.

The layer's own attention and what was found are joined as in one softmax over both: by g = sigmoid(lse_found + b -
lse_local), where lse is the logarithm of a sum of exponentials and b a parameter for each head that starts at 0; or by
the paper's gate g = sigmoid(b) (Wu et al. 2022, section 3.1), which starts at 0.12.

Shapes: B rows of the batch, R rows of the memory, H query heads, G key/value heads, T queries, S local keys,
K retrieved, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.interface import LEAST, Extension, Local
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.retrieved import Lookup
from memorizing_transformers_pytorch.memory.store import StagedEntries
from memorizing_transformers_pytorch.nn.retrieval import retrieved_logits, retrieved_values

GATE_START = -2.0


class HeadBias(nn.Module):
    """A number for each head, read by calling it: so that it is where it is needed when a model is offloaded."""

    def __init__(self, heads: int, start: float, device: torch.device) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((heads,), start, device=device))

    def forward(self) -> Tensor:
        """(H, 1, 1) float32."""
        return self.bias.float().view(-1, 1, 1)


@dataclass
class Reading:
    """Which rows of the memory are in the batch, and whether what passes shall be remembered.

    offsets: for each of them how many tokens were read before. staging: whether keys and values are kept aside.
    """

    rows: list[int]
    offsets: Tensor
    staging: bool = False

    def stand_at(self, offsets: Tensor) -> None:
        """From now on all rows are in the batch, with so many tokens read of each, and nothing is kept aside."""
        self.rows, self.offsets, self.staging = list(range(len(offsets))), offsets, False


@dataclass(eq=False)
class MemoryLayer(Extension):
    """The memory of one layer, taking part in its attention.

    distance: for the positions "constant", how far away everything remembered seems to be; None for true positions.
    """

    layer: Layer
    memory: KNNMemory
    combine: str
    topk: int
    distance: int | None
    bias: HeadBias
    reading: Reading
    enabled: bool = True
    staged: tuple[Tensor, Tensor] | None = None
    last_lookup: Lookup | None = None
    _position_embeddings: Any = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryLayer:
        """Copies of a module (as PEFT makes them) share the memory."""
        return self

    def remember_positions(self, _module: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        """A forward pre-hook."""
        self._position_embeddings = options.get("position_embeddings")

    def joined(self, out: Tensor, query: Tensor, local: Local) -> Tensor:
        """As `Extension.joined`."""
        self.last_lookup = None
        if len(query) % len(self.reading.rows):
            rows = len(self.reading.rows)
            raise ValueError(f"expected a batch that is a multiple of the {rows} rows of the memory, got {len(query)}")
        if self.reading.staging:
            self.staged = self._placed(local.key, keys=True), local.value.detach()
        if (
            not self.enabled
            or self.memory.is_closed
            or not any(self.memory.num_entries[row] for row in self.reading.rows)
        ):
            return self._untouched(out)
        join: Any = self._join
        if torch.compiler.is_compiling():  # a search cannot be compiled
            join = torch.compiler.disable(join)  # type: ignore[no-untyped-call]
        joined: Tensor = join(out, query, local)
        return joined

    def _join(self, out: Tensor, query: Tensor, local: Local) -> Tensor:
        placed = self._grouped(self._placed(query, keys=False))
        lookup, shape = self._look_up(placed), (*query.shape[:3], -1)
        mask = self._of_batch(lookup.mask, shape)
        logits = local.logits(self._of_batch(retrieved_logits(placed, lookup), shape)).masked_fill(~mask, LEAST)
        weights = logits.softmax(dim=-1) * mask
        share = self._share(logits, mask, query, local).transpose(1, 2)
        of_memory = self._of_batch(retrieved_values(self._grouped(weights), lookup), shape).transpose(1, 2)
        return (out + share * (of_memory - out.float())).to(out.dtype)

    def stage(self, mask: Tensor, origins: Tensor) -> StagedEntries:
        """What has passed in the last call, where mask (R, T) is True, as it can be stored: storing nothing yet."""
        assert self.staged is not None
        keys, values = self.staged
        with self.memory.at_batch_indices(self.reading.rows):
            return self.memory.stage(torch.stack((keys, values.to(keys)), dim=-2), mask, origins)

    def _untouched(self, out: Tensor) -> Tensor:
        """The same numbers, but with the bias in the graph, as DistributedDataParallel needs."""
        bias = self.bias.bias
        return out + 0 * bias.sum().to(out) if torch.is_grad_enabled() and bias.requires_grad else out

    def _share(self, logits: Tensor, mask: Tensor, query: Tensor, local: Local) -> Tensor:
        """What the memory gets of the attention (B, H, T, 1): nothing where nothing was found."""
        bias: Tensor = self.bias()
        if self.combine == "softmax":
            bias = bias + logits.logsumexp(dim=-1, keepdim=True) - local.total(query)
        return bias.sigmoid() * mask.any(dim=-1, keepdim=True)

    def _placed(self, x: Tensor, *, keys: bool) -> Tensor:
        """Queries or keys (B, heads, T, D), turned to where they stand in the document, or all to one distance."""
        rotary = self.layer.rotary
        if rotary is None:
            return x
        if self.distance is None:
            return rotary.turned(x, self._of_rows(self.reading.offsets, len(x)).unsqueeze(1))
        bare = rotary.unturned(x, self._position_embeddings)
        return bare if keys else rotary.turned(bare, torch.full((1, 1), self.distance))

    def _look_up(self, query: Tensor) -> Lookup:
        with self.memory.at_batch_indices(self.reading.rows):
            self.last_lookup = self.memory.look_up(self._grouped(query), self.topk)
        return self.last_lookup

    def _of_rows(self, numbers: Tensor, batch: int) -> Tensor:
        """(R,) -> (B,): each row of the memory serves as many rows of the batch, one after the other."""
        return numbers.repeat_interleave(batch // len(numbers))

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, H, T, n) -> (R, H, B / R * T, n)."""
        rows, (batch, heads, count, size) = len(self.reading.rows), x.shape
        return x.view(rows, batch // rows, heads, count, size).transpose(1, 2).reshape(rows, heads, -1, size)

    def _of_batch(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(R, H, B / R * T, n) -> (B, H, T, n)."""
        batch, heads, count, _ = shape
        rows = len(x)
        return x.view(rows, heads, batch // rows, count, -1).transpose(1, 2).reshape(batch, heads, count, -1)
