"""Typed settings: the tree (settings.py), loading (load.py), what follows from it (derived.py), the flags (cli.py)."""
