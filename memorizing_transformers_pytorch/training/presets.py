"""Runs by name. What a preset does not say has the default of its field."""

from __future__ import annotations

from typing import Any

from memorizing_transformers_pytorch.model.config import PRESETS
from memorizing_transformers_pytorch.training.settings import Plain

# A million parameters, ten minutes on two CPU cores: local training first, the memory at the end (docs/training.md).
_SMALL: Plain = {
    "model": {
        "num_tokens": 1_024,
        "dim": 128,
        "depth": 4,
        "dim_head": 32,
        "heads": 4,
        "memorizing_layers": 2,
        "max_knn_memories": 8_192,
        "num_retrieved_memories": 16,
        "short_conv": 4,
        "qk_init": "induction",
        "pad_id": None,
    },
    "data": {"source": "stdlib"},
    "optimizer": {"schedule": "constant", "decay_share": 0.3},
    "memory": {"last_share": 0.3, "growth": [[0, 2_048]]},
    "training": {"steps": 1_000},
}

# The training of the original package: 5 segments of 512 bytes a step with fresh memories, Adam, a constant rate.
_ENWIK8: Plain = {
    "model": {**PRESETS["enwik8"], "pad_id": None},
    "data": {"source": "enwik8", "tokenizer": "bytes", "near_duplicates": None, "pack": True},
    "optimizer": {
        "learning_rate": 2e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "max_grad_norm": 0.5,
    },
    "memory": {"scope": "step"},
    "training": {"steps": 100_000, "rows": 16, "segments": 5, "validate_every": 1_000, "checkpoint_every": 1_000},
}


def _paper(model: str) -> Plain:
    """Wu et al. 2022, section 4: Adafactor, 1,000 steps of warm-up, reciprocal square root decay, 2^17 tokens a step.

    Their learning rate of 1.0 multiplies 1 / sqrt(max(step, 1000)); ours is the peak, 1 / sqrt(1000). PG-19 is read
    from a copy in Parquet: the one of its authors needs a script, which `datasets` no longer runs.
    """
    return {
        "model": {**PRESETS[model], "pad_id": None, "memory_dtype": "bfloat16"},
        "data": {"source": "hf:emozilla/pg19"},
        "optimizer": {
            "name": "adafactor",
            "learning_rate": 1_000**-0.5,
            "schedule": "rsqrt",
            "warmup_steps": 1_000,
            "weight_decay": 0.0,
        },
        "memory": {"growth": [[0, 8_192], [500_000, 65_536]]},
        "training": {
            "steps": 520_000,
            "rows": 256,
            "precision": "bf16",
            "validate_every": 5_000,
            "checkpoint_every": 1_000,
        },
    }


RUN_PRESETS: dict[str, Plain] = {
    "small": _SMALL,
    "enwik8": _ENWIK8,
    **{name: _paper(name) for name in ("paper-200m", "paper-1b", "paper-8b")},
}


def run_preset(name: str) -> dict[str, Any]:
    """A run by name, as plain data. Raises ValueError for an unknown one."""
    if name not in RUN_PRESETS:
        raise ValueError(f"expected a preset among {', '.join(RUN_PRESETS)}, got {name!r}")
    return RUN_PRESETS[name]
