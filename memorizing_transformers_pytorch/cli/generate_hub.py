"""`generate` with a model of transformers: texts are read into its memory, and the prompt is continued."""

from __future__ import annotations

import io
import sys
from itertools import islice
from typing import Any

import torch

from memorizing_transformers_pytorch.cli.models import chosen_device
from memorizing_transformers_pytorch.cli.options.generate import Generate
from memorizing_transformers_pytorch.cli.texts import STDIN, pieces, read_all, read_text
from memorizing_transformers_pytorch.library.readers import open_reader, spans_of
from memorizing_transformers_pytorch.model.generation import check_sampling, until


def generate_with_hub_model(options: Generate) -> None:
    """Read, with a progress bar, then print the continuation as it is written. Raises ValueError for bad input."""
    _check(options)
    texts = {"standard input" if name == STDIN else name: read_text(name) for name in options.read}
    prompt = read_text(STDIN) if options.prompt == STDIN else options.prompt
    if not prompt:
        raise ValueError("a model of transformers continues a prompt: give --prompt")
    reader: Any = open_reader(
        str(options.run),
        chosen_device(options.device),
        max_memories=None,
        dtype=None,
        index=options.index,
        spans=spans_of(options.memories, options.retrieve, options.run),
    )
    tokens = [int(token) for token in reader.tokenizer.encode(prompt)]
    if options.memories is not None:
        reader.load(options.memories, mmap=True)
    read_all(reader, texts)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes a question mark
    generator = torch.Generator().manual_seed(options.seed)
    written = reader.written(tokens, options.temperature, options.top_k, options.top_p, generator)
    print(prompt, end="", flush=True)
    with reader.memory.read_only(), reader.memory.enabled(options.memory):
        some = islice(written, options.max_new_tokens)
        for piece in until(options.stop, pieces(some, tokens, reader.tokenizer)):
            print(piece, end="", flush=True)
    print(flush=True)


def _check(options: Generate) -> None:
    for is_bad, message in (
        (options.segment_length is not None, "--segment-length is for runs"),
        (options.checkpoint != "last", "--checkpoint is for runs"),
        (options.retrieve and options.memories, "--retrieve is for --read: a memory on disk is used as it was built"),
        (not options.memory and (options.memories or options.read), "--no-memory leaves nothing to do with --memories"),
        ([*options.read, options.prompt].count(STDIN) > 1, "expected - (standard input) at most once"),
    ):
        if is_bad:
            raise ValueError(message)
    check_sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
