"""The notebook does what it says, at its tiny size, and is kept without outputs."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "memory_tour.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_short_and_kept_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert len(notebook.cells) < 15
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith('SIZE = "small"')
    first.source = 'SIZE = "tiny"'
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = "".join(str(cell.outputs) for cell in notebook.cells if "outputs" in cell)
    assert "step 1: loss" in told
    assert "with     '" in told
    assert "entries looked up" in told
    assert "entries forgotten" in told
    assert "second" in str(notebook.cells[-1].outputs[-1])
    assert "first" not in str(notebook.cells[-1].outputs[-1])
    asyncio.set_event_loop(None)  # nbclient leaves one open: better collected here, than where it fails another test
    gc.collect()
