"""The examples do what they say, with a tiny model; each has fewer than 60 lines of code."""

from __future__ import annotations

import functools
import importlib
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.export import for_transformers
from tests.huggingface.conftest import cache  # noqa: F401 - a fixture
from tests.huggingface.families import tiny
from tests.library.conftest import make_hub_model

EXAMPLES = Path(__file__).parents[2] / "examples"  # imported in the tests: that takes seconds
BOOK = "The whale was white. Ahab hunted the whale over all the seas. " * 4


@pytest.fixture
def tokenizer() -> Any:
    made = for_transformers(ByteTokenizer())
    made.pad_token = "!"
    return made


@pytest.fixture
def model() -> Any:
    return tiny("llama", "sdpa", vocab_size=256)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 75  # with what they say at the top
    code = path.read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 60


def printed_command(path: Path) -> list[str]:
    """The arguments in the command line that an example prints at its top."""
    (line,) = [each for each in path.read_text().splitlines() if f"python examples/{path.name} " in each]
    return shlex.split(line.partition(f"examples/{path.name}")[2])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_command_that_an_example_prints_is_one_that_it_takes(path: Path) -> None:
    main = importlib.import_module(f"examples.{path.stem}").main

    @functools.wraps(main)
    def taken(**values: Any) -> dict[str, Any]:
        return values

    given = printed_command(path)
    assert tyro.cli(taken, args=given)["model"] == given[0]


def test_an_example_runs_as_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.py").write_text("def one():\n    return 1\n")
    model = str(make_hub_model(tmp_path / "model"))
    path = EXAMPLES / "complete_code.py"
    monkeypatch.setattr(sys, "argv", [str(path), model, *printed_command(path)[1:]])
    runpy.run_path(str(path), run_name="__main__")
    assert "looked in: one.py" in capsys.readouterr().out


def test_a_chat_goes_on_and_shows_where_it_looked(model: Any, tokenizer: Any) -> None:
    from examples import chat_with_a_book

    memory = attach_memory(model, retrieve="tokens", layers="all", write="window", window=40, chunk=64)
    tokens = tokenizer(BOOK, return_tensors="pt").input_ids
    memory.read(tokens, progress=False)
    chat = chat_with_a_book.Chat(memory, tokenizer, max_new_tokens=5)
    for _ in range(3):
        assert isinstance(chat.ask("Who hunts?"), str)
        assert all(source in BOOK for source in chat.sources(tokens[0].tolist()))
    assert [document.tokens for document in memory.documents()] == [len(BOOK), 3 * 33 + 2 - 1]


def test_code_is_completed_with_the_files_that_were_read(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from examples import complete_code

    (tmp_path / "one.py").write_text("def one():\n    return 1\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "two.py").write_text("def two():\n    return 2\n")
    memory = attach_memory(model, retrieve="tokens", layers="all")
    complete_code.read_code(memory, tokenizer, tmp_path)
    assert [document.title for document in memory.documents()] == ["one.py", "two.py"]
    text, files = complete_code.complete(memory, tokenizer, "def three", max_new_tokens=5)
    assert len(text) > 0
    assert set(files) <= {"one.py", "two.py"}
    assert files


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_trainer_tunes_only_the_adapter(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from examples import tune_with_trainer

    documents = [torch.randint(256, (length,)).tolist() for length in (40, 25, 33)]
    before = {name: each.clone() for name, each in model.named_parameters()}
    adapted = tune_with_trainer.tune(model, documents, tmp_path, steps=4, rows=2, segment=16)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    learned = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert learned
    assert all("lora_" in name or "memory_bias" in name for name in learned)
    now = {name.replace("base_layer.", ""): each for name, each in model.named_parameters()}
    assert all(torch.equal(now[name], each) for name, each in before.items())
    assert any(bool(each.any()) for name, each in adapted.named_parameters() if "modules_to_save" in name)


def test_a_loop_tunes_the_biases(model: Any, tmp_path: Path) -> None:
    from examples import tune_in_a_loop

    documents = [torch.randint(256, (1, length)) for length in (50, 33)]
    memory = tune_in_a_loop.tune(model, documents, segment=16, layers="all")
    assert all(parameter.abs().sum() > 0 for parameter in memory.parameters())
    memory.save_parameters(tmp_path / "biases.safetensors")
    values = [parameter.tolist() for parameter in memory.parameters()]
    memory.detach()
    again = attach_memory(model, retrieve="tokens", layers="all")
    again.load_parameters(tmp_path / "biases.safetensors")
    assert [parameter.tolist() for parameter in again.parameters()] == values


def test_a_stream_is_followed_in_bounded_space(model: Any, tokenizer: Any) -> None:
    from examples import endless_stream

    memory = attach_memory(model, retrieve="tokens", layers="all", max_memories=100)
    lines = [BOOK[:61] + "\n"] * 20
    found = list(endless_stream.follow(memory, tokenizer, lines, size=64))
    assert [read for read, _ in found][-1] == 20 * 62
    assert all(loss > 0 for _, loss in found)
    assert memory.layers[0].num_entries == (100,)
