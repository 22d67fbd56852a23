"""Attention over a segment, its past and entries of a memory: tensors in, tensors out."""
