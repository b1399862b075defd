"""Grade completions, store them as runs, and compare runs on the same problems."""
