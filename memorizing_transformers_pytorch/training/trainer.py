"""One optimiser step after another: what changes while a model is trained, and how.

A step reads `segments` segments of every row, one after the other, and each segment in `row_groups` parts; gradients
are accumulated. The loss of a step is the mean over all its scored tokens, of all processes: so it does not matter
into how many parts or processes the rows are divided. Each process has its own rows, with their memories and state.

Knows nothing of files, validation or reports. Shapes: B rows, T tokens of a segment.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from memorizing_transformers_pytorch.data.stream import Batch, DocumentStream
from memorizing_transformers_pytorch.memory import NonFiniteError
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.optimizer import learning_rate_at, make_average, make_optimizer

SMOOTHING = 0.98  # of the running mean of the loss


class Step(NamedTuple):
    """What one step did.

    number: counted from 1. loss: nats per token, None if it was not finite. tokens: trained on so far. grad_norm:
    before clipping. entries: in the memory of a row, on average. seconds: of the step; searching: of those, in the
    search.
    """

    number: int
    loss: float | None
    tokens: int
    learning_rate: float
    grad_norm: float
    entries: float
    seconds: float
    searching: float


@dataclass
class Progress:
    """How far a run is; the same on every process.

    smoothed_loss: the running mean of the loss. memory_since: the step from which memories were used, or None.
    skipped: steps left out because something was not finite.
    """

    step: int = 0
    tokens: int = 0
    smoothed_loss: float | None = None
    memory_since: int | None = None
    skipped: int = 0

    def note(self, loss: float) -> None:
        before = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = SMOOTHING * before + (1 - SMOOTHING) * loss


class Trainer:
    """A model in training, with its optimiser, its stream of documents, and the memories of its rows.

    documents: token ids of each. Raises ValueError for rows that cannot be divided among processes and row groups.
    """

    def __init__(self, config: RunConfig, documents: Sequence[np.ndarray], accelerator: Accelerator) -> None:
        training, rank = config.training, accelerator.process_index
        parts = accelerator.num_processes * training.row_groups
        if training.rows % parts != 0:
            divisors = f"{accelerator.num_processes} processes times {training.row_groups} row groups"
            raise ValueError(f"expected rows to be a multiple of {divisors}, got {training.rows}")
        self.config = config
        self.accelerator = accelerator
        rows = training.rows // accelerator.num_processes
        self.stream = DocumentStream(
            documents,
            rows=training.rows,
            segment_length=training.segment_length,
            seed=config.seed,
            pack=config.data.pack,
            only=range(rank * rows, (rank + 1) * rows),
        )
        torch.manual_seed(config.seed)
        self.model = MemorizingTransformer.from_config(config.model).to(accelerator.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.average = make_average(self.model, config.optimizer)
        self._wrapped, self._stepper = accelerator.prepare(self.model, self.optimizer)
        torch.manual_seed(config.seed + rank)  # from here on random numbers differ: dropout
        self.groups = [list(range(rows))[i :: training.row_groups] for i in range(training.row_groups)]
        self.memories = self.model.create_knn_memories(batch_size=rows, max_memories=config.entries_at(0))
        self.states = self._new_states()
        self.progress = Progress()

    def _new_states(self) -> list[XLMemories]:
        return [self.model.initial_state(len(group)) for group in self.groups]

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.training.steps

    @property
    def averaged_model(self) -> MemorizingTransformer:
        """The model to validate and use: the average of the weights, if one is kept."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, MemorizingTransformer)
        return model

    def step(self) -> Step:
        """Read the next segments of every row, and change the weights.

        Raises FloatingPointError, with `on_nan="stop"`, for a loss or gradients that are not finite; the weights are
        then as before.
        """
        started, searched = time.perf_counter(), self._seconds_searching()
        self._prepare_memories()
        self._wrapped.train()
        batches = [next(self.stream).to(self.accelerator.device) for _ in range(self.config.training.segments)]
        tokens, scored = self._summed([sum(int(batch.mask.sum()) for batch in batches), sum(map(_scored, batches))])
        loss = self._accumulate(batches, scored)
        rate, norm = self._change_weights(loss)
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        filled = self.memories[0].num_entries if self.memories else (0,)
        return Step(
            self.progress.step,
            loss if loss is not None and math.isfinite(norm) else None,
            self.progress.tokens,
            rate,
            norm,
            sum(filled) / len(filled),
            time.perf_counter() - started,
            self._seconds_searching() - searched,
        )

    def _seconds_searching(self) -> float:
        return sum(memory.seconds_searching for memory in self.memories)

    def _prepare_memories(self) -> None:
        """Before this step: start to use the memories, resize them, or empty them, as configured."""
        progress, settings = self.progress, self.config.memory
        if progress.memory_since is None and progress.step >= self.config.memory_from_step:
            smoothed = progress.smoothed_loss
            if settings.from_loss is None or (smoothed is not None and smoothed < settings.from_loss):
                progress.memory_since = progress.step
        entries = self.config.entries_at(progress.step)
        if self.memories and self.memories[0].max_memories != entries:
            self.memories.resize(entries)
        if settings.scope == "step":
            self._forget_everything()

    def _forget_everything(self) -> None:
        self.memories.clear_memory()
        self.states = self._new_states()

    def _accumulate(self, batches: Sequence[Batch], scored: float) -> float | None:
        """Gradients of the mean loss over all scored tokens, and that loss; None if it is not finite anywhere."""
        parts = [(batch, group) for batch in batches for group in range(len(self.groups))]
        per_token = 1 / max(scored, 1)
        processes = self.accelerator.num_processes  # over which gradients are averaged
        total, healthy = 0.0, True
        for number, (batch, group) in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                loss = self._loss(batch, group) if healthy or last else None
                healthy = healthy and loss is not None and math.isfinite(loss.item())
                total += loss.item() if loss is not None else math.nan
                if last:  # all processes take part in this backward pass, or none
                    [total, sick] = self._summed([total, float(not healthy)])
                    healthy = sick == 0
                if healthy and loss is not None:
                    self.accelerator.backward(loss * per_token * processes)
        return total * per_token if healthy else None

    def _loss(self, batch: Batch, group: int) -> Tensor | None:
        """The sum of the losses of a row group, in nats; None if keys or queries are not finite."""
        rows = self.groups[group]
        part = Batch(*(tensor[rows] for tensor in batch))
        hidden = None
        if self.config.memory.dropout > 0:
            hidden = (torch.rand(len(rows)) < self.config.memory.dropout).to(part.tokens.device)
        try:
            with self.memories.at_batch_indices(rows):
                result = self._wrapped(
                    part.tokens,
                    None if self.progress.memory_since is None else self.memories,
                    self.states[group],
                    labels=part.labels,
                    mask=part.mask,
                    origins=part.origins,
                    starts=part.starts,
                    hide_memory=hidden,
                )
        except NonFiniteError:
            return None
        loss, self.states[group] = result if self.model.carries_state else (result, self.states[group])
        return loss * _scored(part)  # type: ignore[no-any-return]

    def _change_weights(self, loss: float | None) -> tuple[float, float]:
        """One step of the optimiser, unless something is not finite; the learning rate, and the norm of gradients."""
        rate = learning_rate_at(self.config.optimizer, self.progress.step, self.config.training.steps)
        norm = math.nan
        if loss is not None:
            clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
            norm = float(clipped) if clipped is not None else math.nan
        scaled = self.accelerator.scaler is not None  # it watches over the gradients of fp16
        if loss is not None and (math.isfinite(norm) or scaled):
            for group in self._stepper.param_groups:
                group["lr"] = rate
            self._stepper.step()
            self.progress.note(loss)
            if self.average is not None:
                self.average.update_parameters(self.model)
        else:
            self._skip()
        self._stepper.zero_grad()
        return rate, norm

    def _skip(self) -> None:
        self._forget_everything()  # they may hold numbers that are not finite
        if self.config.training.on_nan == "stop":
            self._stepper.zero_grad()
            raise FloatingPointError(f"the loss or its gradient is not finite at step {self.progress.step + 1}")
        self.progress.skipped += 1

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        """The sums of these numbers over all processes."""
        if self.accelerator.num_processes == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        summed: list[float] = self.accelerator.reduce(together, "sum").tolist()
        return summed

    def agree(self, flag: bool) -> bool:
        """Whether this is so on any process."""
        return self._summed([float(flag)])[0] > 0

    def from_main(self, number: float) -> float:
        """The number that the main process has."""
        return self._summed([number if self.accelerator.is_main_process else 0.0])[0]


def _scored(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())
