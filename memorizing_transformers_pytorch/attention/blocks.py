"""The pre-norm residual blocks that a layer is made of."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from memorizing_transformers_pytorch.attention.attention import Attended, Attention
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention


class AttentionBlock(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, dim: int, fn: Attention | KNNAttention) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **context: Any) -> Attended:
        """x (B, T, E) and what `attend` of the layer takes."""
        attended = self.fn.attend(self.norm(x), **context)
        return attended._replace(out=x + attended.out)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class FeedForwardBlock(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, dim: int, fn: FeedForward) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.fn(self.norm(x)))
