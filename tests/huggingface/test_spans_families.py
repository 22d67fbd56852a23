"""With passages before its text a model of any family gives what it gives after the same keys and values by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import memory_of
from tests.huggingface.families import FEW, LEARNED_POSITIONS, ONLY_EAGER, REFUSED, SERVED, tiny
from tests.huggingface.spans import NOTHING_ELSE, attached, close, logits, logits_by_hand, plain, read, recalled, tokens

MORE = {"gemma", "glm", "mistral", "olmo2", "qwen3", "stablelm", "mixtral", "phi3", "apertus", "ministral"}


def among(few: Any) -> pytest.MarkDecorator:
    """These families, and the others when all are asked for."""
    chosen = [each if each in few else pytest.param(each, marks=pytest.mark.families) for each in SERVED]
    return pytest.mark.parametrize("family", chosen)


WITHOUT = {"mamba", "recurrent_gemma", "rwkv"}  # keep no keys and values


def limit(family: str) -> float:
    return 2e-5 if family == "gpt_oss" else 1e-5  # its router magnifies what float32 rounds


def backend(family: str) -> str:
    return "eager" if family in ONLY_EAGER else "sdpa"


def bits_stay(memory: Any, model: Any, ids: torch.Tensor, before: torch.Tensor) -> None:
    """An empty memory, a disabled one, and one taken away change no bit."""
    assert torch.equal(logits(model, ids), before)
    read(memory, tokens(1, 50, seed=1))
    assert not torch.equal(logits(model, ids), before)
    with memory.enabled(False):
        assert torch.equal(logits(model, ids), before)
    memory.clear()
    assert torch.equal(logits(model, ids), before)
    memory.detach()
    assert torch.equal(logits(model, ids), before)


@among(FEW)
def test_an_empty_memory_changes_no_bit_and_neither_does_one_taken_away(family: str) -> None:
    model, ids = tiny(family, backend(family)), tokens(2, 20)
    before, names = logits(model, ids), list(model.state_dict())
    written = model.generate(ids, **NOTHING_ELSE)
    memory = attached(model)
    assert torch.equal(model.generate(ids, **NOTHING_ELSE), written)
    bits_stay(memory, model, ids, before)
    assert list(model.state_dict()) == names


@among({*FEW, *MORE})
def test_passages_are_as_the_same_keys_and_values_by_hand(family: str) -> None:
    texts, ids = [tokens(1, 40, seed=1)[0], tokens(1, 30, seed=2)[0]], tokens(1, 9, seed=3)
    for attention in {"eager", backend(family)} if family in FEW else {backend(family)}:
        model = tiny(family, attention)
        for content in ("tokens",) if family in LEARNED_POSITIONS else ("kv", "tokens"):
            memory = read(attached(model, content=content), *texts)
            found, passages = logits(model, ids), recalled(memory)[:, 2]
            assert len(passages) == memory.options.budget == 26
            expected = (
                logits_by_hand(memory, texts, ids)
                if content == "kv"
                else plain(memory, torch.cat((passages[None], ids), dim=1))[:, 26:]
            )
            assert close(found, expected, limit(family))
            memory.detach()


@among(FEW)
def test_with_everything_recalled_it_is_full_context(family: str) -> None:
    model, ids = tiny(family, backend(family)), tokens(1, 60)
    expected = logits(model, ids)[:, 40:]
    for content in ("tokens",) if family in LEARNED_POSITIONS else ("kv", "tokens"):
        memory = read(attached(model, content=content, span=40), ids[:, :40])
        assert close(logits(model, ids[:, 40:]), expected, limit(family))
        assert recalled(memory)[:, 1].tolist() == list(range(40))
        memory.detach()


@pytest.mark.parametrize("family", sorted(LEARNED_POSITIONS))
def test_learned_positions_are_served_by_reading_again(family: str) -> None:
    model = tiny(family)
    assert attached(model).options.content == "tokens"
    memory_of(model).detach()
    with pytest.raises(ValueError, match="use content='tokens'"):
        attached(model, content="kv")


@pytest.mark.parametrize("family", [family for family in REFUSED if family not in WITHOUT])
def test_families_without_movable_keys_read_passages_again(family: str) -> None:
    pytest.importorskip("bm25s")
    model, ids = tiny(family), tokens(1, 60)
    before, expected = logits(model, ids), logits(model, ids)[:, 40:]
    memory = attached(model, content="tokens", finder="bm25", span=40, chunk=128)
    read(memory, ids[:, :40])
    assert close(logits(model, ids[:, 40:]), expected, 2e-5)
    written = model.generate(ids[:, 40:], **NOTHING_ELSE)[:, 20:]
    memory.clear()
    bits_stay(memory, model, ids, before)
    assert torch.equal(written, model.generate(ids, **NOTHING_ELSE)[:, 60:])


@pytest.mark.parametrize("family", sorted(WITHOUT))
def test_families_without_keys_and_values_in_their_cache_are_refused(family: str) -> None:
    model, ids = tiny(family), tokens(2, 9)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=r"cannot have a memory"):
        attached(model, content="tokens", finder="bm25")
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_layers_with_a_window_see_passages_as_far_as_it_reaches(family: str) -> None:
    """As if passages and prompt were one text: what is farther away than the window is not seen."""
    model, ids = tiny(family, "eager", sliding_window=16), tokens(1, 60)
    for content in ("kv", "tokens"):
        memory = attached(model, content=content, span=40)
        read(memory, ids[:, :40])
        expected = plain(memory, ids)[:, 40:]
        assert close(logits(model, ids[:, 40:]), expected, limit(family))
        written = model.generate(ids[:, 40:], **NOTHING_ELSE)[:, 20:]
        memory.detach()
        assert torch.equal(written, model.generate(ids, **NOTHING_ELSE)[:, 60:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_half_precision_is_close_to_the_same_by_hand(dtype: torch.dtype, content: str) -> None:
    texts, ids = [tokens(1, 40, seed=1)[0], tokens(1, 30, seed=2)[0]], tokens(1, 9, seed=3)
    memory = read(attached(tiny("llama", "sdpa").to(dtype), content=content), *texts)
    assert next(iter(memory.layers.values())).memories[0].dtype == dtype
    found, passages = logits(memory.model, ids), recalled(memory)[:, 2]
    assert found.dtype == dtype
    expected = (
        logits_by_hand(memory, texts, ids)
        if content == "kv"
        else plain(memory, torch.cat((passages[None], ids), dim=1))[:, 26:]
    )
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 0.05
