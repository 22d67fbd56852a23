"""`memorizing-transformers explain`: what a model looks up in its memory for a text, as a page or as JSON."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.cli.models import chosen_device, default_model, name_of
from memorizing_transformers_pytorch.cli.options.explain import Explain
from memorizing_transformers_pytorch.cli.texts import STDIN, read_all, read_text, texts_of
from memorizing_transformers_pytorch.explorer import Explanation, explain
from memorizing_transformers_pytorch.explorer.page import ENTRIES, write_page
from memorizing_transformers_pytorch.library.readers import open_reader, spans_of

REPORT = Path("report.html")
WRITTEN = 40  # tokens after a prompt
NOTHING = "expected a text to explain, by --prompt, got an empty one"


def main(options: Explain) -> None:
    """Run `explain`. Raises ValueError for bad input."""
    explain_text(options)


def explain_text(options: Explain) -> None:
    """Read, explain, then write the page and print a summary. Raises ValueError for bad input, if possible before
    anything is read."""
    prompt = read_text(STDIN) if options.prompt == STDIN else options.prompt
    output = checked(options, prompt)
    texts = texts_of(options.read, options.pattern) if options.read else {}
    model, device = default_model() if options.model is None else options.model, chosen_device(options.device)
    reader = open_reader(
        model,
        device,
        max_memories=options.max_memories,
        dtype=None,
        index=options.index,
        spans=spans_of(options.memory, options.retrieve, model),
    )
    if options.memory is not None:
        reader.load(options.memory, mmap=True)
    if reader.longest is not None and (count := len(reader.tokenizer.encode(prompt))) > reader.longest:
        raise ValueError(f"expected at most {reader.longest:,} tokens of prompt, got {count:,} (--read longer texts)")
    if not reader.is_of_spans and (options.question is not None or options.max_new_tokens is not None):
        raise ValueError("--question and --max-new-tokens are for models of transformers with a memory of spans")
    read_all(reader, texts)
    found = _explained(options, prompt, reader)
    if options.json:
        print(json.dumps(as_json(found, all_entries=options.all_entries), indent=1))
        return
    write_page(found, output, f"What {Path(name_of(model)).name} looked up")
    print(f"{found}\n\n{output}")


def _explained(options: Explain, prompt: str, reader: Any) -> Explanation:
    """Of a memory of passages, what the model answers, or writes after the prompt; else the prompt."""
    memory, given = reader.memory, 0
    tokens: Any = prompt
    if options.question is not None:
        tokens = memory.ask(options.question, max_new_tokens=options.max_new_tokens, row=options.row)
    elif reader.is_of_spans and (count := WRITTEN if options.max_new_tokens is None else options.max_new_tokens):
        ids = reader.tokenizer.encode(prompt)
        with memory.read_only(), memory.watched_row(options.row):
            tokens, given = [*ids, *islice(reader.written(ids), count)], len(ids)
    return explain(
        reader.model,
        tokens,
        memory,
        tokenizer=reader.tokenizer,
        row=options.row,
        contribution=None if options.contribution == "none" else options.contribution,
        prompt=given,
    )


def checked(options: Explain, prompt: str) -> Path:
    """The file to write. Raises ValueError for options that do not fit together."""
    output = REPORT if options.output is None else options.output
    for is_bad, message in (
        (prompt and options.question is not None, "give either --prompt or --question"),
        (not (prompt if options.question is None else options.question).strip(), NOTHING),
        (options.retrieve and options.memory, "--retrieve is for --read: a memory on disk is used as it was built"),
        (options.max_new_tokens is not None and options.max_new_tokens < 0, "--max-new-tokens must be 0 or more"),
        (not (options.memory or options.read), "expected something to look up, by --memory or --read, got neither"),
        (options.memory and options.max_memories is not None, "expected --max-memories or --memory, got both"),
        (options.json and options.output, "expected --json or --output, got both"),
        (options.all_entries and not options.json, "expected --all-entries with --json, got it without"),
        (output.exists() and not output.is_file(), f"got {str(output)!r}, which is a folder or a device: name a file"),
    ):
        if is_bad:
            raise ValueError(message)
    if not options.json:
        try:
            tempfile.TemporaryFile(dir=output.parent).close()  # better before long work than after it
        except OSError as error:
            raise ValueError(f"expected a file that can be written, got {str(output)!r}: {error.strerror}") from None
    return output


def as_json(found: Explanation, *, all_entries: bool) -> dict[str, Any]:
    """What an explanation says, with values that JSON can hold. all_entries: or of each token those of a page."""
    losses, alone = (
        [None if loss != loss else loss for loss in each.tolist()] for each in (found.losses, found.without_memory)
    )
    return {
        "tokens": [
            {"text": text, "loss": loss, "loss_without_memory": other, "mass": mass}
            for text, loss, other, mass in zip(found.texts, losses, alone, found.mass_of_tokens().tolist(), strict=True)
        ],
        "layers": found.by_layer(),
        "documents": found.by_document(),
        "passages": [asdict(each) for each in found.passages],
        "blocks": None if found.blocks is None else [asdict(each) for each in found.blocks],
        "looked_up": len(found),
        "entries": found.to_dicts(of_each_token=None if all_entries else ENTRIES),
    }
