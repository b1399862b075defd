"""Reinforcement learning on a task's own grader: GRPO and its variants, PPO."""
