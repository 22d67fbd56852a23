"""A run as a whole: its folder, what it refuses, what it uses, and what it leaves behind when it fails."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint, save_checkpoint
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.training import loop
from memorizing_transformers_pytorch.training.checkpoint import AVERAGE, MODEL, SaveError, checkpoints_of, last_of
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.metrics import Metrics, read_metrics
from memorizing_transformers_pytorch.training.run import CONFIG, METRICS, checkpoint_of, config_of, free_name, load_run
from memorizing_transformers_pytorch.training.trainer import Step, Trainer

from .helpers import command, losses_of, make_config, same, write_corpus


@pytest.fixture(autouse=True)
def _corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time, and are not what is tested here."""
    monkeypatch.setattr(loop, "plots_are_possible", lambda: False)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder


def test_a_run_keeps_its_configuration_tokenizer_metrics_and_checkpoints(tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"validate_every": 6})
    run = train(config, tmp_path / "run")
    assert {path.name for path in run.iterdir()} == {CONFIG, "tokenizer.json", METRICS, "checkpoints"}
    assert config_of(run) == config
    loaded = load_run(run)
    assert (loaded.step, loaded.config, loaded.model.training) == (12, config, False)
    assert loaded.tokenizer.num_tokens == 256
    records = read_metrics(run / METRICS)
    assert [(r["step"], "validation" in r) for r in records if r["step"] % 6 == 0] == [
        (6, False),
        (6, True),
        (12, False),
        (12, True),
    ]
    assert set(records[0]) == {
        *("step", "loss", "bits_per_byte", "tokens", "tokens_per_second"),
        *("learning_rate", "grad_norm", "entries", "searching"),
    }
    assert [r["step"] for r in records if "memory" in r] == [10]


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    run = train(make_config(tmp_path, training={"steps": 2}), tmp_path / "run")
    before = content_of(run)
    with pytest.raises(ValueError, match=r"expected a new folder, got .*run', which exists"):
        train(make_config(tmp_path), run)
    assert content_of(run) == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(ValueError, match="expected a run to overwrite"):
        train(make_config(tmp_path), tmp_path / "letters", overwrite=True)
    assert content_of(tmp_path / "letters") == {"dear.txt": b"dear"}


def test_a_run_that_is_overwritten_leaves_nothing(tmp_path: Path) -> None:
    run = train(make_config(tmp_path, seed=1, training={"validate_every": 2}), tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "sample.txt").write_text("old")
    train(make_config(tmp_path, training={"steps": 3}), run, overwrite=True)
    other = train(make_config(tmp_path, training={"steps": 3}), tmp_path / "other")
    assert content_of(run).keys() == content_of(other).keys()
    assert losses_of(run) == losses_of(other)


def remove_files(folder: Path, unlink: Callable[[Path], None]) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            unlink(path)


def test_a_run_whose_overwriting_was_broken_off_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_config(tmp_path, training={"steps": 2}), tmp_path / "run")
    whole = content_of(run)
    listed = Path.iterdir
    for at in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))))  # the configuration is not the last
            removed: list[Path] = []

            def unlink(path: Path, removed: list[Path] = removed, at: int = at) -> None:
                removed.append(path)
                if len(removed) > at:
                    raise KeyboardInterrupt
                os.remove(path)

            patch.setattr(Path, "unlink", unlink)
            patch.setattr(shutil, "rmtree", partial(remove_files, unlink=unlink))
            try:
                train(make_config(tmp_path, seed=3, training={"steps": 2}), run, overwrite=True)
            except KeyboardInterrupt:
                assert config_of(run).seed == 0
        train(make_config(tmp_path, training={"steps": 2}), run, overwrite=True)
        assert content_of(run).keys() == whole.keys()


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    bad: list[tuple[RunConfig, str]] = [
        (make_config(tmp_path, training={"rows": 100}), "expected at most"),
        (make_config(tmp_path, training={"row_groups": 3}), "multiple of 1 processes times 3 row groups"),
        (make_config(tmp_path, memory={"growth": ((0, 99),)}), "expected memory.growth up to"),
        (make_config(tmp_path, model={"num_tokens": 300}), "expected a tokenizer of 300 tokens"),
        (make_config(tmp_path, data={"source": str(tmp_path / "none")}), "expected"),
        (make_config(tmp_path, init_from=tmp_path / "none"), "is not a training run|expected a run"),
        (make_config(tmp_path, init_from=tmp_path / "corpus" / "1.txt"), "expected a safetensors file"),
    ]
    for config, message in bad:
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_names_are_free(tmp_path: Path) -> None:
    assert free_name(tmp_path / "small") == tmp_path / "small"
    for name in ("small", "small-2"):
        (tmp_path / name).mkdir()
    assert free_name(tmp_path / "small") == tmp_path / "small-3"


# What a run that goes on refuses


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    run = train(make_config(tmp_path, training={"steps": 2}), tmp_path / "run")
    before = content_of(run)
    other = make_config(
        tmp_path, seed=5, model={"dim": 24}, memory={"dropout": 0.5}, training={"steps": 9, "log_every": 3}
    )
    with pytest.raises(ValueError, match="expected the configuration of") as raised:
        train(other, run, resume=True)
    told = str(raised.value).split("which has ")[1].split(", ")
    assert told == ["seed 0 (got 5)", "model.dim 16 (got 24)", "memory.dropout 0.0 (got 0.5)"]
    assert content_of(run) == before


def test_another_text_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"steps": 2})
    run = train(config, tmp_path / "run")
    before = content_of(run)
    (tmp_path / "corpus" / "new.txt").write_text("one more document")
    with pytest.raises(ValueError, match=r"the text has changed: .*run was trained on"):
        train(config, run, resume=True)
    assert content_of(run) == before


def test_what_is_no_run_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus' is not a training run"):
        train(make_config(tmp_path), tmp_path / "corpus", resume=True)


def test_a_damaged_checkpoint_is_refused_in_one_line_and_left_as_it_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"steps": 2})
    run = train(config, tmp_path / "run")
    weights = last_of(run) / MODEL
    weights.write_bytes(weights.read_bytes()[:1000])
    before = content_of(run)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint, got .*step-2'"):
        train(config, run, resume=True)
    assert content_of(run) == before


# What a run uses


def test_validation_and_loading_use_the_average_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated: list[dict[str, torch.Tensor]] = []
    evaluate = loop.evaluate

    def noted(model: MemorizingTransformer, *arguments: Any, **named: Any) -> Any:
        validated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(model, *arguments, **named)

    monkeypatch.setattr(loop, "evaluate", noted)
    config = make_config(tmp_path, optimizer={"ema_decay": 0.7})
    weights: list[torch.Tensor] = []
    step = Trainer.step

    def followed(self: Trainer) -> Step:
        done = step(self)
        weights.append(self.model.token_emb.weight.detach().clone())
        return done

    monkeypatch.setattr(Trainer, "step", followed)
    run = train(config, tmp_path / "run")
    average = weights[0]
    for each in weights[1:]:
        average = 0.7 * average + 0.3 * each
    loaded = load_run(run).model
    torch.testing.assert_close(loaded.token_emb.weight.detach(), average)
    assert same(validated[-1], loaded.state_dict())
    assert torch.equal(load_checkpoint(last_of(run) / MODEL).token_emb.weight, weights[-1])


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_run_can_start_from_the_weights_of_another(tmp_path: Path, ema_decay: float) -> None:
    average = {"optimizer": {"ema_decay": ema_decay}}
    first = train(make_config(tmp_path, **average), tmp_path / "first")
    file = tmp_path / "alone.safetensors"
    save_checkpoint(load_run(first).model, file)
    losses = []
    for source in (first, file):
        config = make_config(
            tmp_path, model={"max_knn_memories": 50}, init_from=source, training={"steps": 1}, **average
        )
        run = tmp_path / source.stem.upper()
        kept: list[dict[str, torch.Tensor]] = []
        with pytest.MonkeyPatch.context() as patch:
            write = loop.write_checkpoint

            def noted(trainer: Trainer, *arguments: Any, kept: list[Any] = kept, write: Any = write) -> Path:
                path: Path = write(trainer, *arguments)
                weights = path / (AVERAGE if ema_decay else MODEL)
                kept.append(load_checkpoint(weights).state_dict())
                return path

            patch.setattr(loop, "write_checkpoint", noted)
            train(config, run)
        assert same(kept[0], load_run(first).model.state_dict())
        losses.append(losses_of(run)[0][1])
    assert losses[0] == losses[1] != losses_of(first)[0][1]


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([3.0, float("nan"), 2.0, 2.0, 2.5, float("inf")])
    monkeypatch.setattr(loop._Loop, "_validation_losses", lambda _: {"21": next(told)})
    run = train(make_config(tmp_path, training={"validate_every": 2}), tmp_path / "run")
    assert (load_run(run, "best").step, load_run(run).step) == (6, 12)
    assert set(checkpoints_of(run)) == {6, 12}
    shutil.rmtree(checkpoint_of(run, "best"))
    with pytest.raises(ValueError, match="expected the best checkpoint, that of step 6, got 12"):
        load_run(run, "best")


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Loop, "_validation_losses", lambda _: {"21": float("nan")})
    run = train(make_config(tmp_path, training={"validate_every": 3}), tmp_path / "run")
    with pytest.raises(ValueError, match="which was not validated yet"):
        load_run(run, "best")


def test_without_validation_documents_there_is_no_best(tmp_path: Path) -> None:
    run = train(make_config(tmp_path, data={"valid": 0.0}, training={"validate_every": 3}), tmp_path / "run")
    with pytest.raises(ValueError, match="which was not validated yet"):
        load_run(run, "best")
    with pytest.raises(ValueError, match="expected a checkpoint 'last' or 'best', got 'first'"):
        load_run(run, "first")


def test_one_process_can_train_in_one_precision_after_another(tmp_path: Path) -> None:
    losses = []
    for number, precision in enumerate(("no", "bf16", "no")):
        config = make_config(tmp_path, training={"precision": precision})
        losses.append([loss for _, loss in losses_of(train(config, tmp_path / str(number)))])
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert load_run(tmp_path / "1").model.token_emb.weight.dtype == torch.float32


def test_memories_on_disk_are_removed_at_the_end_also_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, model={"knn_memories_directory": str(tmp_path / "memories")})
    plain = train(make_config(tmp_path), tmp_path / "plain")
    assert losses_of(train(config, tmp_path / "run")) == losses_of(plain)
    assert list((tmp_path / "memories").iterdir()) == []
    kept: list[Trainer] = []

    def failing(self: Trainer) -> Step:
        kept.append(self)
        raise ZeroDivisionError

    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "other")
    assert list((tmp_path / "memories").iterdir()) == []


# What fails


def broken_after(steps: int) -> Callable[..., Any]:
    accumulate = Trainer._accumulate

    def broken(self: Trainer, *arguments: Any) -> float | None:
        loss = accumulate(self, *arguments)
        return None if self.progress.step == steps else loss

    return broken


def test_a_loss_that_is_not_finite_stops_and_names_step_and_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_config(tmp_path, training={"checkpoint_every": 3}), tmp_path / "run"
    monkeypatch.setattr(Trainer, "_accumulate", broken_after(7))
    with pytest.raises(FloatingPointError) as raised:
        train(config, run)
    assert "not finite at step 8" in str(raised.value)
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-6'}" in str(raised.value)
    assert len(losses_of(run)) == 7


def test_a_plot_that_cannot_be_drawn_neither_stops_a_run_nor_hides_what_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "plots_are_possible", lambda: True)
    monkeypatch.setattr(loop, "save_png", full)
    run = train(make_config(tmp_path, training={"validate_every": 3}), tmp_path / "run")
    assert load_run(run).step == 12
    monkeypatch.setattr(Trainer, "_accumulate", broken_after(7))
    with pytest.raises(FloatingPointError, match="not finite at step 8"):
        train(make_config(tmp_path), tmp_path / "broken")


def test_a_loss_that_is_not_finite_can_be_skipped_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_accumulate", broken_after(7))
    run = train(make_config(tmp_path, training={"on_nan": "skip"}), tmp_path / "run")
    steps = [record for record in read_metrics(run / METRICS) if "loss" in record]
    assert [record["step"] for record in steps if record["loss"] is None] == [8]
    assert [record.get("skipped", 0) for record in steps] == [0] * 7 + [1] * 5


def test_metrics_that_cannot_be_written_stop_the_run_and_name_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = Metrics.note

    def full(self: Metrics, record: Any) -> None:
        if record["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        note(self, record)

    config, run = make_config(tmp_path, training={"checkpoint_every": 2}), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "note", full)
        with pytest.raises(SaveError, match=r"No space left on device; the last good checkpoint is .*step-4$"):
            train(config, run)
    train(config, run, resume=True)
    assert len(losses_of(run)) == 12


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_the_last_checkpoint_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system lets no file grow beyond 150,000 bytes: the optimiser fits, the memories soon do not."""

    def config(steps: int) -> RunConfig:
        training = {"steps": steps, "checkpoint_every": 5, "segment_length": 32}
        return make_config(tmp_path, model={"max_knn_memories": 5_000}, data={"pack": True}, training=training)

    for number in range(5):
        (tmp_path / "corpus" / f"long {number}.txt").write_text(f"{number} long document " * 600)
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(command(config(500), run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors, good = capsys.readouterr().err, last_of(run)
    assert stopped.value.code == 1, errors
    [line] = [line for line in errors.splitlines() if line.startswith("memorizing-transformers")]
    assert re.search(r"could not write .*step-\d+: .*File too large", line)
    assert line.endswith(f"the last good checkpoint is {good}")
    assert "Traceback" not in errors
    assert list((run / "checkpoints").iterdir()) == [good]
    steps = load_run(run).step + 3
    train(config(steps), run, resume=True)
    assert len(losses_of(run)) == steps
