"""Building a memory from files: known ones are skipped, changed ones read anew, and what was broken off goes on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memorizing_transformers_pytorch.data.document import decode
from memorizing_transformers_pytorch.library.readers import DocumentReader
from memorizing_transformers_pytorch.library.room import Room
from memorizing_transformers_pytorch.memory.disk.manifest import files_of_memory
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest

COMPLETE = "complete"
DIGEST = "sha256"


@dataclass
class Outcome:
    """What has become of the files, by their names; left_out: why. too_short, made_room: of which nothing is held."""

    read: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    gone_on: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    made_room: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def files_below(sources: Sequence[str], pattern: str) -> list[Path]:
    """Files, and those below folders whose name matches the pattern, but hidden ones and those of a memory; each once,
    whatever it is called. Raises ValueError for none."""
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.is_dir() and not source.is_file():
            raise ValueError(f"expected a file or folder to read, got {str(source)!r}, which does not exist")
        for path in _below(source, pattern) if source.is_dir() else [source]:
            found.setdefault(_place(path), path)
    if not found:
        raise ValueError(f"expected files that match {pattern!r}, got none in {', '.join(sources)}")
    return list(found.values())


def _place(file: Path | str) -> str:
    """Where a file is, the same for every spelling of its name."""
    try:
        return os.path.realpath(file)
    except (OSError, ValueError):  # the name of a document that is no file
        return str(file)


def _below(root: Path, pattern: str) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(set(names) - files_of_memory(Path(place), names)):
            path = Path(place, name)
            if not name.startswith(".") and path.match(pattern) and path.is_file():
                yield path


class Builder:
    """Reads files into the memory of a reader, and saves it now and then.

    save: is called when `seconds` have passed since the last time, wherever reading stands, and at the end. wish: to
    stop, which raises Interrupted as soon as what was read is saved.
    """

    def __init__(self, reader: DocumentReader, save: Callable[[], None], seconds: float, wish: StopRequest) -> None:
        self._reader, self._save, self._seconds, self._wish = reader, save, seconds, wish
        self._saved_at = time.monotonic()
        self._room = Room(reader)

    def build(self, files: Sequence[Path], progress: Callable[[str, float], None], *, prune: bool = False) -> Outcome:
        """Let the memory hold these files. progress: is told the name of a file and how many of its bytes were read.

        prune: forget documents that came from files which are not among these.
        """
        outcome, known = Outcome(), _by_place(self._reader.ledger.documents())
        for path in files:
            *older, newest = known.get(_place(path), [None])
            self._forget(older)  # a file that was in two memories which were merged
            self._take_in(path, newest, outcome, progress)
        for place in sorted(known.keys() - set(map(_place, files))) if prune else ():
            self._forget(known[place])
            outcome.removed.append(known[place][-1].title)
        outcome.too_short, outcome.made_room = self._room.too_short, self._room.made()
        self._save()
        return outcome

    def _take_in(
        self, path: Path, known: Document | None, outcome: Outcome, progress: Callable[[str, float], None]
    ) -> None:
        name = str(path)
        try:
            data = path.read_bytes()
            text = text_of(data, name)
        except (OSError, ValueError) as error:
            outcome.left_out[name] = str(error)
            return
        about = {"file": _place(path), DIGEST: hashlib.sha256(data).hexdigest()}
        if known is not None and known.about.get(DIGEST) == about[DIGEST]:
            if known.about.get(COMPLETE):
                outcome.known.append(name)
                progress(name, len(data))
                return
            self._room.note_forgotten(known.number)  # it may be read anew, under another number
            outcome.gone_on.append(name)
        elif known is not None:
            self._forget([known])
            known = None
            outcome.changed.append(name)
        else:
            outcome.read.append(name)
        done = 0.0
        for part in self._reader.read(name, text, about, known):
            if part == 1:
                self._finish()
            progress(name, (part - done) * len(data))
            done = part
            self._save_sometimes()

    def _forget(self, documents: Iterable[Document | None]) -> None:
        for each in documents:
            if each is not None:
                self._reader.forget(each.number)
                self._room.note_forgotten(each.number)

    def _finish(self) -> None:
        newest = self._reader.ledger.documents()[-1]
        self._reader.ledger.note(newest.number, {COMPLETE: "yes"})
        self._room.note_read(newest)

    def _save_sometimes(self) -> None:
        if wanted := self._wish.signal:
            self._save()
            raise Interrupted("what was read is saved; the same command goes on", wanted)
        if time.monotonic() - self._saved_at >= self._seconds:
            self._save()
            self._saved_at = time.monotonic()


def _by_place(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The documents of each file, the newest last. (Older memories know files by the names that were given.)"""
    found: dict[str, list[Document]] = {}
    for each in documents:
        if "file" in each.about:
            found.setdefault(_place(each.about["file"]), []).append(each)
    return found


def text_of(data: bytes, name: str) -> str:
    """What a file says. Raises ValueError if it is binary, empty or not UTF-8."""
    if b"\0" in data:
        raise ValueError(f"expected text in {name!r}, got a binary file")
    text = decode(data, repr(name), "strict")
    if not text.strip():
        raise ValueError(f"expected text in {name!r}, got an empty file")
    return text
