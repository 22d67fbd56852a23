"""Building a memory from files: unchanged files are skipped, changed ones read again, interrupted ones continued."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.data.texts import NoText, real_path, text_of
from memorizing_transformers_pytorch.library.readers import COMPLETE, DocumentReader
from memorizing_transformers_pytorch.memory.disk.load import state_of
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest

DIGEST = "sha256"  # in `about` of a document: of its file
FILE, LINK = "file", "link"  # the real path of the file, and the path that was given if a symbolic link is in it
REMOVE_BY_PRUNE = "is still in the memory (--prune removes it)"


@dataclass
class Outcome:
    """What became of files and documents, by name.

    removed: documents that were forgotten, as their files are no text any more or (prune) not among those given.
    kept: documents in the memory whose files are gone or cannot be opened. too_short: nothing of them is stored.
    evicted: others took their place. skipped: file -> why it was not read.
    """

    read: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    continued: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def messages(self, remedy: str) -> list[str]:
        """What a user should know. remedy: against eviction."""
        removed = [f"removed from the memory: {', '.join(self.removed)}"] if self.removed else []
        kept = [f"{title} {REMOVE_BY_PRUNE}: its file is gone or cannot be opened" for title in self.kept]
        skipped = [f"skipped {why}" for why in self.skipped.values()]
        return [*skipped, *removed, *kept, *room_messages(self.too_short, self.evicted, remedy)]


def room_messages(too_short: Sequence[str], evicted: Sequence[str], remedy: str = "") -> list[str]:
    """What to say about documents that the memory does not hold."""
    said = [f"too short to be remembered: {', '.join(too_short)}"] if too_short else []
    if evicted:
        documents = "1 document was" if len(evicted) == 1 else f"{len(evicted):,} documents were"
        said.append(f"the memory is full: {documents} evicted{remedy}")
    return said


def held_titles(memory: Any) -> dict[int, str]:
    """Number -> title of the documents that have entries in the memory."""
    return {each.number: each.title for each in memory.documents() if any(each.entries)}


def evicted_since(before: Mapping[int, str], memory: Any) -> list[str]:
    """The titles of those documents that have no entries left."""
    held = held_titles(memory)
    return [title for number, title in before.items() if number not in held]


class Builder:
    """Reads files into the memory of a reader, and saves it now and then.

    save: called when `seconds` have passed since the last time, and at the end. wish: a request to stop; what was read
    is saved, then Interrupted is raised.
    """

    def __init__(self, reader: DocumentReader, save: Callable[[], None], seconds: float, wish: StopRequest) -> None:
        self._reader, self._save, self._seconds, self._wish = reader, save, seconds, wish
        self._saved_at = time.monotonic()

    def build(self, files: Sequence[Path], progress: Callable[[str, float], None], *, prune: bool = False) -> Outcome:
        """Read these files. progress: called with the name of a file and how many of its bytes were read.

        prune: forget documents whose files are not among these, or cannot be opened.
        """
        self._outcome, self._held = Outcome(), held_titles(self._reader.memory)
        known = by_file(self._reader.memory.ledger.documents(), files)
        unreadable = set[str]()
        for path in files:
            *older, newest = [None, *self._present(known.pop(real_path(path), []))]
            self._forget(older)  # a file that was in two memories which were merged
            try:
                self._read(path, newest, progress)
            except NoText as error:
                self._outcome.skipped[str(path)] = str(error)
                self._remove([newest])
            except OSError as error:
                self._outcome.skipped[str(path)] = f"{path}: {error.strerror or error}"
                if newest is not None:
                    known[real_path(path)] = [newest]
                    unreadable.add(real_path(path))
        for place, documents in known.items():
            documents = self._present(documents)
            if prune:
                self._remove(documents)
            elif place in unreadable or not (os.path.isfile(place) and os.access(place, os.R_OK)):
                self._outcome.kept += [each.title for each in documents if os.path.isabs(each.about[FILE])]
        self._outcome.evicted = evicted_since(self._held, self._reader.memory)
        self._save()
        return self._outcome

    def _present(self, documents: Sequence[Document]) -> list[Document]:
        """Those that are left: a text may contain a token that clears the memory."""
        return [each for each in documents if each.number in self._reader.memory.ledger]

    def _read(self, path: Path, known: Document | None, progress: Callable[[str, float], None]) -> None:
        name, outcome, ledger = str(path), self._outcome, self._reader.memory.ledger
        data = path.read_bytes()
        text, about = text_of(data, name), about_file(path, data)
        if known is not None and known.about.get(DIGEST) != about[DIGEST]:
            self._forget([known])
            known, kind = None, outcome.changed
        elif known is not None and COMPLETE in known.about:
            ledger.note(known.number, about)
            outcome.unchanged.append(name)
            progress(name, len(data))
            return
        else:
            kind = outcome.read if known is None else outcome.continued
        done = 0.0
        for part in self._reader.read(name, text, about, known):
            if part == 1:
                self._note_read(known, ledger.last)
                kind.append(name)
            progress(name, (part - done) * len(data))
            done = part
            self._save_sometimes()

    def _note_read(self, known: Document | None, document: Document) -> None:
        if known is not None:
            self._held.pop(known.number, None)  # it may have been read again, with another number
        if self._reader.remembers(document.tokens):
            self._held[document.number] = document.title
        else:
            self._outcome.too_short.append(document.title)

    def _remove(self, documents: Iterable[Document | None]) -> None:
        self._outcome.removed += [each.title for each in self._forget(documents)]

    def _forget(self, documents: Iterable[Document | None]) -> list[Document]:
        gone = [each for each in documents if each is not None]
        for each in gone:
            self._reader.memory.forget(each.number)
            self._held.pop(each.number, None)
        return gone

    def _save_sometimes(self) -> None:
        if wanted := self._wish.signal:
            self._save()
            raise Interrupted("what was read is saved; run the same command again to continue", wanted)
        if time.monotonic() - self._saved_at >= self._seconds:
            self._save()
            self._saved_at = time.monotonic()


def about_file(path: Path, data: bytes) -> dict[str, str]:
    """What a document says about its file."""
    place, given = real_path(path), os.path.abspath(path)
    return {FILE: place, DIGEST: hashlib.sha256(data).hexdigest(), **({LINK: given} if given != place else {})}


def by_file(documents: Sequence[Document], files: Sequence[Path]) -> dict[str, list[Document]]:
    """The documents of each file by its real path, the newest last. A document that was read through a link belongs to
    the file to which the link leads now, unless its own file is given too."""
    given = {os.path.abspath(path): real_path(path) for path in files}
    places, found = set(given.values()), dict[str, list[Document]]()
    for each in documents:
        if FILE in each.about:
            place = real_path(each.about[FILE])
            if place not in places:
                place = given.get(each.about.get(LINK, ""), place)
            found.setdefault(place, []).append(each)
    return found


def check_different(output: Path, memories: Sequence[Path]) -> None:
    """Raises ValueError for fewer than two memories, for one that is given twice, as another folder or a copy, and for
    an output that holds a memory."""
    if len(memories) < 2:
        raise ValueError(f"merge needs two or more memories, got {len(memories)}")
    given: dict[str, Path] = {}
    for path in memories:
        if path.resolve() == output.resolve():
            raise ValueError(f"{str(path)!r} is both a memory to merge and the folder to write")
        first = given.setdefault(state_of(path).state, path)
        if first is not path:
            raise ValueError(f"{str(first)!r} and {str(path)!r} hold the same saved state: name it once")
    if (output / NAME).exists():
        raise ValueError(f"{str(output)!r} holds a memory: write to a new folder")
