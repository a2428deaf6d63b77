"""How a run is seen: console, metrics file, W&B and the HTML report."""
