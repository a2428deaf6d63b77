"""Simulated users with hidden preferences: a world with known ground truth for experiments and the shipped log."""
