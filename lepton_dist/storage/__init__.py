"""Bytes at rest: the checkpoint's index and slices, who reads what, the journal of a batch run.

May import: floors 0 to 2. Start reading in `index.py`.
"""
