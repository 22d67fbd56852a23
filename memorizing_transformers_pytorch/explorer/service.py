"""What the explorer does for each of its sessions (browser tabs), which have memories of their own. Knows no page."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memorizing_transformers_pytorch.data.texts import text_of
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.explorer.workspace import PASSAGE, Sampling, Workspace
from memorizing_transformers_pytorch.library.build import DIGEST, evicted_since, held_titles, room_messages
from memorizing_transformers_pytorch.library.readers import DocumentReader
from memorizing_transformers_pytorch.memory.ledger import DocumentTable

MAX_BYTES = 20_000_000  # of one text
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Comparison:
    """A prompt, its continuations with the memory and without it, and what was looked up for prompt and the first."""

    prompt: str
    with_memory: str
    without_memory: str
    found: Explanation


class Service:
    """One model, which one session uses at a time; a workspace for each session, made when it is first needed.

    memory: a folder that every workspace begins with, as it is on disk; only `save` writes. read_only: nothing is read,
    forgotten or saved.
    """

    def __init__(self, reader: DocumentReader, memory: Path | None = None, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._reader, self._memory = reader, memory
        self._workspaces: dict[str, Workspace] = {}
        self._gone = set[str]()
        self._lock = threading.Lock()
        Workspace(reader, memory)  # says now what is wrong with the folder

    @contextmanager
    def _at(self, session: str) -> Iterator[Workspace]:
        with self._lock:
            if session not in self._workspaces:
                self._workspaces[session] = Workspace(self._reader, self._memory)
            space = self._workspaces[session]
            try:
                with space.active():
                    yield space
            finally:
                if session in self._gone:
                    self._workspaces.pop(session, None)

    @property
    def sessions(self) -> list[str]:
        return list(self._workspaces)

    def let_go(self, session: str) -> None:
        """Forget a session and all that only it remembers, at once or when what it waits for is done."""
        self._gone.add(session)
        self._workspaces.pop(session, None)

    def documents(self, session: str) -> DocumentTable:
        with self._at(session) as space:
            return space.reader.memory.documents()

    def read(self, session: str, name: str, data: bytes, progress: Progress = lambda part: None) -> str:
        """Read a text -> what has happened, in words. progress: is told which part was read.

        Raises ValueError, with the memory as it was, for what is too large, binary, empty, not UTF-8, or known already.
        """
        self._expect_changes()
        title = name.strip() or "text"
        if len(data) > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_BYTES:,} bytes in {title!r}, got {len(data):,}")
        text, digest = text_of(data, title), hashlib.sha256(data).hexdigest()
        with self._at(session) as space:
            memory, ledger = space.reader.memory, space.reader.memory.ledger
            before, held = set(ledger.numbers), held_titles(memory)
            known = next((each for each in ledger.documents() if each.about.get(DIGEST) == digest), None)
            if known is not None:
                raise ValueError(f"this text is already in the memory, as {known.title!r}")
            try:
                for part in space.reader.read(title, text, {"file": title, DIGEST: digest}, None):
                    progress(part)
                    if session in self._gone:
                        raise ValueError("the session is closed")
            except BaseException:
                memory.forget([number for number in ledger.numbers if number not in before])
                raise
            newest = ledger.last
            if stored := space.reader.remembers(newest.tokens):
                held[newest.number] = title
            messages = room_messages([] if stored else [title], evicted_since(held, memory))
            said = [f"{line[0].upper()}{line[1:]}." for line in messages]
            return " ".join([f"Read {title}: {newest.tokens:,} tokens.", *said])

    def forget(self, session: str, numbers: Sequence[int]) -> int:
        """Forget documents -> how many. Raises ValueError for those that there are not, forgetting none."""
        self._expect_changes()
        with self._at(session) as space:
            there = {each.number for each in space.reader.memory.documents()}
            if not numbers or (unknown := [number for number in numbers if number not in there]):
                raise ValueError(f"expected documents of the memory, got {unknown if numbers else 'none'}")
            for number in numbers:
                space.reader.memory.forget(number)
            space.answer = None
            return len(numbers)

    @property
    def finds_passages(self) -> bool:
        """Whether the memory is one of passages, which can be asked questions."""
        return self._reader.is_of_spans

    def ask(
        self, session: str, prompt: str, sampling: Sampling, *, measure: bool = False, is_question: bool = False
    ) -> Comparison:
        """Continue a prompt with the memory and without, and see where it looks; it is not remembered.

        measure: also by how much each passage lowers the loss. is_question: answer it instead, by passages that it
        alone finds. Raises ValueError for a prompt that is empty or too long.
        """
        if is_question and not self.finds_passages:
            raise ValueError("only a memory of passages can be asked questions")
        with self._at(session) as space:
            if (not prompt.strip() and is_question) or not (tokens := space.encode(prompt)):
                raise ValueError("expected a prompt, got an empty one")
            asked, bare = None, tokens
            if is_question:
                asked, alone = (space.asked(prompt, with_memory=on) for on in (True, False))
                tokens, bare = asked.prompt.tolist(), alone.prompt.tolist()
            if (needed := len(tokens) + sampling.new_tokens) > space.longest:
                raise ValueError(
                    f"expected at most {space.longest:,} tokens of prompt and continuation, got {needed:,}"
                    " (read long texts in)"
                )
            new = space.continued(tokens, sampling, with_memory=asked is None)
            other = space.continued(bare, sampling, with_memory=False)
            space.answer = space.explained(tokens, new, measure=measure, asked=asked)
            return Comparison(prompt, _added(space, tokens, new), _added(space, bare, other), space.answer)

    def answer(self, session: str, layer: int | None = None, head: int | None = None) -> Explanation | None:
        """What was looked up for the last prompt, or by one layer or head; None before the first."""
        with self._at(session) as space:
            return None if space.answer is None else space.answer.only(PASSAGE, layer, head)

    def save(self, session: str, folder: str) -> str:
        """Write the memory of a session to a folder -> its name. Raises ValueError for a folder with anything else."""
        self._expect_changes()
        if not folder.strip():
            raise ValueError("expected a folder to save to, got none")
        path = Path(folder.strip()).expanduser().resolve()
        with self._at(session) as space:
            space.reader.memory.save(path)
        return str(path)

    def _expect_changes(self) -> None:
        if self.read_only:
            raise ValueError("expected to change nothing (--read-only), got a change")


def _added(space: Workspace, before: list[int], new: list[int]) -> str:
    """What new tokens add to the text before them: some tokenizers write the first token of a text differently."""
    return space.decode(before + new)[len(space.decode(before)) :]
