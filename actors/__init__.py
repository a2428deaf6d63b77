"""The long-lived Ray actors, one file a role. Each holds a process and its devices and calls pure code from rluf.

RAY_AUTH_MODE is set for the same reason as in the package cluster: before Ray is first imported.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
