"""Where a result comes from: command, code, versions and machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.utils.version import __version__


def provenance(device: torch.device) -> dict[str, Any]:
    """What to write beside every result, with values that JSON can hold."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "memorizing_transformers_pytorch": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "machine": {
            "system": platform.platform(),
            "device": str(device),
            "processor": processor or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def origin(found: Mapping[str, Any]) -> str:
    """What `provenance` returns, as one line of text."""
    machine, versions = found["machine"], found["versions"]
    code = "no checkout" if found["commit"] is None else f"commit {found['commit']}"
    package = "memorizing_transformers_pytorch"
    return (
        f"{found['date']}; {code}, {package} {versions[package]}, torch {versions['torch']}, "
        f"Python {versions['python']}; {machine['device']} ({machine['processor']}), {machine['threads']} of "
        f"{machine['cores']} cores, {machine['system']}"
    )


def commit() -> str | None:
    """The commit of the package, with a plus if files were changed since; None if it does not run from a checkout."""
    root, printed = Path(__file__).parent.parent.parent, []
    if not (root / ".git").exists():
        return None
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        command = ["git", "-C", str(root), *arguments]  # whichever git the user has; all arguments are ours
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError):
            return None
        printed.append(done.stdout.strip())
    return printed[0] + ("+" if printed[1] else "")
