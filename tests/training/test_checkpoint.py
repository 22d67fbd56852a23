"""A checkpoint is whole or not there, whatever happens while it is written, replaced or removed."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from memorizing_transformers_pytorch.training import checkpoint
from memorizing_transformers_pytorch.training.checkpoint import (
    SaveError,
    checkpoints_of,
    keep_only,
    last_of,
    own_state,
    read_state,
    restore,
    write_checkpoint,
)
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.trainer import Trainer
from tests.amounts import some

from .helpers import make_config, make_trainer, same, weights_of

EXTRA = {"best": None, "text": "some"}
RICH = make_config(
    model={"xl_max_memories": 5, "short_conv": 2, "combine": "gate", "ff_dropout": 0.2},
    optimizer={"ema_decay": 0.9},
    memory={"dropout": 0.3, "growth": ((0, 4), (3, 9))},
    training={"segments": 2, "row_groups": 2},
)


def trained(steps: int, config: RunConfig = RICH) -> Trainer:
    trainer = make_trainer(config)
    for _ in range(steps):
        trainer.step()
    return trainer


def whole(run: Path) -> dict[int, Path]:
    """The checkpoints that are found, each of which can be restored and says of which step it is."""
    found, trainer = checkpoints_of(run), make_trainer(RICH)
    for step, path in found.items():
        restore(trainer, path)
        assert trainer.progress.step == step
    return found


# Exactness


@settings(max_examples=some(5, 100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_trainer_that_is_restored_goes_on_exactly(tmp_path: Path, data: st.DataObject) -> None:
    config = make_config(
        model={
            "xl_max_memories": data.draw(st.sampled_from([0, 5, 20])),
            "short_conv": data.draw(st.sampled_from([0, 3])),
            "combine": data.draw(st.sampled_from(["softmax", "gate"])),
            "attn_dropout": data.draw(st.sampled_from([0.0, 0.1])),
            "ff_dropout": data.draw(st.sampled_from([0.0, 0.2])),
            "memory_dtype": data.draw(st.sampled_from(["float32", "bfloat16", "int8"])),
            "tie_embeddings": data.draw(st.booleans()),
        },
        data={"pack": data.draw(st.booleans())},
        optimizer={
            "name": data.draw(st.sampled_from(["adamw", "adafactor"])),
            "ema_decay": data.draw(st.sampled_from([0.0, 0.7])),
        },
        memory={
            "from_step": data.draw(st.integers(0, 6)),
            "dropout": data.draw(st.sampled_from([0.0, 0.4])),
            "growth": data.draw(st.sampled_from([(), ((0, 3), (4, 21))])),
            "scope": data.draw(st.sampled_from(["document", "step"])),
        },
        training={
            "segments": data.draw(st.integers(1, 2)),
            "row_groups": data.draw(st.sampled_from([1, 2, 4])),
            "precision": data.draw(st.sampled_from(["no", "no", "bf16"])),
        },
    )
    trainer = trained(data.draw(st.integers(0, 8)), config)
    path = write_checkpoint(trainer, tmp_path, EXTRA)
    rng = torch.get_rng_state()
    expected = [trainer.step()[:6] for _ in range(3)]
    other = make_trainer(config)
    torch.set_rng_state(rng)
    torch.rand(5)  # whatever the random numbers were
    restore(other, path)
    assert [other.step()[:6] for _ in range(3)] == expected
    assert same(weights_of(other), weights_of(trainer))
    assert same(own_state(other), own_state(trainer))
    assert same(other.averaged_model.state_dict(), trainer.averaged_model.state_dict())
    shutil.rmtree(tmp_path / "checkpoints")


def test_writing_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    written, plain = trained(2), trained(0)
    expected = [plain.step().loss for _ in range(5)]
    written = trained(0)
    losses = []
    for _ in range(5):
        write_checkpoint(written, tmp_path, EXTRA)
        losses.append(written.step().loss)
    assert losses == expected


# Writing that fails


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_within_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def after(calls: int, action: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    made = []

    def counted(*arguments: Any, **named: Any) -> Any:
        made.append(1)
        return (action if len(made) <= calls else then)(*arguments, **named)

    return counted


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("save_file", 0),
        ("save_file", 1),
        ("save_checkpoint", 0),
        ("save_checkpoint", 1),
        ("sync_folder", 0),
        ("write_checksums", 0),
    ],
)
@pytest.mark.parametrize("failure", [full_disk, full_disk_within_safetensors])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, failure: Callable[..., None]
) -> None:
    trainer = trained(2)
    good = write_checkpoint(trainer, tmp_path, EXTRA)
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, after(calls, getattr(checkpoint, name), failure))
        with pytest.raises(SaveError, match="No space left on device") as raised:
            write_checkpoint(trainer, tmp_path, EXTRA)
    assert f"could not write {tmp_path / 'checkpoints' / 'step-3'}" in str(raised.value)
    assert f"the last good checkpoint is {good}" in str(raised.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert list(whole(tmp_path)) == [2]
    write_checkpoint(trainer, tmp_path, EXTRA)  # there is room again
    assert list(whole(tmp_path)) == [2, 3]


def test_the_first_checkpoint_that_cannot_be_written_has_none_before_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(SaveError, match=r"could not write .*step-0: .*; there is no checkpoint yet"):
        write_checkpoint(trained(0), tmp_path, EXTRA)


# Killed at any moment: as if every change of the file system were the last one


class Killed(BaseException):
    pass


def until_killed(action: Callable[[], object], at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do it, but be killed before the change of names or removal of this number; whether that came."""
    changes = []

    def fatal(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            changes.append(1)
            if len(changes) > at:
                raise Killed
            return change(*arguments, **named)

        return counted

    def removed_piece_by_piece(folder: Path, ignore_errors: bool = False) -> None:
        for path in sorted(Path(folder).glob("*")):
            Path.unlink(path)
        if Path(folder).exists():
            Path.rmdir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removed_piece_by_piece)
        for name in ("rename", "unlink", "rmdir", "mkdir", "replace"):
            patch.setattr(Path, name, fatal(getattr(Path, name)))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.slow
def test_killed_at_any_change_of_the_file_system_there_is_always_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = trained(2), trained(3)
    for again in (False, True):  # a new step, or one that exists already
        for at in range(40):
            run = tmp_path / f"{again} {at}"
            for trainer in (old, new) if again else (old,):
                write_checkpoint(trainer, run, EXTRA)

            def save(run: Path = run) -> None:
                write_checkpoint(new, run, EXTRA | {"text": "new"})
                keep_only(run, {3})

            killed = until_killed(save, at, monkeypatch)
            found = whole(run)
            assert max(found) == 3 if again else set(found) in ({2}, {2, 3}, {3})
            if killed:
                save()
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
            assert read_state(run / "checkpoints" / "step-3")["text"] == "new"
            if not killed:
                break
        assert not killed
        assert at > 8


def test_what_an_interrupted_write_has_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    trainer = trained(1)
    kept = write_checkpoint(trainer, tmp_path, EXTRA)
    for left in (".step-9.incomplete", ".step-8.removed", ".step-8.replaced.removed"):
        shutil.copytree(kept, kept.with_name(left))
    (kept.with_name(".step-9.incomplete") / "state.json").unlink()
    assert list(checkpoints_of(tmp_path).items()) == [(1, kept)]
    trainer.step()
    last = write_checkpoint(trainer, tmp_path, EXTRA)
    keep_only(tmp_path, {2})
    assert list(kept.parent.iterdir()) == [last]


def test_checkpoints_are_ordered_by_their_steps_and_the_one_being_replaced_counts_until_then(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-9", "step-10", "step-100.replaced", "step-11.replaced", "step-11", "step-x", "step-", "else"):
        (folder / name).mkdir(parents=True)
    found = {step: path.name for step, path in checkpoints_of(tmp_path).items()}
    assert list(found.items()) == [(9, "step-9"), (10, "step-10"), (11, "step-11"), (100, "step-100.replaced")]
    assert last_of(tmp_path) == folder / "step-100.replaced"
    keep_only(tmp_path, {10, 11, 100})
    assert {path.name for path in folder.iterdir()} == {*list(found.values())[1:], "step-x", "step-", "else"}


# What is refused


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(trained(2), tmp_path_factory.mktemp("run"), EXTRA)


NAMES = ("model.safetensors", "average.safetensors", "optimizer.safetensors", "process-0.safetensors", "state.json")


@settings(max_examples=some(10, 500), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), share=st.floats(0, 1, exclude_max=True), missing=st.booleans())
def test_a_file_that_is_cut_off_or_missing_is_refused_with_its_checkpoint(
    checkpoint_folder: Path, tmp_path: Path, name: str, share: float, missing: bool
) -> None:
    damaged = tmp_path / "step-2"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(checkpoint_folder, damaged)
    if missing:
        (damaged / name).unlink()
    else:
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"expected a (whole )?checkpoint, got") as raised:
        restore(make_trainer(RICH), damaged)
    assert str(damaged) in str(raised.value)


@settings(max_examples=some(10, 500), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(checkpoint_folder: Path, tmp_path: Path, name: str, where: float, bit: int) -> None:
    damaged = tmp_path / "step-2"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(checkpoint_folder, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match="expected"):
        restore(make_trainer(RICH), damaged)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"processes": 1}', "\x00", "{"])
def test_a_state_that_is_no_state_is_refused(checkpoint_folder: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(checkpoint_folder, tmp_path / "step-2")
    (tmp_path / "step-2" / "state.json").write_text(text)
    with pytest.raises(ValueError, match="expected a checkpoint, got"):
        restore(make_trainer(RICH), tmp_path / "step-2")


def test_files_of_another_model_are_refused(checkpoint_folder: Path) -> None:
    for model in ({"dim": 24}, {"depth": 3}, {"num_kv_heads": 2}):
        with pytest.raises(ValueError, match="expected a whole checkpoint, got"):
            restore(make_trainer(make_config(model=model)), checkpoint_folder)


def test_another_number_of_processes_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_folder, tmp_path / "step-2")
    path = tmp_path / "step-2" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match=r"expected 2 processes, as .*step-2 has, got 1"):
        restore(make_trainer(RICH), tmp_path / "step-2")
