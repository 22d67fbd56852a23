"""What has no place in a memory: documents that made room for others, and those that are too short to be remembered."""

from __future__ import annotations

from collections.abc import Sequence

from memorizing_transformers_pytorch.library.readers import DocumentReader
from memorizing_transformers_pytorch.memory.ledger import Document


class Room:
    """Keeps in mind what a reader holds now and what it reads from now on. (A ledger does not: documents of which
    nothing is left may be struck out of it.)

    too_short: titles of documents of which nothing was remembered.
    """

    def __init__(self, reader: DocumentReader) -> None:
        self._reader = reader
        self._titles = {each.number: each.title for each in reader.documents() if any(each.entries)}
        self.too_short: list[str] = []

    def note_read(self, document: Document) -> None:
        """It was read to its end."""
        if self._reader.remembers(document.tokens):
            self._titles[document.number] = document.title
        else:
            self.too_short.append(document.title)

    def note_forgotten(self, number: int) -> None:
        """Somebody wanted it to go."""
        self._titles.pop(number, None)

    def made(self) -> list[str]:
        """Titles of the documents of which nothing is left, since others needed the room."""
        held = {each.number for each in self._reader.documents() if any(each.entries)}
        return [title for number, title in self._titles.items() if number not in held]


def in_words(too_short: Sequence[str], made_room: Sequence[str], remedy: str = "") -> list[str]:
    """What to say of both; nothing if there is neither."""
    said = [f"too short to be remembered: {', '.join(too_short)}"] if too_short else []
    if made_room:
        documents = "1 document" if len(made_room) == 1 else f"{len(made_room):,} documents"
        said.append(f"the memory is full: {documents} had to make room{remedy}")
    return said
