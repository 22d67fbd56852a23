"""A model learns, in some seconds, to look keys up that lie only in its memory.

Dictionary lookup as in Focused Transformer (Tworkowski et al., NeurIPS 2023): a text is a sequence of entries, each a
key of 4 tokens and a value of 4 tokens, over a vocabulary of 64. It proves search, attention, gradients, storage and
eviction together: the answers cannot be right while one of them is wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch import KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.evaluation.controls import shuffled_values
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX

VOCABULARY = 64
KEY = VALUE = 4
ENTRY = KEY + VALUE
SEGMENT = 256
MEMORY = 2048
ROWS = 4
STEPS = 60


def make_model() -> MemorizingTransformer:
    return MemorizingTransformer(
        num_tokens=VOCABULARY,
        dim=64,
        depth=2,
        heads=2,
        dim_head=32,
        memorizing_layers=1,
        max_knn_memories=MEMORY,
        num_retrieved_memories=16,
        short_conv=KEY + 1,
        qk_init="induction",
        pad_id=None,
    )


def new_entries(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, count, ENTRY))


def with_repeats(history: Tensor) -> tuple[Tensor, Tensor]:
    """A segment of entries (B, n, 8), half of them from the history (B, m, 8), and which of them are (B, n)."""
    entries = new_entries(SEGMENT // ENTRY)
    repeated = torch.rand(entries.shape[:2]) < (0.5 if history.shape[1] > 0 else 0)
    if history.shape[1] > 0:
        old = torch.randint(0, history.shape[1], repeated.shape)
        entries = entries.where(~repeated.unsqueeze(-1), torch.take_along_dim(history, old.unsqueeze(-1), dim=1))
    return entries, repeated


def train(model: MemorizingTransformer) -> None:
    """Only the values of repeated keys are scored: the rest is noise that nobody can predict."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history, state = new_entries(0), None
    with model.knn_memories_context(batch_size=ROWS) as memories:
        for _ in range(STEPS):
            entries, repeated = with_repeats(history)
            scored = F.pad(repeated.unsqueeze(-1).expand(-1, -1, VALUE), (KEY, 0), value=False).flatten(1)
            labels = entries.flatten(1).masked_fill(~scored, IGNORE_INDEX).roll(-1, dims=1)
            loss, state = model(entries.flatten(1), memories, state, labels=labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history = torch.cat((history, entries), dim=1)[:, -MEMORY // ENTRY :]


def share_answered(model: MemorizingTransformer, memories: KNNMemoryList | None, entries: Tensor) -> float:
    """The share of keys whose four value tokens are all right. No key repeats, so none is answered from the segment."""
    state, answered = None, []
    for asked in entries.flatten(1).split(SEGMENT, dim=1):
        logits, state = model(asked, memories, state, add_knn_memory=False)
        right = F.pad(logits[:, :-1].argmax(dim=-1) == asked[:, 1:], (1, 0), value=False)
        answered.append(right.view(ROWS, -1, ENTRY)[:, :, KEY:].all(dim=-1))
    return torch.cat(answered, dim=1).float().mean().item()


def test_keys_that_lie_only_in_the_memory_are_answered() -> None:
    model = make_model()
    train(model)
    entries = new_entries(MEMORY // ENTRY)
    forgotten = new_entries(SEGMENT // ENTRY)
    asked = entries[:, torch.randperm(entries.shape[1])]
    with torch.no_grad(), model.knn_memories_context(batch_size=ROWS) as memories:
        state = None
        for segment in torch.cat((forgotten, entries), dim=1).flatten(1).split(SEGMENT, dim=1):
            _, state = model(segment, memories, state)
        assert share_answered(model, memories, asked) >= 0.9
        assert share_answered(model, None, asked) <= 0.05
        assert share_answered(model, memories, forgotten) <= 0.05
        with shuffled_values(memories[0], torch.Generator().manual_seed(0)):
            assert share_answered(model, memories, asked) <= 0.05
