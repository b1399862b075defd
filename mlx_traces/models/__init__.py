"""From a model's name to its weights, tokenizer, chat template and adapter."""
