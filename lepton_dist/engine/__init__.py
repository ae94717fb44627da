"""One replica's engine: requests become sequences, sequences become batches, batches become tokens.

May import: floors 0 to 4. Start reading in `engine.py`, then `scheduler.py`.
"""
