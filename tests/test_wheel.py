"""The wheel: built, installed in a clean environment with nothing but its declared dependencies, and used once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import torch
import memorizing_transformers_pytorch as package
assert "site-packages" in package.__file__, package.__file__
model = package.MemorizingTransformer(num_tokens=9, dim=8, depth=1, dim_head=8, heads=1)
with model.knn_memories_context(batch_size=1) as memories:
    tokens = torch.randint(1, 9, (1, 5))
    model(tokens, memories)
    loss = model(tokens, memories, labels=tokens)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
import memorizing_transformers_pytorch.cli
from memorizing_transformers_pytorch.explorer.markup import part, shown
from memorizing_transformers_pytorch.explorer.run_page import run_page
assert "<main>" in run_page("title", [], None, None, "")
assert part("app.css") and part("app.js") and shown.message("text")
assert loss.isfinite()
print("stepped")
"""


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    assert run(sys.executable, "-m", "venv", tmp_path / "env").returncode == 0
    reached = run(python, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, *constraints, "einops")
    if reached.returncode != 0:
        pytest.skip(f"no package index to install from: {reached.stderr.strip().splitlines()[-1]}")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    installed = run(python, "-m", "pip", "install", "--quiet", *constraints, wheel)
    assert installed.returncode == 0, installed.stderr
    stepped = run(python, "-W", "error", "-c", PROGRAM, cwd=tmp_path)
    assert stepped.stdout.startswith("stepped"), stepped.stderr
    helped = run(tmp_path / "env" / "bin" / "memorizing-transformers", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    (tmp_path / "some.py").write_text("def collect_parcels(harbour):\n    return harbour.parcels\n" * 9)
    explain = ("explain", "--read", "some.py", "--prompt", "def collect_parcels(harbour):", "-o", "page.html")
    explained = run(tmp_path / "env" / "bin" / "memorizing-transformers", *explain, cwd=tmp_path)
    assert explained.returncode == 0, explained.stderr
    assert "collect_parcels" in (tmp_path / "page.html").read_text(encoding="utf-8")
