"""Long-lived Ray actors, one file per role. Each holds a process and its devices and calls library code from rluf."""

import gc

import rluf  # noqa: F401  sets RAY_AUTH_MODE before ray is imported

# The modules of torch, transformers and vLLM are a million objects. By default full collections visit them nine times
# while they are imported, a seventh of an actor's import time; young objects are collected as before.
gc.set_threshold(*gc.get_threshold()[:2], 1000)
