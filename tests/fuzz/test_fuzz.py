"""Some hundred mutations of whatever is read from disk, and that the harness finds what it looks for.

Many more: `make fuzz`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest

from tests.fuzz.json_mutations import ODD, json_text
from tests.fuzz.mutations import BYTES, FORMATS, mutated

FILES = {
    "a.json": b'{"a": {"b": [1, 2, "x"]}, "c": "{\\"d\\": null}"}',
    "b.yaml": b"a:\n  b: 1\nc: [x, y]\n",
    "c.bin": bytes(range(99)),
}


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_malformed_files_raise_only_the_documented_errors() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    done = fuzz("--inputs", "800", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["target", "inputs", "accepted"]
    accepted, *refused = lines[-2].replace(",", "").split()[2:]
    assert int(accepted) > 40
    assert sum(map(int, refused)) > 400


@pytest.mark.parametrize("fault", ["undocumented", "says nothing", "large"])
def test_an_undocumented_error_is_told_so_that_it_can_be_repeated(fault: str) -> None:
    faulty = ("--targets", "tests.fuzz.faulty", "--target", fault)
    done = fuzz(*faulty, "--inputs", "50", "--seed", "7")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{fault}, input 0 of seed 7: not documented" in done.stdout
    assert {"undocumented": "KeyError", "says nothing": "ValueError", "large": "MemoryError"}[fault] in done.stdout
    assert "--input 0" in done.stdout


def test_documented_errors_are_counted() -> None:
    done = fuzz("--targets", "tests.fuzz.faulty", "--target", "documented", "--inputs", "50")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split() == ["target", "inputs", "accepted", "KeyError"]


@pytest.mark.parametrize("fault", ["slow", "crash"])
def test_an_input_that_ends_the_process_or_takes_too_long_is_told(fault: str) -> None:
    done = fuzz("--targets", "tests.fuzz.faulty", "--target", fault, "--inputs", "50", "--seconds", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{fault}, input 0 of seed 0: it has ended the process" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_mutations_are_the_same_from_the_same_seed_and_differ_among_inputs(name: str) -> None:
    first, again = ([mutated(name, FILES, Random(f"0 {i}")) for i in range(200)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 80
    assert sum(each == FILES[name] for each in first) < 50


@pytest.mark.parametrize("mutation", [*BYTES, *FORMATS.values()])
@pytest.mark.parametrize("content", [b"", b"\0", *FILES.values()])
def test_any_content_is_mutated_or_refused(mutation: object, content: bytes) -> None:
    assert callable(mutation)
    for i in range(20):
        try:
            assert isinstance(mutation(content, Random(i)), bytes)
        except ValueError:  # not of that format
            continue


def test_json_is_changed_within_strings_and_by_every_odd_value() -> None:
    texts = {json_text(FILES["a.json"].decode(), Random(i)) for i in range(5_000)}
    assert all(any(odd in text for text in texts) for odd in ODD)
    assert any('"{\\"d\\": []}"' in text for text in texts)
