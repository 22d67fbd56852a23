"""enwik8, the first 10^8 bytes of an English Wikipedia dump, with the split that results are reported on."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from memorizing_transformers_pytorch.data.document import SPLITS, TextDocument
from memorizing_transformers_pytorch.data.download import download

ADDRESS = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_BYTES = 36_445_475
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SPLIT_BYTES = (90_000_000, 5_000_000, 5_000_000)

_OF_ARCHIVES = (
    EOFError, OSError, RuntimeError, UnicodeDecodeError, lzma.LZMAError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def download_enwik8(cache: Path, progress: bool) -> Path:
    """The archive in the cache, fetched if it is not there."""
    path = cache / "enwik8.zip"
    download(ADDRESS, path, num_bytes=ZIP_BYTES, sha256=ZIP_SHA256, progress=progress)
    return path


class Enwik8:
    """Training, validation and test by position, as the benchmark is defined; a document for each page.

    Every byte of a split is in exactly one of its documents, in order: what precedes the first page is a document too,
    and a page that crosses the border of a split is cut there, even in mid-character.

    path: the file, or the zip archive that holds it. Raises ValueError for anything else.
    """

    def __init__(self, path: Path, split_bytes: tuple[int, int, int] = SPLIT_BYTES) -> None:
        self._path = path
        self._split_bytes = split_bytes
        if not path.is_file():
            raise ValueError(f"expected enwik8 or enwik8.zip, got {str(path)!r}, which does not exist")
        found = self._num_bytes()
        if found != sum(split_bytes):
            raise ValueError(f"expected {sum(split_bytes):,} bytes of enwik8 in {str(path)!r}, got {found:,}")

    def __iter__(self) -> Iterator[TextDocument]:
        with ExitStack() as stack:
            if zipfile.is_zipfile(self._path):
                file = stack.enter_context(stack.enter_context(self._archive()).open("enwik8"))
            else:
                file = stack.enter_context(self._path.open("rb"))
            for split, num_bytes in zip(SPLITS, self._split_bytes, strict=True):
                for number, page in enumerate(_pages(file, num_bytes)):
                    yield TextDocument(f"{split}/{number:06}", page.decode("utf-8", "surrogateescape"), split)

    def fingerprint(self) -> str:
        status = self._path.stat()
        return f"{self._path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def _num_bytes(self) -> int:
        if not zipfile.is_zipfile(self._path):
            return self._path.stat().st_size
        with self._archive() as archive:
            if "enwik8" not in archive.namelist():
                raise ValueError(f"expected 'enwik8' in {str(self._path)!r}, got {archive.namelist()[:5]}")
            return archive.getinfo("enwik8").file_size

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                yield archive
        except _OF_ARCHIVES as error:
            raise ValueError(f"expected a sound archive, got {str(self._path)!r}: {error}") from error


def _pages(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next bytes of a file, cut where a page begins. Text of the dump never contains the tag, as it is escaped."""
    lines: list[bytes] = []
    while num_bytes > 0 and (line := file.readline(num_bytes)):
        num_bytes -= len(line)
        if lines and line.lstrip().startswith(b"<page>"):
            yield b"".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield b"".join(lines)
