"""Values of a block come back when a block inside it has ended."""

from __future__ import annotations

import pytest

from memorizing_transformers_pytorch.utils.context import PerContext


def test_the_value_of_the_outer_block_comes_back_also_after_an_exception() -> None:
    value = PerContext("usual")
    with value.at("outer"):
        with pytest.raises(KeyError), value.at("inner"):
            raise KeyError(value.now)
        assert value.now == "outer"
    assert value.now == "usual"
