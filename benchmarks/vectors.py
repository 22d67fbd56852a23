"""Keys and queries of a trained model, as a memory meets them: unlike random ones they have neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.run import load_run
from memorizing_transformers_pytorch.training.settings import from_plain, merged

SEGMENT, HEADS, DIM_HEAD = 512, 8, 64


def trained_vectors(folder: Path, count: int, steps: int, device: str) -> Path:
    """A file with keys (count, D) in the order of the text and the queries (H, T, D) that come after the last of them.

    The model is that of the preset `small` with heads of width 64, trained for so many steps on Python's standard
    library; the text is that of its longest training documents, one after the other. Made once, on the device.
    """
    file = folder / f"vectors-{steps}-{count}.pt"
    if not file.is_file():
        config = trained_config(steps, device)
        run = folder / f"model-{steps}"
        if not (run / "done").is_file():
            train(config, run, resume=run.exists())
            (run / "done").touch()
        keys, queries = read(load_run(run, device=device).model, text_of(config, count), count)
        torch.save({"keys": keys, "queries": queries}, file)
    return file


def trained_config(steps: int, device: str) -> RunConfig:
    changes = {
        "model": {"dim_head": DIM_HEAD, "heads": HEADS // 2},
        "training": {"steps": steps},
        "device": "cpu" if device == "cpu" else "auto",
    }
    return from_plain(merged(run_preset("small"), changes))


def text_of(config: RunConfig, count: int) -> Tensor:
    """So many tokens, in whole segments, and two more segments (n,)."""
    documents = sorted(prepare(config.data, config.model.num_tokens, progress=False).train, key=len, reverse=True)
    wanted = -(-count // SEGMENT) * SEGMENT + 2 * SEGMENT
    tokens = np.concatenate(documents)[:wanted]
    if len(tokens) < wanted:
        raise ValueError(f"expected {wanted:,} tokens of text, got {len(tokens):,}")
    return torch.from_numpy(tokens.astype(np.int64))


@torch.inference_mode()
def read(model: MemorizingTransformer, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The keys of the first `count` tokens, and the queries of the two segments that follow as those of more heads."""
    seen: dict[str, Any] = {}
    block: Any = model.layers[model.config.layers_with_memory[0] - 1][0]  # type: ignore[index]
    handle = block.register_forward_hook(lambda _module, _inputs, attended: seen.update(reading=attended.reading))
    keys, queries = [], []
    with model.knn_memories_context(batch_size=1, max_memories=SEGMENT) as memories:
        for segment in torch.split(tokens, SEGMENT):
            model(segment[None].to(model.device), memories)
            keys.append(memories[0].store.keys[0, 0, : len(segment)].clone().numbers.cpu())
            if seen["reading"] is not None:
                queries = [*queries[-1:], seen["reading"].queries[0].cpu()]
    handle.remove()
    return torch.cat(keys)[:count], torch.cat(queries)


if __name__ == "__main__":
    raise SystemExit("this is used by `python -m benchmarks`")
