"""Run tracking: console, W&B, Prometheus gauges, and the timeline of the actors."""
