"""What a run shows of itself: progress and notices. Never prompts or texts.

May import: `errors`, `documents`. Start reading in `progress.py`.
"""
