"""Configurations: presets, YAML and flags make the same thing, and nothing unknown slips through."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.training.config import MemoryConfig, OptimizerConfig, RunConfig, TrainingConfig
from memorizing_transformers_pytorch.training.optimizer import learning_rate_at
from memorizing_transformers_pytorch.training.presets import RUN_PRESETS, run_preset
from memorizing_transformers_pytorch.training.settings import (
    differences,
    from_plain,
    merged,
    read_yaml,
    to_plain,
    write_yaml,
)


def small(**sections: Any) -> RunConfig:
    return from_plain(merged(run_preset("small"), sections))


@pytest.mark.parametrize("name", RUN_PRESETS)
def test_presets_are_whole_and_come_back_from_yaml(name: str, tmp_path: Path) -> None:
    config = from_plain(run_preset(name))
    config.check()
    write_yaml(config, tmp_path / "config.yaml")
    assert from_plain(read_yaml(tmp_path / "config.yaml")) == config
    assert config.training.rows % 16 == 0 or name == "small"


def test_the_small_preset_makes_a_model_of_about_a_million_parameters() -> None:
    model = MemorizingTransformer.from_config(small().model)
    assert 0.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6


def test_what_is_merged_lies_over_what_was_there() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merged(base, {"a": {"y": 5}, "c": 6}) == {"a": {"x": 1, "y": 5}, "b": 3, "c": 6}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}


def test_differences_are_named_in_full_with_both_values() -> None:
    assert differences(small(), small()) == {}
    other = small(optimizer={"learning_rate": 1.0}, memory={"growth": [[0, 5]]})
    found = differences(small(), other)
    assert found["optimizer.learning_rate"] == (small().optimizer.learning_rate, 1.0)
    assert found["memory.growth"][1] == [[0, 5]]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"stepz": 3}}, 'can not match "stepz"'),
        ({"training": {"steps": "many"}}, '"training.steps" - should be "int"'),
        ({"optimizer": {"name": "sgd"}}, '"optimizer.name"'),
        ({"training": {"steps": 0}}, "expected steps to be at least 1, got 0"),
        ({"optimizer": {"learning_rate": 0.0}}, "expected learning_rate to be above 0, got 0.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "expected learning_rate to be above 0, got nan"),
        ({"optimizer": {"beta2": 1.0}}, "expected beta2 from 0 to below 1, got 1.0"),
        ({"memory": {"dropout": 1.5}}, "expected dropout from 0 to 1, got 1.5"),
        ({"memory": {"growth": [[5, 8], [2, 9]]}}, "expected growth as rising steps"),
        ({"optimizer": {"learning_rate": "fast"}}, "expected a number, got 'fast'"),
        ({"data": {"cache": 3}}, "expected values of the right types"),
        ({"memory": {"growth": [{"step": 1}]}}, "expected values of the right types"),
        ({"model": {"dim": 0}}, "expected dim to be an integer of at least 1, got 0"),
        ({"data": {"source": ""}}, "expected source not to be empty"),
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        small(**sections)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected memory\.growth up to model\.max_knn_memories=8192, got 9000"):
        small(memory={"growth": [[0, 9000]]}).check()
    with pytest.raises(ValueError, match=r"expected model\.clear_memories_on_sos_token_id to be None"):
        small(model={"clear_memories_on_sos_token_id": 1}).check()


def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    for text in ("- 1\n", "a: [", "\t", "a: !!int ''", "a: !!timestamp x", "a: 2001-99-99", "a: !!bool x"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            read_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["a: &b [x, x]\nc: [*b, *b]", f"a: {'[' * 100_000}", f"a: {'{b: ' * 100_000}"])
def test_yaml_that_would_take_all_memory_or_time_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"expected a YAML file, got .*bad\.yaml.* aliases .*, or more than 20 levels"):
        read_yaml(tmp_path / "bad.yaml")


def test_memory_is_read_from_a_step_or_in_a_share_of_the_steps() -> None:
    shares = {"training": {"steps": 200}}
    assert small(**shares, memory={"last_share": 0.25, "growth": []}).memory_from_step == 150
    assert small(**shares, memory={"last_share": 0.25, "from_step": 7}).memory_from_step == 7
    assert small(**shares, model={"memorizing_layers": []}).memory_from_step == 200


def test_memories_grow_at_their_steps() -> None:
    config = small(memory={"growth": [[10, 100], [20, 8192]]})
    assert [config.entries_at(step) for step in (0, 9, 10, 19, 20, 99)] == [100, 100, 100, 100, 8192, 8192]
    assert small(memory={"growth": []}).entries_at(0) == 8192


def rates(steps: int = 100, **fields: Any) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=2.0, warmup_steps=10, **fields)
    return [learning_rate_at(optimizer, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt", "constant"])
def test_the_learning_rate_warms_up_to_its_peak(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(2)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_schedules_end_where_they_should() -> None:
    assert rates(schedule="cosine")[100] == pytest.approx(0.2)
    assert rates(schedule="cosine")[55] == pytest.approx(1.1)
    assert rates(schedule="rsqrt")[40] == pytest.approx(2 * (10 / 40) ** 0.5)
    assert rates(schedule="constant")[100] == 2


def test_the_last_share_of_the_steps_decays_linearly() -> None:
    found = rates(schedule="constant", decay_share=0.3, final_share=0.1)
    assert found[10:71] == [2.0] * 61
    assert found[85] == pytest.approx((2 + 0.2) / 2)
    assert found[100] == pytest.approx(0.2)


def test_configurations_are_frozen() -> None:
    for config in (TrainingConfig(), MemoryConfig(), OptimizerConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.steps = 1  # type: ignore[union-attr,misc]
    assert to_plain(small())["data"]["cache"] == str(small().data.cache)
