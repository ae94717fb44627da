"""Kernels of our own for CPUs, in C with a plain interface; optional, and never the only way to a result.

May import: `kernels`' floor and below. Start reading in `paged.py`.
"""
