"""Batched generation and log-probabilities of given tokens."""
