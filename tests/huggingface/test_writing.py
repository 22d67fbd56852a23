"""What passes through a model in training and in writing is remembered as if it had been read."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import EVERYTHING, logits, tokens

WRITING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
WINDOW: dict[str, Any] = {**EVERYTHING, "write": "window"}


def entries(memory: AttachedMemory, layer: int = 1, row: int = 0) -> tuple[Tensor, Tensor]:
    """Keys (G, n, D) and origins (n, 3), oldest first."""
    known = memory.layers[layer].memories[0]
    count = known.num_entries[row]
    return known.store.keys[row, :, :count].floats(torch.float32), known.store.origins[row, :count]


@pytest.mark.parametrize("skip_first", [0, 2])
def test_segments_in_training_are_remembered_as_they_would_be_read(skip_first: int) -> None:
    ids = tokens(2, 24)
    read = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "skip_first": 0}, chunk=8)
    read.read(ids, progress=False, look_up=True)
    written = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "skip_first": skip_first})
    for segment in ids.split(8, dim=1):
        with written.writing(["one", "two"]):
            written.model(input_ids=segment, labels=segment).loss.backward()
    assert [(each.title, each.tokens) for each in written.documents()] == [("one", 24), ("two", 24)]
    for row in range(2):
        keys, origins = entries(written, row=row)
        expected, expected_origins = entries(read, row=row)
        kept = [place for place in range(24) if place % 8 >= skip_first]
        assert origins.tolist() == expected_origins[kept].tolist()
        if not skip_first:
            torch.testing.assert_close(keys, expected)


def test_padding_of_a_segment_is_not_remembered() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with memory.writing():
        logits(memory.model, ids, attention_mask=mask)
    assert memory.layers[1].num_entries == (8, 5)
    assert entries(memory, row=1)[1][:, 1].tolist() == [0, 1, 2, 3, 4]
    memory.clear([1])
    with memory.writing():
        logits(memory.model, ids, attention_mask=mask)
    assert [(each.row, each.tokens) for each in memory.documents()] == [(0, 16), (1, 5)]


def test_a_segment_that_fails_is_not_remembered() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(1, 8)

    def interrupted() -> None:
        with memory.writing():
            logits(memory.model, ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert memory.documents() == []
    assert memory.layers[0].num_entries == (0,)
    logits(memory.model, ids)
    assert memory.layers[0].num_entries == (0,)


def test_weights_that_change_between_segments_are_expected() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(1, 16)
    optimizer = torch.optim.SGD(memory.model.parameters(), lr=0.1)
    for segment in ids.split(8, dim=1):
        with memory.writing():
            memory.model(input_ids=segment, labels=segment).loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="model weights changed after this memory was written"):
        logits(memory.model, ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_what_leaves_the_window_is_as_good_as_seen(family: str) -> None:
    """With everything retrieved in all layers, a small window and the memory write what a cache without end does."""
    model, ids = tiny(family), tokens(2, 11)
    expected = model.generate(ids, max_new_tokens=20, **WRITING)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=7)
    cache = DynamicCache(config=model.config)
    found = model.generate(ids, max_new_tokens=20, past_key_values=cache, **WRITING)
    assert torch.equal(found, expected)
    assert cache.layers[0].keys.shape[2] == 6
    assert memory.layers[1].num_entries == (24, 24)  # 11 and 19 have passed, 6 are in the cache
    assert torch.equal(entries(memory)[1][:, 2], expected[0, :24])
    memory.clear()
    assert torch.equal(model.generate(ids, max_new_tokens=20, **WRITING), expected)


def test_a_sliding_window_with_a_memory_is_full_attention() -> None:
    model, ids = tiny("mistral", sliding_window=None), tokens(1, 8)
    expected = model.generate(ids, max_new_tokens=20, **WRITING)
    sliding = tiny("mistral", sliding_window=8)
    assert not torch.equal(sliding.generate(ids, max_new_tokens=20, **WRITING), expected)
    attach_memory(sliding, retrieve="tokens", **WINDOW, window=100)
    assert torch.equal(sliding.generate(ids, max_new_tokens=20, **WRITING), expected)


def test_padding_on_the_left_is_not_remembered_when_it_leaves_the_window() -> None:
    model, ids = tiny("llama"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, **WRITING)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, **WRITING), expected)
    assert memory.layers[1].num_entries == (23, 19)
    assert entries(memory, row=1)[1][:, 1].tolist() == list(range(19))


def test_a_chat_goes_on_with_its_cache_and_the_next_one_remembers_it() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **WRITING)
    more = torch.cat((first.sequences, tokens(1, 4, seed=5)), dim=1)
    second = model.generate(more, past_key_values=first.past_key_values, max_new_tokens=5, **WRITING)
    memory.detach()
    assert torch.equal(second, model.generate(more, max_new_tokens=5, **WRITING))

    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    model.generate(ids, max_new_tokens=5, **WRITING)
    model.generate(tokens(1, 3, seed=6), max_new_tokens=1, **WRITING)
    assert [each.tokens for each in memory.documents()] == [13, 3]
    assert entries(memory)[1][:, 1].tolist() == list(range(13))
    assert memory.place_of(0) == 16  # after both
    with pytest.raises(ValueError, match="expected the cache of the last conversation, or an empty one"):
        model.generate(more, past_key_values=first.past_key_values, max_new_tokens=1, **WRITING)


def test_what_cannot_be_remembered_in_writing_is_refused() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    with pytest.raises(ValueError, match="beams change places"):
        model.generate(ids, num_beams=3, max_new_tokens=5, **WRITING)
    memory.clear()
    model.generate(ids, max_new_tokens=5, **WRITING)
    with pytest.raises(ValueError, match="expected the 1 rows of what is remembered, got 3"):
        model.generate(ids, num_beams=3, max_new_tokens=5, **WRITING)
    with pytest.raises(ValueError, match="expected a DynamicCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=5, **WRITING)
    with pytest.raises(ValueError, match="assisted decoding takes some back"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=5, **WRITING)


def test_assisted_decoding_with_a_memory_that_is_only_read_writes_the_same() -> None:
    model, ids = tiny("llama"), tokens(1, 5).repeat(1, 3)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 30, seed=2), progress=False)
    expected = model.generate(ids, max_new_tokens=9, **WRITING)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=9, **WRITING), expected)


def test_nothing_is_remembered_inside_read_only() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    memory.read(ids, progress=False)
    before = entries(memory)[0].clone()
    with memory.read_only():
        (losses,) = memory.score(ids, progress=False)
        model.generate(ids, max_new_tokens=9, **WRITING)
        with pytest.raises(ValueError, match=r"got one inside read_only\(\)"):
            memory.read(ids, progress=False)
        with pytest.raises(ValueError, match=r"got one inside read_only\(\)"), memory.writing():
            pass
    assert losses[1:].isfinite().all()
    assert torch.equal(entries(memory)[0], before)
    assert len(memory.documents()) == 1


def test_padding_on_the_left_of_a_segment_takes_no_place() -> None:
    """Positions are those that the model was given: by itself it counts padding too."""
    ids, pads = tokens(1, 12), torch.zeros(1, 4).long()
    mask = torch.cat((pads, torch.ones(1, 12).long()), dim=1)
    kept = []
    for options in ({}, {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}):
        for recent in (100, 3):
            memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "skip_first": 4}, recent=recent)
            with memory.writing():
                logits(memory.model, torch.cat((pads, ids), dim=1), attention_mask=mask, **options)
            places = [part.store.origins[0, : part.num_entries[0], 1] for part in reversed(memory.layers[1].memories)]
            kept.append(torch.cat(places).sort().values.tolist())
            found = logits(memory.model, tokens(1, 5, seed=3))
            plain = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "skip_first": 4}, recent=recent)
            with plain.writing():
                logits(plain.model, ids)
            torch.testing.assert_close(found, logits(plain.model, tokens(1, 5, seed=3)), rtol=1e-3, atol=1e-3)
    assert kept == [list(range(8, 16))] * 2 + [list(range(4, 12))] * 2


def test_a_call_that_fails_ends_the_conversation_but_not_the_memory() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache, calls = DynamicCache(config=model.config), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 5):
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=9, **WRITING)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, max_new_tokens=9, **WRITING)
    hook.remove()
    with pytest.raises(ValueError, match="expected the cache of the last conversation, or an empty one"):
        logits(model, ids[:, :1], past_key_values=cache)
    assert [each.tokens for each in memory.documents()] == [11]
    assert entries(memory)[1][:, 1].tolist() == list(range(11))
    assert memory.place_of(0) == 11
    model.generate(ids, max_new_tokens=9, **WRITING)
    assert memory.place_of(0) == 11 + 9 + 8


def test_clearing_one_row_leaves_the_other_as_if_the_chat_had_ended() -> None:
    model, ids = tiny("llama"), tokens(2, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    model.generate(ids, max_new_tokens=5, **WRITING)
    memory.clear([0])
    assert memory.layers[1].num_entries == (0, 13)
    assert [memory.place_of(row) for row in range(2)] == [0, 13]
    assert entries(memory, row=1)[1][:, 1].tolist() == list(range(13))


def test_what_generate_adds_to_answers_that_have_ended_is_padding() -> None:
    model, ids = tiny("llama", eos_token_id=7), tokens(2, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)  # one row ends after the first token
    logits(model, torch.tensor([[7], [9]]), past_key_values=cache)
    logits(model, torch.tensor([[0], [9]]), past_key_values=cache)
    logits(model, torch.tensor([[0], [9]]), past_key_values=cache)
    memory.read(tokens(2, 3), progress=False)
    assert [each.tokens for each in memory.documents()] == [10, 12, 3, 3]
    assert entries(memory)[1][:, 2].tolist() == [*ids[0].tolist(), 7, *tokens(2, 3)[0].tolist()]
    assert [memory.place_of(row) for row in range(2)] == [13, 15]


@pytest.mark.parametrize("pad", [0, 50, None])
def test_generate_itself_stores_answers_up_to_their_end(pad: int | None) -> None:
    """Whatever it pads the other rows with; often that is the end itself."""
    plain, ids = tiny("llama"), tokens(2, 9)
    end = int(plain.generate(ids, max_new_tokens=3, **WRITING)[0, -1])
    model = tiny("llama", eos_token_id=end)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    pad = end if pad is None else pad
    options = {**WRITING, "pad_token_id": pad}
    first = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, return_dict_in_generate=True, **options
    )
    assert first.sequences[0, 12:].tolist() == [pad] * 9
    assert end not in first.sequences[1, 9:]
    assert [each.tokens for each in memory.documents()] == [12, 20]
    more = torch.cat((first.sequences, torch.tensor([[33], [44]])), dim=1)
    mask = torch.ones_like(more)
    mask[0, 12:-1] = 0
    cache = first.past_key_values
    model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=1, **options)
    assert [each.tokens for each in memory.documents()] == [13, 22]  # one token of the user each, and the last answered


@pytest.mark.parametrize("rows", [1, 2])
def test_a_chat_that_goes_on_token_by_token_after_an_end_is_remembered(rows: int) -> None:
    model, text = tiny("llama", eos_token_id=7), tokens(rows, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache = DynamicCache(config=model.config)
    logits(model, text, past_key_values=cache)
    for token in (7, 7, 21, 22, 7, 23):
        logits(model, torch.full((rows, 1), token), past_key_values=cache)
    memory.read(tokens(rows, 3), progress=False)
    assert [each.tokens for each in memory.documents()] == [15] * rows + [3] * rows
    assert entries(memory)[1][9:15, 2].tolist() == [7, 7, 21, 22, 7, 23]


def test_a_row_of_a_chat_that_goes_on_after_its_end_before_others_have_ended_is_remembered() -> None:
    model, text = tiny("llama", eos_token_id=7), tokens(2, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache = DynamicCache(config=model.config)
    logits(model, text, past_key_values=cache)
    for one, other in ((7, 30), (0, 31), (20, 32), (0, 33)):
        logits(model, torch.tensor([[one], [other]]), past_key_values=cache)
    memory.read(tokens(2, 3), progress=False)
    assert entries(memory)[1][9:12, 2].tolist() == [7, 20, 0]


@pytest.mark.parametrize("left", [False, True])
def test_several_documents_in_one_row_are_refused(left: bool) -> None:
    """Positions that begin anew: packed segments. Those of padding do not matter."""
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(1, 8)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with pytest.raises(ValueError, match="give each document a row of its own"), memory.writing():
        logits(memory.model, ids, position_ids=packed)
    mask = torch.ones_like(ids)
    if left:
        mask[0, :5] = 0
    else:
        mask[0, 5:] = 0
    with memory.writing():
        logits(memory.model, ids, position_ids=packed, attention_mask=mask)
    assert memory.layers[1].num_entries == (3 if left else 5,)
    memory.detach()
    logits(memory.model, ids, position_ids=packed)
    memory = attach_memory(memory.model, retrieve="tokens", **EVERYTHING)
    memory.read(ids, progress=False)
    logits(memory.model, ids, position_ids=packed)  # nothing is stored


def test_a_chat_that_is_remembered_does_not_go_on_where_it_cannot() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    with memory.read_only(), pytest.raises(ValueError, match=r"expected a new conversation inside read_only\(\)"):
        logits(model, ids[:, :1], past_key_values=cache)
    with memory.writing():
        logits(model, ids, use_cache=False)
    assert entries(memory)[1][:, 1].tolist() == list(range(18))
    assert [each.tokens for each in memory.documents()] == [18]


def test_only_one_call_fits_inside_writing() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    with memory.writing():
        logits(model, ids)
        with pytest.raises(ValueError, match=r"expected one call of the model with a whole segment inside writing\(\)"):
            logits(model, ids)
        with pytest.raises(ValueError, match=r"got read\(\) or score\(\)"):
            memory.read(ids, progress=False)
    assert memory.layers[1].num_entries == (9,)
    with memory.writing(["one", "two"]), pytest.raises(ValueError, match="expected a title for each of 1 documents"):
        logits(model, ids)


def test_documents_that_are_forgotten_are_not_listed() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers=[1], max_memories=30, skip_first=0, chunk=10)
    for number in range(50):
        memory.read(tokens(1, 10, seed=number), document=str(number), progress=False)
    assert [each.title for each in memory.documents()] == ["46", "47", "48", "49"]
    logits(memory.model, tokens(1, 9))
    origins = memory.last_retrieved[1]
    assert set(origins[..., 0].unique().tolist()) == {-1, 47, 48, 49}
    assert int(origins[..., 1].max()) == 9


def test_what_was_looked_up_is_told_as_it_was_then() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **{**WINDOW, "topk": 4}, window=6, max_memories=8)
    memory.read(tokens(1, 8, seed=3), progress=False)
    model.generate(ids, max_new_tokens=1, **WRITING)  # 3 tokens more enter than were there
    assert set(memory.last_retrieved[1][..., 0].unique().tolist()) == {0}


@pytest.mark.parametrize("options", [{}, {"recent": 4}], ids=["plain", "aging"])
def test_what_a_segment_found_in_a_full_row_is_told_after_it_was_stored(options: dict[str, Any]) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "topk": 4, "max_memories": 8}, **options)
    memory.read(tokens(1, 8, seed=3), document="old", progress=False)
    memory.read(tokens(1, 3, seed=4), document="older", progress=False)
    with memory.writing():
        logits(memory.model, tokens(1, 9))
        before = {index: origins.clone() for index, origins in memory.last_retrieved.items()}
    assert {int(number) for number in before[1][..., 0].unique()} - {-1} == {0, 1}
    for index, origins in memory.last_retrieved.items():
        assert torch.equal(origins, before[index])


def test_what_leaves_the_window_has_its_own_origins_where_layers_keep_different_numbers_of_tokens() -> None:
    model, ids = tiny("gemma3_text", sliding_window=8), tokens(1, 12)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=12)
    written = model.generate(ids, max_new_tokens=10, **WRITING)[0]
    for layer, kept in ((0, 7), (1, 11)):  # of 21 tokens that have passed
        _, origins = entries(memory, layer)
        assert origins[:, 1].tolist() == list(range(21 - kept))
        assert torch.equal(origins[:, 2], written[: 21 - kept])
    model.generate(ids, max_new_tokens=1, **WRITING)  # begins another conversation
    for layer in (0, 1):
        assert torch.equal(entries(memory, layer)[1][:21, 2], written[:21])


def test_a_conversation_that_is_refused_lets_other_threads_write() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **WINDOW, window=6)
    with pytest.raises(ValueError, match="beams change places"):
        memory.model.generate(tokens(1, 9), num_beams=2, max_new_tokens=3, **WRITING)
    reading = threading.Thread(target=lambda: memory.read(tokens(1, 9), progress=False), daemon=True)
    reading.start()
    reading.join(timeout=20)
    assert [each.tokens for each in memory.documents()] == [9]


def test_where_a_call_brings_what_cannot_be_stored_all_before_it_is_remembered() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", **WINDOW, window=6)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="finite"):
        model(inputs_embeds=torch.full((1, 10, 32), torch.nan), past_key_values=cache)
    assert torch.equal(entries(memory)[1][:, 2], ids[0])
    assert [each.tokens for each in memory.documents()] == [9]


def test_a_conversation_that_is_remembered_does_not_go_on_inside_read_only() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **WINDOW, window=6), tokens(1, 9)
    cache = DynamicCache(config=memory.model.config)
    logits(memory.model, ids, past_key_values=cache)
    with memory.read_only(), pytest.raises(ValueError, match="expected a new conversation inside read_only"):
        logits(memory.model, ids[:, :1], past_key_values=cache)


def test_weights_that_change_after_a_conversation_are_noticed() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **WINDOW, window=6), tokens(1, 9)
    memory.model.generate(ids, max_new_tokens=3, **WRITING)
    with torch.no_grad():
        memory.model.model.embed_tokens.weight.mul_(2)
    with pytest.warns(UserWarning, match="model weights changed after this memory was written"):
        logits(memory.model, ids)


def test_a_document_of_a_single_token_counts_as_one_of_several_in_a_row() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    with pytest.raises(ValueError, match="position_ids begin anew within a row"), memory.writing():
        logits(memory.model, tokens(1, 3), position_ids=torch.tensor([[0, 0, 1]]))
    assert memory.documents() == []
