"""Trace files: made, imported, generated, scored, filtered, reformatted, encoded as tokens."""

FORMATS = {  # of rows that `data import` reads, and the columns that a row must have
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "open-r1": ("problem", "generations"),
    "text": ("text",),
}
