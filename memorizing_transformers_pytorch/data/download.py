"""Download a file over HTTP: resumed where it stopped, checked, and in place only when it is whole.

(pooch does not resume downloads.)
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from memorizing_transformers_pytorch.utils.durable import sync
from memorizing_transformers_pytorch.utils.progress import bar

_BLOCK_BYTES = 1 << 16
_TIMEOUT_SECONDS = 30.0


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
