"""Checkpoints of a training run: their format on disk, and uploads to object storage."""
