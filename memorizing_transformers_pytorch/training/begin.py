"""How a run begins, or goes on: its folder, its text, its model with what it starts from.

On bad input nothing is left behind, and what was there stays.
"""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from memorizing_transformers_pytorch.data.prepare import Prepared, prepare
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer, load_tokenizer
from memorizing_transformers_pytorch.model.checkpoint import load_weights, read_weights
from memorizing_transformers_pytorch.training import run as folders
from memorizing_transformers_pytorch.training.checkpoint import AVERAGE, MODEL, last_of, read_state, restore
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.trainer import Trainer

PATIENCE = datetime.timedelta(hours=24)  # of processes that wait while the main one tokenises or validates


class Begun(NamedTuple):
    """A run that is ready for its next step. best: step and loss of the best validation so far, if there was one."""

    trainer: Trainer
    prepared: Prepared
    best: dict[str, Any] | None


def begin(config: RunConfig, folder: Path, *, resume: bool, overwrite: bool) -> Begun:
    """A new run in this folder, or with `resume` the one in it, where its last checkpoint was written.

    Raises ValueError for what makes no sense: see `training.loop.train`.
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
        best = None
        if resume and last_of(folder) is not None:
            best = _go_on(trainer, prepared, folder)
        elif config.init_from is not None:
            weights = read_weights(_weights_of(config.init_from))
            for model in {trainer.model, trainer.averaged_model}:
                load_weights(model, weights)
    if main:
        folders.keep_config(config, folder)
        prepared.tokenizer.save(folder / folders.TOKENIZER)
    accelerator.wait_for_everyone()  # until then another process may see a run that is being replaced
    return Begun(trainer, prepared, best)


def make_accelerator(config: RunConfig) -> Accelerator:
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


def _tokenizer_to_keep(config: RunConfig, resumed: Path | None) -> Tokenizer | None:
    """The tokenizer that a run goes on with, or that of the run whose weights it starts from; None for a new one.

    Raises ValueError if another one was asked for: the same numbers would be other tokens.
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


def _go_on(trainer: Trainer, prepared: Prepared, folder: Path) -> dict[str, Any] | None:
    """Let the trainer stand where the run stopped; the best validation so far."""
    last = last_of(folder)
    assert last is not None
    was = read_state(last)["text"]
    if was != prepared.fingerprint:
        raise ValueError(f"expected the text that {folder} began with ({was}), got another ({prepared.fingerprint})")
    best: dict[str, Any] | None = restore(trainer, last)["best"]
    return best
