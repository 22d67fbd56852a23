"""Which model and memory `memorizing-transformers explore` opens, and the page that it serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.cli.explore import chosen
from memorizing_transformers_pytorch.cli.options.explore import Explore
from memorizing_transformers_pytorch.explorer.service import Service
from memorizing_transformers_pytorch.library.readers import open_reader
from tests.library.conftest import make_hub_model, make_run


def memory_of(model: Path, folder: Path) -> Path:
    service = Service(open_reader(str(model), "cpu", max_memories=None, dtype=None, index=None))
    service.read("me", "one.txt", b"it was the best of times " * 4)
    service.save("me", str(folder))
    return folder


def test_the_newest_run_is_taken_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen(Explore()) == ("shipped", None)
    for i, name in enumerate(("new", "old")):
        (checkpoint,) = (make_run(tmp_path / "runs" / name) / "checkpoints").iterdir()
        os.utime(checkpoint, (2_000_000_000 - i, 2_000_000_000 - i))
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.yaml").touch()
    memory = memory_of(tmp_path / "runs" / "old", tmp_path / "memory")
    new, old = str(Path("runs", "new")), Path("runs", "old")
    assert chosen(Explore()) == (new, None)
    assert chosen(Explore(what=old)) == (str(old), None)
    assert chosen(Explore(model="some/model")) == ("some/model", None)
    assert chosen(Explore(what=memory)) == (new, memory)
    assert chosen(Explore(what=memory, model=str(old))) == (str(old), memory)
    with pytest.raises(ValueError, match="expected a run or --model"):
        chosen(Explore(what=old, model="another"))


def test_a_memory_of_a_model_of_transformers_needs_it(tmp_path: Path) -> None:
    memory = memory_of(make_hub_model(tmp_path / "model"), tmp_path / "memory")
    with pytest.raises(ValueError, match="expected --model"):
        chosen(Explore(what=memory))


def test_a_memory_of_another_model_is_refused_before_the_page_is_there(tmp_path: Path) -> None:
    memory = memory_of(make_run(tmp_path / "one"), tmp_path / "memory")
    other = open_reader(str(make_run(tmp_path / "two", seed=1)), "cpu", max_memories=None, dtype=None, index=None)
    with pytest.raises(ValueError, match="weights"):
        Service(other, memory)


def _hear_interrupts() -> None:
    """Also where the tests run in the background of a shell, which lets its jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_the_command_serves_this_machine_until_it_is_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    command = [sys.executable, "-c", "from memorizing_transformers_pytorch.cli import main; main()"]
    command += ["explore", str(make_run(tmp_path / "run")), "--port", "7950", "--read-only"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=_hear_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            address = re.match(r"http://127\.0\.0\.1:\d+", line)
            assert address is not None, line
            with urllib.request.urlopen(address[0], timeout=30) as answer:
                page = answer.read().decode()
            assert "Memory explorer" in page
            assert "fonts.googleapis" not in page
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stderr.read().strip().splitlines()[-1] == "memorizing-transformers: interrupted"
