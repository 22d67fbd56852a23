"""A training run from its configuration to its last checkpoint: train, validate, save, write down; go on after a stop.

Each step is the trainer's; here is when the rest happens. Only the main process validates and writes what all share.
"""

from __future__ import annotations

import contextlib
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.evaluation.evaluate import evaluate, mean_loss, mode_of
from memorizing_transformers_pytorch.training import run as folders
from memorizing_transformers_pytorch.training.begin import Begun, begin
from memorizing_transformers_pytorch.training.checkpoint import (
    keep_only,
    last_good,
    last_of,
    write_checkpoint,
)
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.metrics import (
    Metrics,
    ProgressBar,
    check_tensorboard_is_there,
    read_metrics,
)
from memorizing_transformers_pytorch.training.monitor import watching
from memorizing_transformers_pytorch.training.report import training_charts
from memorizing_transformers_pytorch.utils.charts import plots_are_possible, save_png
from memorizing_transformers_pytorch.utils.durable import SaveError
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest, stopping_on_signals

SECONDS_BETWEEN_PLOTS = 60


def train(config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as configured and keep everything in `folder`; with `resume`, go on from its last checkpoint.

    Raises ValueError, before anything is written, for a configuration or text that makes no sense, a folder that exists
    already, or one to resume that holds a run of another configuration. Raises FloatingPointError for a loss that is
    not finite, SaveError where a checkpoint or a record cannot be written, Interrupted after SIGINT or SIGTERM,
    when a checkpoint has been written.
    """
    if config.training.tensorboard:
        check_tensorboard_is_there()
    begun = begin(config, folder, resume=resume, overwrite=overwrite)
    with stopping_on_signals() as request:
        _Loop(begun, folder).run(request)
    return folder


class _Loop:
    """What happens around the steps. best: step and loss of the best validation so far."""

    def __init__(self, begun: Begun, folder: Path) -> None:
        self.trainer, self.prepared, self.best = begun
        self.folder = folder
        self.config, self.settings = self.trainer.config, self.trainer.config.training
        self.is_main = self.trainer.accelerator.is_main_process
        self._drawn = time.monotonic()
        self.metrics: Metrics | None = None
        self.bar = ProgressBar(
            step=self.trainer.progress.step,
            steps=self.settings.steps,
            bytes_per_token=self.prepared.train.total_bytes / max(self.prepared.train.num_tokens_total, 1),
            disable=not self.is_main,
        )

    def run(self, request: StopRequest) -> None:
        """The steps that are left. Raises as `train` says."""
        try:
            with ExitStack() as stack:
                self._open(stack)
                if last_of(self.folder) is None:
                    self._save()  # so that even a run that is killed early can go on
                while not self.trainer.finished:
                    self._step()
                    self._after_step(request)
        except SaveError:
            raise
        except OSError as error:
            raise SaveError(f"could not write to {self.folder}: {error}; {last_good(self.folder)}") from error

    def _open(self, stack: ExitStack) -> None:
        """What is to be closed at the end, however it comes."""
        stack.enter_context(self.trainer.memories)
        stack.callback(self._draw)
        stack.enter_context(self.bar)
        if self.is_main:
            self.bar.write(f"the run is kept in {self.folder}")
            tensorboard = self.folder / "tensorboard" if self.settings.tensorboard else None
            path, step = self.folder / folders.METRICS, self.trainer.progress.step
            self.metrics = stack.enter_context(Metrics(path, step=step, tensorboard=tensorboard))

    def _step(self) -> None:
        trainer, tokens = self.trainer, self.trainer.progress.tokens
        due = (trainer.progress.step + 1) % self.settings.log_every == 0
        logged = due and trainer.progress.memory_since is not None
        with watching(trainer.model, trainer.memories) if logged else contextlib.nullcontext() as seen:
            try:
                step = trainer.step()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {last_good(self.folder)}") from None
        record = self.bar.record(step, tokens)
        if trainer.progress.skipped:
            record["skipped"] = trainer.progress.skipped
        if seen:
            record["memory"] = seen
        self._note(record)
        self.bar.show(record, trainer.progress.smoothed_loss, self.config.entries_at(step.number - 1))

    def _note(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.note(record)

    def _draw(self) -> None:
        """The curves so far, if they can be drawn. (On a full disk what has stopped the run must be told, not this.)"""
        self._drawn = time.monotonic()
        if self.is_main and plots_are_possible():
            records = read_metrics(self.folder / folders.METRICS)
            with contextlib.suppress(OSError):
                save_png(training_charts(records, self.trainer.progress.memory_since), self.folder / "metrics.png")

    def _after_step(self, request: StopRequest) -> None:
        step, last = self.trainer.progress.step, self.trainer.finished
        improved = False
        if step % self.settings.validate_every == 0 or last:
            improved = self._validate()
        stop = self.trainer.agree(request.signal is not None)
        if improved or last or stop or step % self.settings.checkpoint_every == 0:
            saved = self._save()
            if stop and not last:
                raise Interrupted(
                    f"interrupted at step {step}; saved in {saved}; continue with --resume", request.signal or 15
                )

    def _validate(self) -> bool:
        """Validate; whether it is the best so far."""
        losses = self._validation_losses() if self.is_main else {}
        names = list(losses)
        if not self.trainer.agree(bool(names)):
            return False
        loss = self.trainer.from_main(losses[names[-1]] if names else 0.0)
        step = self.trainer.progress.step
        if names:
            self._note({"step": step, "validation": losses})
            if time.monotonic() > self._drawn + SECONDS_BETWEEN_PLOTS:
                self._draw()
            shown = ", ".join(f"{loss:.3f} {_words(name)}" for name, loss in losses.items())
            self.bar.write(f"step {step:>6,}: validation loss {shown}")
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best["loss"]):
            return False
        self.best = {"step": step, "loss": loss}
        return True

    def _validation_losses(self) -> dict[str, float]:
        """With the memory off and, if the model has one, on; none without validation documents."""
        documents = [document for document in self.prepared.valid if len(document) > 1]
        documents = sorted(documents, key=len, reverse=True)[: self.settings.validation_documents]
        if not documents:
            return {}
        model = self.trainer.averaged_model
        size = self.config.entries_at(self.trainer.progress.step) if model.config.layers_with_memory else 0
        sizes = sorted({0, size})
        losses = evaluate(
            model,
            documents,
            segment_length=self.settings.segment_length,
            memory_sizes=sizes,
            max_tokens=self.settings.validation_tokens,
        )
        return {mode_of(size): mean_loss(losses[mode_of(size)]) for size in sizes}

    def _save(self) -> Path:
        extra = {"best": self.best, "text": self.prepared.fingerprint}
        saved = write_checkpoint(self.trainer, self.folder, extra)
        if self.is_main:
            best = set() if self.best is None else {self.best["step"]}
            keep_only(self.folder, {self.trainer.progress.step} | best)
        return saved


def _words(mode: str) -> str:
    return "with the memory off" if mode == "off" else f"with {int(mode):,} entries"
