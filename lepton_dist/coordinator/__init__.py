"""What rank 0 decides for the whole job. Pure: no MPI, no tensors, no clock.

May import: floors 0 to 5. Start reading in `dispatcher.py` for what happens in a run, in `planner.py` for plans.
"""
