"""Where the actors run: the resource plan and its check against the cluster, placement, and the connection to Ray."""

import rluf  # noqa: F401  sets RAY_AUTH_MODE before ray is imported
