"""The arithmetic of a layer on one device, without a word of ranks. A torch path gives the same results everywhere.

May import: floors 0 and 1. Start reading in `attention.py`.
"""
