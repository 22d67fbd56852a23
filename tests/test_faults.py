"""The faults of the package memorizing-transformers-pytorch 0.4.1, one by one: each of these tests fails on it.

B1 ... B13 are their names in our notes; what each was is said at the test.
"""

from __future__ import annotations

import ast
import importlib.metadata
import multiprocessing
import re
import string
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memorizing_transformers_pytorch
from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.training import loop
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.settings import from_plain, merged

SOS, EOS = 1, 2


def make_model(**changes: Any) -> MemorizingTransformer:
    fields = {
        "num_tokens": 31,
        "dim": 16,
        "depth": 2,
        "dim_head": 8,
        "heads": 2,
        "memorizing_layers": 1,
        "max_knn_memories": 40,
        "num_retrieved_memories": 4,
    }
    model = MemorizingTransformer(**{**fields, **changes})
    for bias in (model.rel_pos_bias, model.knn_rel_pos_bias):
        nn.init.normal_(bias.relative_attention_bias.weight)  # so that order shows
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(4, 31, shape)


def unit_keys(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def pairs(keys: Tensor) -> Tensor:
    """Entries whose value tells their key."""
    return torch.stack((keys, 2 * keys + 1), dim=-2)


def assert_each_finds_itself(memory: KNNMemory, keys: Tensor) -> None:
    """keys (rows, n, D), all of them stored, used as queries."""
    found, mask = memory.search(keys, topk=1)
    assert mask.all()
    torch.testing.assert_close(found.squeeze(-3), pairs(keys))


@pytest.mark.parametrize(("marker", "remaining"), [(SOS, 5), (EOS, 4)])
def test_b1_memories_are_cleared_on_sos_and_eos(marker: int, remaining: int) -> None:
    """It never happened: activations were compared with the token id."""
    model = make_model(clear_memories_on_sos_token_id=SOS, clear_memories_on_eos_token_id=EOS)
    tokens = random_tokens(2, 8)
    with model.knn_memories_context(batch_size=2) as memories:
        model(tokens, memories)
        tokens[0, 3] = marker
        model(tokens, memories)
        assert memories[0].num_entries == (remaining, 16)


def test_b2_layers_without_xl_memory_know_the_order_of_later_segments() -> None:
    """Query positions were not offset by the XL length: from the second segment on such layers were blind to order."""
    model = make_model(memorizing_layers=(), xl_max_memories=8, xl_memory_layers=2)
    seen: list[Tensor] = []
    model.layers[0][0].register_forward_hook(lambda _module, _inputs, attended: seen.append(attended.out))
    tokens = random_tokens(1, 8)
    _, state = model(tokens)
    shuffled = tokens.clone()
    shuffled[0, :7] = tokens[0, :7].flip(0)
    model(tokens, xl_memories=state)
    model(shuffled, xl_memories=state)
    first, second, other_order = seen
    torch.testing.assert_close(first, second)
    assert (second[0, -1] - other_order[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("memorizing_layers", [(), 1], ids=["ordinary layer", "memorizing layer"])
def test_b2_distances_to_xl_memory_are_the_true_ones(memorizing_layers: Any) -> None:
    """They were short by the XL length. With them, two segments are one window for a single layer."""
    model = make_model(depth=1, memorizing_layers=memorizing_layers, xl_max_memories=9)
    tokens = random_tokens(2, 18)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :9])
    second, _ = model(tokens[:, 9:], xl_memories=state)
    torch.testing.assert_close(second, whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_b3_at_capacity_only_the_oldest_are_thrown_out() -> None:
    """The whole index was wiped, and the next search was blind."""
    memory, keys = KNNMemory(dim=8, max_memories=10, num_indices=2), unit_keys(2, 23, 8)
    for part in keys.split((6, 6, 6, 5), dim=1):
        memory.add(pairs(part))
    assert memory.num_entries == (10, 10)
    assert_each_finds_itself(memory, keys[:, 13:])
    found, _ = memory.search(keys[:, :13], topk=1)
    assert not torch.isclose(found[..., 0, 0, :], keys[:, :13]).all(dim=-1).any()


def test_b3_a_model_at_capacity_sees_its_memory_in_every_segment() -> None:
    model = make_model(max_knn_memories=10)
    with model.knn_memories_context(batch_size=1) as memories:
        for segment in random_tokens(1, 48).split(6, dim=1):
            before = memories[0].num_entries
            with_memory = model(segment, memories, add_knn_memory=False)
            assert torch.allclose(with_memory, model(segment)) == (before == (0,))
            model(segment, memories)
        assert memories[0].num_entries == (10,)


@pytest.mark.parametrize("added", [4, 10, 11, 25, 97])
def test_b4_after_turning_the_ring_keys_and_values_belong_together(added: int) -> None:
    """Ids restarted at 0 while offsets went on: not a single key came with its own value, under a mask of all True."""
    memory, keys = KNNMemory(dim=8, max_memories=10, num_indices=2), unit_keys(2, added, 8)
    for part in keys.split(3, dim=1):
        memory.add(pairs(part))
    assert_each_finds_itself(memory, keys[:, -10:])


def test_b5_adding_to_some_rows_leaves_the_others_alone() -> None:
    """The offsets of all rows went on."""
    memory, keys = KNNMemory(dim=8, max_memories=10, num_indices=3), unit_keys(3, 7, 8)
    memory.add(pairs(keys))
    more = unit_keys(2, 8, 8)
    with memory.at_batch_indices([2, 0]):
        memory.add(pairs(more))
    assert memory.num_entries == (10, 7, 10)
    with memory.at_batch_indices([1]):
        assert_each_finds_itself(memory, keys[1:2])
    with memory.at_batch_indices([2, 0]):
        assert_each_finds_itself(memory, more)


def test_b6_a_model_works_within_a_scope_of_rows() -> None:
    """An assertion forbade it."""
    model, tokens = make_model(), random_tokens(3, 8)
    with model.knn_memories_context(batch_size=3) as memories:
        model(tokens, memories)
        whole = model(tokens, memories, add_knn_memory=False)
        with memories.at_batch_indices([2, 0]):
            part = model(tokens[[2, 0]], memories, add_knn_memory=False)
            model(tokens[[2, 0]], memories)
        torch.testing.assert_close(part, whole[[2, 0]])
        assert memories[0].num_entries == (16, 8, 16)


def test_b6_the_scope_ends_also_after_an_exception() -> None:
    """It stayed."""
    memories = make_model().create_knn_memories(batch_size=3)
    with pytest.raises(KeyError), memories.at_batch_indices([1]):
        raise KeyError
    assert memories[0].scoped_indices == [0, 1, 2]


@pytest.mark.parametrize(("heads", "knn_attn_heads"), [(2, 1), (2, 4), (3, 2)])
def test_b7_memorizing_layers_may_have_heads_of_their_own(heads: int, knn_attn_heads: int) -> None:
    """It crashed."""
    model, tokens = make_model(heads=heads, knn_attn_heads=knn_attn_heads, xl_max_memories=3), random_tokens(2, 8)
    with model.knn_memories_context(batch_size=2) as memories:
        _, state = model(tokens, memories)
        loss, _ = model(tokens, memories, state, labels=tokens)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_b8_memories_take_half_precision(dtype: torch.dtype) -> None:
    """Adding and searching failed."""
    memory, keys = KNNMemory(dim=8, max_memories=10, num_indices=2), unit_keys(2, 9, 8).to(dtype)
    memory.add(pairs(keys))
    found, mask = memory.search(keys, topk=1)
    assert mask.all()
    torch.testing.assert_close(found[:, :, 0].to(dtype), pairs(keys))


@pytest.mark.parametrize("autocast", [False, True])
def test_b8_models_train_in_bfloat16(autocast: bool) -> None:
    """They failed."""
    model, tokens = make_model(), random_tokens(2, 8)
    model = model if autocast else model.bfloat16()
    with (
        model.knn_memories_context(batch_size=2) as memories,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(tokens, memories)
        loss = model(tokens, memories, labels=tokens)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_b9_shifting_memories_down_has_an_effect() -> None:
    """Reading and writing were rotated alike, so that each layer read its own memory."""
    tokens, logits = random_tokens(2, 2, 8), []
    for shift in (0, 1):
        torch.manual_seed(1)
        model = make_model(memorizing_layers=(1, 2), shift_knn_memories_down=shift)
        with model.knn_memories_context(batch_size=2) as memories:
            model(tokens[0], memories)
            logits.append(model(tokens[1], memories))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_b10_training_validates_on_documents_that_it_never_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py validated on the batch that it trained on. Here each document consists of a letter of its own."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    forward = MemorizingTransformer.forward

    def watched(self: MemorizingTransformer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[self.training].update(x[kwargs["mask"]].tolist())
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(MemorizingTransformer, "forward", watched)
    (tmp_path / "text").mkdir()
    for letter in string.ascii_letters:
        (tmp_path / "text" / letter).write_text(letter * 30)
    plain = merged(
        run_preset("enwik8"),
        {
            "device": "cpu",
            "model": {"dim": 8, "dim_head": 4, "heads": 1, "depth": 2, "memorizing_layers": 1, "xl_memory_layers": 2},
            "data": {"source": str(tmp_path / "text"), "cache": str(tmp_path / "cache"), "valid": 0.2, "pack": False},
            "training": {"steps": 12, "rows": 4, "segments": 2, "segment_length": 15, "validate_every": 5},
        },
    )
    config = from_plain(plain)
    loop.train(config, tmp_path / "run")
    prepared = prepare(config.data, 256, progress=False)
    trained, validated = ({ord(name) for name in part.names} for part in (prepared.train, prepared.valid))
    assert seen[False] == validated
    assert len(seen[True]) > 10
    assert seen[True] <= trained


def test_b11_memories_in_one_directory_do_not_touch_each_other(tmp_path: Path) -> None:
    """File names were fixed and files opened for overwriting: the second memory zeroed the first."""
    keys = unit_keys(1, 9, 8)
    first = KNNMemory(dim=8, max_memories=10, directory=tmp_path)
    first.add(pairs(keys))
    second = KNNMemory(dim=8, max_memories=10, directory=tmp_path)
    second.add(pairs(unit_keys(1, 9, 8)))
    assert_each_finds_itself(first, keys)
    second.cleanup()
    assert_each_finds_itself(first, keys)
    first.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_b11_models_with_one_memory_directory_do_not_either(tmp_path: Path) -> None:
    model, tokens = make_model(knn_memories_directory=str(tmp_path)), random_tokens(1, 8)
    with model.knn_memories_context(batch_size=1) as first:
        model(tokens, first)
        before = model(tokens, first, add_knn_memory=False)
        with model.knn_memories_context(batch_size=1) as second:
            model(random_tokens(1, 8), second)
            assert torch.equal(model(tokens, first, add_knn_memory=False), before)
    assert list(tmp_path.iterdir()) == []


def test_b11_files_do_not_stay_behind_even_without_cleanup(tmp_path: Path) -> None:
    memory = KNNMemory(dim=8, max_memories=10, directory=tmp_path)
    assert list(tmp_path.rglob("*"))
    del memory
    assert list(tmp_path.iterdir()) == []


def _use_directory(directory: Path) -> None:
    memory = KNNMemory(dim=8, max_memories=10, directory=directory)
    memory.add(torch.ones(1, 9, 2, 8))
    assert memory.num_entries == (9,)
    memory.cleanup()


def test_b11_a_second_process_may_use_the_same_directory(tmp_path: Path) -> None:
    """It waited on a lock for ever."""
    keys = unit_keys(1, 9, 8)
    memory = KNNMemory(dim=8, max_memories=10, directory=tmp_path)
    memory.add(pairs(keys))
    other = multiprocessing.get_context("fork").Process(target=_use_directory, args=(tmp_path,))
    other.start()
    other.join(120)
    assert other.exitcode == 0
    assert_each_finds_itself(memory, keys)
    memory.cleanup()
    assert list(tmp_path.iterdir()) == []


def imported_modules() -> Iterator[str]:
    """Every top-level module that the package imports, also inside functions."""
    for path in Path(memorizing_transformers_pytorch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                yield node.module.split(".")[0]


def declared_distributions() -> set[str]:
    """What pyproject.toml declares, extras included."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    return {canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_b12_whatever_is_imported_is_declared() -> None:
    """einops_exts was imported and not declared; faiss-gpu was required for indices that only exist on the CPU."""
    distributions, declared = importlib.metadata.packages_distributions(), declared_distributions()
    modules = set(imported_modules()) - set(sys.stdlib_module_names) - {"memorizing_transformers_pytorch"}
    assert {"torch", "faiss", "einops"} <= modules
    undeclared = {m for m in modules if not declared & {canonical(d) for d in distributions.get(m, [m])}}
    assert undeclared == set()
    assert "faiss-gpu" not in declared


def test_b12_what_is_declared_is_what_was_installed() -> None:
    requirements = importlib.metadata.requires("memorizing_transformers_pytorch") or []
    assert {canonical(re.split(r"[^\w.-]", r, maxsplit=1)[0]) for r in requirements} == declared_distributions()


def test_b13_padding_is_not_stored() -> None:
    """It was."""
    model, tokens = make_model(pad_id=0), random_tokens(2, 8)
    tokens[1, 5:] = 0
    with model.knn_memories_context(batch_size=2) as memories:
        model(tokens, memories)
        assert memories[0].num_entries == (8, 5)


def test_b13_token_0_counts_in_the_loss() -> None:
    """It was silently dropped."""
    model, tokens = make_model(), random_tokens(2, 8)
    labels = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens, labels=labels), F.cross_entropy(model(tokens).mT, labels))


def test_b13_search_finds_the_best_entries() -> None:
    """The width of the search was ignored: of the best 32 of 8,192 entries it found 40%."""
    memory, keys, queries = KNNMemory(dim=16, max_memories=8192), unit_keys(1, 8192, 16), unit_keys(1, 50, 16)
    memory.add(pairs(keys))
    found = memory.retrieve(queries, topk=32)
    best = (queries @ keys.mT).topk(32)
    torch.testing.assert_close(found.scores, best.values)
    assert torch.equal(found.slots.sort().values, best.indices.sort().values)


def test_b13_what_was_found_and_where_it_came_from_can_be_seen() -> None:
    """There were statistics of hits, out of reach."""
    model, tokens = make_model(), random_tokens(1, 8)
    with model.knn_memories_context(batch_size=1) as memories:
        model(tokens, memories)
        [memory] = memories
        assert memory.num_entries == (8,)
        found = memory.retrieve(memory.store.keys[:, 0, :8].floats(), topk=1)
        stored = memory.origins(found.slots)
    torch.testing.assert_close(found.scores, torch.ones(1, 8, 1))
    assert sorted(stored[..., 2].flatten().tolist()) == sorted(tokens[0].tolist())


def test_b13_no_files_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories lay in ./.tmp and ./knn.memory.memmap unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    KNNMemory(dim=8).add(torch.randn(1, 9, 2, 8))
    model = make_model()
    model(random_tokens(1, 8), model.create_knn_memories(batch_size=1))
    assert list(tmp_path.iterdir()) == []
