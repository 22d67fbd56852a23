"""What was trained beside what was not, from the files of experiments/huggingface_perplexity.py.

    cd docs/huggingface && python ../../experiments/huggingface_tuned_table.py perplexity.json perplexity-tuned-*.json

Perplexities over the passages that all have; and the share of the way from local to full context, both untrained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(plain: Path, *tuned: Path) -> None:
    untrained = json.loads(plain.read_text())["losses"]
    trained = {path.stem: json.loads(path.read_text())["losses"] for path in tuned}
    for text, losses in untrained.items():
        every = [losses["full context"], *(each[text]["memory"] for each in trained.values())]
        places = set.intersection(*map(set, every))

        def perplexity(found: dict[str, float], places: set[str] = places) -> float:
            return float(np.exp(np.mean([found[place] for place in places])))

        local, full = perplexity(losses["local"]), perplexity(losses["full context"])
        print(f"{text} ({len(places)} passages): local {local:.2f}, full context {full:.2f}")
        memories = {"untrained": losses} | {name: each[text] for name, each in trained.items()}
        for name, each in memories.items():
            memory = perplexity(each["memory"])
            print(f"  {name}: {memory:.2f} ({(local - memory) / (local - full):.0%})", end="")
            if name != "untrained" and {"local", "full context"} <= set(each):
                own = perplexity(each["local"]), perplexity(each["full context"])
                print(f"; its own {own[0]:.2f}, {own[1]:.2f} ({(own[0] - memory) / (own[0] - own[1]):.0%})", end="")
            print()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
