"""Families of models as data: how each reads its config.json and names its weights.

May import: `model`'s own types. Start reading in `llama.py`; a new family is one file here and a line in `registry.py`.
"""
