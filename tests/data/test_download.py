"""Downloads: resumed, checked, and in place only when whole; against a server that misbehaves."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from memorizing_transformers_pytorch.data.enwik8 import download

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What it gives and how: cut after so many bytes for the first answers, in which state, with ranges or without."""

    content: bytes = CONTENT
    cuts: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    knows_ranges: bool = True
    ranges: list[str | None] = field(default_factory=list)
    address: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.ranges.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.knows_ranges else 0
        state = self.states.pop(0) if self.states else 206 if begin else 200
        if begin >= len(self.content):
            state = 416
        body = self.content[begin:] if state < 400 else b""
        handler.send_response(state)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0)] if self.cuts and body else body)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.address = f"http://127.0.0.1:{listener.server_address[1]}/file"
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def fetch(server: Server, path: Path, **options: int) -> None:
    with serving(server):
        download(server.address, path, num_bytes=len(CONTENT), sha256=SHA256, progress=False, wait_seconds=0, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file"


def only(path: Path) -> bool:
    return [found.name for found in path.parent.iterdir()] == [path.name] and path.read_bytes() == CONTENT


def test_a_file_is_fetched_once(path: Path) -> None:
    server = Server()
    fetch(server, path)
    fetch(server, path)
    assert only(path)
    assert server.ranges == [None]


def test_a_connection_cut_off_is_taken_up_where_it_was(path: Path) -> None:
    server = Server(cuts=[100_000, 50_000])
    fetch(server, path)
    assert only(path)
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_takes_up_what_an_earlier_one_left(path: Path) -> None:
    server = Server(cuts=[123_456, 0, 0], states=[])
    with pytest.raises(OSError, match=r"got a connection cut off in 2 attempts; run again to resume"):
        fetch(server, path, attempts=2)
    assert not path.exists()
    assert path.with_name("file.part").read_bytes() == CONTENT[:123_456]
    fetch(server, path)
    assert only(path)
    assert server.ranges[-1] == "bytes=123456-"


def test_a_server_without_ranges_gives_it_anew(path: Path) -> None:
    server = Server(cuts=[100_000], knows_ranges=False)
    fetch(server, path)
    assert only(path)
    assert server.ranges == [None, "bytes=100000-"]


def test_a_busy_server_is_asked_again(path: Path) -> None:
    fetch(Server(states=[503, 429]), path)
    assert only(path)


def test_a_part_longer_than_the_file_is_not_believed(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("file.part").write_bytes(CONTENT + b"more")
    fetch(Server(), path)
    assert only(path)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (Server(content=CONTENT[:-1] + b"!"), r"expected SHA-256 [0-9a-f]{64} of http://.*, got [0-9a-f]{64}"),
        (Server(content=CONTENT[:-1]), "expected 300,000 bytes at http://.*, got 299,999"),
        (Server(content=CONTENT + b"!"), "expected 300,000 bytes at http://.*, got 300,001"),
        (Server(states=[404]), "expected a file at http://.*, got 404 Not Found"),
    ],
)
def test_another_file_or_none_is_refused_and_nothing_kept(path: Path, server: Server, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(server, path)
    assert list(path.parent.iterdir()) == []


def test_a_file_that_became_shorter_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("file.part").write_bytes(CONTENT[:200])
    with pytest.raises(ValueError, match=r"expected 300,000 bytes at http://.*, got 100"):
        fetch(Server(content=CONTENT[:100]), path)
    assert list(path.parent.iterdir()) == []


def test_what_is_not_on_the_web_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected an address that begins with https:// or http://, got 'file:"):
        download(f"file://{__file__}", path, num_bytes=1, sha256=SHA256, progress=False)


def test_a_server_that_is_not_there_is_named(path: Path) -> None:
    with serving(Server()) as server:
        address = server.address
    with pytest.raises(OSError, match=r"expected http://.* to answer, got .*refused.* in 2 attempts"):
        download(address, path, num_bytes=1, sha256=SHA256, progress=False, attempts=2, wait_seconds=0)
