"""The structure of the package: which rooms there are, which way imports run, and that a name means one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import memorizing_transformers_pytorch

ROOT = Path(memorizing_transformers_pytorch.__file__).parent
NAME = memorizing_transformers_pytorch.__name__
MODULES = {path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}

# Each room may import from those before it.
ROOMS = (
    "utils",
    "kernels",
    "memory",
    "attention",
    "model",
    "evaluation",
    "data",
    "training",
    "huggingface",
    "library",
    "explorer",
    "cli",
)


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((NAME, *(parts[:-1] if parts[-1] == "__init__" else parts)))


NAMES = {name_of(path) for path in MODULES}


def imports(tree: ast.Module) -> Iterator[str]:
    """The modules of the package that are imported anywhere in this one, inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == NAME)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else str(node.module)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_the_root_holds_nothing_but_rooms() -> None:
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert files == {"__init__.py", "__main__.py", "py.typed"}
    assert folders == {*ROOMS, "shipped"}


def test_imports_run_one_way() -> None:
    upward = [
        f"{path} imports {module}"
        for path, tree in MODULES.items()
        if path.parts[0] in ROOMS
        for module in imports(tree)
        if room_of(module) is None or ROOMS.index(str(room_of(module))) > ROOMS.index(path.parts[0])
    ]
    assert upward == []


def test_no_modules_import_each_other() -> None:
    graph = {name_of(path): set(imports(tree)) - {name_of(path)} for path, tree in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError that names them


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_map_of_the_house_names_every_module() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8")
    plan = text[text.index("## The house") : text.index("## Words")]
    missing = [str(path) for path in MODULES if path.name not in plan and not path.name.startswith("__")]
    assert [path for path in missing if path.split("/")[0] != "cli"] == []
