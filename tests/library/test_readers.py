"""The models that read documents into a memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.library.readers import HubReader, open_reader
from tests.library.conftest import make_hub_model, make_run


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


@pytest.mark.parametrize(
    ("configured", "asked", "expected"),
    [
        ("exact", None, "auto"),
        ("exact", "exact", "exact"),
        ("IVF4,Flat", None, "IVF4,Flat"),
        ("exact", "IVF8,SQ8", "IVF8,SQ8"),
    ],
)
def test_a_new_library_of_a_run_is_searched_by_lists_unless_something_else_is_said(
    tmp_path: Path, configured: str, asked: str | None, expected: str
) -> None:
    run = make_run(tmp_path / "run", memory_index=configured)
    reader = open_reader(str(run), "cpu", max_memories=None, dtype=None, index=asked)
    assert {each.index for each in reader.memory} == {expected}
    reader.memory.save(tmp_path / "library")
    again = open_reader(str(run), "cpu", max_memories=None, dtype=None, index=None)
    again.load(tmp_path / "library")
    assert {each.index for each in again.memory} == {expected}
