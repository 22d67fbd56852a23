"""The shortest way in: the enwik8 training of the package memorizing-transformers-pytorch 0.4.1, on our model.

    python train.py

Bytes, width 512, 8 layers, memory in layer 4, XL memory in layers 7 and 8; each step reads 5 segments of 512 bytes of
16 rows with fresh memories. It is `memorizing-transformers train --preset enwik8`, takes the same flags (a copy of
enwik8 that is here already: `--data.source enwik8:PATH`), and validates on the validation split.
"""

import sys

from memorizing_transformers_pytorch.cli import main

if __name__ == "__main__":
    main(["train", "--preset", "enwik8", *sys.argv[1:]])
