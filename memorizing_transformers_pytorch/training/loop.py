"""A training run from its configuration to its last checkpoint: train, validate, save, log; resume after a stop.

The trainer does each step; this module decides when the rest happens. Only the main process validates and writes files
that all processes share.
"""

from __future__ import annotations

import contextlib
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.evaluation.evaluate import evaluate, mean_loss
from memorizing_transformers_pytorch.evaluation.report import label
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
from memorizing_transformers_pytorch.training.run import METRICS
from memorizing_transformers_pytorch.utils.charts import plots_are_possible, save_png
from memorizing_transformers_pytorch.utils.durable import SaveError
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest, stopping_on_signals

SECONDS_BETWEEN_PLOTS = 60


def train(config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as configured and keep everything in `folder`; with `resume`, continue from its last checkpoint.

    Raises ValueError, before anything is written, for a bad configuration or text, a folder that exists
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
        train = self.prepared.train
        self.bar = ProgressBar(
            step=self.trainer.progress.step,
            steps=self.settings.steps,
            bytes_per_token=train.total_bytes / max(train.num_tokens_total, 1),
            disable=not self.is_main,
        )

    def run(self, request: StopRequest) -> None:
        """The remaining steps. Raises as `train` says."""
        try:
            with ExitStack() as stack:
                stack.enter_context(self.trainer.memories)
                stack.callback(self._draw)
                stack.enter_context(self.bar)
                if self.is_main:
                    self.bar.write(f"the run is kept in {self.folder}")
                    tensorboard = self.folder / "tensorboard" if self.settings.tensorboard else None
                    metrics = Metrics(self.folder / METRICS, step=self.trainer.progress.step, tensorboard=tensorboard)
                    self.metrics = stack.enter_context(metrics)
                if last_of(self.folder) is None:
                    self._save()  # so that even a run that is killed early can be resumed
                while not self.trainer.finished:
                    self._step()
                    self._after_step(request)
        except SaveError:
            raise
        except OSError as error:
            raise SaveError(f"could not write to {self.folder}: {error}; {last_good(self.folder)}") from error

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
        """The curves so far, if they can be drawn. (On a full disk, the error that stopped the run matters more.)"""
        self._drawn = time.monotonic()
        if self.is_main and plots_are_possible():
            records = read_metrics(self.folder / METRICS)
            with contextlib.suppress(OSError):
                save_png(training_charts(records, self.trainer.progress.memory_since), self.folder / "metrics.png")

    def _after_step(self, request: StopRequest) -> None:
        step, last = self.trainer.progress.step, self.trainer.finished
        improved = (step % self.settings.validate_every == 0 or last) and self._validate()
        stop = self.trainer.agree(request.signal is not None)
        if improved or last or stop or step % self.settings.checkpoint_every == 0:
            saved = self._save()
            if stop and not last:
                message = f"interrupted at step {step}; saved in {saved}; continue with --resume"
                raise Interrupted(message, request.signal or 15)

    def _validate(self) -> bool:
        """Validate; whether it is the best so far."""
        losses = self._validation_losses() if self.is_main else {}
        if not self.trainer.agree(bool(losses)):
            return False
        step, loss = self.trainer.progress.step, self.trainer.from_main([*losses.values(), 0.0][len(losses) - 1])
        if losses:
            self._note({"step": step, "validation": losses})
            if time.monotonic() > self._drawn + SECONDS_BETWEEN_PLOTS:
                self._draw()
            shown = ", ".join(f"{loss:.3f} with {label(name)}" for name, loss in losses.items())
            self.bar.write(f"step {step:>6,}: validation loss {shown}")
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best["loss"]):
            return False
        self.best = {"step": step, "loss": loss}
        return True

    def _validation_losses(self) -> dict[str, float]:
        """With the memory off and, if the model has one, on; none without validation documents."""
        documents = [document for document in self.prepared.valid if len(document) > 1]
        if not documents:
            return {}
        model = self.trainer.averaged_model
        size = self.config.entries_at(self.trainer.progress.step) if model.config.layers_with_memory else 0
        losses = evaluate(
            model,
            sorted(documents, key=len, reverse=True)[: self.settings.validation_documents],
            segment_length=self.settings.segment_length,
            memory_sizes=sorted({0, size}),
            max_tokens=self.settings.validation_tokens,
        )
        return {mode: mean_loss(of_mode) for mode, of_mode in losses.items()}

    def _save(self) -> Path:
        saved = write_checkpoint(self.trainer, self.folder, {"best": self.best, "text": self.prepared.fingerprint})
        if self.is_main:
            best = set() if self.best is None else {self.best["step"]}
            keep_only(self.folder, {self.trainer.progress.step} | best)
        return saved
