"""A tiny model of transformers, texts for it, and commands as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.cli import main
from tests.library.conftest import make_hub_model


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> None:
    from memorizing_transformers_pytorch.huggingface import attach_spans

    monkeypatch.setattr(attach_spans, "best_head", lambda *_: attach_spans.Head(0, 0, 1.0))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_hub_model(tmp_path / "model"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "vault.txt").write_text("The password of the vault is seven green apples. " * 3)
    (folder / "whale.txt").write_text("The whale was white. Ahab hunted the whale over all the seas. " * 30)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()  # after progress bars
    return line
