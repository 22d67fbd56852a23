"""The command line: `memorizing-transformers train | generate`. Bad input is one line on stderr, exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from memorizing_transformers_pytorch.checkpoint import load_checkpoint
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer
from memorizing_transformers_pytorch.generation import stream
from memorizing_transformers_pytorch.training.small import SmallRun, run


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with the model of a run, which reads with its memory whatever comes before."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, with model.safetensors and tokenizer.json."""
    prompt: str = ""
    """Text to continue."""
    read: Path | None = None
    """A text file to read before the prompt, of any length."""
    max_new_tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.6
    """Of sampling; 0 takes the likeliest token."""
    segment_length: int | None = None
    """Local context; that of the run unless given."""
    seed: int = 0
    """Of sampling."""


def generate_text(options: Generate) -> None:
    """Read, then print the continuation as it is written."""
    segment_length = options.segment_length or _segment_length_of(options.run)
    tokenizer = BPETokenizer.load(options.run / "tokenizer.json")
    model = load_checkpoint(options.run / "model.safetensors")
    if options.read is not None and not options.read.is_file():
        raise ValueError(f"expected a text file to read, got {str(options.read)!r}, which does not exist")
    before = "" if options.read is None else options.read.read_text(encoding="utf-8", errors="replace")
    text = tokenizer.encode(before + options.prompt)
    if not text:
        raise ValueError("expected a text to continue, by --read or --prompt, got none")
    print(options.prompt, end="", flush=True)
    with model.knn_memories_context(batch_size=1) as memories:
        written: list[int] = []
        shown = ""
        for tokens in stream(
            model,
            [text],
            memories,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            generator=torch.Generator().manual_seed(options.seed),
            segment_length=segment_length,
        ):
            written += [token for token in tokens if token is not None]
            whole = tokenizer.decode(written)
            if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character of several bytes
                print(whole[len(shown) :], end="", flush=True)
                shown = whole
    print()


def _segment_length_of(run: Path) -> int:
    path = run / "options.json"
    if not path.is_file():
        raise ValueError(f"expected the folder of a run, got {str(run)!r}, which has no options.json (try: train)")
    return int(json.loads(path.read_text(encoding="utf-8"))["segment_length"])


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `memorizing-transformers`."""
    commands: dict[str, Callable[..., Any]] = {"train": SmallRun, "generate": Generate}
    options = tyro.extras.subcommand_cli_from_dict(
        commands, args=arguments, prog="memorizing-transformers", description="Transformers that remember."
    )
    try:
        if isinstance(options, Generate):
            generate_text(options)
        else:
            run(options)
    except (ValueError, OSError) as error:
        print(f"memorizing-transformers: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"memorizing-transformers: {error}; try a smaller --learning-rate", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nmemorizing-transformers: interrupted; the model of the last validation is in the run", file=sys.stderr)
        sys.exit(130)
