"""What one step after another does to weights and memories."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.data.stream import Batch, DocumentStream
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.trainer import Trainer

from .helpers import LENGTHS, documents, make_config, make_trainer, same, weights_of

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "xl": {"xl_max_memories": 5},
    "conv": {"short_conv": 3, "qk_init": "induction"},
    "gate": {"combine": "gate", "num_kv_heads": 2, "memorizing_layers": (1, 2)},
    "all": {"combine": "gate", "xl_max_memories": 11, "xl_memory_layers": (2,), "short_conv": 2},
}


# The slow reference: every row alone, one plain loop over the segments


class RowByRow:
    """Rows that are read one by one, each with a memory and a state of its own."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = MemorizingTransformer.from_config(config.model)
        rows = config.training.rows
        self.memories = [self.model.create_knn_memories(batch_size=1) for _ in range(rows)]
        self.states: list[Any] = [None] * rows
        self.stream = DocumentStream(
            documents(*LENGTHS), rows=rows, segment_length=config.training.segment_length, pack=config.data.pack
        )

    def step(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over all scored tokens of all segments, and its gradient."""
        self.model.load_state_dict(weights)
        self.model.zero_grad()
        if self.config.memory.scope == "step":
            self.states = [None] * len(self.states)
            for memories in self.memories:
                memories.clear_memory()
        rows = range(len(self.states))
        mean = torch.cat([self._losses(batch, row) for batch in self._batches() for row in rows]).mean()
        mean.backward()
        return mean.item(), {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def _batches(self) -> Iterator[Batch]:
        for _ in range(self.config.training.segments):
            yield next(self.stream)

    def _losses(self, batch: Batch, row: int) -> Tensor:
        tokens, labels, mask, origins, starts = (part[row : row + 1] for part in batch)
        result = self.model(tokens, self.memories[row], self.states[row], mask=mask, origins=origins, starts=starts)
        logits, self.states[row] = result if self.model.carries_state else (result, None)
        scored = labels[0] != -100
        return F.cross_entropy(logits[0, scored].float(), labels[0, scored], reduction="none")


def grads_of_next_step(trainer: Trainer) -> tuple[float | None, dict[str, Tensor]]:
    grads: dict[str, Tensor] = {}
    apply = trainer._stepper.step

    def noted() -> None:
        grads.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        apply()

    trainer._stepper.step = noted
    try:
        return trainer.step().loss, grads
    finally:
        trainer._stepper.step = apply


@pytest.mark.parametrize(
    ("row_groups", "segments", "scope", "pack"),
    [(2, 3, "document", True), (4, 2, "step", False), (1, 1, "document", False)],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_follows_the_gradient_of_the_mean_over_all_scored_tokens(
    name: str, row_groups: int, segments: int, scope: str, pack: bool
) -> None:
    torch.set_default_dtype(torch.float64)
    config = make_config(
        model=ARCHITECTURES[name],
        data={"pack": pack},
        optimizer={"max_grad_norm": 1e9},
        memory={"scope": scope},
        training={"row_groups": row_groups, "segments": segments, "segment_length": 7},
    )
    trainer, reference = make_trainer(config), RowByRow(config)
    for _ in range(6 // segments + 1):
        expected, expected_grads = reference.step(weights_of(trainer))
        loss, grads = grads_of_next_step(trainer)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert grads.keys() == expected_grads.keys()
        for parameter, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[parameter], rtol=1e-5, atol=1e-7)
    entries = [tuple(memory.num_entries[0] for memory in memories) for memories in reference.memories]
    assert entries == list(zip(*(memory.num_entries for memory in trainer.memories), strict=True))
    assert any(sum(row) > 0 for row in entries)


def test_losses_and_weights_do_not_depend_on_row_groups() -> None:
    torch.set_default_dtype(torch.float64)
    found = []
    for row_groups in (1, 2, 4):
        config = make_config(model=ARCHITECTURES["all"], training={"row_groups": row_groups, "segments": 2})
        trainer = make_trainer(config)
        losses = [trainer.step().loss for _ in range(8)]
        found.append((losses, trainer.model.to_logits[1].weight.detach().clone()))
    for losses, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-4, atol=1e-5)


def test_tokens_count_what_was_read_without_padding() -> None:
    trainer = make_trainer(make_config(training={"segments": 2, "row_groups": 2}))
    stream = DocumentStream(documents(*LENGTHS), rows=4, segment_length=8)
    read = 0
    for _ in range(5):
        read += sum(int(next(stream).mask.sum()) for _ in range(2))
        assert trainer.step().tokens == read


def test_rows_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rows to be a multiple of 1 processes times 3 row groups, got 4"):
        make_trainer(make_config(training={"row_groups": 3}))


# When the memory is read


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Every search and every write of a memory, with the rows in scope."""
    noted: list[tuple[str, list[int]]] = []
    look_up, stage = KNNMemory.look_up, KNNMemory.stage

    def noted_look_up(self: KNNMemory, *arguments: Any, rows: list[int]) -> Any:
        noted.append(("read", rows))
        return look_up(self, *arguments, rows=rows)

    def noted_stage(self: KNNMemory, *arguments: Any) -> Any:
        noted.append(("write", list(self.scoped_indices)))
        return stage(self, *arguments)

    monkeypatch.setattr(KNNMemory, "look_up", noted_look_up)
    monkeypatch.setattr(KNNMemory, "stage", noted_stage)
    return noted


@pytest.mark.parametrize(("memory", "first"), [({"from_step": 5}, 5), ({"last_share": 0.25}, 9), ({}, 0)])
def test_nothing_is_read_or_written_before_its_step(
    calls: list[tuple[str, list[int]]], memory: dict[str, Any], first: int
) -> None:
    trainer = make_trainer(make_config(memory=memory))
    for step in range(12):
        calls.clear()
        entries = trainer.step().entries
        assert (len(calls), entries > 0) == ((2, True) if step >= first else (0, False))
    assert trainer.progress.memory_since == first


def test_before_its_step_a_memory_changes_nothing() -> None:
    with_memory = make_trainer(make_config(memory={"from_step": 6}))
    without = make_trainer(make_config(memory={"last_share": 0.0}))
    for step in range(9):
        losses = with_memory.step().loss, without.step().loss
        assert (losses[0] == losses[1]) == (step <= 6)  # at the 6th the memory is still empty


def test_a_loss_below_the_threshold_turns_the_memory_on_for_good() -> None:
    threshold = 4.0
    trainer = make_trainer(make_config(memory={"from_step": 2, "from_loss": threshold}))
    on = None
    for step, smoothed in enumerate([5.0, 3.0, 4.5, 4.1, 3.9, 6.0, 7.0]):
        trainer.progress.smoothed_loss = smoothed
        if on is None and step >= 2 and smoothed < threshold:
            on = step
        assert (trainer.step().entries > 0) == (on is not None)
        assert trainer.progress.memory_since == on
    assert on == 4


def test_the_running_mean_follows_the_losses() -> None:
    trainer = make_trainer(make_config())
    expected = None
    for _ in range(4):
        loss = trainer.step().loss
        expected = loss if expected is None else 0.98 * expected + 0.02 * loss
        assert trainer.progress.smoothed_loss == pytest.approx(expected, rel=1e-12)


def test_growth_changes_the_capacity_at_its_step_and_keeps_the_entries() -> None:
    trainer = make_trainer(make_config(memory={"growth": ((0, 3), (4, 10), (7, 21))}), 300, 301, 302, 303)
    kept: list[Tensor] = []
    for step in range(12):
        trainer._prepare_memories()  # done again by the step, to no effect
        [memory] = trainer.memories
        assert memory.max_memories == (3 if step < 4 else 10 if step < 7 else 21)
        if step in (4, 7):
            snapshot = memory.state_dict()
            for before, after in zip(kept, snapshot["origins"].split(snapshot["filled"].tolist()), strict=True):
                assert sorted(before.tolist()) == sorted(after.tolist())
        trainer.step()
        snapshot = trainer.memories[0].state_dict()
        kept = list(snapshot["origins"].split(snapshot["filled"].tolist()))
    assert trainer.memories[0].num_entries == (21,) * 4


def test_growth_from_a_later_step_begins_with_its_first_size() -> None:
    trainer = make_trainer(make_config(memory={"growth": ((5, 4), (7, 9))}))
    sizes = []
    for _ in range(9):
        trainer.step()
        sizes.append(trainer.memories[0].max_memories)
    assert sizes == [4] * 7 + [9] * 2


def test_memories_of_a_step_are_forgotten_before_the_next() -> None:
    config = make_config(model={"xl_max_memories": 4}, memory={"scope": "step"}, training={"segments": 2})
    trainer = make_trainer(config, 200, 201, 202, 203)
    for _ in range(3):
        trainer.step()
        assert trainer.memories[0].num_entries == (12,) * 4  # 2 segments of 8, of which XL memory holds 4
        assert trainer.states[0].length == 4


def test_memories_of_documents_are_carried_from_step_to_step() -> None:
    trainer = make_trainer(make_config(), 200, 201, 202, 203)
    assert [trainer.step().entries for _ in range(4)] == [8, 16, 21, 21]


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_full_dropout_equals_no_reading_and_still_writes(combine: str) -> None:
    hidden = make_trainer(make_config(model={"combine": combine}, memory={"dropout": 1.0}))
    without = make_trainer(make_config(model={"combine": combine}, memory={"last_share": 0.0}))
    for _ in range(6):
        step = hidden.step()
        assert step.loss == pytest.approx(without.step().loss, rel=1e-6)
        assert step.entries > 0


def test_dropout_hides_some_rows_anew_for_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[list[bool]] = []
    look_up = KNNMemory.look_up

    def noted(self: KNNMemory, queries: Tensor, topk: int, hide: Tensor, rows: list[int]) -> Any:
        hidden.append((hide if hide.ndim == 1 else hide.all(dim=1)).tolist())
        return look_up(self, queries, topk, hide, rows=rows)

    monkeypatch.setattr(KNNMemory, "look_up", noted)
    trainer = make_trainer(make_config(memory={"dropout": 0.5}), 400, 401, 402, 403)
    for _ in range(30):
        trainer.step()
    drawn = hidden[1:]  # in the first segment all documents are new
    assert 0.3 < sum(map(sum, drawn)) / (4 * len(drawn)) < 0.7
    assert len({tuple(rows) for rows in drawn}) > 8


def test_each_group_sees_the_memories_of_its_rows_alone(calls: list[tuple[str, list[int]]]) -> None:
    trainer = make_trainer(make_config(training={"row_groups": 2}))
    trainer.step()
    assert calls == [("read", [0, 2]), ("write", [0, 2]), ("read", [1, 3]), ("write", [1, 3])]


def test_a_row_remembers_its_own_document(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(data={"pack": True}, training={"row_groups": 2, "segments": 2}))
    for _ in range(8):
        trainer.step()
        places = trainer.stream.state_dict()["places"]
        snapshot = trainer.memories[0].state_dict()
        for (document, position), origins in zip(
            places, snapshot["origins"].split(snapshot["filled"].tolist()), strict=True
        ):
            assert {origin[0] for origin in origins.tolist()} == {document}
            assert max(origin[1] for origin in origins.tolist()) == position - 1


# What is not finite


def break_step(trainer: Trainer, number: int, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Let the state and besides a loss, its gradient, or the keys of the step with this number (from 1) be NaN."""
    forward, keys = trainer.model.forward, trainer.model.layers[1][0].fn.to_kv
    parts = []

    def broken(*arguments: Any, **named: Any) -> Any:
        if trainer.progress.step + 1 != number:
            return forward(*arguments, **named)
        parts.append(how)
        if how == "keys" and len(parts) == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(keys, "forward", lambda x: F.linear(x, keys.weight * torch.nan))
                return forward(*arguments, **named)
        loss, state = forward(*arguments, **named)
        for pairs in [*state, *state.conv_states]:
            pairs.fill_(torch.nan)
        if how == "gradient":
            loss.register_hook(lambda grad: grad * torch.nan)
        return loss * torch.nan if how == "loss" and len(parts) == 2 else loss, state

    monkeypatch.setattr(trainer.model, "forward", broken)


FRAGILE: dict[str, Any] = {
    "model": {"xl_max_memories": 3, "short_conv": 2},
    "optimizer": {"ema_decay": 0.5},
}


@pytest.mark.parametrize("how", ["loss", "gradient", "keys"])
def test_a_step_that_is_not_finite_stops_with_the_weights_as_they_were(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    trainer = make_trainer(make_config(**FRAGILE, training={"segments": 2, "row_groups": 2}))
    break_step(trainer, 4, monkeypatch, how)
    for _ in range(3):
        trainer.step()
    before = weights_of(trainer)
    average = {name: tensor.clone() for name, tensor in trainer.averaged_model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="at step 4"):
        trainer.step()
    assert same(before, weights_of(trainer))
    assert same(average, trainer.averaged_model.state_dict())
    assert trainer.progress.step == 3


@pytest.mark.parametrize("how", ["loss", "gradient", "keys"])
def test_a_step_that_is_not_finite_can_be_skipped_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    trainer = make_trainer(make_config(**FRAGILE, training={"on_nan": "skip", "segments": 2, "row_groups": 2}))
    break_step(trainer, 4, monkeypatch, how)
    steps = []
    for number in range(1, 9):
        before = weights_of(trainer)
        steps.append(trainer.step())
        assert same(before, weights_of(trainer)) == (number == 4)
    assert [step.number for step in steps if step.loss is None] == [4]
    assert trainer.progress.skipped == 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(trainer).values())
    assert all(bool(tensor.isfinite().all()) for state in trainer.states for tensor in [*state, *state.conv_states])
