"""Is the aligned policy better, by how much, and does it cheat: intervals, monitors and the run summary. Pure code."""
