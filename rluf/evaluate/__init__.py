"""Evaluation of a policy against its base: intervals, effects, monitors, gates, run summary, A/B test analysis."""
