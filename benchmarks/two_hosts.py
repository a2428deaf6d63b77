"""A run over two hosts whose network breaks: learner on one, engine on the other, weights published over TCP.

The hosts are namespaces of this machine (network, processes, mounts), each with its address, its Ray node and its own
/tmp and /dev/shm; a pair of virtual interfaces joins them. Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and says so.

    python benchmarks/two_hosts.py                # all parts; --part alone|healed|lost runs one

alone: the same run on one host, through shared memory. healed: the engine's host is cut off for a moment, which the run
waits out, then until Ray takes it for dead; healed, it joins again, the engine is started there and the run goes on to
the weights of `alone`, bit for bit. lost: it stays cut off, and the run ends by naming whom it waited for, with exit
code 6. The last line is JSON.
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

HEAD, WORKER = "10.231.77.1", "10.231.77.2"
PORT = 6391
STEPS = 10
TOLD = [f"algorithm.steps={STEPS}", "learner.save_every=4", "cluster.heartbeat_s=5"]
APART = ["publish.engine=tcp", "cluster.labels=[rollout:host=b, learner:host=a, reward:host=a]"]
DEAD_AFTER = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
              "RAY_health_check_failure_threshold": "8", "RAY_health_check_initial_delay_ms": "2000"}  # fmt: skip
"""Ray takes a node for dead after some 8 s here; its own default is about 30."""
BLINK_S = 3.0
PATIENCE_S = 150
RAY = str(Path(sys.executable).parent / "ray")


def sh(*command: str) -> None:
    """Run a command that must work."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Hosts:
    """Two namespaces a and b, a cable between them, and a Ray node on each."""

    def __init__(self, base: Path) -> None:
        self.base, self.names = base, {host: f"rluf{os.getpid()}{host}" for host in "ab"}
        self.inits: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        try:
            self._lay()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _lay(self) -> None:
        a, b = self.names["a"], self.names["b"]
        for name in (a, b):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, address in ((a, HEAD), (b, WORKER)):
            sh("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        self.cable(True)
        common = "--disable-usage-stats --object-store-memory=268435456 --num-cpus=2"
        head = f"{RAY} start --head --block --port={PORT} --node-ip-address={HEAD} --include-dashboard=false "
        worker = f"{RAY} start --block --address={HEAD}:{PORT} --node-ip-address={WORKER} {common} --labels host=b"
        self._boot("a", f"while :; do {head} {common} --labels host=a; sleep 1; done")
        self._runs("a")
        self._boot("b", f"while :; do {worker}; sleep 1; done")  # a node that was taken for dead joins as a new one
        self._runs("b")

    def __exit__(self, *_: object) -> None:
        for process in self.inits.values():
            process.kill()  # with the first process of its namespace every other one in it ends
            process.wait(30)
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60, check=False)

    def cable(self, plugged: bool) -> None:
        """Join host b to host a, or cut it off."""
        sh("ip", "-n", self.names["a"], "link", "set", "eth0", "up")
        sh("ip", "-n", self.names["b"], "link", "set", "eth0", "up" if plugged else "down")
        for name in self.names.values() if plugged else ():
            sh("ip", "-n", name, "route", "replace", "default", "dev", "eth0")

    def _boot(self, host: str, command: str) -> None:
        private = "mount -t tmpfs tmpfs /tmp && mount -t tmpfs -o size=600m tmpfs /dev/shm && mkdir -p /tmp/r && "
        private += f"printf '127.0.0.1 localhost\\n{HEAD} host-a\\n{WORKER} host-b\\n' > /tmp/hosts && "
        private += "mount --bind /tmp/hosts /etc/hosts && "
        wrap = ["ip", "netns", "exec", self.names[host], "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        wrap += ["--mount-proc", "--uts", "bash", "-c", f"hostname host-{host}; {private}{command}"]
        env = {**chaos.environment(), **DEAD_AFTER, "RAY_TMPDIR": "/tmp/r"}
        with (self.base / f"host-{host}.txt").open("wb") as output:
            self.inits[host] = subprocess.Popen(wrap, env=env, stdout=output, stderr=subprocess.STDOUT)

    def _runs(self, host: str) -> None:
        """Wait until the host's node runs; `ray start` gives it 30 s and is begun again when that was not enough."""
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in (self.base / f"host-{host}.txt").read_text():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no Ray at host {host} after 240 s")
            time.sleep(0.3)

    def start(self, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        """A driver on host a."""
        below = chaos.below(self.inits["a"].pid)
        inner = next(pid for pid, told in below.items() if " start --head" in told and "while :" not in told)
        command = ["nsenter", "--target", str(inner), "--net", "--mount", "--pid", "--uts", sys.executable]
        command += [str(Path(chaos.__file__).resolve()), "--run", str(self.base), str(folder)]
        command += [*TOLD, *APART, f"cluster.address={HEAD}:{PORT}", *overrides]
        folder.mkdir(parents=True, exist_ok=True)
        env = {**chaos.environment(), "RAY_TMPDIR": "/tmp/r"}
        with (folder / "output.txt").open("a") as output:
            return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)


def wait_for(process: subprocess.Popen[str], folder: Path, words: str, seconds: float) -> float:
    """Seconds until run.log has `words`. Raises RuntimeError when the run ends before, or is too slow."""
    begun = time.monotonic()
    log = folder / "run.log"
    while not (log.exists() and words in log.read_text()):
        if process.poll() is not None or time.monotonic() - begun > seconds:
            raise RuntimeError(f"never said {words!r}:\n{(folder / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.05)
    return time.monotonic() - begun


def alone(base: Path) -> dict[str, Any]:
    """On one host, through shared memory."""
    with chaos.head() as ray:
        process = chaos.start(base, base / "alone", *TOLD, f"cluster.address={ray.address}")
        code = process.wait(600)
    return {"code": code, "weights": chaos.digest(base / "alone") if code == 0 else ""}


def healed(base: Path) -> dict[str, Any]:
    """A blink, then a cut that Ray takes for the end of the node."""
    folder = base / "healed"
    with Hosts(base) as hosts:
        process = hosts.start(folder)
        try:
            chaos.wait_for_step(process, folder, 2)
            hosts.cable(False)
            time.sleep(BLINK_S)
            hosts.cable(True)
            chaos.wait_for_step(process, folder, 5)
            replaced = "starting it again" in (folder / "run.log").read_text()
            hosts.cable(False)
            told = wait_for(process, folder, "starting it again", 120)
            time.sleep(10)
            hosts.cable(True)
            joined = time.monotonic()
            back = wait_for(process, folder, "start 2 is back", 400)
            code = process.wait(600)
        finally:
            process.kill()
    log = (folder / "run.log").read_text()
    return {
        "code": code,
        "weights": chaos.digest(folder) if code == 0 else "",
        "steps": [row["step"] for row in chaos.rows(folder)] == list(range(1, STEPS + 1)),
        "engine_lost_by_a_blink": replaced,
        "told_after_s": round(told, 1),
        "back_after_s": round(back, 1),
        "run_ended_after_s": round(time.monotonic() - joined, 1),
        "said": [
            line.split("  ", 1)[-1].strip() for line in log.splitlines() if "WARNING" in line or "is back" in line
        ],
    }


def lost(base: Path) -> dict[str, Any]:
    """A cut that nobody heals."""
    folder = base / "lost"
    with Hosts(base) as hosts:
        process = hosts.start(folder, f"cluster.start_deadline_s={PATIENCE_S}")
        try:
            chaos.wait_for_step(process, folder, 2)
            hosts.cable(False)
            cut = time.monotonic()
            code = process.wait(600)
        finally:
            process.kill()
    words = (folder / "output.txt").read_text()
    return {"code": code, "ended_after_s": round(time.monotonic() - cut, 1), "said": words.strip().splitlines()[-1],
            "traceback": "Traceback" in words}  # fmt: skip


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that both hosts see: not below /tmp, of which each has its own."""
    base = Path(tempfile.mkdtemp(prefix="rluf-two-hosts-", dir="/var/tmp"))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def problem() -> str:
    """Why hosts cannot be made here; empty when they can."""
    tools = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} not installed (iproute2, util-linux)"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stderr.strip()


def main() -> None:
    """Run the parts, print one line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["alone", "healed", "lost"])
    given = parser.parse_args()
    if told := problem():
        sys.exit(f"two hosts cannot be made here: {told}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the hosts are ended
    found: dict[str, Any] = {}
    parts = {"alone": alone, "healed": healed, "lost": lost}
    with shared_folder() as base:
        chaos.make_inputs(base)
        for name in [given.part] if given.part else parts:
            begun = time.monotonic()
            found[name] = parts[name](base) | {"seconds": round(time.monotonic() - begun, 1)}
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    if len(found) > 1:
        found["same_bits"] = found["alone"]["weights"] == found["healed"]["weights"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
