"""What a memory should be: for each row a plain list of entries, the oldest first."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Entry:
    """A key and a value per head (G, 2, D) as they are stored, and the origin."""

    pairs: Tensor
    origin: tuple[int, int, int]


@dataclass
class PlainMemory:
    """Rows of at most `capacity` entries, which are evicted as the policy says."""

    capacity: int
    policy: str
    rows: list[list[Entry]] = field(default_factory=list)

    def copy(self) -> PlainMemory:
        rows = [list(row) for row in self.rows]
        return PlainMemory(self.capacity, self.policy, rows)

    def add(self, row: int, entries: list[Entry]) -> None:
        known = self.rows[row]
        excess = min(len(known) + len(entries) - self.capacity, len(known))
        if excess > 0 and self.policy == "by-document":
            self._let_go_of_documents(known, excess, {each.origin[0] for each in entries})
        self.rows[row] = (known + entries)[-self.capacity :]

    def _let_go_of_documents(self, known: list[Entry], excess: int, going_on: set[int]) -> None:
        gone = 0
        while gone < excess:
            ended = [each.origin[0] for each in known if each.origin[0] not in going_on]
            if not ended:
                return
            gone += sum(each.origin[0] == ended[0] for each in known)
            known[:] = [each for each in known if each.origin[0] != ended[0]]

    def forget(self, documents: set[int]) -> int:
        before = sum(map(len, self.rows))
        self.rows = [[each for each in row if each.origin[0] not in documents] for row in self.rows]
        return before - sum(map(len, self.rows))
