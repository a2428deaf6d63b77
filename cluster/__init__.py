"""Where the actors run: the resource plan and its check against the cluster, placement, connecting to Ray.

Ray's token, which keeps strangers off a cluster, is switched on here: Ray reads RAY_AUTH_MODE once, when it is first
imported, so this must come before.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
