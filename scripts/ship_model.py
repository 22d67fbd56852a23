"""Put a run into the package, as the model that is there without training one: without what only training needs.

    python scripts/ship_model.py RUN

`explain` and `explore` use it where there is no run, and everything that takes --model by the name "shipped".
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import yaml

from memorizing_transformers_pytorch.training.checkpoint import MODEL, STATE
from memorizing_transformers_pytorch.training.run import CONFIG, SHIPPED, TOKENIZER, checkpoint_of, load_run
from memorizing_transformers_pytorch.utils.durable import write_checksums

CARD = """# The shipped model

{parameters:,} parameters, trained by `make train` on Python's standard library (PSF licence) and put here by
`python scripts/ship_model.py RUN`, so that a memory can be tried without training or downloading anything. It has
learned to copy from its memory, and knows nothing but Python source.

#{evaluation}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    checkpoint = checkpoint_of(run)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    target = SHIPPED / checkpoint.relative_to(run)
    target.mkdir(parents=True)
    for name in (MODEL, STATE):
        shutil.copyfile(checkpoint / name, target / name)
    write_checksums(target)
    shutil.copyfile(run / TOKENIZER, SHIPPED / TOKENIZER)
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    del config["data"]["cache"]  # that of whoever uses it
    (SHIPPED / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    parameters = sum(each.numel() for each in load_run(SHIPPED).model.parameters())
    evaluation = (run / "evaluation" / "evaluation.md").read_text(encoding="utf-8")
    (SHIPPED / "README.md").write_text(CARD.format(parameters=parameters, evaluation=evaluation), encoding="utf-8")
    print(f"{SHIPPED}: {sum(path.stat().st_size for path in SHIPPED.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    main()
