"""transports: how bytes move. local (threads), mpi (any node), shm (a shared window inside one node).
It may import: the rest of comm, errors.
Start with ../transport.py, the protocol that each of them meets, then local.py, the simplest.
"""
