"""What a memory of spans refuses, and that a refusal changes nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, DynamicCache, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.cache_utils import QuantizedLayer

from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.prefix import prefix_of
from tests.huggingface.families import tiny
from tests.huggingface.spans import NOTHING_ELSE, attached, logits, plain, read, recalled, tokens

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"content": "text"}, "expected content to be one of"),
    ({"finder": "magic"}, "expected finder to be one of"),
    ({"passages": 0}, "expected passages to be at least 1, got 0"),
    ({"passages": 2.0}, "expected passages to be a whole number"),
    ({"span": 0}, "expected span to be at least 1"),
    ({"first": -1}, "expected first to be at least 0"),
    ({"every": 0}, "expected every to be at least 1"),
    ({"overlap": -1}, "expected overlap to be at least 0"),
    ({"chunk": 16, "overlap": 16}, "overlap must be below chunk=16, got 16"),
    ({"max_memories": 0}, "expected max_memories to be at least 1"),
    ({"policy": "whim"}, "expected policy to be one of"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    before, hooks = logits(model, ids), hooks_of(model)
    with pytest.raises(ValueError, match=message):
        attached(model, **options)
    assert hooks_of(model) == hooks
    assert torch.equal(logits(model, ids), before)
    attached(model)


def hooks_of(model: Any) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("finder", ["head", "both"])
def test_a_model_without_an_induction_head_cannot_find_by_one(finder: str) -> None:
    model = tiny("llama")
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="no induction head that could find passages: use finder='bm25'"):
        attach_memory(model, retrieve="spans", finder=finder)
    assert hooks_of(model) == hooks


def test_a_model_without_an_induction_head_finds_by_words_and_that_is_said() -> None:
    pytest.importorskip("bm25s")
    model = tiny("llama")
    with pytest.warns(UserWarning, match="no induction head that could find passages: finder='bm25' is used"):
        memory = attach_memory(model, retrieve="spans")
    assert memory.options.finder == "bm25"
    assert memory.finder is None
    read(memory, tokens(1, 300))
    memory.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_memory(model, retrieve="spans", finder="bm25")


def test_words_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for finder in ("bm25", "both"):
        with pytest.raises(ValueError, match="pip install bm25s"):
            attached(tiny("llama"), finder=finder)
    assert attached(tiny("llama")).options.finder == "head"


def test_words_help_to_find_unless_the_memory_grows_while_the_model_writes() -> None:
    pytest.importorskip("bm25s")
    assert attached(tiny("llama")).options.finder == "both"
    assert attached(tiny("llama"), write="window", window=40).options.finder == "head"


def test_models_that_write_no_text_are_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models: list[tuple[Any, str]] = [
        (T5(T5Config(**sizes)), "decoder-only"),
        (BertModel(BertConfig(**small)), "causal language model"),
        (torch.nn.Linear(2, 2), "causal language model"),
    ]
    for model, message in models:
        with pytest.raises(ValueError, match=message):
            attached(model)


@pytest.mark.parametrize("family", ["jamba", "bamba", "qwen3_next"])
def test_models_with_a_recurrent_state_in_their_cache_are_refused(family: str) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **mamba)).eval()
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="cannot have a memory"):
        attached(model, content="tokens")
    assert hooks_of(model) == hooks


def test_positions_that_a_model_has_not_learned_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit this model, which has 512: give fewer passages"):
        attached(tiny("gpt2"), span=200)
    with pytest.raises(ValueError, match="do not fit this model, which has 512"):
        attached(tiny("gpt2"), chunk=300)
    attached(tiny("llama"), chunk=300)


def test_a_second_memory_is_refused_whichever_is_first() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    for first, second in ((attached, token_memory), (token_memory, attached), (attached, attached)):
        memory = read(first(model), tokens(1, 40))
        before = logits(model, ids)
        with pytest.raises(ValueError, match=r"which has one: detach\(\) it first"):
            second(model)
        assert torch.equal(logits(model, ids), before)
        memory.detach()


def token_memory(model: Any) -> Any:
    return attach_memory(model, retrieve="tokens", layers="all")


@pytest.fixture
def memory() -> Any:
    return read(attached(tiny("llama", "sdpa")), tokens(1, 60))


def state(memory: Any) -> tuple[Any, ...]:
    entries = [list(memory.entries(0, layer)) for layer in memory.layers]
    return entries, memory.place_of(0), [document.number for document in memory.documents()]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0).long(), "at least one token"),
        (torch.zeros(2, 2, 2).long(), r"\(N,\) or \(rows, N\)"),
        (torch.tensor([1, 99]), "0 to 98, got 1 to 99"),
        (torch.tensor([-1, 5]), "0 to 98, got -1 to 5"),
        (torch.tensor([0.5]), "input_ids"),
        (torch.ones(3, 4).long(), "expected the 1 rows of what is remembered, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_read_changes_nothing(memory: Any, ids: Any, message: str) -> None:
    before = state(memory)
    for read_it in (memory.read, memory.score):
        with pytest.raises(ValueError, match=message):
            read_it(ids, progress=False)
    assert state(memory) == before


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("text", "needs a tokenizer"),
        (torch.zeros(0).long(), "has no tokens"),
        (torch.tensor([99]), "token ids of this model, 0 to 98, got 99 to 99 in the question"),
        (torch.tensor([0.5]), "token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(memory: Any, question: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.recall(question)
    for row in (-1, 1):
        with pytest.raises(ValueError, match=f"the memory has rows 0 to 0, got {row}"):
            memory.recall(tokens(1, 3)[0], row=row)


def test_embeddings_find_nothing(memory: Any) -> None:
    embedded = memory.model.get_input_embeddings()(tokens(1, 5))
    with pytest.raises(ValueError, match="passages are found by token ids: give input_ids"):
        memory.model(inputs_embeds=embedded)
    with memory.enabled(False), torch.no_grad():
        found = memory.model(inputs_embeds=embedded).logits
    assert torch.equal(found, plain(memory, tokens(1, 5)))
    memory.clear()
    assert memory.model(inputs_embeds=embedded).logits.isfinite().all()


def test_embeddings_of_a_chat_that_has_passages_are_refused(memory: Any) -> None:
    cache = DynamicCache()
    logits(memory.model, tokens(1, 5), past_key_values=cache)
    embedded = memory.model.get_input_embeddings()(tokens(1, 5))
    with pytest.raises(ValueError, match="passages are found by token ids"):
        memory.model(inputs_embeds=embedded, past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert logits(memory.model, tokens(1, 3), past_key_values=cache).isfinite().all()


def test_gradient_checkpointing_has_no_cache_for_passages(memory: Any) -> None:
    model, ids = memory.model.train(), tokens(1, 5)
    labels = ids.clone()
    labels[:, :2] = -100
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        model(input_ids=ids, labels=labels)
    with memory.enabled(False):
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    model(input_ids=ids, labels=labels).loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused() -> None:
    memory = read(attached(tiny("llama", "sdpa")), tokens(2, 40))
    for rows in (1, 3):
        cache = DynamicCache()
        with pytest.raises(ValueError, match=f"a multiple of the 2 rows of the memory, got {rows}"):
            logits(memory.model, tokens(rows, 5), past_key_values=cache)
        assert prefix_of(cache) is None
        assert cache.get_seq_length() == 0
    assert logits(memory.model, tokens(4, 5)).isfinite().all()


class Codes(QuantizedLayer):  # type: ignore[misc]
    def _quantize(self, tensor: Any, axis: int) -> Any:
        return tensor, axis

    def _dequantize(self, tensor: Any) -> Any:
        return tensor[0]


def test_other_caches_are_refused(memory: Any) -> None:
    cache = DynamicCache()
    cache.layers = [Codes(), Codes()]
    with pytest.raises(ValueError, match="cannot be placed in a cache of Codes: use a DynamicCache or a StaticCache"):
        logits(memory.model, tokens(1, 5), past_key_values=cache)


def test_masks_of_other_shapes_are_refused(memory: Any) -> None:
    for mask in (object(), torch.ones(5).long(), torch.ones(1, 5, 5)):
        with pytest.raises(ValueError, match=r"passages need an attention mask as a tensor"):
            logits(memory.model, tokens(1, 5), attention_mask=mask)


def test_a_call_that_fails_leaves_the_next_one_as_it_was(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cache = memory.model, tokens(1, 6), DynamicCache()
    expected, origins = logits(model, ids), recalled(memory)
    logits(model, tokens(1, 4, seed=1), past_key_values=cache)
    logits(model, ids)
    with monkeypatch.context() as patched:
        patched.setattr(model.model.norm, "forward", lambda _x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, tokens(1, 5, seed=2))
    assert torch.equal(recalled(memory), origins)
    assert torch.equal(logits(model, ids), expected)


def test_a_detached_memory_refuses_everything(memory: Any) -> None:
    memory.detach()
    memory.detach()
    assert repr(memory) == "RecallMemory(detached)"
    for refused in (
        lambda: memory.read(tokens(1, 5), progress=False),
        lambda: memory.recall(tokens(1, 5)[0]),
        lambda: memory.forget(0),
        lambda: memory.clear(),
    ):
        with pytest.raises(ValueError, match="detach"):
            refused()
    assert memory.model.generate(tokens(1, 5), **NOTHING_ELSE).shape == (1, 13)


def test_training_segments_are_for_memories_of_tokens(memory: Any) -> None:
    before = state(memory)
    with pytest.raises(ValueError, match=r"passages are not trained: use read\(\)"), memory.writing():
        memory.model(input_ids=tokens(1, 5))
    assert state(memory) == before


def test_nothing_is_read_inside_read_only(memory: Any) -> None:
    before = state(memory)
    with memory.read_only():
        with pytest.raises(ValueError, match="read_only"):
            memory.read(tokens(1, 5), progress=False)
        memory.recall(tokens(1, 5)[0])
    assert state(memory) == before
