"""A training run from its configuration to its last checkpoint: train, validate, save, write down; go on after a stop.

Each step is the trainer's; here is when the rest happens. Only the main process validates and writes what all share.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from memorizing_transformers_pytorch.checkpoint import load_weights, read_weights
from memorizing_transformers_pytorch.data.prepare import Prepared, prepare
from memorizing_transformers_pytorch.data.tokenizer import load_tokenizer
from memorizing_transformers_pytorch.training import run as folders
from memorizing_transformers_pytorch.training.checkpoint import (
    AVERAGE,
    MODEL,
    CheckpointError,
    keep_only,
    last_good,
    last_of,
    read_state,
    restore,
    write_checkpoint,
)
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.evaluate import evaluate, mean_loss, mode_of
from memorizing_transformers_pytorch.training.interrupts import Interrupted, Wish, stopping_on_signals
from memorizing_transformers_pytorch.training.metrics import Metrics, ProgressBar, check_tensorboard_is_there
from memorizing_transformers_pytorch.training.monitor import watching
from memorizing_transformers_pytorch.training.trainer import Trainer

PATIENCE = datetime.timedelta(hours=6)  # of processes that wait while the main one tokenises or validates


def train(config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as configured and keep everything in `folder`; with `resume`, go on from its last checkpoint.

    Raises ValueError, before anything is written, for a configuration or text that makes no sense, a folder that exists
    already, or one to resume that holds a run of another configuration. Raises FloatingPointError for a loss that is
    not finite, CheckpointError where a checkpoint or a record cannot be written, Interrupted after SIGINT or SIGTERM,
    when a checkpoint has been written.
    """
    config.check()
    if resume:
        folders.check_same(config, folder)
    else:
        folders.check_free(folder, overwrite=overwrite)
    if config.training.tensorboard:
        check_tensorboard_is_there()
    accelerator = _make_accelerator(config)
    with accelerator.main_process_first():
        prepared = prepare(
            config.data,
            config.model.num_tokens,
            progress=accelerator.is_main_process,
            tokenizer=load_tokenizer(folder / folders.TOKENIZER) if resume else None,
        )
    trainer = Trainer(config, prepared.train, accelerator)
    if config.init_from is not None and not resume:
        weights = read_weights(_weights_of(config.init_from))
        for model in {trainer.model, trainer.best_model}:
            load_weights(model, weights)
    best = _go_on(trainer, prepared, folder) if resume else None
    if accelerator.is_main_process:
        if resume:
            folders.keep_config(config, folder)
        else:
            folders.begin(config, folder)
            prepared.tokenizer.save(folder / folders.TOKENIZER)
    accelerator.wait_for_everyone()  # until then another process may see a run that is being replaced
    with stopping_on_signals() as wish:
        _Loop(trainer, prepared, folder, best).run(wish)
    return folder


def _make_accelerator(config: RunConfig) -> Accelerator:
    """One with these settings, also in a process that has trained with others before: accelerate keeps the first."""
    patience = InitProcessGroupKwargs(timeout=PATIENCE)

    def make() -> Accelerator:
        precision, cpu = config.training.precision, config.device == "cpu"
        return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[patience])

    try:
        return make()
    except ValueError:
        AcceleratorState._reset_state(reset_partial_state=True)
        return make()


def _weights_of(source: Path) -> Path:
    """The weights of a run, or a file."""
    if source.is_file():
        return source
    checkpoint = folders.checkpoint_of(source)
    return checkpoint / (AVERAGE if (checkpoint / AVERAGE).is_file() else MODEL)


def _go_on(trainer: Trainer, prepared: Prepared, folder: Path) -> dict[str, Any] | None:
    """Let the trainer stand where the run stopped; the best validation so far. From the start if it never saved."""
    last = last_of(folder)
    if last is None:
        return None
    was = read_state(last)["text"]
    if was != prepared.fingerprint:
        raise ValueError(f"expected the text that {folder} began with ({was}), got another ({prepared.fingerprint})")
    best: dict[str, Any] | None = restore(trainer, last)["best"]
    return best


class _Loop:
    """What happens around the steps. best: step and loss of the best validation so far."""

    def __init__(self, trainer: Trainer, prepared: Prepared, folder: Path, best: dict[str, Any] | None) -> None:
        self.trainer, self.prepared, self.folder, self.best = trainer, prepared, folder, best
        self.config, self.settings = trainer.config, trainer.config.training
        self.is_main = trainer.accelerator.is_main_process
        self.metrics: Metrics | None = None
        self.bar = ProgressBar(
            step=trainer.progress.step,
            steps=self.settings.steps,
            bytes_per_token=prepared.train.total_bytes / max(prepared.train.num_tokens_total, 1),
            disable=not self.is_main,
        )

    def run(self, wish: Wish) -> None:
        """The steps that are left. Raises as `train` says."""
        try:
            with ExitStack() as stack:
                self._open(stack)
                if last_of(self.folder) is None:
                    self._save()  # so that even a run that is killed early can go on
                while not self.trainer.finished:
                    self._step()
                    self._after_step(wish)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"could not write to {self.folder}: {error}; {last_good(self.folder)}") from error

    def _open(self, stack: ExitStack) -> None:
        """What is to be closed at the end, however it comes."""
        stack.enter_context(self.trainer.memories)
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

    def _after_step(self, wish: Wish) -> None:
        step, last = self.trainer.progress.step, self.trainer.finished
        improved = False
        if step % self.settings.validate_every == 0 or last:
            improved = self._validate()
        stop = self.trainer.agree(wish.signal is not None)
        if improved or last or stop or step % self.settings.checkpoint_every == 0:
            saved = self._save()
            if stop and not last:
                raise Interrupted(
                    f"interrupted at step {step}; saved in {saved}; go on with --resume", wish.signal or 15
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
        model = self.trainer.best_model
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
