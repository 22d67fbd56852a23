"""Changed weights are noticed, whichever change it is, and looking for changes costs little."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.utils.fingerprint import UNKNOWN, Weights

ROWS = 50


class Quantised(nn.Module):
    """Weights in buffers, as GPTQ and AWQ have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.randint(-9, 9, (ROWS, 4), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(ROWS, 1))
        self.register_buffer("table", torch.rand(3), persistent=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(ROWS, 8), nn.ModuleList([nn.Linear(8, ROWS), Quantised()]))


def in_place(weight: Tensor, row: int) -> None:
    with torch.no_grad():
        weight[row] += 1


def through_the_optimizer(weight: Tensor, row: int) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[row] = 1.0
    torch.optim.SGD([weight], lr=0.1).step()


def swapped_data(weight: Tensor, row: int) -> None:
    changed = weight.detach().clone()
    changed[row] += 1
    weight.data = changed


@pytest.mark.parametrize("change", [in_place, through_the_optimizer, swapped_data])
def test_a_change_of_any_row_is_noticed(change: Callable[[Tensor, int], None]) -> None:
    net = model()
    weights = Weights(net)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if "table" in name or (change is through_the_optimizer and not tensor.requires_grad):
            continue
        for row in range(0, len(tensor), 7):
            weights.have_written()
            before = weights.fingerprint()
            change(tensor, row)
            with pytest.warns(UserWarning, match="model weights changed after this memory was written"):
                weights.warn_of_others()
            with pytest.raises(ValueError, match=r"Clear the memory first\."):
                weights.refuse_others()
            assert weights.fingerprint() != before, (name, row)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_was_loaded_is_noticed(assign: bool) -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["1.1.qweight"][31] += 1
    net.load_state_dict(state, assign=assign)
    with pytest.raises(ValueError, match="model weights changed"):
        weights.refuse_others()


@pytest.mark.parametrize("through", ["a module", "a parameter", "a buffer", "another module", "fewer modules"])
def test_what_is_exchanged_is_noticed(through: str) -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    if through == "a module":
        net[1][0] = nn.Linear(8, ROWS)
    elif through == "a parameter":
        net[0].weight = nn.Parameter(net[0].weight + 1)
    elif through == "a buffer":
        net[1][1].qweight = net[1][1].qweight + 1
    elif through == "another module":
        net[1].append(nn.Linear(2, 2))
    else:
        del net[1][0]
    with pytest.raises(ValueError, match="model weights changed"):
        weights.refuse_others()


def test_what_is_the_same_is_no_change() -> None:
    """The same numbers in other tensors, once the hash is known; buffers that are not saved; another mode."""
    net = model()
    weights = Weights(net)
    weights.have_written()
    known = weights.written_by
    net.eval().requires_grad_(False)
    net[1][1].table += 1
    net[1][1].register_buffer("table", torch.rand(5), persistent=False)
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)
    weights.warn_of_others()
    weights.refuse_others()
    weights.check(known)
    assert weights.written_by == known == weights.fingerprint() == Weights(net).fingerprint()


def test_a_change_that_was_taken_back_is_none() -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    known = weights.written_by
    in_place(net[0].weight, 3)
    with pytest.warns(UserWarning, match="model weights changed"):
        weights.warn_of_others()
    weights.warn_of_others()  # once for each change
    with torch.no_grad():
        net[0].weight[3] -= 1
    net[0].weight.data.copy_(model()[0].weight)
    weights.warn_of_others()
    assert weights.written_by == known


def test_a_full_hash_notices_what_no_version_counts() -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    known = weights.written_by
    net[1][0].weight.data[17].mul_(2)
    weights.warn_of_others()
    with pytest.raises(ValueError, match="this memory was written by other weights"):
        weights.check(known)


def test_weights_that_changed_before_their_hash_was_known_are_those_of_no_model() -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    in_place(net[0].weight, 3)
    assert weights.written_by == UNKNOWN
    with pytest.raises(ValueError, match="this memory was written by other weights"):
        weights.check(UNKNOWN)
    weights.check(None)


def test_what_is_ignored_does_not_count() -> None:
    net = model()
    weights = Weights(net, "1.0")
    weights.have_written()
    in_place(net[1][0].weight, 3)
    weights.refuse_others()
    assert weights.fingerprint() == Weights(net, "1.0").fingerprint() != Weights(net).fingerprint()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_knows_who_wrote(copied: Callable[[tuple[nn.Module, Weights]], tuple[nn.Module, Weights]]) -> None:
    net = model()
    weights = Weights(net)
    weights.have_written()
    other, of_copy = copied((net, weights))
    of_copy.refuse_others()
    in_place(net[0].weight, 3)
    of_copy.refuse_others()
    in_place(other[0].weight, 3)
    with pytest.raises(ValueError, match="model weights changed"):
        of_copy.refuse_others()


def test_fingerprints_of_earlier_releases_are_accepted() -> None:
    """Computed by the release before, which read 16 numbers of each parameter and no buffers."""
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).view(2, 3))
        net.bias.fill_(0.5)
    old = "a1d2c098156ea6bfaa6021b59ed02e1141b7d8e3e8b5e431d8f32c1570f66394"
    Weights(net).check(old)
    in_place(net.weight, 1)
    with pytest.raises(ValueError, match="this memory was written by other weights"):
        Weights(net).check(old)


def test_looking_for_changes_takes_no_time() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1), nn.Identity()) for _ in range(150)))
    weights = Weights(net)
    weights.have_written()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        weights.warn_of_others()
        times.append(time.perf_counter() - start)
    assert sorted(times)[2] < 1e-3
