"""A model with passages before its text writes what it would write with their text before the prompt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache, pipeline

from memorizing_transformers_pytorch.huggingface import memory_of
from memorizing_transformers_pytorch.huggingface.prefix import prefix_of
from tests.huggingface.families import tiny
from tests.huggingface.spans import NOTHING_ELSE, attached, close, logits, plain, read, recalled, tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "several": {"do_sample": True, "num_return_sequences": 3},
}
TEXT, PROMPT = tokens(1, 30, seed=1), tokens(1, 10, seed=2)
WHOLE = torch.cat((TEXT, PROMPT), dim=1)


def everything(model: Any, **options: Any) -> Any:
    """A memory of the text of 30 tokens, all of which are recalled."""
    return read(attached(model, **{"span": 20, **options}), TEXT)


@torch.no_grad()
def written(model: Any, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    found: Tensor = model.generate(ids, **NOTHING_ELSE | options)[:, ids.shape[1] :]
    return found


@pytest.mark.parametrize("content", ["kv", "tokens"])
@pytest.mark.parametrize("way", WAYS)
def test_it_writes_as_with_the_text_before_the_prompt(way: str, content: str) -> None:
    model, options = tiny("llama", "sdpa"), WAYS[way]
    expected = written(model, WHOLE, **options)
    everything(model, content=content)
    assert torch.equal(written(model, PROMPT, **options), expected)


def test_assisted_decoding_writes_what_greedy_decoding_does() -> None:
    model, assistant = tiny("llama", "sdpa"), tiny("llama", "sdpa", num_hidden_layers=1)
    everything(model)
    assert torch.equal(written(model, PROMPT, assistant_model=assistant), written(model, PROMPT))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_each_row_of_an_uneven_batch_is_continued_as_alone(attention: str, content: str) -> None:
    """Prompts are padded on the left, and each has passages of its own, chosen anew every few tokens."""
    model = tiny("llama", attention)
    memory = read(attached(model, content=content), tokens(1, 200, seed=4))
    ids, mask = tokens(3, 12, seed=5), torch.ones(3, 12).long()
    mask[1, :5], mask[2, :9] = 0, 0
    before = plain(memory, ids)
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)  # as `generate` gives them
    found = logits(model, ids, attention_mask=mask, position_ids=places)
    assert torch.equal(logits(model, ids, attention_mask=mask), found)
    passages = [recalled(memory, row) for row in range(3)]
    assert len({tuple(each[:, 1].tolist()) for each in passages}) > 1
    together = written(model, ids, attention_mask=mask, max_new_tokens=12)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(written(model, ids, attention_mask=mask, max_new_tokens=12, **static), together)
    for row, skipped in enumerate((0, 5, 9)):
        alone = ids[row : row + 1, skipped:]
        assert close(found[row : row + 1, skipped:], logits(model, alone), 2e-5)
        assert torch.equal(recalled(memory), passages[row])
        assert torch.equal(written(model, alone, max_new_tokens=12)[0], together[row])
    assert torch.equal(plain(memory, ids), before)


def test_padding_takes_no_positions_in_calls_one_after_the_other() -> None:
    """As the bare model, a row with padding gives what it gives alone, without `position_ids`."""
    model, ids, mask = tiny("llama", "sdpa"), tokens(2, 12, seed=5), torch.ones(2, 12).long()
    read(attached(model, every=100), tokens(1, 40, seed=4))
    mask[1, :5] = 0
    cache, own = DynamicCache(), DynamicCache()
    logits(model, ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    found = logits(model, ids[:, 8:9], attention_mask=mask[:, :9], past_key_values=cache)
    logits(model, ids[1:, 5:8], past_key_values=own)
    assert close(found[1:], logits(model, ids[1:, 8:9], past_key_values=own), 2e-5)


@pytest.mark.filterwarnings("ignore")  # transformers and PyTorch warn of each other
@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_flex_attention_gives_what_another_backend_does(content: str) -> None:
    """(Uncompiled: compiled on a CPU it is wrong after a change of shape, also in the bare model.)"""
    ids, mask, found = tokens(2, 9), torch.ones(2, 9).long(), []
    mask[1, :4] = 0
    with torch.compiler.set_stance("force_eager"):
        for attention in ("sdpa", "flex_attention"):
            model = tiny("llama", attention)
            memory = read(attached(model, content=content), tokens(1, 100))
            assert model.config._attn_implementation == attention
            assert all(layer.self_attn.config is model.config for layer in model.model.layers)
            scores = memory.score(tokens(1, 40), progress=False)[0][1:]
            found.append((logits(model, ids[:1]), scores, written(model, ids, attention_mask=mask)))
    assert close(found[1][0], found[0][0])
    assert close(found[1][1], found[0][1])
    assert torch.equal(found[1][2], found[0][2])


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_rows_of_different_lengths_have_passages_of_their_own_document(content: str) -> None:
    """A row of the memory for each of the batch, one of them with less than fits: it is padded."""
    model, texts = tiny("llama", "sdpa"), tokens(2, 40, seed=4)
    mask = torch.ones(2, 40).long()
    mask[1, 10:] = 0
    memory = attached(model, content=content)
    memory.read(texts, mask, progress=False)
    ids = tokens(4, 6, seed=5)
    found, together = logits(model, ids), written(model, ids, max_new_tokens=12)
    static = written(model, ids, max_new_tokens=12, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, together)
    memory.detach()
    for row in range(4):
        alone = read(attached(model, content=content), texts[row // 2][mask[row // 2].bool()])
        assert close(logits(model, ids[row : row + 1]), found[row : row + 1], 2e-5)
        assert torch.equal(written(model, ids[row : row + 1], max_new_tokens=12)[0], together[row])
        alone.detach()


@pytest.mark.parametrize("make", ["dynamic", "static"])
def test_a_chat_goes_on_with_its_cache_as_with_everything_at_once(make: str) -> None:
    model, parts = tiny("llama", "sdpa"), [tokens(1, count, seed=count) for count in (6, 1, 9, 3)]
    everything(model)
    whole = logits(model, torch.cat(parts, dim=1))
    memory_of(model).detach()
    everything(model, every=1)  # all is recalled each time
    cache: Any = DynamicCache() if make == "dynamic" else StaticCache(model.config, max_cache_len=40)
    found = []
    for part in parts:
        found.append(logits(model, part, past_key_values=cache))
        length = int(cache.get_seq_length())
        assert length == sum(each.shape[1] for each in found)
    assert close(torch.cat(found, dim=1), whole)


def text_keys(cache: Any, count: int) -> Tensor:
    return torch.stack([layer.keys[:, :, -count:] for layer in cache.layers])


def test_a_memory_that_is_filled_in_mid_chat_moves_the_text_before_it() -> None:
    """Its keys are then those of a text that begins after the passages. (Values of deeper layers have seen none.)"""
    model = tiny("llama", "sdpa")
    memory, cache, twin = attached(model, span=20), DynamicCache(), DynamicCache()
    logits(model, PROMPT, past_key_values=cache)
    assert prefix_of(cache) is None
    plain(memory, PROMPT, past_key_values=twin, position_ids=torch.arange(30, 40)[None])
    read(memory, TEXT)
    found = logits(model, tokens(1, 5, seed=6), past_key_values=cache)
    assert close(text_keys(cache, 15)[:, :, :, :10], text_keys(twin, 10), 1e-4)
    passages = DynamicCache()
    plain(memory, TEXT, past_key_values=passages)
    for i, layer in enumerate(twin.layers):
        own = passages.layers[i]
        layer.keys, layer.values = torch.cat((own.keys, layer.keys), 2), torch.cat((own.values, layer.values), 2)
    assert close(found, plain(memory, tokens(1, 5, seed=6), past_key_values=twin))
    assert cache.get_seq_length() == 15


def test_passages_that_become_longer_or_shorter_move_the_text() -> None:
    model = tiny("llama", "sdpa")
    memory, cache, ids = attached(model, span=20), DynamicCache(), tokens(1, 18, seed=6)
    for number, (start, count) in enumerate(((0, 8), (6, 20), (12, 3))):
        if number:
            memory.clear()
        read(memory, TEXT[:, :count])
        logits(model, ids[:, start : start + 6], past_key_values=cache)
        assert prefix_of(cache).size == count
        twin = DynamicCache()
        places = torch.arange(count, count + start + 6)[None]
        plain(memory, ids[:, : start + 6], past_key_values=twin, position_ids=places)
        keys = cache.layers[0].keys  # of the first layer depend on the place alone
        assert close(keys[:, :, count:], twin.layers[0].keys, 1e-4)
    memory.clear()
    logits(model, tokens(1, 2), past_key_values=cache)
    assert prefix_of(cache).size == 0
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("make", ["dynamic", "static"])
def test_a_memory_that_is_disabled_in_mid_chat_leaves_the_text_alone(make: str) -> None:
    """Without the passages, the next tokens see the text as it was written."""
    model = tiny("llama", "sdpa")
    memory = everything(model)
    cache: Any = DynamicCache() if make == "dynamic" else StaticCache(model.config, max_cache_len=40)
    logits(model, PROMPT, past_key_values=cache)
    twin, held = DynamicCache(), memory.options.budget if make == "static" else 30
    for i, layer in enumerate(cache.layers):
        twin.update(layer.keys[:, :, held : held + 10].clone(), layer.values[:, :, held : held + 10].clone(), i)
    ids = tokens(1, 4, seed=6)
    expected = plain(memory, ids, past_key_values=twin, position_ids=torch.arange(40, 44)[None])
    found = plain(memory, ids, past_key_values=cache)
    if make == "dynamic":
        assert close(found, expected)
        assert cache.get_seq_length() == 14
    else:
        assert close(found, expected)


def test_a_cache_can_be_copied_cropped_repeated_and_reordered() -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model), tokens(1, 120, seed=4))
    ids = tokens(2, 9, seed=5)
    cache = DynamicCache()
    logits(model, ids, past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert prefix_of(copied) is not prefix_of(cache)
    assert {id(layer.prefix) for layer in copied.layers} == {id(prefix_of(copied))}
    more = tokens(2, 3, seed=6)
    expected = logits(model, more, past_key_values=cache)
    assert torch.equal(logits(model, more, past_key_values=copy.deepcopy(copied)), expected)
    copied.reorder_cache(torch.tensor([1, 0]))
    assert close(logits(model, more.flip(0), past_key_values=copy.deepcopy(copied)).flip(0), expected)
    copied.batch_repeat_interleave(2)
    assert prefix_of(copied).mask.shape[0] == prefix_of(copied).tokens.shape[0] == 4
    found = logits(model, more.flip(0).repeat_interleave(2, 0), past_key_values=copied)
    assert close(found[::2].flip(0), expected)
    assert torch.equal(found[::2], found[1::2])
    cache.crop(9)
    assert cache.get_seq_length() == 9
    assert torch.equal(prefix_of(cache).tokens, ids)  # by which passages are found, with those that come
    assert close(logits(model, more, past_key_values=cache), expected)
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    assert close(logits(model, more, past_key_values=cache), expected)
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(9)
    assert close(logits(model, more[1:], past_key_values=cache), expected[1:])
    assert len(memory.last_recalled) == 1


def test_without_a_cache_none_is_returned() -> None:
    model = tiny("llama", "sdpa")
    memory = everything(model)
    for options in ({}, {"return_dict": False}):
        without, given = (model(input_ids=PROMPT, use_cache=use, **options) for use in (False, True))
        assert close(without[0].detach(), given[0].detach())
        assert len(without) == 1
        assert len(given) == 2
    assert model(input_ids=PROMPT, use_cache=False).past_key_values is None
    assert close(logits(model, PROMPT, use_cache=False), plain(memory, WHOLE)[:, 30:])


def test_the_prompt_alone_chooses_passages_where_there_are_labels() -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model), tokens(1, 200, seed=4))
    ids = tokens(2, 12, seed=5)
    labels = ids.clone()
    labels[0, :5], labels[1, :8] = -100, -100
    labels[0, 9] = -100  # what comes after what is to be predicted must not choose either
    found = model(input_ids=ids, labels=labels)
    chosen = [recalled(memory, row) for row in range(2)]
    for row, count in enumerate((5, 8)):
        logits(model, ids[row : row + 1, :count])
        assert torch.equal(recalled(memory), chosen[row])
    changed = ids.clone()
    changed[0, 5:], changed[1, 8:] = 7, 7
    model(input_ids=changed, labels=labels)
    assert all(torch.equal(recalled(memory, row), chosen[row]) for row in range(2))
    found.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_where_every_token_has_a_label_nothing_is_recalled_and_that_is_said() -> None:
    model = tiny("llama", "sdpa")
    memory = everything(model)
    with pytest.warns(UserWarning, match="nothing is recalled. Give the label -100"):
        found = model(input_ids=PROMPT, labels=PROMPT)
    with memory.enabled(False):
        assert torch.equal(found.loss, model(input_ids=PROMPT, labels=PROMPT).loss)


def test_passages_are_chosen_anew_every_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", "sdpa")
    for every in (1, 3, 5):
        memory = read(attached(model, every=every), tokens(1, 120, seed=4))
        search, asked = memory._recall.search, []
        find = search.pairs_for

        def counted(queries: Any, budget: int, find: Any = find, asked: Any = asked) -> Any:
            asked.append(queries[0].tokens)
            return find(queries, budget)

        monkeypatch.setattr(search, "pairs_for", counted)
        text = written(model, PROMPT, max_new_tokens=12)
        whole = torch.cat((PROMPT, text), dim=1)[0]
        stops = [10, *range(10 + every, 22, every)]
        assert [len(query) for query in asked] == stops  # the last token that is written is not given to the model
        assert all(torch.equal(query, whole[:stop]) for query, stop in zip(asked, stops, strict=True))
        memory.detach()


def test_a_static_cache_writes_what_a_growing_one_does_while_passages_change() -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model, every=4), tokens(1, 120, seed=4))
    dynamic = written(model, PROMPT, max_new_tokens=12)
    static = written(model, PROMPT, max_new_tokens=12, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)
    assert len(recalled(memory)) == 26


def test_a_pipeline_writes_as_generate_does() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(99)}
    known = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    known.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="w0")
    model = tiny("llama", "sdpa")
    everything(model, tokenizer=tokenizer)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = " ".join(f"w{i}" for i in PROMPT[0].tolist())
    found = write(prompt, return_full_text=False, **NOTHING_ELSE)[0]["generated_text"]
    assert found.split() == [f"w{i}" for i in written(model, PROMPT)[0].tolist()]
    memory_of(model).detach()
    assert found.split() == [f"w{i}" for i in written(model, WHOLE)[0].tolist()]


def test_a_trainer_evaluates_with_passages(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny("llama", "sdpa")
    memory = everything(model)
    labels = PROMPT[0].clone()
    labels[:4] = -100
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=[{"input_ids": PROMPT[0], "labels": labels}] * 3)
    found = trainer.evaluate()["eval_loss"]
    expected = torch.nn.functional.cross_entropy(plain(memory, WHOLE)[0, 33:-1], PROMPT[0, 4:])
    assert found == pytest.approx(float(expected), rel=1e-4)
