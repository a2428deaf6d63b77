"""Long-lived Ray actors, one file per role. Each holds a process and its devices and calls library code from rluf."""

import rluf  # noqa: F401  sets RAY_AUTH_MODE before ray is imported
