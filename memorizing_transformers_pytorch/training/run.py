"""The folder of a run: who may write into it, what it holds, and how to load it.

config.yaml      the configuration, resolved          metrics.jsonl   a line for each step and validation
tokenizer.json   the tokenizer                        metrics.png     the same as curves
checkpoints/     the last and the best checkpoint     evaluation/     what `evaluate` wrote
report.html      all of that, and what was looked up  sample.txt      a continuation that the model wrote
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from memorizing_transformers_pytorch.data.tokenizer import Tokenizer, load_tokenizer
from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.training.checkpoint import AVERAGE, MODEL, checkpoints_of, last_of, read_state
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.settings import differences, from_plain, read_yaml, write_yaml
from memorizing_transformers_pytorch.utils.durable import replacing, verify

RUNS = Path("runs")  # where runs are by default
SHIPPED = Path(__file__).parent.parent / "shipped"  # a small run that comes with the package
CONFIG, TOKENIZER, METRICS = "config.yaml", "tokenizer.json", "metrics.jsonl"

# Fields that may change when a run is resumed: they say how much more is done or logged, not what is done.
MAY_CHANGE = {"output", "device", "data.cache"} | {
    f"training.{name}"
    for name in ("steps", "on_nan", "validate_every", "validation_tokens", "validation_documents", "checkpoint_every",
                 "log_every", "tensorboard")
}  # fmt: skip


class LoadedRun(NamedTuple):
    """A run, ready to use, with its model in evaluation mode. step: of the checkpoint."""

    folder: Path
    config: RunConfig
    model: MemorizingTransformer
    tokenizer: Tokenizer
    step: int


def run_named(name: str | Path) -> Path:
    """The folder of a run, or of the one that comes with the package if it is called "shipped" and there is no such
    folder."""
    return SHIPPED if str(name) == SHIPPED.name and not Path(name).exists() else Path(name)


def config_of(folder: Path) -> RunConfig:
    """The configuration of a run. Raises ValueError where there is no run."""
    if not (folder / CONFIG).is_file():
        what = f"{str(folder)!r} is not a training run: it has no {CONFIG}"
        raise ValueError(f"{what} (`memorizing-transformers train` makes a run)")
    return from_plain(read_yaml(folder / CONFIG))


def checkpoint_of(folder: Path, which: str = "last") -> Path:
    """The "last" or the "best" checkpoint of a run. Raises ValueError if there is none."""
    last = last_of(folder)
    if last is None:
        raise ValueError(f"expected a run with a checkpoint, got {str(folder)!r}, which has none yet")
    if which == "last":
        return last
    if which != "best":
        raise ValueError(f"expected a checkpoint 'last' or 'best', got {which!r}")
    best = read_state(last)["best"]
    if best is None:
        raise ValueError(f"expected a run with a best checkpoint, got {str(folder)!r}, which was not validated yet")
    found, step = checkpoints_of(folder), best["step"]
    if step not in found:
        raise ValueError(f"expected the best checkpoint, that of step {step}, got {', '.join(map(str, found))}")
    return found[step]


def newest_run(below: Path) -> Path | None:
    """The run below a folder whose checkpoint was written last; None if there is none."""
    written = {path.parent: last_of(path.parent) for path in below.rglob(CONFIG)}
    ages = {run: checkpoint.stat().st_mtime for run, checkpoint in written.items() if checkpoint is not None}
    return max(ages, key=lambda run: ages[run], default=None)


def load_run(
    folder: Path, which: str = "last", device: torch.device | str | None = None, index: str | None = None
) -> LoadedRun:
    """The model and tokenizer of a run, from its "last" or its "best" checkpoint; averaged weights if it keeps those.

    index: how its memories are searched, unless as in training.
    Raises ValueError for a folder that is not a run, or has no such checkpoint.
    """
    config = config_of(folder)
    checkpoint = checkpoint_of(folder, which)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    weights = AVERAGE if config.optimizer.ema_decay > 0 else MODEL
    verify(checkpoint, weights)
    model = load_checkpoint(checkpoint / weights, device or "cpu").eval()
    if index is not None:
        model.config = dataclasses.replace(model.config, memory_index=index)
    return LoadedRun(folder, config, model, tokenizer, int(read_state(checkpoint)["progress"]["step"]))


def free_name(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist yet."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


@contextmanager
def new_run(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """The folder of a new run. If the code inside fails, the folder is as it was.

    The folder is claimed at once: of two runs that start together, only one gets it.
    Raises ValueError for a folder that exists, unless it holds a run and `overwrite` is set.
    """
    if overwrite and folder.exists() and any(folder.iterdir()):
        if not (folder / CONFIG).is_file():
            raise ValueError(f"expected a run to overwrite, got {str(folder)!r}, which has no {CONFIG}")
        yield
        _empty(folder)
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _claim(folder)
    try:
        yield
    except BaseException:
        (folder / CONFIG).unlink()
        with suppress(OSError):  # something else may be in them by now
            for path in made:
                path.rmdir()
        raise


def _claim(folder: Path) -> None:
    """Make the folder, or take an empty one, and write its first file before any other process does."""
    taken = ValueError(f"expected a new folder, got {str(folder)!r}, which exists (--resume or --overwrite)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise taken
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / CONFIG).touch(exist_ok=False)
    except FileExistsError:
        raise taken from None


def _empty(folder: Path) -> None:
    """Remove the files of a run, except the configuration: if this is interrupted, --overwrite works again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG:
            path.unlink()


def keep_config(config: RunConfig, folder: Path) -> None:
    """Write the configuration of a run; an older one is replaced at the end. It does not name the folder, so that
    another run can use it."""
    with replacing(folder / CONFIG) as aside:
        write_yaml(dataclasses.replace(config, output=None), aside)


def check_same(config: RunConfig, folder: Path) -> None:
    """Raises ValueError, with the fields that differ, if a run cannot be resumed with this configuration."""
    found = {name: both for name, both in differences(config_of(folder), config).items() if name not in MAY_CHANGE}
    if found:
        listed = ", ".join(f"{name} {was!r} (got {now!r})" for name, (was, now) in found.items())
        raise ValueError(f"expected the configuration of {folder}, which has {listed}")
