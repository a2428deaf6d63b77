"""Exit with the process that started this one."""

from __future__ import annotations

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """Exit this process as soon as the one that started it is gone, even by SIGKILL.

    The multiprocessing parent has the writing end of a pipe open for its lifetime; the kernel closes it when it dies.
    PR_SET_PDEATHSIG does not fit: it fires when the starting *thread* ends, and misses a parent that died before.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == "rluf-exit-with-parent" for thread in threading.enumerate()):
        return

    def exit_after_parent() -> None:
        parent.join()
        # Not sys.exit: it would end this thread only, and cleanup may wait for a parent that is gone.
        os._exit(1)

    threading.Thread(target=exit_after_parent, name="rluf-exit-with-parent", daemon=True).start()
