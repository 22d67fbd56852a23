"""ModelConfig: everything that makes a `MemorizingTransformer` what it is. It refuses what makes no sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, cast

IGNORE_INDEX = -100  # labels that are not scored
DTYPES = ("float32", "bfloat16", "float16", "int8")

_AT_LEAST_ONE = ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "max_knn_memories")
_AT_LEAST_ZERO = ("xl_max_memories", "shift_knn_memories_down", "shift_xl_memories_down", "short_conv")
_AT_MOST = 2**31 - 1
_TOKEN_IDS = ("pad_id", "clear_memories_on_sos_token_id", "clear_memories_on_eos_token_id")


class ModelFields(TypedDict, total=False):
    """The fields of `ModelConfig` as keyword arguments, which an editor can complete."""

    num_tokens: int
    dim: int
    depth: int
    dim_head: int
    heads: int
    knn_attn_heads: int | None
    num_kv_heads: int
    attn_dropout: float
    ff_mult: int
    ff_dropout: float
    memorizing_layers: int | tuple[int, ...] | None
    max_knn_memories: int
    num_retrieved_memories: int
    combine: str
    memory_dtype: str
    memory_index: str
    knn_memories_directory: str | None
    clear_memories_on_sos_token_id: int | None
    clear_memories_on_eos_token_id: int | None
    shift_knn_memories_down: int
    pad_id: int | None
    xl_max_memories: int
    xl_memory_layers: int | tuple[int, ...] | None
    shift_xl_memories_down: int
    short_conv: int
    qk_init: str
    tie_embeddings: bool
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The arguments of `MemorizingTransformer`, checked. Layers are numbered from 1.

    Raises ValueError for values that make no sense.
    """

    num_tokens: int
    """Size of the vocabulary."""
    dim: int
    """Model width E."""
    depth: int
    """Number of layers."""
    dim_head: int = 64
    """Head width D."""
    heads: int = 8
    """Query heads H of ordinary layers."""
    knn_attn_heads: int | None = None
    """Query heads of memorizing layers; as many as in the others if None."""
    num_kv_heads: int = 1
    """Key/value heads G of every layer; 1 is multi-query attention."""
    attn_dropout: float = 0.0
    """Dropout of attention weights."""
    ff_mult: int = 4
    """Width of the feed-forward layers, as a multiple of dim."""
    ff_dropout: float = 0.0
    """Dropout inside feed-forward layers."""
    memorizing_layers: int | tuple[int, ...] | None = None
    """The layers that have a memory; the middle one if None, none if ()."""
    max_knn_memories: int = 250_000
    """Capacity M of each row of each memory, in entries."""
    num_retrieved_memories: int = 32
    """Entries K retrieved for each query."""
    combine: str = "softmax"
    """"softmax" over retrieved and local keys together, or the paper's "gate" between the two."""
    memory_dtype: str = "float32"
    """How memories store keys and values: float32, bfloat16, float16, or int8 with a scale for each vector."""
    memory_index: str = "exact"
    """How memories are searched: exact, auto or inverted lists such as IVF1024,SQfp16 (see `KNNMemory`)."""
    knn_memories_directory: str | None = None
    """Keep memories in memory-mapped files below this folder instead of in RAM."""
    clear_memories_on_sos_token_id: int | None = None
    """A row with this token is cleared before its segment is searched."""
    clear_memories_on_eos_token_id: int | None = None
    """A row with this token is cleared after its segment is stored."""
    shift_knn_memories_down: int = 0
    """The i-th memorizing layer reads the memory that the (i + n)-th writes, wrapping round."""
    pad_id: int | None = 0
    """Where no mask is given, a run of this token at the end of a row is padding; None for no padding."""
    xl_max_memories: int = 0
    """Pairs of earlier segments that layers with Transformer-XL memory attend to."""
    xl_memory_layers: int | tuple[int, ...] | None = None
    """The layers with Transformer-XL memory; all if None and xl_max_memories > 0."""
    shift_xl_memories_down: int = 0
    """The i-th layer with XL memory reads that of the (i + n)-th, wrapping round (Ding et al. 2021)."""
    short_conv: int = 0
    """Width of a causal depthwise convolution over queries and keys of memorizing layers; 0 for none."""
    qk_init: str = "independent"
    """"induction" starts memorizing layers as induction heads; needs short_conv >= 2."""
    tie_embeddings: bool = False
    """Share the weights of token embedding and output layer."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_dtype", str(self.memory_dtype).removeprefix("torch."))
        if self.knn_memories_directory is not None:
            object.__setattr__(self, "knn_memories_directory", str(self.knn_memories_directory))
        self._check_sizes()
        self._check_token_ids()
        for name in ("memorizing_layers", "xl_memory_layers"):
            layers = getattr(self, name)
            if layers is not None:
                object.__setattr__(self, name, self._checked_layers(name, layers))
        self._check_choices()

    def _check_sizes(self) -> None:
        optional = () if self.knn_attn_heads is None else ("knn_attn_heads",)
        for name in (*_AT_LEAST_ONE, *optional, "num_kv_heads", "num_retrieved_memories", *_AT_LEAST_ZERO):
            least, value = int(name not in _AT_LEAST_ZERO), getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name} to be an integer of at least {least}, got {value!r}")
            if value > _AT_MOST:
                raise ValueError(f"expected {name} to be at most {_AT_MOST}, got {value}")
        for name in ("heads", *optional):
            if getattr(self, name) % self.num_kv_heads != 0:
                expected = f"{name} to be a multiple of num_kv_heads={self.num_kv_heads}"
                raise ValueError(f"expected {expected}, got {getattr(self, name)}")
        for name in ("attn_dropout", "ff_dropout"):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} from 0 to below 1, got {getattr(self, name)}")

    def _check_choices(self) -> None:
        choices = {"combine": ("softmax", "gate"), "qk_init": ("independent", "induction"), "memory_dtype": DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected {name} to be one of {allowed}, got {getattr(self, name)!r}")
        if self.qk_init == "induction" and self.short_conv < 2:
            raise ValueError(f"expected short_conv of at least 2 for qk_init='induction', got {self.short_conv}")
        if self.xl_memory_layers not in (None, ()) and self.xl_max_memories == 0:
            raise ValueError(f"expected xl_max_memories above 0 for xl_memory_layers={self.xl_memory_layers}, got 0")

    def _check_token_ids(self) -> None:
        for name in _TOKEN_IDS:
            token_id = getattr(self, name)
            if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < self.num_tokens):
                raise ValueError(f"expected {name} from 0 to {self.num_tokens - 1} or None, got {token_id}")

    def _checked_layers(self, name: str, layers: int | tuple[int, ...]) -> tuple[int, ...]:
        given = tuple(layers) if isinstance(layers, tuple | list) else (layers,)
        known = all(isinstance(layer, int) and 1 <= layer <= self.depth for layer in given)
        if not known or len(set(given)) != len(given):
            raise ValueError(f"expected {name} to be distinct layers from 1 to {self.depth}, got {given}")
        return tuple(sorted(given))

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """`memorizing_layers`, in order; the middle one unless given."""
        if self.memorizing_layers is None:
            return (max(self.depth // 2, 1),)
        return cast(tuple[int, ...], self.memorizing_layers)

    @property
    def layers_with_xl(self) -> tuple[int, ...]:
        """`xl_memory_layers`, in order; with XL memory all of them unless given."""
        if self.xl_memory_layers is None:
            return tuple(range(1, self.depth + 1)) if self.xl_max_memories > 0 else ()
        return cast(tuple[int, ...], self.xl_memory_layers)

    @property
    def memory_heads(self) -> int:
        """`knn_attn_heads`; as many as `heads` unless given."""
        return self.heads if self.knn_attn_heads is None else self.knn_attn_heads

    @property
    def num_kv_pairs_kept(self) -> int:
        """Pairs that XL memory keeps; 0 without layers that have it."""
        return self.xl_max_memories if self.layers_with_xl else 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, with values that JSON can hold."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for fields that are unknown or missing."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        missing = sorted(n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields)
        if unknown or missing:
            raise ValueError(f"expected the fields of ModelConfig, got unknown {unknown} and missing {missing}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Unpack[ModelFields]) -> ModelConfig:
        """A named configuration with some fields changed: see `PRESETS`. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"expected a preset among {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})


# Wu et al. 2022: one memorizing layer three quarters up (the 9th of 12), keys and values per head, the gate, k = 32,
# XL memory as long as the 512-token segments. Widths of 1B and 8B are theirs; where we found no figure for these two
# (head width, memorizing layer) that of the 200M model is carried over.
_PAPER: dict[str, Any] = {
    "num_tokens": 32_000,
    "dim_head": 128,
    "num_retrieved_memories": 32,
    "max_knn_memories": 65_536,
    "combine": "gate",
    "xl_max_memories": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The enwik8 run of the original package: bytes, multi-query attention, XL memory in the last two layers.
    "enwik8": {
        "num_tokens": 256,
        "dim": 512,
        "depth": 8,
        "memorizing_layers": 4,
        "max_knn_memories": 7_680,
        "num_retrieved_memories": 32,
        "xl_memory_layers": (7, 8),
        "xl_max_memories": 512,
    },
    "paper-200m": {**_PAPER, "dim": 1024, "depth": 12, "heads": 8, "num_kv_heads": 8, "memorizing_layers": 9},
    "paper-1b": {
        **_PAPER,
        "dim": 2048,
        "depth": 8,
        "heads": 32,
        "num_kv_heads": 32,
        "ff_mult": 8,
        "memorizing_layers": 6,
    },
    "paper-8b": {
        **_PAPER,
        "dim": 4096,
        "depth": 16,
        "heads": 64,
        "num_kv_heads": 64,
        "ff_mult": 8,
        "memorizing_layers": 12,
    },
}
