"""The options of `train`: a preset, over it a YAML file, over that flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.settings import from_plain, merged, read_yaml, to_plain


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model with a memory, test what the memory is worth, and let it write."""

    preset: str = "small"
    """The configuration to start from: small, enwik8, paper-200m, paper-1b or paper-8b."""
    config: Path | None = None
    """A YAML file with fields of a run, laid over the preset. (Flags are laid over both.)"""
    resume: bool = False
    """Resume the run in --output, exactly from its last checkpoint, with its own configuration."""
    overwrite: bool = False
    """Replace the run in --output."""
    evaluate: bool = True
    """At the end, evaluate on the held-out test documents, with controls."""
    evaluate_tokens: int = 16_384
    """Tokens to read of each of these documents. (`evaluate` reads whole documents, at any memory sizes.)"""
    evaluate_documents: int = 64
    """Documents to evaluate on, drawn at random; all if there are fewer."""
    sample_tokens: int = 160
    """Tokens to write at the end, continuing a held-out document; 0 for none."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run."""


def parse(arguments: Sequence[str], program: str) -> Train:
    """The arguments over what they start from: a preset and a file, or with --resume the run itself.

    Raises ValueError for an unknown preset, a file or a run that cannot be read, or bad values.
    """
    first = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--output", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--overwrite", action="store_true")
    given = vars(first.parse_known_args(list(arguments))[0])
    if given.get("resume"):
        if "output" not in given or given.keys() & {"config", "preset", "overwrite"}:
            expected = "--resume with --output RUN, and without --preset, --config and --overwrite"
            raise ValueError(f"expected {expected}, got {' '.join(arguments)}")
        from memorizing_transformers_pytorch.training.run import config_of  # imports torch

        base = to_plain(config_of(given["output"]))
    else:
        base = merged({}, run_preset(given.get("preset", "small")))
        if "config" in given:
            base = merged(base, read_yaml(given["config"]))
    default = Train(run=from_plain(base))
    return parse_arguments(Train, arguments, program, default=default)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
