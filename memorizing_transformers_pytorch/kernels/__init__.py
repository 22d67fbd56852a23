"""Triton kernels for what takes the time on a GPU. Tensors in, tensors out; each has a slow twin in plain PyTorch.

`availability` says whether a tensor can be given to them. With TRITON_INTERPRET=1 they also run, slowly, on a CPU.
"""
