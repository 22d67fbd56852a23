"""What the package reads from disk: how a valid input is made, how it is read, and what may be raised.

To add one, write a function `(folder) -> read` that makes the files in the folder and returns how they are read, and
put it into `TARGETS`. What `read` leaves behind is of no account but for the files: they are as they were each time.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.cli.texts import read_text
from memorizing_transformers_pytorch.data import cache, files, tables
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import SPLITS, TextDocument
from memorizing_transformers_pytorch.data.enwik8 import Enwik8
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from memorizing_transformers_pytorch.library.readers import spans_in
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.manifest import checksum_of
from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint, read_weights, save_checkpoint
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.training.checkpoint import read_state, restore, write_checkpoint
from memorizing_transformers_pytorch.training.metrics import Metrics
from memorizing_transformers_pytorch.training.run import CONFIG, METRICS, TOKENIZER, checkpoint_of, load_run
from memorizing_transformers_pytorch.training.settings import from_plain, read_yaml, write_yaml
from memorizing_transformers_pytorch.utils.durable import verify, write_checksums
from memorizing_transformers_pytorch.utils.plain_json import read_object
from tests.training.helpers import make_config, make_trainer

from .target import Read, Target

torch.set_num_threads(1)
torch.manual_seed(0)

RICH = make_config(
    model={"xl_max_memories": 5, "short_conv": 2, "combine": "gate"},
    optimizer={"ema_decay": 0.9},
    memory={"growth": ((0, 4), (3, 9))},
    training={"segments": 2, "row_groups": 2},
)
TEXTS = ("One", "two, caf\N{LATIN SMALL LETTER E WITH ACUTE}", "", "a longer text\nof two lines " * 4)
SPANS: dict[str, dict[str, Any]] = {
    "keys and values": {"content": "kv", "dtype": torch.int8},
    "tokens": {"content": "tokens", "dtype": torch.bfloat16},
    "words": {"content": "tokens", "finder": "bm25"},
}
ROWS = [{"text": text, "name": f"n{i}", "more": {"x": [i]}} for i, text in enumerate((*TEXTS, None))]


# Models


def weights(folder: Path) -> Read:
    save_checkpoint(MemorizingTransformer.from_config(RICH.model), folder / "model.safetensors")
    return lambda: read_weights(folder / "model.safetensors")


def model(folder: Path) -> Read:
    weights(folder)
    return lambda: load_checkpoint(folder / "model.safetensors")


def model_config(folder: Path) -> Read:
    (folder / "config.json").write_text(json.dumps(RICH.model.to_dict()), encoding="utf-8")
    return lambda: ModelConfig.from_dict(read_object(folder / "config.json"))


def attached(folder: Path) -> Read:
    from memorizing_transformers_pytorch.huggingface import attach_memory
    from tests.huggingface.families import tiny

    memory = attach_memory(tiny("llama"), retrieve="tokens", layers=(0, 1), topk=8, index="exact")
    memory.save_parameters(folder / "biases.safetensors")
    return lambda: memory.load_parameters(folder / "biases.safetensors")


# Runs


def run_config(folder: Path) -> Read:
    write_yaml(RICH, folder / CONFIG)
    return lambda: from_plain(read_yaml(folder / CONFIG)).check()


def checkpoint(folder: Path) -> Read:
    trainer = make_trainer(RICH)
    for _ in range(2):
        trainer.step()
    written = write_checkpoint(trainer, folder, {"best": {"step": 2, "loss": 1.0}, "text": "some"})
    return lambda: (restore(trainer, written), next(trainer.stream))


def seal_checkpoint(folder: Path) -> None:
    for each in (folder / "checkpoints").iterdir():
        write_checksums(each)


def state(folder: Path) -> Read:
    checkpoint(folder)
    return lambda: (checkpoint_of(folder), checkpoint_of(folder, "best"), read_state(checkpoint_of(folder)))


def checksums(folder: Path) -> Read:
    for name in ("a", "b"):
        (folder / name).write_text(name * 99, encoding="utf-8")
    write_checksums(folder)
    return lambda: verify(folder, "a", "b")


def run(folder: Path) -> Read:
    checkpoint(folder)
    write_yaml(RICH, folder / CONFIG)
    ByteTokenizer().save(folder / TOKENIZER)
    return lambda: load_run(folder, "best")


def metrics(folder: Path) -> Read:
    lines = ({"step": step, "loss": 1.5 / step, "layers": {"2": {"gate": [0.5]}}} for step in range(1, 6))
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def read() -> None:
        with Metrics(folder / METRICS, step=3):
            pass

    return read


# Memories on disk


def memory(mmap: bool, folder: Path) -> Read:
    kinds = ({"dtype": torch.float32}, {"dtype": torch.int8, "policy": "by-document"})
    memories = KNNMemoryList([KNNMemory(3, 20, 2, num_kv_heads=2, **kind) for kind in kinds])
    memories.extra, count = {"some": [1, None, {"more": "text"}]}, 12
    for title in ("one", "two"):
        number = memories.ledger.begin(title, 1, 0, {"file": title})
        places = torch.arange(count).expand(2, count)
        origins = torch.stack((torch.full_like(places, number), places, places % 3), dim=-1)
        memories.add([torch.randn(2, 2, count, 2, 3) for _ in kinds], origins=origins)
        memories.ledger.grow(number, count)
        memories.save(folder)
        count = 1

    def read() -> None:
        with KNNMemoryList.load(folder, mmap=mmap, verify=True) as loaded:
            loaded.documents()
            loaded[0].search(torch.randn(2, 2, 1, 3), 4)
            loaded.add([torch.randn(2, 2, 1, 2, 3) for _ in kinds])

    return read


def spans(options: dict[str, Any], folder: Path) -> Read:
    """Passages: the folder is loaded by the model that wrote it, asked, and read on into."""
    from memorizing_transformers_pytorch.huggingface.export import for_transformers
    from tests.huggingface.families import tiny
    from tests.huggingface.spans import attached

    memory = attached(tiny("llama", vocab_size=256), tokenizer=for_transformers(ByteTokenizer()), **options)
    for title in ("one", "two"):
        memory.read(f"The door of {title} is green. " * 3, document=title, progress=False)
        memory.save(folder)
    prompt = torch.arange(97, 109)[None]

    def read() -> None:
        spans_in(folder)
        memory.load(folder, mmap=True, verify=True, other_weights=True)
        memory.documents()
        memory.recall("Which door is green?")
        memory.model(input_ids=prompt)
        memory.last_recalled  # noqa: B018
        memory.read("one more", progress=False)

    return read


def seal_memory(folder: Path) -> None:
    """Let the manifest tell the truth about the files that it names, and about itself, as far as there is any."""
    try:
        whole = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        body = whole["memory"]
        for part in (*body["memories"], *body["journals"]):
            data = (folder / part["file"]["name"]).read_bytes()
            part["file"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        whole["sha256"] = checksum_of(body)
        (folder / "manifest.json").write_text(json.dumps(whole), encoding="utf-8")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return


# Text


def bytes_tokenizer(folder: Path) -> Read:
    ByteTokenizer().save(folder / TOKENIZER)
    return lambda: load_tokenizer(folder / TOKENIZER)


def bpe_tokenizer(folder: Path) -> Read:
    BPETokenizer.train([" ".join(f"word{i % 7} {i}" for i in range(99))], 280).save(folder / TOKENIZER)
    return lambda: load_tokenizer(folder / TOKENIZER)


def token_cache(folder: Path) -> Read:
    documents = [(SPLITS[i % 3], TextDocument(f"n{i}", text)) for i, text in enumerate(TEXTS * 2)]
    made = cache.build(folder, "some", documents, ByteTokenizer(), {"source": "here"})

    def read() -> None:
        for split in SPLITS:
            tokens = cache.TokenisedDocuments(made, split)
            assert sum(map(len, tokens)) == tokens.num_tokens_total == tokens.lengths.sum()
            assert len(tokens) == len(tokens.names) == len(tokens.num_bytes)
            assert tokens.total_bytes >= 0

    return read


def text_file(folder: Path) -> Read:
    path = folder / "some.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    config = DataConfig(source=str(path), errors="strict")
    return lambda: (list(files.matching(config)), read_text(str(path)))


def table(ending: str, folder: Path) -> Read:
    path = folder / f"table{ending}"
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import gzip

        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if ending.endswith("gz") else content)
    config = DataConfig(source=str(path), name_column="name", errors="strict")
    return lambda: list(tables.read_table(path, config))


def enwik8(folder: Path) -> Read:
    text = "".join(f"<page>\n{text}</page>\n" for text in TEXTS)
    with zipfile.ZipFile(folder / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("enwik8"), text)
    sizes = (len(text.encode()) - 20, 10, 10)
    return lambda: list(Enwik8(folder / "enwik8.zip", sizes))


TARGETS = (
    Target("weights", weights),
    Target("model", model),
    Target("model configuration", model_config),
    Target("attached parameters", attached),
    Target("run configuration", run_config),
    Target("run", run, seal=seal_checkpoint),
    Target("checkpoint", checkpoint),
    Target("checkpoint, resealed", checkpoint, files="**/step-*/*.s*", seal=seal_checkpoint),
    Target("state", state, files="**/state.json"),
    Target("checksums", checksums),
    Target("metrics", metrics),
    Target("memory", partial(memory, False), files="[!.]*"),
    Target("memory, resealed", partial(memory, False), files="[!.]*", seal=seal_memory),
    Target("memory, mapped and resealed", partial(memory, True), files="[!.]*", seal=seal_memory),
    *(
        Target(f"passages of {name}, {how}", partial(spans, options), files="[!.]*", seal=seal)
        for name, options in SPANS.items()
        for how, seal in (("as they are", lambda _: None), ("resealed", seal_memory))
    ),
    Target("tokenizer of bytes", bytes_tokenizer),
    Target("tokenizer", bpe_tokenizer),
    Target("prepared tokens", token_cache),
    Target("text", text_file),
    Target("table .jsonl", partial(table, ".jsonl")),
    Target("table .jsonl.gz", partial(table, ".jsonl.gz")),
    Target("table .parquet", partial(table, ".parquet")),
    Target("enwik8", enwik8),
)
