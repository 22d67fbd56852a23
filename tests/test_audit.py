"""Nothing in the package runs what it has read (no pickles, code made from text or shells); what `make audit` says."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import memorizing_transformers_pytorch
from scripts.audit_dependencies import verdict

PACKAGE = Path(memorizing_transformers_pytorch.__file__).parent
UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
NEVER = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "os.system", "os.popen", "faiss.read_index"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
}
WITH = {"allow_pickle": "unpickles", "shell": "runs a shell", "trust_remote_code": "runs code that it fetches"}


def _imported(tree: ast.AST) -> dict[str, str]:
    """The full names of what a module imports, by the names that it has there."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name: each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return names


def _full_name(node: ast.AST, imported: dict[str, str]) -> str:
    """a.b.c as what was imported, "" for what is no such name."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _full_name(node.value, imported)
        return before and f"{before}.{node.attr}"
    return ""


def risks(source: str) -> list[str]:
    """What of a source runs, or may run, what it reads."""
    tree = ast.parse(source)
    imported = _imported(tree)
    found = [f"{name}: unpickles" for name in imported.values() if name.partition(".")[0] in UNPICKLING]
    names = [*imported.values(), *(_full_name(node, imported) for node in ast.walk(tree))]  # also what is passed on
    found += [f"{name}: runs what it reads" for name in names if name.removeprefix("builtins.") in NEVER]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        risky = [each for each in call.keywords if each.arg in WITH]
        found += [f"{each.arg}: {WITH[each.arg or '']}" for each in risky if ast.unparse(each.value) != "False"]
    return found


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 50
    found = {str(path.relative_to(PACKAGE)): risks(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: each for path, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as json",
        "from pickle import loads",
        "def later():\n    from joblib import load",
        "import shelve",
        "import marshal",
        "eval('1')",
        "x = exec",
        "compile('1', '', 'eval')",
        "import builtins\nbuiltins.eval('1')",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import torch as t\nreader = t.load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=unsure)",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import yaml\nyaml.unsafe_load('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import os\nos.system('x')",
        "import faiss\nfaiss.read_index('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_what_would_run_what_it_reads_is_found(source: str) -> None:
    assert risks(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()\nre.compile('x')\ntorch.compile(model)\njson.load(file)",
        "import yaml\nyaml.safe_load('x')",
        "import numpy as np\nnp.load('x', mmap_mode='r', allow_pickle=False)",
        "import subprocess\nsubprocess.run(['git'])",
        "from safetensors.torch import load_file\nload_file('x')",
    ],
)
def test_what_reads_data_alone_is_not(source: str) -> None:
    assert risks(source) == []


def answer(*vulnerabilities: str) -> str:
    found = [{"id": each, "fix_versions": ["1.1"]} for each in vulnerabilities]
    known = {"name": "some", "version": "1.0", "vulns": found}
    return json.dumps({"dependencies": [known, {"name": "other", "skip_reason": "Dependency not found"}]})


def test_a_vulnerable_dependency_fails_the_audit_and_an_unreachable_database_does_not() -> None:
    code, lines = verdict(answer("PYSEC-1"), "")
    assert code == 1
    assert lines[0] == "some 1.0: PYSEC-1, mended in ['1.1']"
    assert verdict(answer(), "") == (0, ["0 vulnerabilities in 1 of 2 dependencies"])
    unknown = json.dumps({"dependencies": [{"name": "other", "skip_reason": "Dependency not found"}]})
    for given in (unknown, ""), ("", "requests.ConnectionError: no"), ("", "x: No module named pip_audit"):
        code, [line] = verdict(*given)
        assert code == 0
        assert line.startswith("skipped: ")
    assert verdict("", "usage: pip-audit")[0] == 1
