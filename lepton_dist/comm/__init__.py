"""comm: bytes between ranks. Worlds, groups, mailboxes, and the transports that carry them; the only room with mpi4py.
It may import: errors, documents, plan, config, telemetry.
Start with world.py, then group.py, then transports/.
"""
