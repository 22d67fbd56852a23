"""enwik8: the usual split, in order, without losing a byte."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data import enwik8
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import SPLITS
from memorizing_transformers_pytorch.data.enwik8 import Enwik8
from memorizing_transformers_pytorch.data.prepare import open_corpus
from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer

HEAD = b"<mediawiki>\n"
PAGES = [b"  <page>\n<title>%d \xc3\xa9</title>\n  </page>\n" % number for number in range(9)]


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_a_document_is_a_page_and_what_precedes_the_first_is_one(tmp_path: Path, zipped: bool) -> None:
    data, size = HEAD + b"".join(PAGES), len(PAGES[0])
    path = tmp_path / "enwik8"
    if zipped:
        archive(path, enwik8=data)
    else:
        path.write_bytes(data)
    documents = list(Enwik8(path, (len(HEAD) + 5 * size, 2 * size, 2 * size)))
    assert [document.text.encode() for document in documents] == [HEAD, *PAGES]
    assert [document.split for document in documents] == 6 * ["train"] + 2 * ["valid"] + 2 * ["test"]
    assert len({document.name for document in documents}) == 10


@given(st.data())
def test_the_tokens_of_a_split_are_its_bytes_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = HEAD + b"".join(PAGES) + bytes(range(256))
    path = tmp_path_factory.getbasetemp() / "enwik8-cut"
    path.write_bytes(content)
    first, second = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    tokens: dict[str | None, list[int]] = {split: [] for split in SPLITS}
    for document in Enwik8(path, (first, second - first, len(content) - second)):
        tokens[document.split] += ByteTokenizer().encode(document.text)
    assert [bytes(tokens[split]) for split in SPLITS] == [content[:first], content[first:second], content[second:]]


def test_anything_but_enwik8_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"expected 100,000,000 bytes of enwik8 in .*, got 4"):
        open_corpus(DataConfig(source=f"enwik8:{short}"))
    with pytest.raises(ValueError, match="does not exist"):
        Enwik8(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected 'enwik8' in"):
        Enwik8(archive(tmp_path / "other.zip", readme=b""))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1000)
    path = archive(tmp_path / "enwik8.zip", enwik8=content)
    damaged = bytearray(path.read_bytes())
    damaged[500] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="expected a sound archive"):
        list(Enwik8(path, (900, 50, 50)))


def test_it_is_downloaded_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, Path, int]] = []

    def fetch(address: str, path: Path, *, num_bytes: int, sha256: str, progress: bool) -> None:
        fetched.append((address, path, num_bytes))
        archive(path, enwik8=b"x" * 100)

    monkeypatch.setattr(enwik8, "download", fetch)
    with pytest.raises(ValueError, match=r"expected 100,000,000 bytes of enwik8 in .*, got 100"):
        open_corpus(DataConfig(source="enwik8", cache=tmp_path))
    assert fetched == [("http://mattmahoney.net/dc/enwik8.zip", tmp_path / "enwik8.zip", 36_445_475)]


def test_whatever_is_wrong_with_an_archive_is_a_value_error(tmp_path: Path) -> None:
    content = b"<page>some</page>\n" * 50
    path = archive(tmp_path / "enwik8.zip", enwik8=content)
    whole = path.read_bytes()
    for place in range(len(whole) - 120, len(whole)):  # its directory: encrypted, compressed otherwise, elsewhere ...
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            list(Enwik8(path, (len(content) - 20, 10, 10)))
