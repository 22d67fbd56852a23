"""The logarithm of the sum of local exponentials, from PyTorch's kernel, against the same written out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig

from memorizing_transformers_pytorch.huggingface import attach_memory, interface
from memorizing_transformers_pytorch.huggingface.interface import LEAST, Extension, Local
from tests.huggingface.families import tiny

WIDTH = 5


class Recorded(Extension):
    """Keeps what it is given."""

    def __init__(self, needs_lse: bool) -> None:
        self._needs_lse, self.local = needs_lse, None

    def needs_lse(self) -> bool:
        return self._needs_lse

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        self.local = local
        return out


def module() -> nn.Module:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = "sdpa"
    made = nn.Module()
    made.config, made.is_causal = config, True
    return made


def masks(queries: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Masks for two rows. The first row is left-padded, so some of its queries see nothing."""
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, -1, -1).clone()
    visible[0, :, :, :3] = False
    visible[0, :, 0] = False
    numbers = torch.zeros(2, 1, queries, keys, dtype=dtype)
    return {
        "none": None,
        "bool": visible,
        "the least numbers": numbers.masked_fill(~visible, torch.finfo(dtype).min),
        "minus infinity": numbers.masked_fill(~visible, -torch.inf),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "bool", "the least numbers", "minus infinity"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 13), (6, 13)])
def test_the_kernel_tells_what_the_logits_add_up_to(
    queries: int, keys: int, name: str, dtype: torch.dtype, attended: Any
) -> None:
    mask = masks(queries, keys, dtype)[name]
    fast, slow, out, expected_out = attended(queries, keys, mask, dtype)
    assert_close(out, expected_out)
    seen = slow > LEAST / 2
    assert torch.equal(fast > LEAST / 2, seen)
    assert seen.any()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    assert_close(fast[seen].float(), slow[seen].float(), **tolerance)


@pytest.fixture
def attended() -> Any:
    torch.manual_seed(0)

    def both(queries: int, keys: int, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        query = torch.randn(2, 4, queries, WIDTH, dtype=dtype)
        key, value = torch.randn(2, 2, 2, keys, WIDTH, dtype=dtype)
        outs, lses = [], []
        for needs_lse in (True, False):
            layer, extension = module(), Recorded(needs_lse)
            layer.num_key_value_groups = 2
            interface.use(layer, extension)
            outs.append(interface.attend(layer, query, key, value, mask, scaling=0.3)[0])
            assert extension.local is not None
            assert (extension.local._lse is not None) == needs_lse
            lses.append(extension.local.lse(query))
        return *lses, *outs

    return both


def test_where_something_is_learned_the_lse_has_a_gradient() -> None:
    layer, extension = module(), Recorded(needs_lse=True)
    layer.num_key_value_groups = 1
    interface.use(layer, extension)
    query, key, value = torch.randn(3, 1, 2, 4, WIDTH).unbind()
    interface.attend(layer, query.requires_grad_(), key, value, None, scaling=0.3)
    assert extension.local is not None
    assert extension.local.lse(query).requires_grad


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_the_kernel_is_asked_only_where_something_was_found_and_the_lse_is_needed(
    combine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, with_lse = [], interface._with_lse
    monkeypatch.setattr(interface, "_with_lse", lambda *given: asked.append(1) or with_lse(*given))
    model = tiny("llama", "sdpa")
    memory = attach_memory(model, retrieve="tokens", combine=combine)
    tokens = torch.randint(50, (1, 20))
    with torch.no_grad():
        model(tokens)
        assert not asked
        memory.read(tokens, progress=False)
        model(tokens)
        assert len(asked) == (len(memory.layers) if combine == "softmax" else 0)
        with memory.enabled(False):
            model(tokens)
    assert len(asked) == (len(memory.layers) if combine == "softmax" else 0)
