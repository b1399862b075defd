"""Supervised fine-tuning, and what all training shares: loop, gradients, optimizer, checkpoints, memory."""
