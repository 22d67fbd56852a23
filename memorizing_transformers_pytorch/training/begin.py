"""How a run starts or resumes: its folder, its text, its model and initial weights.

Bad input leaves nothing behind and changes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
from functools import partial
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

PATIENCE = datetime.timedelta(hours=24)  # of processes that wait while the main process tokenises or validates


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
