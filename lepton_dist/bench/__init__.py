"""Looking at a model, a plan and a machine: what each rank would hold, what the cluster has and measures.

May import: floors 0 to 7. Start reading in `inspect.py`.
"""
