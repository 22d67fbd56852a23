"""The loop: it learns, it clears what belongs to another document, and the same run gives the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.data.stream import DocumentStream
from memorizing_transformers_pytorch.training.loop import Step, TrainingConfig, train


def make_model(**changes: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    fields = {"num_tokens": 19, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "max_knn_memories": 40}
    return MemorizingTransformer(**{**fields, "short_conv": 3, **changes})


def make_stream() -> DocumentStream:
    documents = [np.arange(length) % 19 for length in (31, 5, 44, 17)]
    return DocumentStream(documents, rows=3, segment_length=8)


def run(model: MemorizingTransformer, **config: Any) -> list[Step]:
    defaults = {"steps": 40, "warmup_steps": 5, "learning_rate": 1e-2}
    return list(train(model, make_stream(), TrainingConfig(**{**defaults, **config})))


@pytest.mark.parametrize("changes", [{}, {"short_conv": 0}, {"xl_max_memories": 5}, {"memorizing_layers": ()}], ids=str)
def test_a_run_learns_and_repeats(changes: dict[str, Any]) -> None:
    steps = run(make_model(**changes))
    assert [step.number for step in steps] == list(range(1, 41))
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps == run(make_model(**changes))


def test_memory_is_used_from_its_step_on() -> None:
    early, late = run(make_model()), run(make_model(), memory_from_step=7)
    assert [step.entries for step in late[:7]] == [0] * 7
    assert late[7].entries > 0
    assert early[0].entries > 0
    assert late[:7] == run(make_model(), memory_from_step=40)[:7]


def test_a_document_that_begins_finds_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream, entries = make_model(max_knn_memories=1000), make_stream(), []
    forward = MemorizingTransformer.forward

    def watched(self: MemorizingTransformer, x: torch.Tensor, memories: Any, *args: Any, **kwargs: Any) -> Any:
        entries.append(memories[0].num_entries)
        return forward(self, x, memories, *args, **kwargs)

    monkeypatch.setattr(MemorizingTransformer, "forward", watched)
    list(train(model, stream, TrainingConfig(steps=12, warmup_steps=2)))
    again, read = make_stream(), [0, 0, 0]
    for counts in entries:
        batch = next(again)
        read = [0 if row in batch.starts else count for row, count in enumerate(read)]
        assert counts == tuple(read)
        read = [count + int(batch.mask[row].sum()) for row, count in enumerate(read)]


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = make_model()
    with torch.no_grad():
        model.to_logits[1].bias[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss of step 0"):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "bad", [{"steps": -1}, {"learning_rate": 0.0}, {"max_grad_norm": -1.0}, {"weight_decay": -0.1}]
)
def test_numbers_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"expected {next(iter(bad))} to be"):
        TrainingConfig(**{"steps": 1, **bad})
