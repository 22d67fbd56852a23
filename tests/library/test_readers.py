"""The models that read documents into a memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.library.readers import HubReader, open_reader
from tests.library.conftest import make_hub_model


@pytest.mark.parametrize(("positions", "chunk"), [(64, 64), (600, 512)])
def test_a_model_reads_no_more_at_once_than_it_has_learned_positions_for(
    tmp_path: Path, positions: int, chunk: int
) -> None:
    model = make_hub_model(tmp_path / "model", "gpt2", n_positions=positions, max_position_embeddings=positions)
    reader = open_reader(str(model), "cpu", max_memories=None, dtype=None, index=None)
    assert isinstance(reader, HubReader)
    assert (reader.longest, reader.memory.options.chunk) == (positions, chunk)
    assert list(reader.read("long", "a long text " * 100, {}, None))[-1] == 1
    assert [each.tokens for each in reader.memory.documents()] == [1_200]
