"""Both attention layers equal their obvious versions, see no token too early, and remember exactly what they should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memorizing_transformers_pytorch.attention import causal
from memorizing_transformers_pytorch.attention.attention import Attention, AttentionBlock, FeedForward, FeedForwardBlock
from memorizing_transformers_pytorch.attention.causal import INVISIBLE, causal_distances
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.memory import KNNMemory
from tests import reference
from tests.reference import ListMemory

ROWS, HEADS, DIM_HEAD, DIM, TOPK = 3, 4, 5, 13, 6
LATE_GRADIENTS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]


def make_layer(kind: type[nn.Module] = KNNAttention, **arguments: Any) -> Any:
    """A small layer of which no parameter has its (often special) value at the start."""
    if kind is KNNAttention:
        arguments = {"num_retrieved_memories": TOPK, "attn_scale_init": 5, **arguments}
    layer = kind(**{"dim": DIM, "heads": HEADS, "dim_head": DIM_HEAD, **arguments})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def make_memories(
    sizes: tuple[int, ...], *, kv_heads: int = 1, capacity: int = 17, dtype: torch.dtype = torch.float32
) -> tuple[KNNMemory, ListMemory]:
    """A memory whose rows have had so many random entries each, and the same as a list."""
    memory = KNNMemory(DIM_HEAD, capacity, len(sizes), num_kv_heads=kv_heads, dtype=dtype)
    listed = ListMemory(rows=len(sizes), capacity=capacity, dtype=dtype)
    entries = torch.randn(len(sizes), kv_heads, max(sizes), 2, DIM_HEAD)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    memory.add(entries, mask)
    listed.add(entries, mask)
    return memory, listed


def gradients(out: Tensor, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of the input and of every parameter, for the same random weighting of the outputs."""
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad((out * weighting).sum(), (x, *parameters), materialize_grads=True)
    return dict(zip(("input", *names), found, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def random_pairs(*shape: int) -> Tensor:
    """Random pairs (*shape, 2, D), such as a past or an XL memory."""
    return torch.randn(*shape, 2, DIM_HEAD)


# Equal to the reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("past", [0, 3])
def test_attention_equals_the_reference(dtype: torch.dtype, tolerance: float, num_kv_heads: int, past: int) -> None:
    layer = make_layer(Attention, num_kv_heads=num_kv_heads).to(dtype)
    x = torch.randn(ROWS, 7, DIM, dtype=dtype, requires_grad=True)
    before = random_pairs(ROWS, num_kv_heads, past).to(dtype) if past else None
    bias = torch.randn(1, HEADS, 7, past + 7, dtype=dtype)
    out, _ = layer(x, xl_memory=before, rel_pos_bias=bias)
    expected = reference.attention(layer, x, past=before, bias=bias)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    actual_grads, expected_grads = gradients(out, layer, x), gradients(expected, layer, x)
    torch.testing.assert_close(actual_grads, expected_grads, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("num_kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("sizes", [None, (0, 0, 0), (0, 3, 29)])  # nothing to search; fewer than asked for; many
def test_knn_attention_equals_the_reference(
    dtype: torch.dtype, tolerance: float, num_kv_heads: int, combine: str, sizes: tuple[int, ...] | None
) -> None:
    layer = make_layer(num_kv_heads=num_kv_heads, combine=combine, short_conv=3, gate_output=True).to(dtype)
    x = torch.randn(ROWS, 7, DIM, dtype=dtype, requires_grad=True)
    past, bias = random_pairs(ROWS, num_kv_heads, 2).to(dtype), torch.randn(1, HEADS, 7, 9, dtype=dtype)
    memory, listed = (None, None) if sizes is None else make_memories(sizes, kv_heads=num_kv_heads)
    out, _ = layer(x, knn_memory=memory, xl_memory=past, rel_pos_bias=bias, add_knn_memory=False)
    expected, _ = reference.knn_attention(layer, x, listed, past=past, bias=bias)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    actual_grads, expected_grads = gradients(out, layer, x), gradients(expected, layer, x)
    torch.testing.assert_close(actual_grads, expected_grads, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_a_half_precision_store_only_rounds(dtype: torch.dtype, tolerance: float, combine: str) -> None:
    layer = make_layer(combine=combine)
    x = torch.randn(ROWS, 7, DIM, requires_grad=True)
    memory, listed = make_memories((0, 3, 29), dtype=dtype)
    out, _ = layer(x, knn_memory=memory, add_knn_memory=False)
    expected, _ = reference.knn_attention(layer, x, listed)
    assert relative_error(out, expected) < tolerance
    actual_grads, expected_grads = gradients(out, layer, x), gradients(expected, layer, x)
    for name, grad in expected_grads.items():
        assert relative_error(actual_grads[name], grad) < tolerance, name


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_gradients_of_a_layer_with_a_memory_are_right(combine: str) -> None:
    layer = make_layer(dim=3, heads=2, combine=combine, short_conv=2).double()
    memory, _ = make_memories((0, 9))
    names = [name for name, _ in layer.named_parameters()]

    def attended(x: Tensor, *parameters: Tensor) -> Tensor:
        arguments = {"knn_memory": memory, "add_knn_memory": False}
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), arguments)[0]

    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attended, (x, *layer.parameters()), fast_mode=True)


# Without copies of what was retrieved


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation gives back, in forward and backward, or that autograd saves."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._see, lambda saved: saved)

    def __enter__(self) -> LargestTensor:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hooks.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._see(leaf)
        return result

    def _see(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            self.numel = max(self.numel, leaf.numel())
        return leaf


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_copies_would_be(combine: str, dtype: torch.dtype) -> None:
    topk, width, length = 31, 64, 5
    layer = KNNAttention(dim=9, heads=HEADS, dim_head=width, num_retrieved_memories=topk, combine=combine)
    entries, x = torch.randn(1, 1, 37, 2, width), torch.randn(1, length, 9, requires_grad=True)
    memory, listed = KNNMemory(width, 37, dtype=dtype), ListMemory(rows=1, capacity=37)
    memory.add(entries)
    listed.add(entries)
    with LargestTensor() as fast:
        out, _ = layer(x, knn_memory=memory)  # which overwrites entries that the backward pass needs
        out.sum().backward()
    with LargestTensor() as slow:
        reference.knn_attention(layer, x, listed)[0].sum().backward()
    copies = HEADS * length * topk * width
    assert slow.numel >= copies
    assert fast.numel < copies / 10


# Late backward passes


def unrolled(layer: KNNAttention, dtype: torch.dtype, frozen: tuple[str, ...] = ()) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of losses summed over segments while the rings turn three times: the layer's, the reference's."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    memory, listed = make_memories((0, 3, 29), kv_heads=layer.num_kv_heads, dtype=dtype)
    losses: list[list[Tensor]] = [[], []]
    for step, length in enumerate((7, 3, 11, 5, 17, 2, 9)):
        x = torch.randn(ROWS, length, DIM)
        if step == 4:
            memory.clear([1])
            listed.clear([1])
        expected, pairs = reference.knn_attention(layer, x, listed)
        listed.add(pairs)
        weighting = torch.randn_like(expected)
        for kept, out in zip(losses, (layer(x, knn_memory=memory)[0], expected), strict=True):
            kept.append((out * weighting).sum())
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    actual_grads, expected_grads = (torch.autograd.grad(torch.stack(kept).sum(), trained) for kept in losses)
    yield from zip(actual_grads, expected_grads, strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), LATE_GRADIENTS)
@pytest.mark.parametrize(("num_kv_heads", "combine"), [(1, "softmax"), (2, "gate")])
def test_backward_is_right_however_often_the_ring_has_turned(
    dtype: torch.dtype, tolerance: float, num_kv_heads: int, combine: str
) -> None:
    layer = make_layer(num_kv_heads=num_kv_heads, combine=combine, short_conv=3)
    for actual, expected in unrolled(layer, dtype):
        assert relative_error(actual, expected) < tolerance


def test_backward_is_right_where_only_the_weighting_of_the_memory_is_trained() -> None:
    frozen = ("to_q.weight", "to_kv.weight", "to_out.weight")
    for actual, expected in unrolled(make_layer(combine="gate"), torch.float32, frozen):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_blocks_of_queries_give_what_all_of_them_do_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], past: int, size: int
) -> None:
    layer = make_layer(kind, num_kv_heads=2)
    memory, _ = make_memories((9, 3, 0), kv_heads=2)
    x, pairs = torch.randn(ROWS, 7, DIM, requires_grad=True), torch.randn(ROWS, 2, past, 2, DIM_HEAD)
    bias = causal_distances(7, past + 7).eq(INVISIBLE).float().mul(-1e30).expand(1, HEADS, -1, -1)
    options = {"look_up": memory.look_up} if kind is KNNAttention else {}

    def run(at_once: int) -> list[Tensor]:
        monkeypatch.setattr(causal, "QUERIES_AT_ONCE", at_once)
        attended = layer.attend(x, bias=bias, past=pairs, **options)
        read = [] if attended.reading is None else [attended.reading.weights]
        return [attended.out, *read, *gradients(attended.out, layer, x).values()]

    torch.testing.assert_close(run(size), run(100))


def test_no_gradient_flows_through_the_memory_or_the_past() -> None:
    layer, memory = make_layer(), KNNMemory(DIM_HEAD, 17, ROWS)
    first, second = (torch.randn(ROWS, 7, DIM, requires_grad=True) for _ in range(2))
    _, pairs = reference.knn_attention(layer, first)
    memory.add(pairs)
    out, _ = layer(second, knn_memory=memory, xl_memory=pairs)
    grads = torch.autograd.grad(out.sum(), (first, second), allow_unused=True)
    assert grads[0] is None
    assert grads[1] is not None


# Causality


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("past", [0, 3])
def test_an_output_does_not_depend_on_later_tokens(kind: type[nn.Module], past: int) -> None:
    extra = {} if kind is Attention else {"short_conv": 3}
    layer = make_layer(kind, **extra)
    inputs = {} if kind is Attention else {"knn_memory": make_memories((0, 3, 29))[0], "add_knn_memory": False}
    x = torch.randn(ROWS, 7, DIM, requires_grad=True)
    out, _ = layer(x, xl_memory=random_pairs(ROWS, 1, past) if past else None, **inputs)
    for i in range(7):
        (grad,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        depends = grad.abs().amax(dim=(0, 2)) > 0
        assert depends.tolist() == [True] * (i + 1) + [False] * (6 - i)


# Softmax, gates and temperature


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("gate_output", [False, True])
def test_an_empty_memory_is_as_good_as_none(combine: str, gate_output: bool) -> None:
    layer = make_layer(combine=combine, gate_output=gate_output)
    x = torch.randn(ROWS, 7, DIM)
    torch.testing.assert_close(layer(x, knn_memory=make_memories((0, 0, 0))[0])[0], layer(x)[0])


@pytest.mark.parametrize(("sizes", "moved"), [(None, False), ((0, 0, 0), False), ((0, 3, 29), True)])
def test_the_gate_always_has_a_gradient_and_only_a_memory_moves_it(sizes: tuple[int, ...] | None, moved: bool) -> None:
    layer = make_layer(combine="gate")
    memory = None if sizes is None else make_memories(sizes)[0]
    layer(torch.randn(ROWS, 7, DIM), knn_memory=memory)[0].square().sum().backward()
    assert layer.gate.grad is not None
    assert (layer.gate.grad != 0).flatten().tolist() == [moved] * HEADS


@pytest.mark.parametrize(("gate", "open_to_memory"), [(-50.0, False), (50.0, True)])
def test_a_gate_can_shut_out_either_side(gate: float, open_to_memory: bool) -> None:
    layer = make_layer(combine="gate")
    layer.gate.data.fill_(gate)
    memory, _ = make_memories((9, 29, 3))
    x, past = torch.randn(ROWS, 7, DIM), random_pairs(ROWS, 1, 5)
    out, _ = layer(x, knn_memory=memory, add_knn_memory=False)
    without_memory, _ = layer(x)
    with_past, _ = layer(x, knn_memory=memory, xl_memory=past, add_knn_memory=False)
    assert torch.allclose(out, without_memory, atol=1e-5) != open_to_memory
    assert torch.allclose(out, with_past, atol=1e-5) == open_to_memory


def test_a_gate_starts_half_open() -> None:
    layer = KNNAttention(dim=DIM, combine="gate")
    assert layer.gate is not None
    assert torch.equal(layer.gate.sigmoid(), torch.full((8, 1, 1), 0.5))


def test_an_output_gate_starts_shut_but_learns() -> None:
    layer = KNNAttention(dim=DIM, heads=HEADS, dim_head=DIM_HEAD, gate_output=True)
    out, _ = layer(torch.randn(ROWS, 7, DIM), knn_memory=make_memories((0, 3, 29))[0])
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert layer.output_gate is not None
    assert layer.output_gate.grad is not None
    assert float(layer.output_gate.grad.abs()) > 0


@pytest.mark.parametrize("sizes", [None, (9, 3, 29)])
@pytest.mark.parametrize("head", range(HEADS))
def test_each_head_has_a_temperature_of_its_own(head: int, sizes: tuple[int, ...] | None) -> None:
    layer = make_layer(dim=HEADS * DIM_HEAD)
    layer.to_out.weight.data = torch.eye(HEADS * DIM_HEAD)
    x, memory = torch.randn(ROWS, 7, HEADS * DIM_HEAD), None if sizes is None else make_memories(sizes)[0]
    before, _ = layer(x, knn_memory=memory, add_knn_memory=False)
    layer.scale.data[head] += 1
    after, _ = layer(x, knn_memory=memory, add_knn_memory=False)
    changed = (after - before).abs().unflatten(-1, (HEADS, DIM_HEAD)).amax(dim=(0, 1, 3)) > 1e-4
    assert changed.tolist() == [other == head for other in range(HEADS)]


def test_temperatures_start_where_asked() -> None:
    scale = KNNAttention(dim=DIM, heads=3, attn_scale_init=7).scale
    torch.testing.assert_close(scale, torch.full((3, 1, 1), math.log(7)))
    torch.testing.assert_close(KNNAttention(dim=DIM).scale, torch.full((8, 1, 1), math.log(20)))


@pytest.mark.parametrize(
    "arguments", [{"kind": Attention}, {"combine": "softmax"}, {"combine": "gate"}], ids=["local", "softmax", "gate"]
)
def test_dropout_acts_only_in_training(arguments: dict[str, Any]) -> None:
    layer, x = make_layer(dropout=0.5, **arguments), torch.randn(ROWS, 7, DIM)
    given = {} if "kind" in arguments else {"knn_memory": make_memories((0, 3, 29))[0], "add_knn_memory": False}
    assert not torch.equal(layer.train()(x, **given)[0], layer(x, **given)[0])
    without = make_layer(**arguments)
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x, **given)[0], without(x, **given)[0])


def test_dropout_acts_on_retrieved_entries_too() -> None:
    layer, (memory, _) = make_layer(dropout=0.5, combine="gate"), make_memories((17, 17, 17))
    layer.gate.data.fill_(50.0)  # nothing but the memory
    x = torch.randn(ROWS, 7, DIM)
    first, second = (layer(x, knn_memory=memory, add_knn_memory=False)[0] for _ in range(2))
    assert relative_error(first, second) > 0.1


# What is stored


def stored(memory: KNNMemory) -> Tensor:
    """The entries (B, G, N, 2, D) of a memory that has not turned."""
    count = memory.num_entries[0]
    return torch.stack((memory.store.keys.floats(), memory.store.values.floats()), dim=-2)[:, :, :count]


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("xl_max_memories", [0, 1, 7, 12, 100])
def test_what_xl_memory_discards_enters_the_memory_once_and_in_order(num_kv_heads: int, xl_max_memories: int) -> None:
    layer = make_layer(num_kv_heads=num_kv_heads, xl_max_memories=xl_max_memories)
    memory, xl_memory = KNNMemory(DIM_HEAD, 50, ROWS, num_kv_heads=num_kv_heads), None
    pairs = []
    for length in (5, 3, 11, 1, 5):
        x = torch.randn(ROWS, length, DIM)
        pairs.append(reference.knn_attention(layer, x)[1])
        _, xl_memory = layer(x, knn_memory=memory, xl_memory=xl_memory)
        produced = torch.cat(pairs, dim=2)
        cut = max(produced.shape[2] - xl_max_memories, 0)
        assert memory.num_entries == (cut,) * ROWS
        torch.testing.assert_close(stored(memory), produced[:, :, :cut])
        if xl_max_memories == 0:
            assert xl_memory is None
        else:
            torch.testing.assert_close(xl_memory, produced[:, :, cut:])
            assert not xl_memory.requires_grad


@pytest.mark.parametrize("short_conv", [0, 4])
def test_stored_keys_have_length_1_and_values_are_as_they_were(short_conv: int) -> None:
    layer, memory, x = make_layer(short_conv=short_conv), KNNMemory(DIM_HEAD, 50, ROWS), torch.randn(ROWS, 7, DIM)
    layer(x, knn_memory=memory)
    keys, values = stored(memory).unbind(dim=-2)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(ROWS, 1, 7))
    torch.testing.assert_close(values[:, 0], layer.to_kv(x).detach()[..., DIM_HEAD:])


def test_the_search_comes_before_the_segment_is_stored() -> None:
    layer, memory, x = make_layer(), KNNMemory(DIM_HEAD, 50, ROWS), torch.randn(ROWS, 7, DIM)
    first, _ = layer(x, knn_memory=memory)
    second, _ = layer(x, knn_memory=memory)
    torch.testing.assert_close(first, layer(x)[0])
    assert relative_error(second, first) > 1e-2
    assert memory.num_entries == (14,) * ROWS


def test_a_memory_is_unchanged_where_nothing_shall_be_added() -> None:
    layer, (memory, _) = make_layer(), make_memories((17, 17, 17))
    before = stored(memory)
    out, _ = layer(torch.randn(ROWS, 7, DIM), knn_memory=memory, add_knn_memory=False)
    assert torch.equal(stored(memory), before)
    assert memory.num_entries == (17, 17, 17)
    assert bool(out.isfinite().all())


# Other numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_half_precision_layers_are_close_to_float32(dtype: torch.dtype, store_dtype: torch.dtype, combine: str) -> None:
    layer = make_layer(
        combine=combine, short_conv=3, num_retrieved_memories=17
    )  # all: ties cannot change what is found
    x = torch.randn(ROWS, 7, DIM, requires_grad=True)
    memory, listed = make_memories((0, 3, 17), dtype=store_dtype)
    expected, _ = reference.knn_attention(layer, x, listed)
    expected_grads = gradients(expected, layer, x)
    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    out, _ = layer(x, knn_memory=memory)
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 0.05
    for name, grad in gradients(out, layer, x).items():
        assert relative_error(grad.float(), expected_grads[name]) < 0.1, name


@pytest.mark.parametrize("store_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_autocast_is_close_to_float32(store_dtype: torch.dtype, combine: str) -> None:
    layer = make_layer(combine=combine, short_conv=3, num_retrieved_memories=17)
    x = torch.randn(ROWS, 7, DIM, requires_grad=True)
    memory, listed = make_memories((0, 3, 17), dtype=store_dtype)
    expected, _ = reference.knn_attention(layer, x, listed)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(x, knn_memory=memory)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) < 0.05
    expected_grads = gradients(expected, layer, x)
    for name, grad in gradients(out, layer, x).items():
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected_grads[name]) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_local_attention_works_in_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    layer, x = make_layer(Attention, num_kv_heads=2), torch.randn(ROWS, 7, DIM)
    bias = torch.randn(1, HEADS, 7, 10)
    past = random_pairs(ROWS, 2, 3)
    expected = reference.attention(layer, x, past=past, bias=bias)
    with torch.autocast("cpu", dtype, enabled=autocast):
        layer, x = (layer, x) if autocast else (layer.to(dtype), x.to(dtype))
        out, _ = layer(x, xl_memory=past, rel_pos_bias=bias)
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 0.05


# What was read


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("past", [0, 3])
def test_the_reading_holds_the_weights_of_what_was_retrieved(combine: str, kv_heads: int, past: int) -> None:
    """Those of the obvious version, which add up to at most 1; none where a row has fewer entries."""
    layer = make_layer(num_kv_heads=kv_heads, combine=combine)
    memory, listed = make_memories((0, 3, 29), kv_heads=kv_heads)
    x, before = torch.randn(ROWS, 7, DIM), random_pairs(ROWS, kv_heads, past) if past else None
    bias = reference.causal_bias(7, past + 7)
    attended = layer.attend(x, bias=bias, past=before, look_up=memory.look_up)
    queries, weights = attended.reading.queries, attended.reading.weights

    temperature, found = layer.scale.exp(), listed.search(queries, TOPK, kv_heads)
    keys, _ = reference.join_pairs(before, attended.pairs, HEADS)
    memory_logits = reference.gathered_logits(queries, found.keys) * temperature
    memory_logits = memory_logits.masked_fill(~found.mask, -math.inf)
    local_logits = queries @ keys.mT * temperature + bias
    if combine == "gate":
        expected = memory_logits.softmax(dim=-1).nan_to_num() * layer.gate.sigmoid()
    else:
        expected = torch.cat((memory_logits, local_logits), dim=-1).softmax(dim=-1)[..., :TOPK]
    torch.testing.assert_close(weights, expected.detach())
    assert bool((weights.sum(dim=-1) <= 1 + 1e-6).all())
    assert torch.equal(attended.reading.lookup.mask, found.mask)
    assert not weights[~found.mask].any()


def test_without_a_memory_there_is_no_reading() -> None:
    x, bias = torch.randn(ROWS, 7, DIM), reference.causal_bias(7, 7)
    for kind in (Attention, KNNAttention):
        assert make_layer(kind).attend(x, bias=bias).reading is None


# Refusals


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Attention, {"heads": 4, "num_kv_heads": 3}),
        (KNNAttention, {"heads": 4, "num_kv_heads": 8}),
        (KNNAttention, {"heads": 4, "num_kv_heads": 0}),
        (KNNAttention, {"dropout": 1.5}),
        (KNNAttention, {"combine": "sum"}),
        (KNNAttention, {"qk_init": "random"}),
        (KNNAttention, {"qk_init": "induction", "short_conv": 1}),
    ],
)
def test_bad_arguments_are_refused(kind: type[nn.Module], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|dropout"):
        kind(dim=DIM, **arguments)


@pytest.mark.parametrize(("width", "rows"), [(DIM_HEAD + 1, ROWS), (DIM_HEAD, ROWS + 1)])
def test_a_memory_that_does_not_fit_is_refused(width: int, rows: int) -> None:
    with pytest.raises(ValueError, match="expected queries"):
        make_layer()(torch.randn(ROWS, 7, DIM), knn_memory=KNNMemory(width, 9, rows))


# Compiled


def assert_compiles(module: nn.Module, before_backward: Callable[[], Any] = lambda: None, **context: Any) -> None:
    """Outputs and gradients of the module stay as they are when it is compiled."""
    torch._dynamo.reset()
    x = torch.randn(ROWS, 7, DIM, requires_grad=True)
    results = [call(x, **context) for call in (torch.compile(module, backend="eager", fullgraph=True), module)]
    compiled, plain = (result if isinstance(result, Tensor) else result.out for result in results)
    torch.testing.assert_close(compiled, plain)
    before_backward()
    torch.testing.assert_close(gradients(compiled, module, x), gradients(plain, module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [FeedForward, lambda dim: FeedForwardBlock(dim, FeedForward(dim))])
def test_feed_forward_compiles(make: Callable[[int], nn.Module]) -> None:
    assert_compiles(make(DIM))


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("past", [0, 3])
def test_attention_blocks_compile(kind: type[nn.Module], past: int) -> None:
    before = random_pairs(ROWS, 2, past) if past else None
    block = AttentionBlock(DIM, make_layer(kind, num_kv_heads=2))
    assert_compiles(block, bias=reference.causal_bias(7, past + 7), past=before)


@pytest.mark.filterwarnings("ignore")  # PyTorch may warn where it has to split the graph: that is allowed
@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_a_block_with_a_memory_compiles_and_its_backward_may_come_late(combine: str) -> None:
    block = AttentionBlock(DIM, make_layer(num_kv_heads=2, combine=combine, short_conv=3))
    memory, _ = make_memories((0, 3, 29), kv_heads=2)
    context = {"bias": reference.causal_bias(7, 7), "look_up": memory.look_up}
    assert_compiles(block, lambda: memory.add(random_pairs(ROWS, 2, 30)), **context)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize(
    "padding", [[False] * 2 + [True] * 5, [True] * 4 + [False] * 3, [True, False] * 3 + [True]], ids=str
)
def test_padding_is_neither_attended_to_nor_stored(kind: type[Attention | KNNAttention], padding: list[bool]) -> None:
    layer, memory = kind(dim=12, heads=2, dim_head=5), KNNMemory(5, 20, 2)
    arguments = {"knn_memory": memory} if kind is KNNAttention else {}
    mask = torch.tensor([padding, [True] * 7])
    x = torch.randn(2, 7, 12)
    out, _ = layer(x, mask=mask, **arguments)
    assert out.isfinite().all()
    changed, _ = layer(x.where(mask.unsqueeze(-1), torch.randn(2, 7, 12)), mask=mask)
    torch.testing.assert_close(out[mask], changed[mask])
    alone, _ = layer(x[:1, mask[0]])
    torch.testing.assert_close(out[:1, mask[0]], alone)
    if arguments:
        assert memory.num_entries == (sum(padding), 7)


def test_a_mask_that_cannot_be_used_is_refused() -> None:
    x = torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match=r"expected a bool mask \(2, 7\), got torch.int64 \(2, 7\)"):
        Attention(dim=12)(x, mask=torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected no mask with xl_max_memories"):
        KNNAttention(dim=12, xl_max_memories=3)(x, mask=torch.ones(2, 7, dtype=torch.bool))


def test_padding_that_a_convolution_would_see_is_refused() -> None:
    layer, x = KNNAttention(dim=12, short_conv=3), torch.randn(1, 5, 12)
    layer(x, mask=torch.tensor([[True, True, True, False, False]]))
    with pytest.raises(ValueError, match="expected padding on the right only"):
        layer(x, mask=torch.tensor([[False, True, True, True, True]]))


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_xl_memory_that_does_not_fit_is_refused(kind: type[Attention | KNNAttention]) -> None:
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=r"expected xl_memory \(2, 1, 3, 2, 4\), got \(2, 1, 3, 2, 5\)"):
        kind(dim=12, dim_head=4, xl_max_memories=3)(x, xl_memory=torch.randn(2, 1, 3, 2, 5))


def test_a_past_that_the_layer_does_not_keep_is_seen_but_not_stored() -> None:
    layer, x, past = KNNAttention(dim=12, dim_head=4), torch.randn(2, 5, 12), torch.randn(2, 1, 3, 2, 4)
    with KNNMemory(4, max_memories=20, num_indices=2) as memory:
        out, new_past = layer(x, xl_memory=past, knn_memory=memory)
        assert new_past is None
        assert not torch.equal(out, layer(x)[0])
        assert memory.num_entries == (5, 5)
