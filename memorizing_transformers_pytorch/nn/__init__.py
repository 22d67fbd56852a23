"""Layers: tensors in, tensors out. Knows no index library, no file, no process group."""
