"""The options of `export`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model of a run as a folder for AutoModelForCausalLM.from_pretrained, with tokenizer and model card."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; "shipped" is one that comes with the package."""
    folder: tyro.conf.Positional[Path]
    """Folder to write, which must not exist."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights of the run."""


parse = functools.partial(parse_arguments, Export)
