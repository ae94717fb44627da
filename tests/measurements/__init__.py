"""Programs that measure what rank 0 and leaders spend, in processor time of one thread.

``python -m tests.measurements.NAME`` prints one figure a line. No test looks at them: figures belong to a machine.
"""
