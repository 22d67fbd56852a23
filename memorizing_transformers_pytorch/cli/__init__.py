"""The command line: `memorizing-transformers train | evaluate | generate | ask | chat | explain | memory | ...`.

Bad input prints one line and exits with code 2. torch is imported when a command is known to make sense.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from memorizing_transformers_pytorch.utils.durable import SaveError
from memorizing_transformers_pytorch.utils.interrupts import Interrupted
from memorizing_transformers_pytorch.utils.version import __version__

PROGRAM = "memorizing-transformers"

COMMANDS = {
    "train": "train a model with a memory on your own text, or continue a run",
    "evaluate": "measure what the memory of a run is worth on held-out documents",
    "generate": "read texts of any length, then continue them",
    "ask": "answer a question about what a Hugging Face model has read, with sources",
    "chat": "talk with a Hugging Face model about what it has read, with sources",
    "explain": "show what a model retrieves from its memory, as a page",
    "memory": "build a memory on disk from files; inspect, forget, verify, compact, merge",
    "explore": "read files, ask questions and see what is retrieved, in a browser",
    "export": "write the model of a run for transformers and the Hugging Face hub",
}

HELP = (
    f"usage: {PROGRAM} COMMAND ...  (COMMAND --help lists its options; --version)\n\nTransformers that remember.\n\n"
    + "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `memorizing-transformers`. Exit codes: 2 for bad input, 1 for a run that failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        sys.exit(0 if arguments else 2)
    command, *rest = arguments
    if command == "--version":
        print(f"{PROGRAM} {__version__}")
        return
    if command not in COMMANDS:
        _fail(f"expected a command among {', '.join(COMMANDS)}, got {command!r}", 2)
    try:
        options = importlib.import_module(f"{__name__}.options.{command}").parse(rest, f"{PROGRAM} {command}")
        importlib.import_module(f"{__name__}.{command}").main(options)
    except FloatingPointError as error:
        remedy = (
            "continue with --resume --training.on-nan skip, or start again with a smaller --optimizer.learning-rate"
        )
        _fail(f"{error}; {remedy}", 1)
    except SaveError as error:
        _fail(str(error), 1)
    except Interrupted as error:
        _fail(str(error), 128 + error.signal)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> NoReturn:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
