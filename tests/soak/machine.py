"""Does everything twice, with memories and with plain lists, and compares: one random operation after the other.

Shapes: R rows, G key/value heads, N entries, D head width, K retrieved.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, disk
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.policy import POLICIES
from memorizing_transformers_pytorch.utils.durable import SaveError
from tests.soak.plain import Entry, PlainMemory

DIM = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
INDICES = ("exact", "exact", "auto", "IVF2,Flat")
OPERATIONS = (
    ("add",) * 8 + ("search",) * 6 + ("clear", "forget", "resize", "save", "save", "load", "break off", "merge")
)
STEPS_OF_SAVING = ("disk.save.write_tensors", "disk.save.write_manifest", "disk.save.sync", "disk.save.read_manifest")


class Difference(AssertionError):
    """A memory is not what the plain list says."""


class Machine:
    """Memories of two layers and of one kind, drawn from a seed, and a folder for them."""

    def __init__(self, seed: int, folder: Path, device: str = "cpu") -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.device = device
        draw = self.random.choice
        indices = INDICES if device == "cpu" else INDICES[:3]  # those of faiss are for CPUs
        self.dtype, self.index, self.policy = draw(DTYPES), draw(indices), draw(POLICIES)
        self.num_rows, self.heads, capacity = draw((1, 1, 3)), draw((1, 2)), draw((1, 5, 17, 70))
        self.folder, self.serial = folder / f"memory-{seed}", 0
        self.plain = PlainMemory(capacity, self.policy, [[] for _ in range(self.num_rows)])
        self.memories = self._new(capacity)
        self.saved: PlainMemory | None = None

    def __repr__(self) -> str:
        kind = f"{self.dtype}, {self.index}, {self.policy}"
        return f"{self.num_rows} rows, {self.heads} heads, {self.plain.capacity} entries, {kind}, {self.device}"

    def _new(self, capacity: int) -> KNNMemoryList:
        options = {"dtype": self.dtype, "index": self.index, "policy": self.policy, "num_kv_heads": self.heads}
        rows = self.num_rows
        return KNNMemoryList([KNNMemory(DIM, capacity, rows, device=self.device, **options) for _ in range(2)])

    def close(self) -> None:
        self.memories.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, operations: int) -> Iterator[str]:
        """So many operations, after each of which all is compared. Gives their names."""
        for _ in range(operations):
            name = self.random.choice(OPERATIONS)
            getattr(self, name.replace(" ", "_"))()
            self.compare()
            yield name

    # What is done

    def add(self) -> None:
        self._add(self.memories, self.plain)

    def _add(self, memories: KNNMemoryList, plain: PlainMemory) -> None:
        count = self.random.choice((0, 1, 2, 3, 9, 30))
        pairs = torch.randn(self.num_rows, self.heads, count, 2, DIM, generator=self.generator)
        mask = torch.rand(self.num_rows, count, generator=self.generator) < self.random.choice((0.5, 1.1))
        numbers = self.serial + torch.arange(self.num_rows * count).view(self.num_rows, count)
        self.serial += self.num_rows * count
        origins = torch.stack((numbers // 20, numbers, numbers % 7), dim=-1)
        memories.add([pairs, -pairs], mask, origins)
        for row in range(self.num_rows):
            kept = mask[row].nonzero().flatten().tolist()
            entries = [
                Entry(Vectors.of(pairs[row, :, n], self.dtype).floats(), tuple(origins[row, n].tolist())) for n in kept
            ]
            plain.add(row, entries)

    def search(self) -> None:
        topk, count = self.random.choice((1, 3, 8)), self.random.choice((1, 4))
        queries = torch.randn(self.num_rows, self.heads, count, DIM, generator=self.generator)
        for sign, memory in ((1, self.memories[0]), (-1, self.memories[1])):
            found = memory.look_up(sign * queries, topk)
            origins = memory.origins(found.slots)
            for row, entries in enumerate(self.plain.rows):
                self._check_found(queries[row], entries, found.scores[row], found.mask[row], origins[row])

    def _check_found(
        self, queries: Tensor, entries: list[Entry], scores: Tensor, mask: Tensor, origins: Tensor
    ) -> None:
        by_number, count = {each.origin[1]: each for each in entries}, min(scores.shape[-1], len(entries))
        there = torch.arange(scores.shape[-1]) < count
        self.expect(bool((mask == there).all()), f"{count} found", mask)
        for head in range(self.heads if count else 0):
            keys = torch.stack([each.pairs[head, 0].float() for each in entries])
            best = (queries[head] @ keys.T).sort(descending=True).values[:, :count]
            own, numbers = scores[head, :, :count], origins[head, :, :count, 1].flatten().tolist()
            found = torch.stack([by_number[number].pairs[head, 0].float() for number in numbers])
            again = (found.view(*own.shape, DIM) * queries[head].unsqueeze(1)).sum(-1)
            for expected in (best, again):
                self.expect(torch.allclose(own, expected, rtol=1e-4, atol=1e-4), expected, own)

    def clear(self) -> None:
        rows = [row for row in range(self.num_rows) if self.random.random() < 0.5]
        self.memories.clear_memory(rows)
        for row in rows:
            self.plain.rows[row] = []

    def forget(self) -> None:
        held = sorted({each.origin[0] for row in self.plain.rows for each in row})
        if held:
            documents = set(self.random.sample(held, self.random.randint(1, min(len(held), 2))))
            count = self.memories.forget(documents)
            self.expect(count == 2 * self.plain.forget(documents), "as many entries forgotten", count)

    def resize(self) -> None:
        capacity = self.random.choice((1, 5, 17, 70))
        self.memories.resize(capacity)
        self.plain = PlainMemory(capacity, self.policy, [row[-capacity:] for row in self.plain.rows])

    def merge(self) -> None:
        """With others of the same kind, which are then the newer ones."""
        other, plain = self._new(self.plain.capacity), PlainMemory(self.plain.capacity, self.policy)
        plain.rows = [[] for _ in range(self.num_rows)]
        self._add(other, plain)
        numbers = [each.number for each in self.memories.documents()]
        shift = max([self.memories.ledger.next_number, *(number + 1 for number in numbers)])
        self.memories.merge(other)
        other.cleanup()
        needed = max(len(a) + len(b) for a, b in zip(self.plain.rows, plain.rows, strict=True))
        self.plain.capacity = max(self.plain.capacity, needed)
        for row, more in zip(self.plain.rows, plain.rows, strict=True):
            row += [Entry(each.pairs, (each.origin[0] + shift, *each.origin[1:])) for each in more]
        self.serial += 20 * (shift + 1)  # so that numbers of documents stay different

    def save(self) -> None:
        self.memories.save(self.folder, compact=self.random.random() < 0.1)
        self.saved = self.plain.copy()

    def load(self) -> None:
        if self.saved is not None:
            self.memories.cleanup()
            mapped = self.random.random() < 0.5 and self.device == "cpu"
            self.memories = KNNMemoryList.load(self.folder, mmap=mapped, verify=True, device=self.device)
            self.plain = self.saved.copy()

    def break_off(self) -> None:
        """A disk that is full at some moment: the old state stays, or, after all that counts is done, it is the new."""
        step = self.random.choice(STEPS_OF_SAVING)
        with failing(step, after=self.random.randint(0, 2)):
            try:
                self.memories.save(self.folder, compact=self.random.random() < 0.5)
            except SaveError:
                before = self.saved
                found = None if before is None else KNNMemoryList.load(self.folder, device=self.device)
                if found is not None and before is not None:
                    same = _both_same(found, before)
                    found.cleanup()
                    self.expect(same, "the old state", "another")
                return
        self.saved = self.plain.copy()

    # What is compared

    def compare(self) -> None:
        """All entries of both layers, in their order."""
        for sign, memory in ((1, self.memories[0]), (-1, self.memories[1])):
            self.expect(_same(memory, self.plain, sign), "the plain lists", memory)

    def expect(self, holds: bool, wanted: object, got: object) -> None:
        if not holds:
            raise Difference(f"{self!r}: expected {wanted}, got {got}")


def _same(memory: KNNMemory, plain: PlainMemory, sign: int) -> bool:
    for row, entries in enumerate(plain.rows):
        held = memory.store.picked(row, memory.store.places_in_order(row))
        if list(map(tuple, held["origins"].tolist())) != [each.origin for each in entries]:
            return False
        for name, which in (("keys", 0), ("values", 1)):
            wanted = [each.pairs[:, which] for each in entries]
            kept = Vectors(held[name], held.get(f"{name[:-1]}_scales")).floats().cpu()
            if entries and not torch.equal(kept, sign * torch.stack(wanted, dim=1)):
                return False
    return True


def _both_same(found: KNNMemoryList, plain: PlainMemory) -> bool:
    return _same(found[0], plain, 1) and _same(found[1], plain, -1)


@contextmanager
def failing(step: str, after: int) -> Iterator[None]:
    """Inside, a step of saving fails, after it went well so many times."""
    module, name = step.rsplit(".", 1)
    place = getattr(disk, module.removeprefix("disk."))
    real, times = getattr(place, name), iter(range(1000))

    def act(*args: object, **options: object) -> object:
        if next(times) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    with mock.patch.object(place, name, act):
        yield
