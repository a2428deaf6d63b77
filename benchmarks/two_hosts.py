"""A run over two hosts whose network breaks: learner on one, engine on the other, weights through a shared folder.

The hosts are namespaces of this machine (network, processes, mounts), each with its address, its Ray node and its own
/tmp and /dev/shm; a pair of virtual interfaces connects them. Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN); without it the
benchmark exits with a message.

    python benchmarks/two_hosts.py                # all parts; --part single|reconnected|disconnected runs one

single: the same run on one host, through shared memory. reconnected: the engine's host is disconnected for a moment,
which the run waits out, then until Ray declares it dead; reconnected, it joins again, the engine is started there, and
the run ends with the weights of `single`, bit for bit. disconnected: it stays disconnected, and the run ends with exit
code 6, naming the actor it waited for. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chaos

HEAD_ADDRESS, WORKER_ADDRESS = "10.231.77.1", "10.231.77.2"
RAY_PORT = 6391
STEPS = 10
RUN_OVERRIDES = [
    f"algorithm.steps={STEPS}",
    "learner.checkpoint_every_steps=4",
]
TWO_HOST_OVERRIDES = [
    "weight_sync.transport=disk",
    "cluster.node_labels={rollout: {host: b}, learner: {host: a}, reward: {host: a}}",
]
RAY_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
    "RAY_health_check_initial_delay_ms": "2000",
}
"""With these Ray declares a node dead after about 8 s; its default is about 30."""
SHORT_CUT_S = 3.0
"""Shorter than the time after which Ray declares a node dead."""
ACTOR_START_TIMEOUT_S = 150
RAY_COMMAND = str(Path(sys.executable).parent / "ray")
RESTARTING, RESTARTED = "restarting it", "restarted after"
"""Parts of the log lines of a lost actor and of its replacement."""


def run_command(*command: str) -> None:
    """Run a command; RuntimeError if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.strip()}")


class TwoHosts:
    """Two namespaces a and b, a network link between them, and a Ray node on each."""

    def __init__(self, work_folder: Path) -> None:
        self.work_folder = work_folder
        self.namespaces = {host: f"rluf{os.getpid()}{host}" for host in "ab"}
        self.init_processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoHosts:
        try:
            self._start_hosts()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_hosts(self) -> None:
        a, b = self.namespaces["a"], self.namespaces["b"]
        for namespace in (a, b):
            run_command("ip", "netns", "add", namespace)
            run_command("ip", "-n", namespace, "link", "set", "lo", "up")
        run_command("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for namespace, address in ((a, HEAD_ADDRESS), (b, WORKER_ADDRESS)):
            run_command("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        self.set_connected(True)
        common = "--disable-usage-stats --object-store-memory=268435456 --num-cpus=2"
        head = f"{RAY_COMMAND} start --head --block --port={RAY_PORT} --node-ip-address={HEAD_ADDRESS} "
        head += f"--include-dashboard=false {common} --labels host=a"
        worker = f"{RAY_COMMAND} start --block --address={HEAD_ADDRESS}:{RAY_PORT} "
        worker += f"--node-ip-address={WORKER_ADDRESS} {common} --labels host=b"
        self._start_host("a", f"while :; do {head}; sleep 1; done")
        self._wait_for_ray("a")
        # In a loop, since a node that was declared dead exits and must join as a new one.
        self._start_host("b", f"while :; do {worker}; sleep 1; done")
        self._wait_for_ray("b")

    def __exit__(self, *_: object) -> None:
        for process in self.init_processes.values():
            # All other processes of a process namespace end with its first one.
            process.kill()
            process.wait(30)
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=60, check=False)

    def set_connected(self, connected: bool) -> None:
        """Connect host b to host a, or disconnect it."""
        run_command("ip", "-n", self.namespaces["a"], "link", "set", "eth0", "up")
        run_command("ip", "-n", self.namespaces["b"], "link", "set", "eth0", "up" if connected else "down")
        # A link that goes down loses its routes.
        for namespace in self.namespaces.values() if connected else ():
            run_command("ip", "-n", namespace, "route", "replace", "default", "dev", "eth0")

    def _start_host(self, host: str, command: str) -> None:
        setup = "mount -t tmpfs tmpfs /tmp && mount -t tmpfs -o size=600m tmpfs /dev/shm && mkdir -p /tmp/r && "
        setup += f"printf '127.0.0.1 localhost\\n{HEAD_ADDRESS} host-a\\n{WORKER_ADDRESS} host-b\\n' > /tmp/hosts && "
        setup += "mount --bind /tmp/hosts /etc/hosts && "
        wrapper = ["ip", "netns", "exec", self.namespaces[host], "unshare", "--mount", "--pid", "--fork"]
        wrapper += ["--kill-child", "--mount-proc", "--uts", "bash", "-c", f"hostname host-{host}; {setup}{command}"]
        env = {
            **chaos.build_environment(),
            **RAY_HEALTH_CHECKS,
            "RAY_TMPDIR": "/tmp/r",
            "RAY_ADDRESS": f"{HEAD_ADDRESS}:{RAY_PORT}",
        }
        with self._output_file(host).open("wb") as output:
            process = subprocess.Popen(wrapper, env=env, stdout=output, stderr=subprocess.STDOUT)
        self.init_processes[host] = process

    def _output_file(self, host: str) -> Path:
        return self.work_folder / f"host-{host}.txt"

    def _wait_for_ray(self, host: str) -> None:
        """Wait until the Ray node of a host runs; `ray start` allows 30 s and is repeated if that was not enough."""
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in self._output_file(host).read_text():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no Ray at host {host} after 240 s")
            time.sleep(0.3)

    def start_run(self, run_folder: Path, *overrides: str) -> subprocess.Popen[str]:
        """Start a driver on host a."""
        processes = chaos.descendant_processes(self.init_processes["a"].pid)
        ray_pid = next(
            pid for pid, command in processes.items() if " start --head" in command and "while :" not in command
        )
        command = ["nsenter", "--target", str(ray_pid), "--net", "--mount", "--pid", "--uts", sys.executable]
        command += [str(Path(chaos.__file__).resolve()), "--run", str(self.work_folder), str(run_folder)]
        command += [*RUN_OVERRIDES, *TWO_HOST_OVERRIDES, f"run.cache={self.work_folder / 'cache'}"]
        command += overrides
        run_folder.mkdir(parents=True, exist_ok=True)
        env = {**chaos.build_environment(), "RAY_TMPDIR": "/tmp/r", "RAY_ADDRESS": f"{HEAD_ADDRESS}:{RAY_PORT}"}
        with (run_folder / "output.txt").open("a") as output:
            return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def wait_for_log(process: subprocess.Popen[str], run_folder: Path, text: str, timeout_s: float) -> float:
    """Seconds until run.log contains `text`. Raises RuntimeError when the run ends before, or is too slow."""
    start_time = time.monotonic()
    log_file = run_folder / "run.log"
    while not (log_file.exists() and text in log_file.read_text()):
        if process.poll() is not None or time.monotonic() - start_time > timeout_s:
            raise RuntimeError(f"{text!r} was not logged:\n{(run_folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.05)
    return time.monotonic() - start_time


def run_on_single_host(work_folder: Path) -> dict[str, Any]:
    """On one host, through shared memory."""
    run_folder = work_folder / "single"
    with chaos.ray_head() as head:
        process = chaos.start_run(work_folder, run_folder, head.address, *RUN_OVERRIDES)
        exit_code = process.wait(600)
    return {"exit_code": exit_code, "weights": chaos.hash_policy(run_folder) if exit_code == 0 else ""}


def run_reconnected(work_folder: Path) -> dict[str, Any]:
    """A short cut, then one after which Ray declares the node dead."""
    run_folder = work_folder / "reconnected"
    with TwoHosts(work_folder) as hosts:
        process = hosts.start_run(run_folder)
        try:
            chaos.wait_for_step(process, run_folder, 2)
            hosts.set_connected(False)
            time.sleep(SHORT_CUT_S)
            hosts.set_connected(True)
            chaos.wait_for_step(process, run_folder, 5)
            lost_by_short_cut = RESTARTING in (run_folder / "run.log").read_text()
            hosts.set_connected(False)
            detected_after_s = wait_for_log(process, run_folder, RESTARTING, 120)
            time.sleep(10)
            hosts.set_connected(True)
            reconnect_time = time.monotonic()
            restarted_after_s = wait_for_log(process, run_folder, RESTARTED, 400)
            exit_code = process.wait(600)
        finally:
            process.kill()
    log_lines = (run_folder / "run.log").read_text().splitlines()
    return {
        "exit_code": exit_code,
        "weights": chaos.hash_policy(run_folder) if exit_code == 0 else "",
        "all_steps": [row["step"] for row in chaos.read_metrics(run_folder)] == list(range(1, STEPS + 1)),
        "engine_lost_by_short_cut": lost_by_short_cut,
        "detected_after_s": round(detected_after_s, 1),
        "restarted_after_s": round(restarted_after_s, 1),
        "run_ended_after_s": round(time.monotonic() - reconnect_time, 1),
        "log": [line.split("  ", 1)[-1].strip() for line in log_lines if "WARNING" in line or RESTARTED in line],
    }


def run_disconnected(work_folder: Path) -> dict[str, Any]:
    """A permanent cut."""
    run_folder = work_folder / "disconnected"
    with TwoHosts(work_folder) as hosts:
        process = hosts.start_run(run_folder, f"timeouts.actor_start_s={ACTOR_START_TIMEOUT_S}")
        try:
            chaos.wait_for_step(process, run_folder, 2)
            hosts.set_connected(False)
            cut_time = time.monotonic()
            exit_code = process.wait(600)
        finally:
            process.kill()
    output = (run_folder / "output.txt").read_text()
    return {
        "exit_code": exit_code,
        "ended_after_s": round(time.monotonic() - cut_time, 1),
        "message": output.strip().splitlines()[-1],
        "traceback": "Traceback" in output,
    }


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that both hosts see: not below /tmp, since each has its own."""
    work_folder = Path(tempfile.mkdtemp(prefix="rluf-two-hosts-", dir="/var/tmp"))
    try:
        yield work_folder
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)


def find_host_problem() -> str:
    """Why hosts cannot be created here; empty when they can."""
    missing_tools = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing_tools:
        return f"{', '.join(missing_tools)} not installed (iproute2, util-linux)"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return process.stderr.strip()


def main() -> None:
    """Run the parts, print one line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["single", "reconnected", "disconnected"])
    arguments = parser.parse_args()
    if problem := find_host_problem():
        sys.exit(f"two hosts cannot be created here: {problem}")
    # Exit through the context managers, which stop the hosts.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parts = {"single": run_on_single_host, "reconnected": run_reconnected, "disconnected": run_disconnected}
    results: dict[str, Any] = {}
    with shared_folder() as work_folder:
        chaos.make_inputs(work_folder)
        for name in [arguments.part] if arguments.part else parts:
            start_time = time.monotonic()
            results[name] = parts[name](work_folder) | {"seconds": round(time.monotonic() - start_time, 1)}
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    if len(results) > 1:
        results["same_bits"] = results["single"]["weights"] == results["reconnected"]["weights"]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
