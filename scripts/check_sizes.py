"""Fail where a file, a function or a list of parameters of the package has grown too large (two ideas in one?)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 300
MAX_BODY_LINES = 40
MAX_PARAMETERS = 13  # beside self and keywords with a default; the public layers of the original have up to 12


def body_lines(function: ast.FunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


def complaints(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found = []
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            where = f"{path}:{node.lineno}: {node.name}"
            if (lines := body_lines(node)) > MAX_BODY_LINES:
                found.append(f"{where} has {lines} lines, at most {MAX_BODY_LINES}")
            needed = [
                a for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is None
            ]
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *needed)]
            if (count := len([name for name in names if name not in ("self", "cls")])) > MAX_PARAMETERS:
                found.append(f"{where} has {count} parameters, at most {MAX_PARAMETERS}")
    return found


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    paths = [*sorted((root / "memorizing_transformers_pytorch").rglob("*.py")), root / "train.py"]
    found = [complaint for path in paths for complaint in complaints(path)]
    print("\n".join(found) or f"sizes are fine in {len(paths)} files")
    sys.exit(bool(found))
