"""Chats without end with a memory of passages: what leaves the cache is stored, and recalled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from tests.huggingface.families import tiny
from tests.huggingface.spans import attached, tokens

WINDOW: dict[str, Any] = {"write": "window", "window": 12, "every": 4, "passages": 8, "span": 8, "first": 0}
CONTENTS = pytest.mark.parametrize("content", ["kv", "tokens"])


def written(model: Any, prompt: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    mask = options.pop("mask", torch.ones_like(prompt))
    found: torch.Tensor = model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return found


@CONTENTS
def test_a_chat_of_which_all_is_recalled_is_as_one_with_all_in_its_context(content: str) -> None:
    model, prompt = tiny("llama"), tokens(1, 9)
    expected = written(model, prompt, 40)
    memory = attached(model, content=content, **WINDOW)
    assert torch.equal(written(model, prompt, 40), expected)
    stored = memory.place_of(0)
    assert 48 - 12 - 4 - 1 <= stored <= 48 - 12  # the rest is in the cache
    memory.forget(where=lambda _: False)  # whatever changes the memory ends the chat, the rest of which is stored
    assert memory.place_of(0) == 48


def test_rows_of_a_chat_are_as_each_by_itself() -> None:
    # (Keys of token ids are made anew, a piece at a time, and pieces begin elsewhere where a row has padding.)
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    together = tiny("llama")
    memory = attached(together, content="kv", **WINDOW)
    both = written(together, prompt, 30, mask=mask)
    assert memory.num_rows == 2
    alone = tiny("llama")
    attached(alone, content="kv", **WINDOW)
    assert torch.equal(written(alone, prompt[1:, 4:], 30)[0, 5:], both[1, 9:])


def test_a_chat_goes_on_with_its_cache_and_forgets_what_it_shall() -> None:
    model, prompt = tiny("llama"), tokens(1, 9)
    memory = attached(model, content="kv", **WINDOW)
    first = written(model, prompt, 30, return_dict_in_generate=True)
    more = torch.cat((first.sequences, tokens(1, 5, seed=3)), dim=1)
    second = written(model, more, 30, past_key_values=first.past_key_values)
    assert second.shape == (1, 9 + 30 + 5 + 30)
    assert first.past_key_values.get_seq_length() == second.shape[1] - 1
    (document,) = memory.documents()
    assert memory.forget(document.number) > 0
    assert memory.recall(prompt) == []
    with pytest.raises(ValueError, match="expected the cache of the last conversation"):
        written(model, torch.cat((second, tokens(1, 2)), dim=1), 2, past_key_values=first.past_key_values)


def test_what_is_refused_stores_nothing() -> None:
    model, prompt = tiny("llama"), tokens(1, 9)
    memory = attached(model, content="kv", **WINDOW)
    for options, message in (
        ({"num_beams": 2}, "beams change places"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"past_key_values": StaticCache(model.config, max_cache_len=64)}, "needs a DynamicCache"),
    ):
        with pytest.raises(ValueError, match=message):
            written(model, prompt, 20, **options)
    assert not memory.documents()
    cache = DynamicCache()
    model(prompt, past_key_values=cache)
    with memory.read_only():
        with pytest.raises(ValueError, match="expected a new conversation"):
            model(prompt[:, :1], past_key_values=cache)
        written(model, prompt, 30)
    assert not memory.documents()
    with pytest.raises(ValueError, match="use write='read'"):
        attached(tiny("gpt2"), content="tokens", **WINDOW)


def test_a_call_that_cannot_find_passages_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    memory = attached(model, content="kv", **WINDOW)

    def broken(*_: Any) -> None:
        raise FloatingPointError("no passages")

    monkeypatch.setattr(memory._at_work.recall, "before", broken)
    with pytest.raises(FloatingPointError, match="no passages"):
        written(model, tokens(1, 9), 2)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(memory._at_work.lock.acquire, False).result()
