"""Memories against plain lists, for millions of operations (`python -m tests.soak`, or `make soak`)."""
