"""enwik8, the first 10^8 bytes of an English Wikipedia dump, with the split that results are reported on.

It is downloaded over HTTP: resumed where that stopped, checked, and in place only when it is whole. (pooch does not
resume downloads.)
"""

from __future__ import annotations

import hashlib
import lzma
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, BinaryIO

from tqdm import tqdm

from memorizing_transformers_pytorch.data.document import SPLITS, TextDocument
from memorizing_transformers_pytorch.utils.durable import sync
from memorizing_transformers_pytorch.utils.progress import bar

ADDRESS = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_BYTES = 36_445_475
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SPLIT_BYTES = (90_000_000, 5_000_000, 5_000_000)
_BLOCK_BYTES = 1 << 16
_TIMEOUT_SECONDS = 30.0
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


def download(
    address: str,
    path: Path,
    *,
    num_bytes: int,
    sha256: str,
    progress: bool = True,
    attempts: int = 5,
    wait_seconds: float = 1.0,
) -> None:
    """Download `address` to `path`, unless that file exists. An unfinished download stays beside it as a .part file.

    A connection that breaks is tried again, after a wait that doubles. Raises ValueError if the server has another file
    (nothing is kept) or the address is not HTTP, OSError after that many attempts without a new byte.
    """
    if not address.startswith(("https://", "http://")):
        raise ValueError(f"expected an address that begins with https:// or http://, got {address!r}")
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if part.exists() and part.stat().st_size > num_bytes:
        part.unlink()
    with bar(total=num_bytes, unit="B", unit_scale=True, desc=path.name, disable=not progress) as shown:
        failed = 0
        while (before := _size(part)) < num_bytes:
            problem = _fetch(address, part, num_bytes, shown)
            failed = failed + 1 if _size(part) == before else 0
            if failed == attempts:
                raise OSError(
                    f"expected {address} to answer, got {problem} in {attempts} attempts; run again to resume"
                )
            if problem:
                time.sleep(wait_seconds * 2**failed)
    _accept(part, path, address, sha256)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(address: str, part: Path, num_bytes: int, shown: tqdm[Any]) -> str | None:
    """Fetch what is missing of the part. Returns what went wrong, if trying again may help."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(address, headers=headers)  # noqa: S310 (download has seen that it is HTTP)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310 (the same)
            begin = have if response.status == 206 else 0
            length = response.headers.get("Content-Length")
            if length is not None and begin + int(length) != num_bytes:
                part.unlink(missing_ok=True)
                raise ValueError(f"expected {num_bytes:,} bytes at {address}, got {begin + int(length):,}")
            _write(response, part, begin, num_bytes, shown)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the server's file: start again
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise ValueError(f"expected a file at {address}, got {error.code} {error.reason}") from error
            return f"{error.code} {error.reason}"
    except (OSError, HTTPException) as error:
        return str(error) or type(error).__name__
    return "a connection cut off" if _size(part) < num_bytes else None


def _write(response: BinaryIO, part: Path, begin: int, num_bytes: int, shown: tqdm[Any]) -> None:
    """Write at a place, without truncating: another process that fetches the same file writes the same bytes."""
    part.touch()
    with part.open("r+b") as file:
        file.seek(begin)
        while block := response.read(_BLOCK_BYTES):
            file.write(block)
            shown.update(file.tell() - shown.n)
            if file.tell() > num_bytes:
                break


def _accept(part: Path, path: Path, address: str, sha256: str) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise ValueError(f"expected SHA-256 {sha256} of {address}, got {found}")
    sync(part)
    part.replace(path)
