"""Make, import, generate, score, filter, reformat and encode traces."""

FORMATS = {  # of rows that `data import` reads, and the columns that a row must have
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "open-r1": ("problem", "generations"),
    "text": ("text",),
}
