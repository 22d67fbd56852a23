"""Three segments through the original package, written to a file: configuration, weights, inputs and outputs.

Run by make_golden.sh in the original's environment. Its index is approximate; with a wider search (efSearch) it is
exact for so few entries, and every search is checked against brute force: where one differs there is no golden file.
"""

from __future__ import annotations

import json
import sys

import memorizing_transformers_pytorch.knn_memory as original
import torch
from safetensors.torch import save_file

from memorizing_transformers_pytorch import MemorizingTransformer

CONFIG = {
    "num_tokens": 61,
    "dim": 48,
    "depth": 4,
    "dim_head": 16,
    "heads": 3,
    "memorizing_layers": (2, 4),
    "max_knn_memories": 500,
    "num_retrieved_memories": 5,
}
ROWS, SEGMENTS, SEGMENT_LENGTH = 2, 3, 19


def search_exactly(memory, queries, topk, **options):
    """The original search, which must have found what brute force finds."""
    key_values, mask = search(memory, queries, topk, **options)
    for row, knn_queries in enumerate(queries):
        count = int(memory.db_offsets[row])
        keys = torch.from_numpy(memory.db[row, :count, 0]).float()
        expected = (knn_queries @ keys.mT).topk(min(topk, count), dim=-1).values
        found = (knn_queries.unsqueeze(-2) * key_values[row, ..., 0, :]).sum(dim=-1).masked_fill(~mask[row], -2)
        found = found.sort(dim=-1, descending=True).values[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    return key_values, mask


search = original.KNNMemory.search
original.KNNMemory.search = search_exactly


@torch.no_grad()
def main(path: str) -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(**CONFIG).eval()
    tokens = torch.randint(1, CONFIG["num_tokens"], (ROWS, SEGMENTS * SEGMENT_LENGTH))
    with model.knn_memories_context(batch_size=ROWS) as memories:
        for memory in memories:
            for knn in memory.knns:
                knn.index.hnsw.efSearch = 500
        logits = [model(segment, memories) for segment in tokens.split(SEGMENT_LENGTH, dim=1)]
    tensors = {f"weights.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {"tokens": tokens, "logits": torch.cat(logits, dim=1)}
    about = {"made_by": "memorizing-transformers-pytorch 0.4.1", "torch": torch.__version__}
    about |= {"config": json.dumps(CONFIG), "segment_length": str(SEGMENT_LENGTH)}
    save_file(tensors, path, metadata=about)


if __name__ == "__main__":
    main(sys.argv[1])
