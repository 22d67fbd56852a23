"""A training run from its configuration to its last checkpoint: train, validate, save, log; resume after a stop.

The trainer does each step; this module begins or resumes the run, and decides when the rest happens. Bad input leaves
nothing behind and changes nothing. Only the main process validates and writes files
that all processes share.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from memorizing_transformers_pytorch.data.prepare import Prepared, prepare
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer, load_tokenizer
from memorizing_transformers_pytorch.evaluation.evaluate import evaluate, mean_loss
from memorizing_transformers_pytorch.evaluation.report import label
from memorizing_transformers_pytorch.model.checkpoint import load_weights, read_weights
from memorizing_transformers_pytorch.training import run as folders
from memorizing_transformers_pytorch.training.checkpoint import (
    AVERAGE,
    MODEL,
    keep_only,
    last_good,
    last_of,
    read_state,
    restore,
    write_checkpoint,
)
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.metrics import (
    Metrics,
    ProgressBar,
    check_tensorboard_is_there,
    read_metrics,
    training_charts,
)
from memorizing_transformers_pytorch.training.monitor import watching
from memorizing_transformers_pytorch.training.run import METRICS
from memorizing_transformers_pytorch.training.trainer import Trainer
from memorizing_transformers_pytorch.utils.charts import plots_are_possible, save_png
from memorizing_transformers_pytorch.utils.durable import SaveError
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest, stopping_on_signals

PATIENCE = datetime.timedelta(hours=24)  # of processes that wait while the main process tokenises or validates
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


class Begun(NamedTuple):
    """A run that is ready for its next step. best: step and loss of the best validation so far, if there was one."""

    trainer: Trainer
    prepared: Prepared
    best: dict[str, Any] | None


def begin(config: RunConfig, folder: Path, *, resume: bool, overwrite: bool) -> Begun:
    """A new run in this folder, or with `resume` the run in it, as of its last checkpoint.

    Raises ValueError for bad input: see `training.loop.train`.
    """
    config.check()
    if resume:
        folders.check_same(config, folder)
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with folders.new_run(folder, overwrite=overwrite) if main and not resume else contextlib.nullcontext():
        tokenizer = _tokenizer_to_keep(config, folder if resume else None)
        with accelerator.main_process_first():
            prepared = prepare(config.data, config.model.num_tokens, progress=main, tokenizer=tokenizer)
        _check_something_is_remembered(config, prepared)
        trainer = Trainer(config, prepared.train, accelerator)
        best, last = None, last_of(folder) if resume else None
        if last is not None:
            if (was := read_state(last)["text"]) != prepared.fingerprint:
                now = prepared.fingerprint
                raise ValueError(f"the text has changed: {folder} was trained on {was}, the text is now {now}")
            best = restore(trainer, last)["best"]
        elif config.init_from is not None:
            weights = read_weights(_weights_of(config.init_from))
            for model in {trainer.model, trainer.averaged_model}:
                load_weights(model, weights)
    if main:
        folders.keep_config(config, folder)
        prepared.tokenizer.save(folder / folders.TOKENIZER)
    accelerator.wait_for_everyone()  # else another process may see a run that is being replaced
    return Begun(trainer, prepared, best)


def make_accelerator(config: RunConfig) -> Accelerator:
    """One with these settings, also in a process that has trained with others before: accelerate keeps the first."""
    make = partial(
        Accelerator,
        mixed_precision=config.training.precision,
        cpu=config.device == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    try:
        return make()
    except ValueError:
        AcceleratorState._reset_state(reset_partial_state=True)
        return make()


def _tokenizer_to_keep(config: RunConfig, resumed: Path | None) -> Tokenizer | None:
    """The tokenizer of a resumed run, or of the run whose weights this run starts from; None to train a new one.

    Raises ValueError if another tokenizer was asked for: the same ids would be other tokens.
    """
    source = resumed or config.init_from
    if source is None or not (source / folders.TOKENIZER).is_file():
        return None
    tokenizer = load_tokenizer(source / folders.TOKENIZER)
    wanted = config.data.tokenizer
    if resumed is None and wanted != "bpe" and load_tokenizer(wanted).to_json() != tokenizer.to_json():
        raise ValueError(f"expected the tokenizer of {source}, whose weights the run starts from, got {wanted!r}")
    return tokenizer


def _check_something_is_remembered(config: RunConfig, prepared: Prepared) -> None:
    """A memory is of use from the second segment of a document on."""
    length = config.training.segment_length
    remembers = config.model.layers_with_memory or config.model.layers_with_xl
    if remembers and not any(len(document) > length for document in prepared.train):
        longest = max(len(document) for document in prepared.train)
        expected = f"a training document longer than a segment of {length} tokens (--training.segment-length)"
        raise ValueError(f"expected {expected}, got at most {longest}")


def _weights_of(source: Path) -> Path:
    """The weights of a run, or a file."""
    if source.is_file():
        return source
    checkpoint = folders.checkpoint_of(source)
    return checkpoint / (AVERAGE if (checkpoint / AVERAGE).is_file() else MODEL)
