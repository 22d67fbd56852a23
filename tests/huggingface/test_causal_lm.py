"""Our model as one of transformers: the same numbers, saved, loaded, trained and written with by theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from memorizing_transformers_pytorch.cli import main as command
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer
from memorizing_transformers_pytorch.huggingface import MemorizingTransformerConfig, export_run
from memorizing_transformers_pytorch.huggingface.export import for_transformers
from memorizing_transformers_pytorch.training.run import load_run
from tests.huggingface.test_attach import tokens
from tests.training.helpers import make_config, write_corpus

MODEL: dict[str, Any] = {
    "num_tokens": 99,
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "dim_head": 16,
    "memorizing_layers": [2],
    "max_knn_memories": 100,
    "pad_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "convolution": {"short_conv": 4, "qk_init": "induction"},
    "xl": {"xl_max_memories": 8},
}
WRITING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


def made(kind: str = "plain") -> Any:
    torch.manual_seed(0)
    config = MemorizingTransformerConfig({**MODEL, **KINDS[kind]}, segment_length=8)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_the_model_through_the_segments(kind: str) -> None:
    model, ids = made(kind), tokens(2, 21)
    expected, state = [], None
    with model.model.knn_memories_context(batch_size=2) as memories:
        for segment in ids.split(8, dim=1):
            found = model.model(segment, memories, state)
            found, state = found if model.model.carries_state else (found, None)
            expected.append(found)
    torch.testing.assert_close(model(ids).logits, torch.cat(expected, dim=1))
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, ids = made(kind), tokens(2, 21)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_config == model.config.model_config
    assert torch.equal(again(ids).logits, model(ids).logits)
    tied = again.model.token_emb.weight is again.model.to_logits[1].weight
    assert tied == (kind == "tied")


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_its_logits_say(kind: str) -> None:
    model, ids = made(kind), tokens(2, 11)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(ids, **WRITING), expected)
    cache = model.read(ids[:, :9])
    assert torch.equal(model.generate(ids, past_key_values=cache, **WRITING), expected)


def test_padding_makes_no_difference() -> None:
    model, ids = made(), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    together = model.generate(ids, attention_mask=mask, **WRITING)
    assert torch.equal(together[:1, 4:], model.generate(ids[:1, 4:], **WRITING))
    loss = model(ids, attention_mask=mask, labels=ids).loss
    each = [model(row, labels=row).loss for row in (ids[:1, 4:], ids[1:])]
    torch.testing.assert_close(loss, (6 * each[0] + 10 * each[1]) / 16)


def test_what_a_memory_cannot_follow_is_refused() -> None:
    model, ids = made(), tokens(1, 5)
    with pytest.raises(ValueError, match="a memory cannot follow beams"):
        model.generate(ids, num_beams=2, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(ValueError, match="expected no labels with use_cache"):
        model(ids, labels=ids, use_cache=True)
    with pytest.raises(ValueError, match="expected the vocabulary of 99 tokens to stay"):
        model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="expected segment_length to be at least 1"):
        MemorizingTransformerConfig(MODEL, segment_length=0)
    with pytest.raises(ValueError, match="expected the fields of ModelConfig"):
        MemorizingTransformerConfig({"nonsense": 1})


def test_trainer_trains_it(tmp_path: Path) -> None:
    model, ids = made("convolution"), tokens(4, 24)
    before = model(ids, labels=ids).loss.item()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=8, learning_rate=0.01, report_to=[], disable_tqdm=True, use_cpu=True, save_steps=8
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert again(ids, labels=ids).loss.item() < before - 0.1


@pytest.mark.parametrize("text", ["Übung, \n\n日本語 \x00 🙂", "plain words\tand tabs  "])
def test_tokens_are_those_of_our_tokenizers(text: str) -> None:
    bpe = BPETokenizer.train(["some words, and more words"] * 3, 260)
    for tokenizer in (ByteTokenizer(), bpe):
        theirs = for_transformers(tokenizer)
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_a_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from memorizing_transformers_pytorch.training.loop import train

    write_corpus(tmp_path / "corpus")
    train(make_config(tmp_path), tmp_path / "run")
    command(["export", str(tmp_path / "run"), str(tmp_path / "exported")])
    assert f"wrote {tmp_path / 'exported'}" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    run = load_run(tmp_path / "run")
    ids = tokenizer("w1 w2", return_tensors="pt").input_ids
    assert ids[0].tolist() == run.tokenizer.encode("w1 w2")
    with run.model.knn_memories_context(batch_size=1) as memories:
        torch.testing.assert_close(model(ids).logits, run.model(ids, memories))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "12 steps" in card
    assert "library_name: transformers" in card
    with pytest.raises(ValueError, match="expected a new folder"):
        export_run(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(ValueError, match="is not a training run"):
        export_run(tmp_path / "corpus", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    data, norms = [{"input_ids": row, "labels": row} for row in tokens(4, 24)], []
    for rows in (4, 1):
        arguments = transformers.TrainingArguments(
            tmp_path / str(rows),
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=4 // rows,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        trainer = transformers.Trainer(made(), arguments, train_dataset=data)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
