"""Config: what the user asked for, typed and checked: sampling parameters, run files, options.
It may import `errors` and `documents` only.
Start reading in `sampling.py`."""
