"""`memorizing-transformers generate MODEL`: read texts of any length, then continue them."""

from __future__ import annotations

import functools
import io
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from memorizing_transformers_pytorch.cli.models import chosen_device, is_of_transformers
from memorizing_transformers_pytorch.cli.options.generate import Generate
from memorizing_transformers_pytorch.cli.texts import STDIN, pieces, read_text
from memorizing_transformers_pytorch.library.readers import load_memories
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.model.generation import stream, until
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.model.state import XLMemories
from memorizing_transformers_pytorch.training.run import LoadedRun, load_run, run_named
from memorizing_transformers_pytorch.utils.progress import bar as progress_bar


def main(options: Generate) -> None:
    """Run `generate`. Raises ValueError for bad input."""
    generate_text(options)


def generate_text(options: Generate) -> None:
    """Read, with a progress bar, then print the continuation as it is written. Raises ValueError for bad input."""
    if is_of_transformers(options.run):
        from memorizing_transformers_pytorch.cli.generate_hub import generate_with_hub_model

        generate_with_hub_model(options)
        return
    if options.retrieve is not None:
        raise ValueError("--retrieve is for models of transformers: a run has the memory that it was trained with")
    before, prompt = read_input(options)
    run = load_run(run_named(options.run), options.checkpoint, chosen_device(options.device), options.index)
    segment_length = run.config.training.segment_length if options.segment_length is None else options.segment_length
    tokens = run.tokenizer.encode(before + prompt)
    if not tokens:
        raise ValueError("expected a text to continue, by --read or --prompt, got none")
    write = functools.partial(
        stream,
        run.model,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed),
        segment_length=segment_length,
    )
    write([tokens])  # checks everything, and reads nothing yet: reading may take long
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes a question mark
    with memories_of(run, options) as memories:
        rest, state = read_whole_segments(run.model, tokens, memories, segment_length)
        written = (row[0] for row in write([rest], memories, xl_memories=state))
        print(prompt, end="", flush=True)
        for piece in until(options.stop, pieces(written, tokens, run.tokenizer)):
            print(piece, end="", flush=True)
        print(flush=True)


def memories_of(run: LoadedRun, options: Generate) -> AbstractContextManager[KNNMemoryList | None]:
    """An empty memory, the one on disk, or none. Raises ValueError for a memory of another model."""
    if options.memories is not None:
        if not options.memory:
            raise ValueError("expected --memories or --no-memory, got both")
        return load_memories(run, options.memories, mmap=True, index=options.index)
    return run.model.knn_memories_context(batch_size=1) if options.memory else nullcontext()


def read_input(options: Generate) -> tuple[str, str]:
    """The text before the prompt, and the prompt. Raises ValueError for binary files, or two uses of stdin."""
    if [*options.read, options.prompt].count(STDIN) > 1:
        raise ValueError("expected - (standard input) at most once, got it several times")
    *texts, last = [read_text(name) for name in options.read] or [""]
    before = "".join(text if text.endswith("\n") else text + "\n" for text in texts) + last
    return before, read_text(STDIN) if options.prompt == STDIN else options.prompt


def read_whole_segments(
    model: MemorizingTransformer, tokens: list[int], memories: KNNMemoryList | None, segment_length: int
) -> tuple[list[int], XLMemories | None]:
    """Read all full segments before the last token, with a progress bar. Returns the other tokens, and the state."""
    count = (len(tokens) - 1) // segment_length * segment_length
    if count == 0:
        return tokens, None
    session = Session(model, memories, batch_size=1, segment_length=segment_length)
    with progress_bar(total=len(tokens), desc="reading", unit=" tokens", unit_scale=True) as bar:
        for start in range(0, count, segment_length):
            session.read([tokens[start : start + segment_length]])
            bar.update(segment_length)
        bar.update(len(tokens) - count)
    return tokens[count:], session.close()
