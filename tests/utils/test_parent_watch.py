"""A watched process ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOLDER = """
import multiprocessing, sys, time
{import_line}
class Executor:
    def start(self):
        {watch_line}
        time.sleep(60)
def run_core(executor_class):
    executor_class().start()
if __name__ == "__main__":
    core = multiprocessing.get_context("{method}").Process(target=run_core, args=(Executor,), daemon=True)
    core.start()
    print(core.pid, flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("kill_signal", [signal.SIGKILL, signal.SIGTERM])
def test_a_core_exits_with_its_killed_holder(method: str, kill_signal: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    import_line = "from rluf.utils.parent_watch import exit_with_parent\nexit_with_parent()  # at import: no parent yet"
    script.write_text(HOLDER.format(method=method, import_line=import_line, watch_line="exit_with_parent()"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        core_pid = int(holder.stdout.readline())
        time.sleep(0.6)  # the core unpickles the class and starts its watch
        assert is_running(core_pid)
        holder.send_signal(kill_signal)
    deadline = time.monotonic() + 5
    while is_running(core_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_running(core_pid):
        os.kill(core_pid, signal.SIGKILL)
        pytest.fail("the core outlived its holder")
