"""The options of each command: nothing here imports torch, so that `--help` and mistakes are answered at once."""
