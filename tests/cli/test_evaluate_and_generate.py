"""The commands for a run that has been trained: evaluate and generate, with a tiny run that has not."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memorizing_transformers_pytorch import MemorizingTransformer, cli
from memorizing_transformers_pytorch.cli import evaluate as cli_evaluate
from memorizing_transformers_pytorch.cli import generate as cli_generate
from memorizing_transformers_pytorch.cli.evaluate import (
    choose_sizes,
    data_of,
    evaluate_run,
    parse_sizes,
    read_texts,
    scored_bytes,
)
from memorizing_transformers_pytorch.cli.generate import generate_text, pieces, read_text, until
from memorizing_transformers_pytorch.cli.models import chosen_device
from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
from memorizing_transformers_pytorch.cli.options.generate import Generate
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.training.config import RunConfig, TrainingConfig

SENTENCE = "Où est la mémoire ? Ici, dit la bête numéro {}. "


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run whose corpus has 12 documents of 3 to 14 sentences, half of them for tests."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        text = "".join(SENTENCE.format(100 * number + i) for i in range(number + 3))
        (corpus / f"{number}.txt").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = ModelConfig(
        num_tokens=256, dim=16, depth=2, dim_head=8, heads=2, max_knn_memories=300, short_conv=2, xl_max_memories=5
    )
    data = DataConfig(
        source=str(corpus), tokenizer="bytes", test=0.5, valid=0.2, near_duplicates=None, cache=tmp_path / "cache"
    )
    config = RunConfig(model=model, data=data, training=TrainingConfig(segment_length=32))
    folder = tmp_path / "run"
    state = {"processes": 1, "progress": {"step": 7}, "best": None}
    state["text"] = prepare(data, 256, progress=False, tokenizer=ByteTokenizer()).fingerprint
    (folder / "checkpoints" / "step-7").mkdir(parents=True)
    (folder / "checkpoints" / "step-7" / "state.json").write_text(json.dumps(state))
    made = SimpleNamespace(
        folder=folder,
        config=config,
        model=MemorizingTransformer.from_config(model).eval(),
        tokenizer=ByteTokenizer(),
        step=7,
        corpus=corpus,
    )
    for module in (cli_evaluate, cli_generate):
        monkeypatch.setattr(module, "load_run", lambda *_: made)
    return made


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    return data


# evaluate


def test_an_evaluation_leaves_numbers_table_and_plot_and_prints_the_table(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluate_run(Evaluate(run=run.folder, memory="0,64,300"))
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.md", "evaluation.png"}
    kept = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert list(kept["modes"]) == ["off", "64", "300", "other", "shuffled", "random keys"]
    assert (kept["step"], kept["segment_length"], kept["controls_at"]) == (7, 32, 300)
    assert {"command", "commit", "date", "versions", "machine", "options", "positions"} <= set(kept)
    by_document = [document["loss"]["64"] for document in kept["documents"]]
    tokens = [document["tokens"] for document in kept["documents"]]
    assert kept["modes"]["64"]["loss"]["value"] == pytest.approx(np.average(by_document, weights=tokens), rel=1e-6)
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "# Evaluation of run" in text
    assert "another document's memory" in text


def test_bits_per_byte_are_the_bits_of_each_token_if_tokens_are_bytes(run: SimpleNamespace) -> None:
    for options in ({}, {"max_tokens": 40}):
        folder = evaluate_run(Evaluate(run=run.folder, memory="0", controls=False, **options))
        mode = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["modes"]["off"]
        assert mode["bits_per_byte"] == pytest.approx(mode["loss"]["value"] / np.log(2), rel=1e-6)


@pytest.mark.parametrize("max_tokens", [None, 1, 2, 5, 9, 1_000])
@pytest.mark.parametrize("text", ["naïve 記憶, mémoire 記憶", "é 記憶", "記"])
def test_a_character_counts_as_bytes_that_are_scored_where_it_ends(text: str, max_tokens: int | None) -> None:
    learned = BPETokenizer.train(["mémoire naïve " * 3], 262)
    names = json.loads(learned.to_json())["model"]["vocab"]
    sizes = {token: len(name) for name, token in names.items()}  # in a name each character is a byte
    data = text.encode()
    for tokenizer, size in ((ByteTokenizer(), dict.fromkeys(range(256), 1)), (learned, sizes)):
        tokens = tokenizer.encode(text)
        ends = np.cumsum([size[token] for token in tokens])
        assert ends[-1] == len(data)
        last = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
        begin, end = (len(data[: ends[n]].decode(errors="ignore").encode()) for n in (0, last))
        assert scored_bytes(np.array(tokens), len(data), max_tokens, tokenizer) == end - begin


def test_the_report_says_from_where_the_numbers_are(run: SimpleNamespace) -> None:
    folder = evaluate_run(Evaluate(run=run.folder, memory="0", max_tokens=9))
    kept = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    last = (folder / "evaluation.md").read_text(encoding="utf-8").splitlines()[-1]
    machine = kept["machine"]
    for part in ("step 7", kept["date"], str(kept["commit"] or "no checkout"), machine["system"], machine["device"]):
        assert part in last


def test_a_text_that_has_changed_since_training_is_pointed_out(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(**options: object) -> list[bool]:
        folder = evaluate_run(Evaluate(run=run.folder, memory="0", max_tokens=9, **options))
        written = (folder / "evaluation.md").read_text(encoding="utf-8")
        kept = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["warning"]
        texts = (written, capsys.readouterr().err, kept or "")
        return ["the text has changed since training" in text for text in texts]

    assert warned() == [False] * 3
    assert warned(cache=tmp_path / "another cache") == [False] * 3
    (run.corpus / "new.txt").write_text(SENTENCE * 5, encoding="utf-8")
    assert warned() == [True] * 3
    assert warned(source=str(run.corpus)) == [False] * 3  # which says nothing of what is held out


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_evaluate, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    (run.folder / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"expected a folder to write to, got .*below': Not a directory"):
        evaluate_run(Evaluate(run=run.folder, output=run.folder / "file" / "below"))


def test_the_report_is_printed_even_if_it_cannot_be_written(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cli_evaluate, "save_png", full)
    with pytest.raises(OSError, match="no space left"):
        evaluate_run(Evaluate(run=run.folder, memory="0", max_tokens=9))
    assert "| off " in capsys.readouterr().out
    assert not (run.folder / "evaluation").exists()


def test_the_device_is_the_gpu_if_there_is_one_and_none_is_named(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for module in (cli_evaluate, cli_generate):
        monkeypatch.setattr(module, "load_run", lambda *given: used.append(given[2]) or run)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for device in (None, "cpu"):
            evaluate_run(Evaluate(run=run.folder, memory="0", max_tokens=9, device=device))
            generate_text(Generate(run=run.folder, prompt="x", max_new_tokens=0, device=device))
    assert used == ["cpu"] * 4 + ["cuda"] * 2 + ["cpu"] * 2


@pytest.mark.parametrize("name", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected a device of this machine, such as cpu or cuda, got '{name}'"):
        chosen_device(name)


def test_the_same_seed_gives_the_same_numbers(run: SimpleNamespace) -> None:
    def numbers(seed: int) -> object:
        folder = evaluate_run(Evaluate(run=run.folder, memory="64", seed=seed, max_tokens=70))
        return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["modes"]

    first = numbers(1)
    assert first == numbers(1) != numbers(2)


def test_an_interrupted_evaluation_leaves_the_last_one_whole(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluate_run(Evaluate(run=run.folder, memory="64", controls=False, max_tokens=40))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_evaluate, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(Evaluate(run=run.folder, memory="32", controls=False, max_tokens=40))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_documents_can_be_chosen(run: SimpleNamespace) -> None:
    def names(**options: object) -> list[str]:
        return read_texts(Evaluate(run=run.folder, **options), run).names

    assert not set(names()) & set(names(split="valid"))
    long = names(min_tokens=400)
    assert long == [name for name in names() if (run.corpus / name).stat().st_size >= 400]
    assert 0 < len(long) < len(names())
    assert len(names(documents=2)) == 2
    assert set(names(documents=2)) < set(names())
    assert names(documents=99) == names()


def test_all_documents_of_another_text_can_be_read(run: SimpleNamespace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in "abc":
        (other / name).write_text(f"ë{name * 50}", encoding="utf-8")
    texts = read_texts(Evaluate(run=run.folder, source=str(other)), run)
    assert sorted(texts.names) == ["a", "b", "c"]
    assert [len(tokens) for tokens in texts.tokens] == texts.num_bytes == [52] * 3  # no token ends before the second


def test_another_text_is_read_as_that_of_the_run(run: SimpleNamespace, tmp_path: Path) -> None:
    own = DataConfig(source="hf:x", subset="a", streaming=True, pattern="*.md", group="folder", text_column="body")
    read = data_of(Evaluate(run=run.folder, source="here", cache=tmp_path), own)
    changed = {"source": "here", "subset": None, "streaming": False, "cache": tmp_path}
    assert read == replace(own, **changed, valid=0, test=0, near_duplicates=None)
    assert data_of(Evaluate(run=run.folder, source="hf:x", text_column="text"), own).subset == "a"
    assert data_of(Evaluate(run=run.folder, source="hf:y", text_column="text"), own).text_column == "text"
    assert data_of(Evaluate(run=run.folder), own) == own
    (tmp_path / "rows.jsonl").write_text('{"body": "mémoire"}\n{"body": "bête"}\n', encoding="utf-8")
    texts = read_texts(Evaluate(run=run.folder, source=str(tmp_path / "rows.jsonl"), text_column="body"), run)
    assert sorted(map(len, texts.tokens)) == [5, 8]


def test_a_single_document_is_evaluated_without_intervals_and_without_another_ones_memory(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluate_run(Evaluate(run=run.folder, memory="64", documents=1))
    kept = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert list(kept["modes"]) == ["off", "64", "shuffled", "random keys"]
    assert "no intervals and no memory of another" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("512", [0, 512]), ("2048,0, 512", [0, 512, 2048]), (" 8_192 0 8192,", [0, 8192])]
)
def test_memory_sizes_are_separated_by_commas_or_spaces(text: str, expected: list[int]) -> None:
    assert parse_sizes(text) == expected


@pytest.mark.parametrize("text", ["", ",", "many", "-5", "1.5", "1e3", "5;6", "_"])
def test_other_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected memory sizes such as 0,512,2048, got"):
        parse_sizes(text)


def test_the_size_of_the_run_is_among_the_sizes_and_has_the_controls() -> None:
    config = ModelConfig(num_tokens=9, dim=4, depth=2, max_knn_memories=3_000)
    assert choose_sizes(None, config, True) == ([0, 512, 2_048, 3_000, 8_192], 3_000)
    assert choose_sizes([0, 3_000, 5_000], config, True) == ([0, 3_000, 5_000], 3_000)
    assert choose_sizes([0, 5, 7], config, True) == ([0, 5, 7], 7)
    assert choose_sizes([0, 5, 7], config, False) == ([0, 5, 7], None)
    assert choose_sizes([0], config, True) == ([0], None)
    without = ModelConfig(num_tokens=9, dim=4, depth=2, memorizing_layers=())
    assert choose_sizes(None, without, True) == ([0], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "x"}, "expected memory sizes"),
        ({"min_tokens": 10**6}, r"expected documents of at least 1000000 tokens in the test split, got none"),
        ({"documents": 0}, "expected documents to be at least 1, got 0"),
        ({"max_tokens": 0}, "expected max_tokens to be at least 1, got 0"),
        ({"rows": 0}, "expected rows to be at least 1, got 0"),
        ({"source": "nowhere"}, "expected a source .* got 'nowhere'"),
        ({"text_column": "body"}, "expected text_column only with a source, got 'body'"),
        ({"device": "nowhere"}, "expected a device of this machine, .* got 'nowhere'"),
    ],
)
def test_bad_options_of_an_evaluation_write_nothing(
    run: SimpleNamespace, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(Evaluate(run=run.folder, **options))
    assert [path.name for path in run.folder.iterdir()] == ["checkpoints"]


def test_a_file_in_the_place_of_the_report_is_refused(run: SimpleNamespace) -> None:
    (run.folder / "evaluation").write_text("kept")
    with pytest.raises(ValueError, match="expected a folder to write to, got the file"):
        evaluate_run(Evaluate(run=run.folder))
    assert (run.folder / "evaluation").read_text() == "kept"


def test_a_loss_that_is_not_finite_comes_with_a_remedy_that_the_command_line_accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: object) -> None:
        raise FloatingPointError("not finite")

    monkeypatch.setattr("memorizing_transformers_pytorch.cli.train.train_and_report", failing)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train"])
    remedy = "continue with --resume --training.on-nan skip, or start again with a smaller --optimizer.learning-rate"
    assert capsys.readouterr().err == f"memorizing-transformers: not finite; {remedy}\n"


# generate


def written(run: SimpleNamespace, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    generate_text(Generate(run=run.folder, **options))
    return capsys.readouterr().out


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("repeats", [1, 20])
def test_reading_in_portions_gives_the_text_that_reading_at_once_gives(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], memory: bool, repeats: int
) -> None:
    text = "The quick brown fox. " * repeats
    with run.model.knn_memories_context(batch_size=1) as memories:
        [expected] = generate(
            run.model,
            [run.tokenizer.encode(text)],
            memories if memory else None,
            max_new_tokens=50,
            temperature=0,
            segment_length=32,
        )
    found = written(run, capsys, prompt=text, max_new_tokens=50, temperature=0, memory=memory)
    assert found == text + run.tokenizer.decode(expected) + "\n"


def test_files_are_read_in_order_before_the_prompt_with_a_progress_bar(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    encode = run.tokenizer.encode
    monkeypatch.setattr(run.tokenizer, "encode", lambda text: read.append(text) or encode(text), raising=False)
    (run.folder / "without newline").write_text("first " * 20)
    (run.folder / "with").write_text("second\n")
    names = [str(run.folder / name) for name in ("without newline", "with", "without newline")]
    generate_text(Generate(run=run.folder, read=tuple(names), prompt="Then", max_new_tokens=3))
    assert read == ["first " * 20 + "\nsecond\n" + "first " * 20 + "Then"]
    shown = capsys.readouterr()
    assert shown.out.startswith("Then")
    assert "reading: 100%" in shown.err


def test_standard_input_can_be_read_or_continued(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], stdin: io.BytesIO
) -> None:
    text = "Où ? " * 20
    whole = written(run, capsys, prompt=text, max_new_tokens=20)
    for options in ({"prompt": "-"}, {"read": ("-",)}):
        stdin.seek(0)
        stdin.write(text.encode())
        stdin.seek(0)
        found = written(run, capsys, max_new_tokens=20, **options)
        assert found == (whole if "prompt" in options else whole.removeprefix(text))


def test_the_seed_decides_on_the_text(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"prompt": "x", "max_new_tokens": 40}
    first, same, other = (written(run, capsys, **few, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_the_likeliest_token_is_the_only_one_of_top_1_and_of_a_tiny_top_p(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"prompt": "x", "max_new_tokens": 40}
    likeliest = written(run, capsys, **few, temperature=0)
    assert written(run, capsys, **few, temperature=1.0, top_k=1) == likeliest
    assert written(run, capsys, **few, temperature=1.0, top_p=1e-6) == likeliest


def test_writing_ends_before_the_text_to_stop_at(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"prompt": "x", "max_new_tokens": 40}
    whole = written(run, capsys, **few, temperature=1.0).removesuffix("\n")
    stop = whole[20:23]
    assert written(run, capsys, **few, temperature=1.0, stop=stop) == "x" + whole[1:].partition(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(["ab", "cSTOPd"], "abc"), (["abS", "TO", "Pd"], "ab"), (["ab", "STO"], "abSTO"), (["SSTO", "P"], "S"), ([], "")],
)
def test_what_may_begin_the_text_to_stop_at_is_held_back(texts: list[str], expected: str) -> None:
    assert "".join(until("STOP", iter(texts))) == expected
    shown = ""
    for piece in until("STOP", iter(texts)):
        shown += piece
        assert expected.startswith(shown)


@pytest.mark.parametrize("trained", [True, False])
def test_pieces_are_whole_characters_and_together_the_text(trained: bool) -> None:
    text = "naïve — 記憶 🐟 mémoire"
    tokenizer = BPETokenizer.train([text * 3], 260) if trained else ByteTokenizer()
    before = tokenizer.encode("é")
    found = list(pieces(iter([*tokenizer.encode(text), None]), before, tokenizer))
    assert "".join(found) == text
    assert len(found) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_an_unfinished_character_is_shown_in_the_end() -> None:
    assert "".join(pieces(iter([65, 0xF0, 0x9F]), [66], ByteTokenizer())) == "A\N{REPLACEMENT CHARACTER}"


def test_an_output_that_knows_no_unicode_gets_question_marks(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    generate_text(Generate(run=run.folder, prompt="mémoire", max_new_tokens=0))
    assert data.getvalue() == b"m?moire\n"


def test_what_is_no_text_is_refused(run: SimpleNamespace, stdin: io.BytesIO) -> None:
    (run.folder / "binary").write_bytes(b"\x7fELF\0")
    (run.folder / "latin").write_bytes(b"abc \xe9t\xe9")
    (run.folder / "marked").write_bytes(b"\xef\xbb\xbfabc")
    for name, message in (
        ("binary", "expected text to read, got .* which is binary"),
        ("latin", "expected UTF-8 in .* got byte 0xe9 at offset 4"),
        ("nowhere", "expected a text file to read, got .* does not exist"),
        ("", "expected a text file to read, got .* a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text(str(run.folder / name))
    assert read_text(str(run.folder / "marked")) == "abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a text to continue, by --read or --prompt, got none"),
        ({"prompt": "-", "read": ("-",)}, "at most once"),
        ({"prompt": "x", "temperature": -1.0}, "expected temperature to be at least 0"),
        ({"prompt": "x", "top_p": 0.0}, "expected top_p above 0"),
        ({"prompt": "x", "segment_length": 0}, "expected segment_length to be at least 1, got 0"),
        ({"prompt": "x", "max_new_tokens": -1}, "expected max_new_tokens to be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_text(Generate(run=run.folder, **options))
    assert capsys.readouterr() == ("", "")


def test_the_shipped_model_writes_what_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        f"{verb}_{noun}" for verb in ("fetch", "merge", "drop") for noun in ("ledger", "parcel", "voucher", "invoice")
    ]
    text = "".join(f"def {name}(self, {name[-6:]}, limit=10):\n    return self.{name}(limit)\n\n" for name in names)
    (tmp_path / "parcels.py").write_text(text)
    given = ["--read", "parcels.py", "--prompt", "def merge_voucher(", "--temperature", "0", "--max-new-tokens", "12"]
    cli.main(["generate", "shipped", *given])
    assert ", limit=10" in capsys.readouterr().out
