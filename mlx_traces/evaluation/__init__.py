"""Completions graded and stored as runs; statistics of runs on the same problems."""
