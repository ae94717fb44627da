"""The commands of `lepton-dist`, a small file each.

May import: everything below. Start reading in `main.py`.
"""
