"""What every rank of a job runs: the controller on rank 0, workers on the others, and the batch run over them.

May import: floors 0 to 6. Start reading in `run.py`.
"""
