"""Fused kernels for NVIDIA GPUs, in Triton. Without Triton, or a C compiler for it, the torch path is used.

May import: floors 0 and 1. Start reading in `library.py`.
"""
