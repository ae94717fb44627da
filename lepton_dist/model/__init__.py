"""One decoder, and the families of models as data.

May import: floors 0 to 2. Start reading in `decoder.py`, then `architectures/llama.py`.
"""
