"""What `read` and `score` take: token ids, text, files, folders, and the output of a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory
from memorizing_transformers_pytorch.huggingface.attach_spans import Head
from memorizing_transformers_pytorch.huggingface.export import for_transformers
from tests.huggingface.families import tiny

TEXT = "The whale was white. Ahab hunted the whale. "
SPANS = {"retrieve": "spans", "chunk": 64, "overlap": 16}


@pytest.fixture
def tokenizer() -> Any:
    made = for_transformers(ByteTokenizer())
    made.pad_token = "!"
    return made


@pytest.fixture(params=["spans", "tokens"])
def memory(request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> AttachedMemory:
    name = "memorizing_transformers_pytorch.huggingface.attach_spans.best_head"
    monkeypatch.setattr(name, lambda *_: Head(1, 0, 1.0))
    options: dict[str, Any] = SPANS if request.param == "spans" else {"layers": "all"}
    return attach_memory(tiny("llama", vocab_size=256), tokenizer=tokenizer, **{"retrieve": "tokens", **options})


def ids(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def titles(memory: AttachedMemory) -> list[str]:
    return [each.title for each in memory.documents()]


def held(memory: AttachedMemory) -> list[int]:
    return [token for _, _, token in memory.entries(0, next(iter(memory.layers)))]


def test_text_a_file_and_the_output_of_a_tokenizer_are_read_like_their_token_ids(
    memory: AttachedMemory, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    with memory.read_only():
        (expected,) = memory.score(ids(TEXT), progress=False)
        for given in (TEXT, tmp_path / "book.txt", tokenizer(TEXT), tokenizer(TEXT, return_tensors="pt")):
            (found,) = memory.score(given, progress=False)
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    memory.read(ids(TEXT), progress=False)
    before = held(memory)
    for given in (TEXT, tmp_path / "book.txt", tokenizer(TEXT)):
        memory.clear()
        memory.read(given, progress=False)
        assert held(memory) == before


def test_a_padded_batch_of_a_tokenizer_is_read_row_by_row(memory: AttachedMemory, tokenizer: Any) -> None:
    memory.read(tokenizer([TEXT, "A short one."], padding=True), document=["long", "short"], progress=False)
    assert [(each.title, each.row, each.tokens) for each in memory.documents()] == [("long", 0, 44), ("short", 1, 12)]


def test_text_is_never_a_path(memory: AttachedMemory, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    name = str(tmp_path / "book.txt")
    memory.read(name, progress=False)
    assert [each.tokens for each in memory.documents()] == [len(name)]


def test_each_file_of_a_folder_is_a_document_and_the_rest_is_named(memory: AttachedMemory, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text("Another text.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes(b"O\xf9 est-il")
    with pytest.warns(UserWarning, match=r"latin\.txt: not UTF-8.*picture\.png: binary"):
        memory.read(tmp_path, progress=False)
    assert titles(memory) == ["two.txt", "below/one.txt"]
    assert [each.tokens for each in memory.documents()] == [13, len(TEXT)]
    (tmp_path / "latin.txt").unlink()
    (tmp_path / "picture.png").unlink()
    with memory.read_only():
        assert [len(each) for each in memory.score(tmp_path, progress=False)] == [13, len(TEXT)]


def test_a_title_can_be_given(memory: AttachedMemory, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text(TEXT)
    for given, title in ((TEXT, "by hand"), (tmp_path / "one.txt", "a file"), (tmp_path / "one.txt", None)):
        memory.read(given, document=title, progress=False)
    memory.read(tmp_path, document=["first", "second"], progress=False)
    assert titles(memory) == ["by hand", "a file", "one.txt", "first", "second"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "the text has no tokens"),
        (Path("nowhere.txt"), {}, "nowhere.txt cannot be read"),
        (Path("picture.png"), {}, "binary file"),
        (Path("nothing"), {}, "no files match"),
        (Path("pictures"), {}, "there is no text in any file"),
        (TEXT, {"attention_mask": torch.ones(1, 44)}, "attention_mask goes with token ids"),
        ({"ids": [1]}, {}, "has input_ids"),
        ({"input_ids": [[1, 2], [3]]}, {}, "need padding"),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 0]]}, {}, "at least one token in each"),
        (7, {}, "a tensor of integers"),
        (Path("texts"), {"document": ["one", "two"]}, "a title for each of 1 documents"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped")
def test_what_cannot_be_read_is_refused(
    memory: AttachedMemory,
    given: Any,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("nothing", "pictures", "texts"):
        Path(folder).mkdir()
    for file in ("picture.png", "pictures/one.png"):
        Path(file).write_bytes(b"\0")
    Path("texts/one.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=re.escape(message)):
        memory.read(given, progress=False, **options)
    assert list(memory.ledger.documents()) == []


def test_text_needs_a_tokenizer(memory: AttachedMemory) -> None:
    memory.tokenizer = None
    for given in (TEXT, Path(__file__)):
        with pytest.raises(ValueError, match="text needs a tokenizer"):
            memory.read(given, progress=False)


def test_the_memory_is_taken_away_at_the_end_of_with(memory: AttachedMemory) -> None:
    with memory as entered:
        assert entered is memory
        memory.read(TEXT, progress=False)
        assert memory.last_document is not None
    assert repr(memory).endswith("(detached)")
    with pytest.raises(ValueError, match="detach"):
        memory.read(TEXT, progress=False)
