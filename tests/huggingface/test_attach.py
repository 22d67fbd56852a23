"""A memory attached to a model of transformers: empty it changes nothing, and what is read is as good as seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory, suggest_layers
from tests.huggingface.families import FEW, LEARNED_POSITIONS, ONLY_EAGER, REFUSED, SERVED, tiny

EVERYTHING: dict[str, Any] = {"layers": "all", "topk": 64, "skip_first": 0, "index": "exact", "dtype": torch.float32}
by_family = pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.families) for family in SERVED]
)
by_backend = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 99, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **options).logits
    return found


def backends(family: str) -> list[str]:
    return ["eager"] if family in ONLY_EAGER else ["eager", "sdpa"]


@by_family
def test_an_empty_memory_changes_no_bit_and_neither_does_one_taken_away(family: str) -> None:
    for attention in backends(family):
        model, ids = tiny(family, attention), tokens(2, 20)
        before, names = logits(model, ids), list(model.state_dict())
        memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
        assert torch.equal(logits(model, ids), before)
        memory.read(tokens(2, 20, seed=1), progress=False)
        assert not torch.equal(logits(model, ids), before)
        with memory.enabled(False):
            assert torch.equal(logits(model, ids), before)
        memory.clear()
        assert torch.equal(logits(model, ids), before)
        memory.detach()
        assert torch.equal(logits(model, ids), before)
        assert list(model.state_dict()) == names


@by_family
def test_what_was_read_is_as_good_as_seen(family: str) -> None:
    """With everything retrieved in every layer, a text in two halves gives what it gives in one."""
    for attention in backends(family):
        model, ids = tiny(family, attention), tokens(3, 40)
        expected = logits(model, ids)[:, 24:]
        memory = attach_memory(model, retrieve="tokens", **EVERYTHING, chunk=9)
        if family in LEARNED_POSITIONS:
            read_at_once(memory, ids[:, :24])
        else:
            memory.read(ids[:, :24], progress=False, look_up=True)
        positions = {"position_ids": torch.arange(24, 40)[None]} if family in LEARNED_POSITIONS else {}
        found = logits(model, ids[:, 24:], **positions)
        limit = 2e-5 if family == "gpt_oss" else 1e-5  # its router magnifies what float32 rounds
        assert float((found - expected).abs().max() / expected.abs().max()) < limit


def read_at_once(memory: Any, ids: Tensor) -> None:
    object.__setattr__(memory.options, "chunk", ids.shape[1])  # learned positions begin anew with each chunk
    memory.read(ids, progress=False)


@by_backend
def test_uneven_documents_in_a_batch_are_read_as_each_by_itself(attention: str) -> None:
    model, ids = tiny("llama", attention), tokens(3, 30)
    lengths, prompts = (30, 7, 18), tokens(3, 6, seed=1)
    mask = torch.zeros(3, 30).long()
    for row, length in enumerate(lengths):
        mask[row, 30 - length :] = 1 if row % 2 else 0
        mask[row, :length] = 0 if row % 2 else 1
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING, chunk=8)
    memory.read(ids, mask, progress=False)
    together = logits(model, prompts)
    memory.detach()
    for row in range(3):
        alone = attach_memory(model, retrieve="tokens", **EVERYTHING, chunk=8)
        alone.read(ids[row][mask[row].bool()], progress=False)
        torch.testing.assert_close(logits(model, prompts[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-4)
        alone.detach()


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_it_writes_as_if_it_had_seen_the_text(options: dict[str, Any]) -> None:
    model, ids = tiny("llama", "sdpa"), tokens(1, 40)
    writing = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(ids, **writing)[:, 40:]
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING, chunk=16)
    memory.read(ids[:, :30], progress=False, look_up=True)
    assert torch.equal(model.generate(ids[:, 30:], **writing)[:, 10:], expected)


def test_prompts_padded_on_the_left_are_continued_as_without_padding() -> None:
    model, ids = tiny("llama", "sdpa"), tokens(2, 12)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 30, seed=2), progress=False)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    writing = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **writing)
    alone = model.generate(ids[1:, 5:], **writing)
    assert torch.equal(together[1, 12:], alone[0, 7:])


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_the_bias_of_the_heads_learns_and_nothing_else_that_is_frozen(combine: str) -> None:
    model = tiny("qwen2", "sdpa").requires_grad_(False)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING, combine=combine)
    memory.read(tokens(1, 30), progress=False)
    ids = tokens(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in memory.parameters())
    assert len(memory.parameters()) == 2
    memory.clear()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in memory.parameters())


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_scaled_embeddings_are_as_long_at_constant_positions_as_at_true_ones(family: str) -> None:
    """One token read and one asked are one apart in either case (YaRN makes queries and keys longer)."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
    part = {"partial_rotary_factor": 0.5} if family == "phi" else {}
    model, found = tiny(family, rope_parameters={**yarn, **part}), []
    for positions in ("true", "constant"):
        memory = attach_memory(model, retrieve="tokens", **EVERYTHING, positions=positions, distance=1)
        assert memory.layers[0].layer.rotary is not None
        assert memory.layers[0].layer.rotary.scale > 1.1
        memory.read(tokens(1, 1), progress=False)
        found.append(logits(model, tokens(1, 1, seed=1)))
        memory.detach()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_reading_that_is_broken_off_is_listed_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    memory = attach_memory(model, retrieve="tokens", layers=[1], chunk=10, skip_first=0)
    forward, calls = model.forward, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            memory.read(tokens(1, 50), progress=False)
    assert [document.tokens for document in memory.documents()] == [20]
    assert memory.layers[1].num_entries == (20,)
    memory.read(tokens(1, 5), progress=False)
    assert memory.layers[1].memories[0].store.origins[0, :25, 1].tolist() == list(range(25))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_that_is_no_multiple_of_the_rows_is_refused(family: str) -> None:
    model = tiny(family)
    memory = attach_memory(model, retrieve="tokens", layers=[0])
    memory.read(tokens(3, 20), progress=False)
    for rows in (1, 2, 4):
        with pytest.raises(ValueError, match=f"a multiple of the 3 rows of the memory, got {rows}"):
            logits(model, tokens(rows, 5))
    assert logits(model, tokens(6, 5)).isfinite().all()


def test_what_was_looked_up_is_forgotten_with_what_was_read() -> None:
    model = tiny("llama")
    memory = attach_memory(model, retrieve="tokens", layers=[0])
    memory.read(tokens(3, 20), progress=False)
    logits(model, tokens(3, 5))
    assert set(memory.last_retrieved) == {0}
    memory.clear()
    assert memory.last_retrieved == {}
    memory.read(tokens(1, 20), progress=False)
    with memory.enabled(False):
        logits(model, tokens(1, 5))
    assert memory.last_retrieved == {}
    memory.detach()
    assert repr(memory) == "AttachedMemory(detached)"


def test_a_failure_while_attaching_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from memorizing_transformers_pytorch.huggingface import layer as base

    model, made = tiny("llama"), []

    class Failing(base.KNNMemory):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(1)
            if len(made) == 2:
                raise MemoryError
            super().__init__(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(base, "KNNMemory", Failing)
        with pytest.raises(MemoryError):
            attach_memory(model, retrieve="tokens", layers="all")
    attach_memory(model, retrieve="tokens", layers="all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    found = []
    for each in (torch.float32, dtype):
        model = tiny("llama", "sdpa").to(each)
        memory = attach_memory(model, retrieve="tokens", **{**EVERYTHING, "dtype": None})
        memory.read(tokens(1, 30), progress=False)
        assert memory.layers[0].memories[0].dtype == each
        found.append(logits(model, tokens(2, 6, seed=1)))
    assert found[1].dtype == dtype
    assert float((found[1].float() - found[0]).norm() / found[0].norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2"])
def test_every_layer_of_a_deep_model_is_served_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """Rounding adds up from layer to layer: it must not look as if positions could not be undone."""
    model = tiny(family, "sdpa", num_hidden_layers=24).to(dtype)
    memory = attach_memory(model, retrieve="tokens", **{**EVERYTHING, "dtype": None})
    assert list(memory.layers) == list(range(24))


@by_family
def test_codes_are_close_to_float32_at_little_more_than_a_quarter(family: str) -> None:
    ids, found, sizes = tokens(1, 30), [], []
    for dtype in (torch.float32, torch.int8):
        memory = attach_memory(tiny(family, "eager"), retrieve="tokens", **{**EVERYTHING, "dtype": dtype})
        memory.read(ids, progress=False)
        found.append(logits(memory.model, tokens(2, 6, seed=1)))
        layer = next(iter(memory.layers.values()))
        width, heads = layer.memories[0].dim, layer.memories[0].num_kv_heads
        sizes.append(layer.num_bytes / 30 - 3 * 8)  # without origin
    assert sizes == [2 * heads * 4 * width, 2 * heads * (width + 4)]
    errors = (found[1] - found[0]).norm(dim=-1) / found[0].norm(dim=-1)
    assert 0 < float(errors.median()) < 0.03  # of most tokens: a router may give some to other experts


def test_gradients_through_codes_are_close_to_those_through_float32() -> None:
    found = []
    for dtype in (torch.float32, torch.int8):
        model, ids = tiny("llama", "sdpa"), tokens(2, 9, seed=1)
        memory = attach_memory(model, retrieve="tokens", **{**EVERYTHING, "dtype": dtype})
        memory.read(tokens(1, 30), progress=False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = tiny("llama", "sdpa"), tokens(2, 9)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 30), progress=False)
    model.train()
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it does not compile: that is allowed
def test_a_model_with_a_memory_compiles() -> None:
    torch._dynamo.reset()
    model, ids = tiny("llama", "sdpa"), tokens(2, 9)
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 30), progress=False)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(input_ids=ids).logits
    torch.testing.assert_close(compiled, logits(model, ids), rtol=1e-4, atol=1e-4)


def test_constant_positions_do_not_depend_on_where_it_was_read() -> None:
    model, ids, filler = tiny("llama"), tokens(1, 20), tokens(1, 50, seed=3)
    found = []
    for before in (0, 50):
        memory = attach_memory(
            model, retrieve="tokens", layers=[0], topk=20, skip_first=0, positions="constant", index="exact"
        )
        if before:
            memory.read(filler[:, :before], progress=False)
            memory.clear()
            memory._contents.state.offsets[:] = [before]
        memory.read(ids, progress=False)
        found.append(logits(model, tokens(1, 5, seed=4)))
        memory.detach()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_first_tokens_of_a_chunk_are_not_remembered_but_all_others_once() -> None:
    model, ids = tiny("llama"), tokens(1, 50)
    memory = attach_memory(model, retrieve="tokens", layers=[1], chunk=16, skip_first=4)
    memory.read(ids, document="a book", progress=False)
    layer = memory.layers[1].memories[0]
    origins = layer.store.origins[0, : layer.num_entries[0]]
    assert origins[:, 1].tolist() == list(range(4, 50))
    assert origins[:, 2].tolist() == ids[0, 4:].tolist()
    (document,) = memory.documents()
    assert (document.title, document.row, document.tokens) == ("a book", 0, 50)


@pytest.mark.parametrize(("chunk", "skip_first"), [(50, 0), (16, 4), (9, 1)])
def test_scores_are_the_losses_of_each_token_after_its_chunk_and_the_memory(chunk: int, skip_first: int) -> None:
    model, ids = tiny("llama"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    memory = attach_memory(model, retrieve="tokens", **{**EVERYTHING, "skip_first": skip_first}, chunk=chunk)
    first, second = memory.score(ids, mask, progress=False)
    assert [document.tokens for document in memory.documents()] == [40, 33]
    assert first.shape == (40,)
    assert second.shape == (33,)
    assert first.isnan().nonzero().flatten().tolist() == [0]
    memory.detach()
    log_likelihoods = logits(model, ids[1:, 7:])[0, :-1].log_softmax(dim=-1)
    whole = -log_likelihoods.gather(1, ids[1, 8:, None]).squeeze(1)
    torch.testing.assert_close(second[1:chunk], whole[: chunk - 1], rtol=1e-4, atol=1e-4)
    if skip_first == 0:
        torch.testing.assert_close(second[1:], whole, rtol=1e-4, atol=1e-4)


def test_weights_that_have_changed_since_they_read_are_noticed() -> None:
    model, ids = tiny("llama"), tokens(1, 30)
    memory = attach_memory(model, retrieve="tokens", layers=[1])
    memory.read(ids, progress=False)
    with torch.no_grad():
        memory.parameters()[0].add_(1)  # of the joining: keys do not depend on it
    logits(model, ids)
    memory.read(ids, progress=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="model weights changed after this memory was written"):
        logits(model, ids)
    logits(model, ids)  # once for each change
    with pytest.raises(ValueError, match="model weights changed after this memory was written"):
        memory.read(ids, progress=False)
    assert len(memory.documents()) == 2
    memory.clear()
    memory.read(ids, progress=False)
    logits(model, ids)


def test_an_adapter_counts_as_other_weights_and_can_be_trained() -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny("llama", "sdpa"), tokens(1, 30)
    memory = attach_memory(model, retrieve="tokens", layers=[1], skip_first=0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=None))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    memory.read(ids, progress=False)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)
    with adapted.disable_adapter(), pytest.warns(UserWarning, match="model weights changed"):
        adapted(input_ids=ids)


def test_it_tells_what_was_looked_up_and_what_it_holds() -> None:
    model = tiny("llama")
    memory = attach_memory(model, retrieve="tokens", layers=[1], topk=3)
    assert repr(memory) == "AttachedMemory(layers=[1], entries={1: (0,)}, bytes=0)"
    memory.read(tokens(1, 40), progress=False)
    logits(model, tokens(2, 5))
    origins = memory.last_retrieved[1]
    assert origins.shape == (1, 4, 10, 3, 3)
    assert bool((origins[..., 0] == 0).all())
    assert "bytes=5,472" in repr(memory)


def test_layers_are_suggested_by_their_induction_heads() -> None:
    scores = suggest_layers(tiny("llama"))
    assert set(scores) == {0, 1}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    model, random = tiny("llama"), torch.Generator().manual_seed(0)
    ids = torch.randint(99, (4, 64), generator=random).repeat(1, 2)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):  # (4, H, 128, 128)
        by_head = [weights[:, head, torch.arange(64, 127), torch.arange(1, 64)].mean() for head in range(4)]
        assert scores[layer] == pytest.approx(float(max(by_head)), rel=1e-4)


@pytest.mark.parametrize("scores", [{0: 0.15, 1: 0.05}, {1: 0.15, 0: 0.05}, {1: 0.3, 0: 0.2}])
def test_auto_takes_the_suggested_layers(scores: dict[int, float], cache: Path) -> None:
    suggest_layers(tiny("llama"))
    (path,) = cache.iterdir()
    path.write_text(json.dumps({layer: [0.0, score, 0.0, 0.0] for layer, score in scores.items()}))  # of each head
    expected = [0, 1] if max(scores.values()) >= 0.2 else [max(scores, key=lambda layer: scores[layer])]  # best first
    assert list(attach_memory(tiny("llama"), retrieve="tokens").layers) == expected


def test_suggestions_are_kept_for_each_checkpoint(cache: Path) -> None:
    scores = suggest_layers(tiny("llama"))
    (path,) = cache.iterdir()
    path.write_text(json.dumps({0: [0.75, 0.1, 0.0, 0.0], 1: [0.5, 0.0, 0.0, 0.0]}))  # of each head
    assert suggest_layers(tiny("llama")) == {0: 0.75, 1: 0.5}
    path.write_text("{")
    assert suggest_layers(tiny("llama")) == scores
    assert {int(index): max(heads) for index, heads in json.loads(path.read_text()).items()} == scores
    suggest_layers(tiny("qwen2"))
    assert len(list(cache.iterdir())) == 2


def test_auto_takes_all_layers_from_the_first_induction_head_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from memorizing_transformers_pytorch.huggingface import layers

    scores = {18: 0.9, 23: 0.3, 17: 0.2, **{index: 0.0 for index in range(30) if index not in (17, 18, 23)}}
    monkeypatch.setattr(layers, "induction_scores", lambda *_: scores)
    assert layers.chosen_layers(None, {}) == list(range(14, 30))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"layers": [7]}, r"expected layers among \[0, 1\], got 7"),
    ({"layers": []}, "expected at least one layer"),
    ({"layers": "some"}, "expected layers to be numbers, 'all' or 'auto', got 'some'"),
    ({"topk": 0}, "expected topk to be at least 1, got 0"),
    ({"combine": "sum"}, "expected combine to be one of"),
    ({"positions": "none"}, "expected positions to be one of"),
    ({"skip_first": 512}, "expected skip_first to be below chunk=512, got 512"),
    ({"index": "nonsense"}, "expected index to be"),
    ({"layers": 1}, "expected layers to be numbers, 'all' or 'auto', got 1"),
    ({"topk": 2.5}, "expected topk to be a whole number, got 2.5"),
    ({"max_memories": "many"}, "expected max_memories to be a whole number, got 'many'"),
    ({"recent": 1.5}, "expected recent to be a whole number, got 1.5"),
    ({"device": "cuda:99"}, "expected a device of this machine, such as cpu or cuda, got 'cuda:99'"),
    ({"directory": "/dev/null/folder"}, "expected a directory for files, got '/dev/null/folder'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_and_the_model_is_untouched(options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    before, configs = list(model.state_dict()), [layer.self_attn.config for layer in model.model.layers]
    with pytest.raises(ValueError, match=message):
        attach_memory(model, retrieve="tokens", **options)
    assert list(model.state_dict()) == before
    assert all(layer.self_attn.config is config for layer, config in zip(model.model.layers, configs, strict=True))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(2, 3, 4).long(), None, r"expected input_ids \(N,\) or \(rows, N\)"),
        (torch.ones(2, 3), None, "expected input_ids to be a tensor of integers"),
        (torch.ones(1, 3).long(), torch.ones(1, 4), "expected an attention_mask of shape"),
        (torch.zeros(0, 5).long(), None, "expected at least one token in each document"),
        (torch.zeros(1, 0).long(), None, "expected at least one token in each document"),
        (torch.ones(1, 3).long(), torch.zeros(1, 3), "expected at least one token in each document"),
        (torch.tensor([[3, 99]]), None, "expected token ids of this model, 0 to 98, got 3 to 99"),
        (torch.ones(1, 3).long(), [1, 1, 1], "expected an attention_mask of shape .1, 3., got <class 'list'>"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(ids: Tensor, mask: Any, message: str) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers=[1])
    with pytest.raises(ValueError, match=message):
        memory.read(ids, mask, progress=False)
    assert memory.documents() == []


def test_titles_that_are_no_text_are_refused() -> None:
    memory, titles = attach_memory(tiny("llama"), retrieve="tokens", layers=[1]), [3, [3], {"a": "book"}.values()]
    for title in titles:
        with pytest.raises(ValueError, match="expected titles as text, got"):
            memory.read(tokens(1, 9), document=title, progress=False)
    assert memory.documents() == []


def test_what_was_taken_away_says_so_whatever_it_is_asked(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers=[1])
    memory.detach()
    asked = [
        memory.parameters,
        memory.documents,
        lambda: memory.num_bytes,
        lambda: memory.entries(0, 1),
        lambda: memory.save_parameters(tmp_path / "biases.safetensors"),
        lambda: memory.load_parameters(tmp_path / "biases.safetensors"),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=r"expected an attached memory, got one that detach\(\) has taken away"):
            ask()


def test_entries_of_a_layer_come_the_oldest_first_from_all_its_memories() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", layers=[1], skip_first=0, recent=8), tokens(1, 30)
    memory.read(ids, document="a book", progress=False)
    assert [tuple(entry) for entry in memory.entries(0, 1)] == [(0, i, int(ids[0, i])) for i in range(30)]
    with pytest.raises(ValueError, match=r"expected a layer with a memory among \[1\], got 0"):
        memory.entries(0, 0)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_have_a_memory_are_refused_with_the_reason(family: str) -> None:
    model = tiny(family)
    before, ids = list(model.state_dict()), tokens(1, 9)
    plain = logits(model, ids, use_cache=False)
    with pytest.raises(ValueError, match=REFUSED[family][1]):
        attach_memory(model, retrieve="tokens", layers="all")
    assert list(model.state_dict()) == before
    assert torch.equal(logits(model, ids, use_cache=False), plain)


def test_what_is_no_causal_model_is_refused() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

    with pytest.raises(ValueError, match="expected a causal language model of transformers, got Linear"):
        attach_memory(torch.nn.Linear(2, 2), retrieve="tokens")
    with pytest.raises(ValueError, match="expected a causal language model"):
        attach_memory(AutoModel.from_config(tiny("llama").config), retrieve="tokens")
    t5 = AutoConfig.for_model("t5", vocab_size=99, d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48)
    with pytest.raises(ValueError, match="expected a decoder-only model, got the encoder-decoder"):
        attach_memory(AutoModelForSeq2SeqLM.from_config(t5), retrieve="tokens")


def test_a_model_that_has_a_memory_is_refused_another() -> None:
    model = tiny("llama")
    attach_memory(model, retrieve="tokens", layers=[0])
    with pytest.raises(ValueError, match=r"which has one: detach\(\) it first"):
        attach_memory(model, retrieve="tokens", layers=[1])


def test_parameters_of_an_adapter_are_its_own_and_all_that_it_saves(tmp_path: Path) -> None:
    """PEFT trains a copy of the biases; saved with the adapter, they come back with it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_bias"])
    model, ids = tiny("llama", "sdpa"), tokens(1, 30)
    memory = attach_memory(model, retrieve="tokens", layers=[1], skip_first=0)
    adapted = peft.get_peft_model(model, config)
    (bias,) = memory.parameters()
    assert bias.requires_grad
    memory.read(ids, progress=False)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0
    with torch.no_grad():
        bias.fill_(-1.5)
    changed = logits(adapted, ids)
    with adapted.disable_adapter(), pytest.warns(UserWarning, match="model weights changed"):
        assert not torch.equal(logits(adapted, ids), changed)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("memory_bias" in name for name in saved) == 1
    assert all("memory_bias" in name or "lora_" in name for name in saved)

    again = tiny("llama", "sdpa")
    memory = attach_memory(again, retrieve="tokens", layers=[1], skip_first=0)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    assert memory.parameters()[0].tolist() == [-1.5] * 4
    memory.read(ids, progress=False)
    torch.testing.assert_close(logits(loaded, ids), changed)


def test_a_deep_copy_has_biases_of_its_own() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    memory = attach_memory(model, retrieve="tokens", layers=[1], skip_first=0)
    memory.read(tokens(1, 30, seed=1), progress=False)
    twin = copy.deepcopy(model)
    before = logits(model, ids)
    assert torch.equal(logits(twin, ids), before)
    with torch.no_grad():
        twin.model.layers[1].self_attn.memory_bias.bias.fill_(-9.0)
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(twin, ids), before)


def test_parameters_are_saved_and_loaded_by_themselves(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers="all")
    with torch.no_grad():
        for i, parameter in enumerate(memory.parameters()):
            parameter.fill_(i + 0.5)
    memory.save_parameters(tmp_path / "memory.safetensors")
    other = attach_memory(tiny("llama"), retrieve="tokens", layers="all")
    other.load_parameters(tmp_path / "memory.safetensors")
    assert [parameter.tolist() for parameter in other.parameters()] == [[0.5] * 4, [1.5] * 4]
    fewer = attach_memory(tiny("llama"), retrieve="tokens", layers=[1])
    with pytest.raises(ValueError, match="expected parameters of the shapes"):
        fewer.load_parameters(tmp_path / "memory.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "memory.safetensors").read_bytes()[:-1])
    for name in ("damaged.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"expected a .* file, got .*{name}"):
            fewer.load_parameters(tmp_path / name)
    assert fewer.parameters()[0].tolist() == [0.0] * 4


def test_chunks_fit_the_positions_that_a_model_has_learned() -> None:
    model = tiny("gpt2", n_positions=64, max_position_embeddings=64)
    with pytest.raises(ValueError, match="expected chunk to be at most 64, the positions that the model has, got 512"):
        attach_memory(model, retrieve="tokens")
    memory = attach_memory(model, retrieve="tokens", chunk=64)
    memory.read(tokens(1, 200), progress=False)
    attach_memory(
        tiny("llama", max_position_embeddings=64), retrieve="tokens", layers=[0]
    )  # rotary ones go on for ever


def test_a_model_that_is_offloaded_has_a_memory_where_it_computes() -> None:
    model, ids = tiny("llama"), tokens(1, 40)
    expected = logits(model, ids)[:, 24:]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    memory = attach_memory(model, retrieve="tokens", **EVERYTHING)
    memory.read(ids[:, :24], progress=False)
    torch.testing.assert_close(logits(model, ids[:, 24:]), expected, rtol=1e-4, atol=1e-4)
    memory.read(ids[:, :24], progress=False)  # by the same weights
    memory.detach()
    assert torch.equal(logits(model, ids)[:, 24:], expected)


def test_chunks_see_what_was_read_before_only_if_told() -> None:
    ids, keys = tokens(1, 40), {}
    for look_up in (False, True):
        memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, chunk=20)
        memory.read(ids, progress=False, look_up=look_up)
        assert memory.last_retrieved == {}  # only calls of the model are told
        keys[look_up] = memory.layers[1].memories[0].store.keys[0, :, :40].floats().clone()
    alone = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, chunk=20)
    alone.read(ids[:, :20], progress=False)
    alone.read(ids[:, 20:], progress=False)
    torch.testing.assert_close(keys[False], alone.layers[1].memories[0].store.keys[0, :, :40].floats())
    torch.testing.assert_close(keys[False][:, :20], keys[True][:, :20])
    assert not torch.allclose(keys[False][:, 20:], keys[True][:, 20:], atol=1e-2)


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_weights_that_are_told_are_those_of_what_was_found(family: str, combine: str) -> None:
    memory = attach_memory(tiny(family), retrieve="tokens", **{**EVERYTHING, "topk": 8}, combine=combine)
    ids, outs = tokens(1, 5, seed=1), list[Tensor]()
    memory.layers[0].layer.module.o_proj.register_forward_pre_hook(lambda _, inputs: outs.append(inputs[0][0]))
    with memory.enabled(False):
        memory.read(tokens(1, 30), progress=False)
        outs.clear()
        logits(memory.model, ids)
    with memory.watched_row(0) as watched:
        logits(memory.model, ids)
    found = watched.found[0]
    (lookup,) = [each for each in found.lookups if each is not None]
    (table,) = lookup.tables()
    weights = found.weights[0]  # (4, 5, 8)
    sums = (weights.unsqueeze(-1) * table.values.floats()[table.slots[0]]).sum(dim=-2)
    mass = weights.sum(dim=-1, keepdim=True)
    here, joined = (out.view(5, 4, -1).transpose(0, 1) for out in outs)
    torch.testing.assert_close(here * (1 - mass) + sums, joined)


def test_each_row_of_the_memory_serves_as_many_rows_of_the_batch_one_after_the_other() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    memory.read(ids, mask, progress=False)
    queries = tokens(2, 5, seed=1)
    found = logits(memory.model, queries.repeat_interleave(2, dim=0))
    torch.testing.assert_close(found, logits(memory.model, queries).repeat_interleave(2, dim=0))


def test_rows_that_have_read_different_numbers_of_tokens_read_on_where_each_stands() -> None:
    ids, mask, more = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64), tokens(2, 12, seed=1)
    mask[1, 11:] = 0
    both, alone = (attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING) for _ in range(2))
    both.read(ids, mask, progress=False)
    both.read(more, progress=False)
    alone.read(ids[1:, :11], progress=False)
    alone.read(more[1:], progress=False)
    one, other = both.layers[1].memories[0].store.oldest(1, 99), alone.layers[1].memories[0].store.oldest(0, 99)
    torch.testing.assert_close(one.keys.floats(), other.keys.floats(), rtol=1e-4, atol=1e-4)
    assert torch.equal(one.origins[..., 1:], other.origins[..., 1:])
