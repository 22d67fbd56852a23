"""The command line: `memorizing-transformers train | evaluate | generate | explain | memory | explore | export`.

Bad input is one line and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from memorizing_transformers_pytorch.memory.disk.folder import SaveError
from memorizing_transformers_pytorch.training.checkpoint import CheckpointError
from memorizing_transformers_pytorch.training.interrupts import Interrupted

PROGRAM = "memorizing-transformers"

COMMANDS = {
    "train": "train a model with a memory on text of your own, or go on with a run",
    "evaluate": "what the memory of a run is worth on held-out documents",
    "generate": "read texts of any length, then continue them",
    "explain": "show what a model looks up in its memory, as a page",
    "memory": "build a memory on disk from files, look into it, forget, verify, compact, merge",
    "explore": "read, ask and see what is looked up, in a browser",
    "export": "write the model of a run for transformers and the Hugging Face hub",
}

HELP = (
    f"usage: {PROGRAM} COMMAND ...  (COMMAND --help tells its options)\n\nTransformers that remember.\n\n"
    + "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
)


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that the arguments begin with. Raises ValueError for an unknown one."""
    command, *rest = arguments
    if command not in COMMANDS:
        raise ValueError(f"expected a command among {', '.join(COMMANDS)}, got {command!r}")
    importlib.import_module(f"{__name__}.{command}").main(rest, f"{PROGRAM} {command}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `memorizing-transformers`. Exit codes: 2 for bad input, 1 for a run that failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        sys.exit(0 if arguments else 2)
    try:
        run_command(arguments)
    except FloatingPointError as error:
        remedy = "go on with --resume --training.on-nan skip, or start again with a smaller --optimizer.learning-rate"
        _fail(f"{error}; {remedy}", 1)
    except (CheckpointError, SaveError) as error:
        _fail(str(error), 1)
    except Interrupted as error:
        _fail(str(error), 128 + error.signal)
    except BrokenPipeError:  # who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
