"""`python -m memorizing_transformers_pytorch`, for launchers such as torchrun."""

from memorizing_transformers_pytorch.cli import main

main()
