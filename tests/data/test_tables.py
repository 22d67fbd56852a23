"""Tables: a document for each row, named by a column or by its text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.prepare import open_corpus

ROWS = [{"text": f"text {number}\n", "title": f"title {number}", "year": number} for number in range(100)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    data = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(source: Path, **options: object) -> list[TextDocument]:
    return list(open_corpus(DataConfig(source=str(source), **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_each_row_is_a_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    assert read(path, name_column="title") == [TextDocument(row["title"], row["text"]) for row in ROWS]
    assert [document.text for document in read(path, text_column="title")] == [row["title"] for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_without_a_name_column_the_name_depends_on_nothing_but_the_text(tmp_path: Path, name: str) -> None:
    names = {document.text: document.name for document in read(write(tmp_path / name, ROWS))}
    assert len(set(names.values())) == 100
    again = {document.text: document.name for document in read(write(tmp_path / name, ROWS[::-3]))}
    assert again == {text: names[text] for text in again}


def test_a_folder_of_tables_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", ROWS[:3])
    write(tmp_path / "2.jsonl", ROWS[3:5])
    assert [document.text for document in read(tmp_path)] == [row["text"] for row in ROWS[:5]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match=r"expected a column 'body' in .*, got 'text', 'title', 'year'"):
        read(path, text_column="body")
    with pytest.raises(ValueError, match=r"expected a column 'id' in .*, got 'text', 'title', 'year'"):
        read(path, name_column="id")
    with pytest.raises(ValueError, match=r"expected text in column 'year' of .*, got int"):
        read(path, text_column="year")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_without_text_are_skipped_and_counted_or_refused(tmp_path: Path, name: str) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder / name, [ROWS[0], {**ROWS[1], "text": None}, ROWS[2]])
    with pytest.warns(UserWarning, match=r"skipped 2 rows of '.*' whose column 'text' is null") as told:
        assert [document.text for document in read(tmp_path)] == 2 * ["text 0\n", "text 2\n"]
    assert len(told) == 1
    with pytest.warns(UserWarning, match="skipped 1 rows"):
        assert len(read(path, max_documents=2)) == 2
    where = "line 2" if name == "rows.jsonl" else "row 1"
    with pytest.raises(ValueError, match=rf"expected text in column 'text' of '.*{name}', {where}, got NoneType"):
        read(path, nulls="fail")


def test_a_row_of_parquet_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [*ROWS[:70], {**ROWS[70], "text": "\N{SNOWMAN}", "title": None}])
    with pytest.raises(ValueError, match=r"expected text in column 'title' of '.*rows.parquet', row 70, got NoneType"):
        read(path, text_column="title", nulls="fail")


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert read(path)[0].text == "a"


def test_halves_of_characters_are_replaced_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"text": "\ud83d\ude00 \ud83d!"}')
    assert read(path)[0].text == "\N{GRINNING FACE} \N{REPLACEMENT CHARACTER}!"
    with pytest.raises(ValueError, match=r"expected UTF-8 in .*line 1, got '\\ud83d' at 2"):
        read(path, errors="strict")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": ', r"expected JSON in .*rows.jsonl', line 3, got an error"),
        ("rows.jsonl", b"[1]", r"expected an object in .*line 1, got list"),
        ("rows.jsonl.gz", b"plain", "expected a readable file, got .*rows.jsonl.gz"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "expected a readable file"),
        ("rows.parquet", b"PAR1, but not really", r"expected a Parquet file, got '.*rows.parquet': "),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'memorizing_transformers_pytorch\[datasets\]'"):
        read(tmp_path / "rows.parquet")


def test_rows_without_a_name_are_named_by_their_text(tmp_path: Path) -> None:
    rows = [{"text": "one", "title": None}, {"text": "two", "title": None}, {"text": "three", "title": "3"}]
    names = [document.name for document in read(write(tmp_path / "rows.jsonl", rows), name_column="title")]
    assert names[2] == "3"
    assert names[:2] == [document.name for document in read(write(tmp_path / "same.jsonl", rows))][:2]
    assert len(set(names)) == 3
