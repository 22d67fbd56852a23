"""Complete code with a memory of a whole code base.

    python examples/complete_code.py HuggingFaceTB/SmolLM2-135M src/ --prompt "def load_config(path):"

It also tells in which files it looked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from tyro.conf import Positional

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory


def read_code(memory: AttachedMemory, tokenizer: Any, folder: Path, pattern: str = "**/*.py") -> None:
    """Read every file, each as a document of the same row: what is asked later finds all of them."""
    for path in sorted(folder.glob(pattern)):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            name = str(path.relative_to(folder))
            memory.read(tokenizer(f"# {name}\n{text}", return_tensors="pt").input_ids, document=name, progress=False)


def complete(memory: AttachedMemory, tokenizer: Any, prompt: str, max_new_tokens: int = 60) -> tuple[str, list[str]]:
    """The continuation, and the files in which the last token looked, most looked at first."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = memory.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    titles = {document.number: document.title for document in memory.documents()}
    looked: dict[str, int] = {}
    for found in memory.last_retrieved.values():
        for number in found[..., 0].flatten().tolist():
            if number in titles:
                looked[titles[number]] = looked.get(titles[number], 0) + 1
    text = tokenizer.decode(written[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text, sorted(looked, key=lambda title: -looked[title])


def main(model: Positional[str], folder: Positional[Path], prompt: str, pattern: str = "**/*.py") -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    memory = attach_memory(AutoModelForCausalLM.from_pretrained(model), retrieve="tokens")
    read_code(memory, tokenizer, folder, pattern)
    print(memory)
    text, files = complete(memory, tokenizer, prompt)
    print(prompt + text)
    print("looked in:", ", ".join(files[:5]))


if __name__ == "__main__":
    tyro.cli(main)
