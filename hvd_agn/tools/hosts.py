"""Several emulated hosts on one machine, for tests and benchmarks between nodes: needs root and iproute2.

A host is a network namespace with one interface, ``eth0``; what runs there also has a host name, a ``/dev/shm`` and
System V IPC of its own, by which MPI tells nodes apart. All hosts hang on one bridge, in a namespace of its own:
nothing is added to the machine's own network, so that harnesses running side by side can use the same addresses.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ..errors import LaunchError

# What ssh would do, for the launchers of MPI: `agent [-options] HOST COMMAND...` runs the command on that host.
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts --ipc sh -c '
export TMPDIR={folder} # where launchers leave files when they are killed
hostname "$0" && mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs shm /dev/shm && exec sh -c "$1"
' "$host" "$*"
"""
_NETWORK = "10.77.0.{}"
_NAME = re.compile(r"agn(\d+)[a-z]+\d*")
_QUEUE_BYTES = 64 << 20  # more than TCP ever has under way here: a full queue must push back, not drop
_BURST_BYTES = 128 << 10  # two of the 64 KiB segments that Linux hands to a link at once
_TMP = Path(tempfile.gettempdir())
_count = itertools.count()


class EmulatedHosts:
    """``count`` hosts, from ``with`` to the end of its block.

    Args:
        count: how many.
        rate: of every host's link, in each direction, as ``tc`` spells it: ``"1gbit"``. None: as fast as it goes.
        delay: of every host's link, in each direction. ``"1ms"`` makes a round trip of 4 ms. Needs netem.

    Raises:
        LaunchError: on entry, if this machine does not let us; the message says what is missing.
    """

    names: list[str]
    """Host names, which are those of their network namespaces too."""

    agent: str
    """Path of a program called like ssh: ``agent HOST COMMAND...``."""

    def __init__(self, count: int, *, rate: str | None = None, delay: str | None = None):
        base = f"agn{os.getpid()}{_letters(next(_count))}"
        self.names = [f"{base}{i}" for i in range(count)]
        self.agent = str(_TMP / base / "agent")
        self._base, self._rate, self._delay = base, rate, delay

    def __enter__(self) -> "EmulatedHosts":
        if os.geteuid() != 0:
            raise LaunchError("emulated hosts need root")
        if missing := [tool for tool in ("ip", "tc", "unshare", "hostname", "mount") if not shutil.which(tool)]:
            raise LaunchError(f"emulated hosts need {', '.join(missing)} on PATH (Debian: iproute2, util-linux)")
        _remove_leftovers()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a host."""
        return [self.agent, self.names[host], shlex.join(command)]

    def pids(self) -> list[int]:
        """Every process on any of the hosts, whoever its parent is by now."""
        return _pids(self.names)

    def kill(self) -> None:
        """End every process on the hosts, daemons too."""
        _kill(self.names)

    def dropped(self) -> int:
        """Packets that a link's queue had no room for."""
        links = [(name, "eth0") for name in self.names]
        links += [(self._base, f"host{i}") for i in range(len(self.names))]
        texts = [_run("tc", "-n", where, "-s", "qdisc", "show", "dev", link) for where, link in links]
        return sum(int(dropped) for text in texts for dropped in re.findall(r"dropped (\d+)", text))

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them. Again: does nothing."""
        _remove([*self.names, self._base])

    def _make(self) -> None:
        _run("ip", "netns", "add", self._base)
        _run("ip", "-n", self._base, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._base, "link", "set", "bridge", "up")
        addresses = [_NETWORK.format(i + 1) for i in range(len(self.names))]
        lines = [f"{address} {name}\n" for address, name in zip(addresses, self.names, strict=True)]
        agent = Path(self.agent)
        agent.parent.mkdir()
        (agent.parent / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        agent.write_text(_AGENT.format(folder=agent.parent))
        agent.chmod(0o755)
        for i, name in enumerate(self.names):
            _run("ip", "netns", "add", name)
            peer = ("peer", "name", "eth0", "netns", name)
            _run("ip", "-n", self._base, "link", "add", f"host{i}", "master", "bridge", "type", "veth", *peer)
            _run("ip", "-n", name, "address", "add", f"{addresses[i]}/24", "dev", "eth0")
            for where, link in ((name, "lo"), (name, "eth0"), (self._base, f"host{i}")):
                _run("ip", "-n", where, "link", "set", link, "up")
            for where, link in ((name, "eth0"), (self._base, f"host{i}")):
                self._shape(where, link)
        for i in range(len(self.names)):
            _run(*self.command(i, ["true"]))

    def _shape(self, where: str, link: str) -> None:
        """Slow down what leaves by a link. Both its ends are shaped, so each direction has its own rate."""
        add = ("tc", "-n", where, "qdisc", "add", "dev", link, "root")
        if self._delay:
            packets = str(_QUEUE_BYTES // 1500)
            _run(*add, "netem", "limit", packets, "delay", self._delay, *(("rate", self._rate) if self._rate else ()))
        elif self._rate:
            _run(*add, "tbf", "rate", self._rate, "burst", str(_BURST_BYTES), "limit", str(_QUEUE_BYTES))


def unavailable(*, rate: str | None = None, delay: str | None = None) -> str | None:
    """Why this machine cannot have such hosts, or None if it can."""
    try:
        with EmulatedHosts(1, rate=rate, delay=delay):
            return None
    except LaunchError as error:
        return str(error)


def _letters(number: int) -> str:
    """A number in letters, so that digits on either side of it are others' numbers."""
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise LaunchError(f"emulated hosts: `{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _existing() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _pids(names: Sequence[str]) -> list[int]:
    there = _existing()
    return [int(pid) for name in names if name in there for pid in _run("ip", "netns", "pids", name).split()]


def _kill(names: Sequence[str]) -> None:
    """Again and again, because a process may fork while we look."""
    deadline = time.monotonic() + 10
    while (pids := _pids(names)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _remove(names: Sequence[str]) -> None:
    there = _existing()
    _kill(names)
    for name in names:
        if name in there:
            _run("ip", "netns", "del", name)  # its links go with it
        shutil.rmtree(_TMP / name, ignore_errors=True)


def _remove_leftovers() -> None:
    """Hosts of harnesses that were killed: the process whose id is in the name is gone."""
    names = {*_existing(), *(path.name for path in _TMP.glob("agn*"))}
    owners = {name: match[1] for name in names if (match := _NAME.fullmatch(name))}
    _remove([name for name, owner in owners.items() if not _runs(owner)])


def _runs(pid: str) -> bool:
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # ended, but its parent has not asked
