"""A name to weights, tokenizer, chat template and adapter."""
