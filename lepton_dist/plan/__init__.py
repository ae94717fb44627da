"""Who holds what: the plan and the slices of the model that follow from it. Pure: no tensors, no MPI.

May import: `errors`, `documents`. Start reading in `plan.py`, then `axes.py`.
"""
