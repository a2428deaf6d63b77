"""Rule judges, and the aggregation of several objectives into one reward."""
