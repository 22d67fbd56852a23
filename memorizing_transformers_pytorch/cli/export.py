"""`memorizing-transformers export RUN FOLDER`: a run as a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
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


def main(arguments: Sequence[str], program: str) -> None:
    """Run `export` with these arguments. Raises ValueError for bad input."""
    options = parse_arguments(Export, arguments, program)
    try:
        from memorizing_transformers_pytorch.huggingface.export import export_run
    except ImportError as error:
        raise ValueError(f"expected the extra 'huggingface' to be installed, got {error}") from error
    export_run(options.run, options.folder, options.checkpoint)
    print(f"wrote {options.folder}")
