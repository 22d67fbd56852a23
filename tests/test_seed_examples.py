"""The examples of the original's README, with fewer and no special tokens, and what it says in words."""

from __future__ import annotations

import torch

from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer


def test_memorizing_transformer() -> None:
    model = MemorizingTransformer(
        num_tokens=20000,
        dim=512,
        dim_head=64,
        depth=8,
        memorizing_layers=(4, 5),
        max_knn_memories=64000,
        num_retrieved_memories=32,
        clear_memories_on_sos_token_id=1,
    )
    data = torch.randint(2, 20000, (2, 256))

    knn_memories = model.create_knn_memories(batch_size=2)
    logits = model(data, knn_memories=knn_memories)
    assert logits.shape == (2, 256, 20000)
    assert [memory.num_entries for memory in knn_memories] == [(256, 256)] * 2

    # read-only
    logits = model(data, knn_memories=knn_memories, add_knn_memory=False)
    assert logits.shape == (2, 256, 20000)
    assert [memory.num_entries for memory in knn_memories] == [(256, 256)] * 2

    # "otherwise, you can also manually iterate through the ANN memories and clear the indices"
    for memory in knn_memories:
        memory.clear([0])
    assert [memory.num_entries for memory in knn_memories] == [(0, 256)] * 2
    data[1, 10] = 1
    model(data, knn_memories=knn_memories)
    assert [memory.num_entries for memory in knn_memories] == [(256, 246)] * 2


def test_memorizing_transformer_with_xl_memories() -> None:
    model = MemorizingTransformer(
        num_tokens=20000,
        dim=512,
        depth=8,
        memorizing_layers=(4, 5),
        max_knn_memories=64000,
        num_retrieved_memories=32,
        clear_memories_on_sos_token_id=1,
        xl_memory_layers=(2, 3, 4, 5),
        xl_max_memories=512,
        shift_knn_memories_down=1,
        shift_xl_memories_down=1,
    )
    data = torch.randint(2, 20000, (2, 256))

    xl_memories = None
    with model.knn_memories_context(batch_size=2) as knn_memories:
        logits1, xl_memories = model(data, knn_memories=knn_memories, xl_memories=xl_memories)
        logits2, xl_memories = model(data, knn_memories=knn_memories, xl_memories=xl_memories)
        logits3, xl_memories = model(data, knn_memories=knn_memories, xl_memories=xl_memories)
        assert [memory.num_entries for memory in knn_memories] == [(3 * 256 - 512,) * 2] * 2

    assert logits1.shape == logits2.shape == logits3.shape == (2, 256, 20000)
    assert len(xl_memories) == 4
    assert all(pairs.shape == (2, 1, 512, 2, 64) for pairs in xl_memories)
    assert not torch.allclose(logits1, logits2, atol=1e-4)


def test_knn_memory() -> None:
    memory = KNNMemory(dim=64, max_memories=64000, num_indices=2)

    memory.add(torch.randn(2, 512, 2, 64))
    memory.add(torch.randn(2, 512, 2, 64))

    memory.clear([0])

    memory.add(torch.randn(2, 512, 2, 64))
    memory.add(torch.randn(2, 512, 2, 64))

    key_values, mask = memory.search(torch.randn(2, 512, 64), topk=32)
    assert key_values.shape == (2, 512, 32, 2, 64)
    assert mask.shape == (2, 512, 32)
    assert mask.all()
    assert memory.num_entries == (1024, 2048)
