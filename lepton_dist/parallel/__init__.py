"""This rank's stage: what it loads, how it is built, and how activations pass between stages.

May import: floors 0 to 3. Start reading in `stage.py`.
"""
