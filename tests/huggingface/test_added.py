"""A layer added to a model: at first it changes nothing, and it attends with a cache as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import Added, AttachedMemory, attach_memory
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import logits, tokens

WRITING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 9}


def added(family: str = "llama", *, layers: Any = (0, 1), sizes: Any = True, opened: bool = True) -> AttachedMemory:
    """A tiny model with added layers, whose gates are open unless told otherwise."""
    sizes = Added(heads=2, dim_head=8) if sizes is True else sizes
    memory = attach_memory(tiny(family), retrieve="tokens", layers=layers, added=sizes, topk=8, index="exact")
    if opened:
        with torch.no_grad():
            for module in memory.model.modules():
                if hasattr(module, "output_gate"):
                    module.output_gate.fill_(2.0)
    return memory


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_it_changes_nothing_before_it_has_learned_and_after_it_was_taken_away(family: str) -> None:
    plain, ids = tiny(family), tokens(2, 9)
    expected = logits(plain, ids)
    memory = added(family, opened=False)
    memory.read(tokens(1, 20, seed=1), progress=False)
    assert torch.equal(logits(memory.model, ids), expected)
    memory.detach()
    memory = added(family)
    assert not torch.equal(logits(memory.model, ids), expected)
    with memory.enabled(False):
        assert torch.equal(logits(memory.model, ids), expected)
    memory.detach()
    assert torch.equal(logits(memory.model, ids), expected)
    assert list(memory.model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sizes", [True, Added(heads=4, dim_head=4, num_kv_heads=2, short_conv=0)])
def test_it_writes_with_a_cache_what_it_writes_without(family: str, sizes: Any) -> None:
    memory, ids = added(family, sizes=sizes), tokens(2, 6)
    memory.read(tokens(1, 20, seed=1), progress=False)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for options in ({}, {"num_beams": 3}):
        expected = memory.model.generate(ids, attention_mask=mask, use_cache=False, **WRITING, **options)
        assert torch.equal(memory.model.generate(ids, attention_mask=mask, **WRITING, **options), expected)
    alone = memory.model.generate(ids[1:, 2:], **WRITING)
    together = memory.model.generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(alone[0], together[1, 2:])


def test_only_the_added_layers_learn() -> None:
    memory, ids = added(), tokens(2, 9)
    memory.model.requires_grad_(False)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    memory.read(tokens(1, 20, seed=1), progress=False)
    with pytest.raises(ValueError, match="expected the 1 rows of what is remembered, got 2"), memory.writing():
        logits(memory.model, ids)
    memory.model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in memory.parameters())
    assert sum(bool(parameter.grad is not None) for parameter in memory.model.parameters()) == len(memory.parameters())


def test_it_finds_again_what_it_has_read() -> None:
    """It starts as an induction head: where three tokens were read before, it looks at what came after them."""
    memory = added(layers=[0], sizes=Added(heads=2, dim_head=64))
    book = torch.randperm(90)[:60] + 2
    memory.read(book, progress=False)
    logits(memory.model, book[None, 20:40])
    found = memory.last_retrieved[0]  # (1, 2, 20, 8, 3)
    assert bool((found[..., 0] == 0).all())
    assert torch.equal(found[..., 2], book[found[..., 1]])
    hits = found[..., 1] == torch.arange(21, 41)[None, None, :, None]
    assert float(hits.any(dim=-1)[..., 4:].float().mean()) > 0.5
    assert float(hits[..., 4:, 0].float().mean()) > 0.3  # of random ones a sixtieth


def test_auto_adds_one_layer() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", added=True)
    assert len(memory.layers) == 1
    assert "entries={" in repr(memory)
    with pytest.raises(ValueError, match="expected a DynamicCache"):
        memory.model.generate(tokens(1, 3), cache_implementation="static", max_new_tokens=2)
    memory.detach()
    with pytest.raises(ValueError, match="expected write='read' with an added layer"):
        attach_memory(memory.model, retrieve="tokens", added=True, write="window", window=9)


def test_a_cache_without_a_place_for_it_is_refused() -> None:
    from transformers import DynamicCache

    memory, ids = added(), tokens(1, 6)
    cache = memory.model(input_ids=ids, use_cache=True).past_key_values
    for bad in (cache, DynamicCache()):
        with pytest.raises(ValueError, match=r"expected past_key_values=DynamicCache\(config=model.config\)"):
            logits(memory.model, ids, past_key_values=bad)
    with pytest.raises(ValueError, match="which has one: detach"):
        attach_memory(memory.model, retrieve="tokens", added=True)


def test_an_adapter_has_a_copy_that_learns(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    memory = added(layers=[1])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_attention"])
    adapted = peft.get_peft_model(memory.model, config)
    assert all(parameter.requires_grad for parameter in memory.parameters())
    memory.read(tokens(1, 20), progress=False)
    ids = tokens(1, 9)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in memory.parameters())


def test_it_remembers_what_is_read_without_looking_up() -> None:
    memory = added()
    memory.read(tokens(1, 20), progress=False)
    assert {site.num_entries for site in memory.layers.values()} == {(16,)}  # but for skip_first
