"""Text: the tokenizer, chat templates, text of token ids as they come, and the dialects of input and output rows.
It may import the floors below it: `config`, `plan`, `telemetry`, `errors`; never `storage` or `model`, its neighbours.
Start reading in `rows.py`, then `dialects.py` (rows in), `tokenizer.py`, `detokenizer.py`, `output.py` (rows out)."""
