"""``python -m hvd_agn bench``: what the exchange and a step cost, against what the hardware and others need.

All figures of one rank count come from one run, taken in turn, so that a change of the machine's speed meets them all.
"""

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core, config, mpi, rules
from ..center import Center
from ..errors import AGNError
from .launch import run_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

    from .hosts import EmulatedHosts

ROUNDS = 7
EXCHANGES_PER_ROUND = 5
PERIOD = 10

Columns = Sequence[tuple[str, str, str]]
"""Key, heading and format of each."""

EXCHANGE_COLUMNS: Columns = (
    ("ranks", "ranks", "{:d}"),
    ("limit_ms", "limit", "{:.1f}"),
    ("exchange_ms", "exchange", "{:.1f}"),
    ("per_exchange_ms", "per exchange", "{:.1f}"),
    ("allreduce_ms", "allreduce", "{:.1f}"),
    ("naive_ms", "Get_accumulate", "{:.1f}"),
    ("exchange_over_limit", "exchange/limit", "{:.2f}"),
    ("per_exchange_over_limit", "per exch./limit", "{:.2f}"),
    ("allreduce_over_exchange", "allreduce/exch.", "{:.1f}"),
    ("naive_over_exchange", "Get_acc./exch.", "{:.1f}"),
)
RULES_COLUMNS: Columns = (
    ("name", "rule", "{}"),
    ("slots", "slots", "{:d}"),
    ("ranks", "ranks", "{:d}"),
    ("limit_ms", "limit", "{:.1f}"),
    ("exchange_ms", "exchange", "{:.1f}"),
    ("per_exchange_ms", "per exchange", "{:.1f}"),
    ("exchange_over_limit", "exchange/limit", "{:.2f}"),
    ("per_exchange_over_limit", "per exch./limit", "{:.2f}"),
)
BENCHED_RULES = (
    rules.Add(),
    rules.SGD(0.7),
    rules.SGD(0.7, 0.9, nesterov=True),
    rules.Adam(),
    rules.AdamW(),
    rules.Adagrad(),
    rules.RMSprop(),
    rules.RMSprop(momentum=0.9, centered=True),
    rules.Lion(),
    rules.DelayedNesterov(0.1, 0.9, 4),
    rules.Elastic(0.2),
)


def exchange(params: int, ranks: Sequence[int], transport: str) -> list[dict[str, Any]]:
    """Time the exchange of ``params`` float32 parameters on each number of ranks of this machine. Times in ms.

    Raises:
        AGNError: a run failed; the message has its output.
    """
    return [run_job(n, {"params": params, "center": {"transport": transport}}) for n in ranks]


def all_rules(params: int, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Time each rule's exchange against its pass over private memory, as :func:`exchange` does for ``Add``.

    Raises:
        AGNError: a run failed; the message has its output.
    """
    rows = []
    for number, rule in enumerate(BENCHED_RULES):
        row = {"name": type(rule).__name__, "rule": repr(rule), "slots": len(rule.active_slots())}
        rows += [row | run_job(n, {"params": params, "center": {}, "rule": number, "alone": True}) for n in ranks]
    return rows


def run_job(ranks: int, options: dict[str, Any], hosts: "EmulatedHosts | None" = None) -> dict[str, Any]:
    """:func:`exchange_rank` on every rank; rank 0's result.

    Raises:
        AGNError: the run failed; the message has its output.
    """
    command = [sys.executable, "-m", "hvd_agn.tools.bench", json.dumps(options)]
    try:
        done = run_ranks(ranks, command, timeout=600, hosts=hosts)
    except subprocess.TimeoutExpired as late:
        raise AGNError(f"the run on {ranks} ranks took over {late.timeout} s: {late.stderr!s}") from None
    if done.returncode != 0:
        raise AGNError(f"the run on {ranks} ranks failed: {done.stdout}{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def exchange_rank(options: dict[str, Any]) -> None:
    """One rank's part of a job; rank 0 prints the result as JSON.

    Args:
        options: ``params``; ``center``: arguments of :class:`hvd_agn.Center`; ``rule``: which of ``BENCHED_RULES``;
            ``rounds``; ``alone``: leave out what the exchange is compared with; ``idle``: ranks that do not exchange.
    """
    MPI = mpi.initialize()
    comm = MPI.COMM_WORLD
    params, rounds, alone = options["params"], options.get("rounds", ROUNDS), options.get("alone", False)
    rule, idle = BENCHED_RULES[options.get("rule", 0)], options.get("idle", [])
    exchanges = 0 if comm.rank in idle else EXCHANGES_PER_ROUND
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        center = Center([theta := np.zeros(params, np.float32)], rule, **options["center"])
    summed = np.zeros(0 if alone else params, np.float32)
    naive = None if alone else _HandWritten(MPI, params)

    limit: list[float] = []
    own: list[float] = []
    spans: list[float] = []
    allreduce: list[float] = []
    by_hand: list[float] = []
    for _ in range(rounds + 1):  # the first warms up
        if comm.rank == 0:
            limit += _core.time_private_pass(params, config.BLOCK_BYTES.read(), 2, rule._native())[1:]
        theta += 1.0
        _sleeping_barrier(comm)
        start = time.monotonic()
        own += [_timed(lambda: center.exchange(PERIOD)) for _ in range(exchanges)]
        end = time.monotonic()
        _sleeping_barrier(comm)  # a host that polls in an allreduce would take the core from its mailbox
        spans.append(comm.allreduce(end, op=MPI.MAX) - comm.allreduce(start, op=MPI.MIN))
        if naive is not None:
            _sleeping_barrier(comm)
            allreduce.append(_timed(lambda: comm.Allreduce(MPI.IN_PLACE, summed)))
            _sleeping_barrier(comm)
            by_hand.append(_timed(naive.exchange))
        _sleeping_barrier(comm)
    # The host's own exchange is direct: of all ranks, the slowest is reported.
    slowest = comm.allreduce(statistics.median(own[exchanges:] or [0.0]), op=MPI.MAX)
    slowest_by_hand = comm.allreduce(statistics.median(by_hand[1:]) if by_hand else 0.0, op=MPI.MAX)
    if naive is not None:
        naive.close()
    overlap = _overlap(center, comm) if options["center"].get("overlap") else {}
    if comm.rank == 0:
        result = {
            "ranks": comm.size,
            "params": params,
            "limit_ms": 1e3 * min(limit[1:]),
            "exchange_ms": 1e3 * slowest,
            "per_exchange_ms": 1e3 * sum(spans[1:]) / (rounds * EXCHANGES_PER_ROUND * (comm.size - len(idle))),
        }
        result["exchange_over_limit"] = result["exchange_ms"] / result["limit_ms"]
        result["per_exchange_over_limit"] = result["per_exchange_ms"] / result["limit_ms"]
        if naive is not None:
            result["allreduce_ms"] = 1e3 * statistics.median(allreduce[1:])
            result["naive_ms"] = 1e3 * slowest_by_hand
            result["allreduce_over_exchange"] = result["allreduce_ms"] / result["exchange_ms"]
            result["naive_over_exchange"] = result["naive_ms"] / result["exchange_ms"]
        result |= overlap
        result["mpi"] = _core.mpi_library_version().split(",")[0].split("\n")[0].strip()
        print(json.dumps(result), flush=True)


def _overlap(center: Center, comm: "MPI.Comm") -> dict[str, float]:
    """What start() and finish() take around an exchange that ends in the background: the slowest rank's, in ms."""
    client = center.arrays_client
    blocked: list[float] = []
    merge: list[float] = []
    for _ in range(ROUNDS):
        _sleeping_barrier(comm)
        blocked.append(_timed(lambda: client.start(PERIOD)))
        while not client.ready:
            time.sleep(0.002)
        merge.append(_timed(client.finish))
    times = {"blocked_ms": blocked, "merge_ms": merge}
    return {key: 1e3 * max(comm.allgather(statistics.median(values))) for key, values in times.items()}


class _HandWritten:
    """AGN as one would write it with mpi4py: NumPy, and Get_accumulate on a window at rank 0."""

    def __init__(self, MPI: ModuleType, params: int) -> None:
        self._mpi = MPI
        nbytes = 4 * params if MPI.COMM_WORLD.rank == 0 else 0
        self._window = MPI.Win.Allocate(nbytes, 4, comm=MPI.COMM_WORLD)
        self._theta, self._anchor, self._center = (np.zeros(params, np.float32) for _ in range(3))

    def exchange(self) -> None:
        delta = (self._theta - self._anchor) / PERIOD
        self._window.Lock(0, self._mpi.LOCK_SHARED)
        self._window.Get_accumulate(delta, self._center, 0, op=self._mpi.SUM)
        self._window.Unlock(0)
        self._theta[:] = self._center + delta
        self._anchor[:] = self._theta

    def close(self) -> None:
        self._window.Free()


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> str:
    """Rows as aligned text."""
    cells = [[heading for _, heading, _ in columns]]
    cells += [[form.format(row[key]) if key in row else "" for key, _, form in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _sleeping_barrier(comm: "MPI.Comm") -> None:
    """A barrier that leaves the cores to those still at work."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


if __name__ == "__main__":
    exchange_rank(json.loads(sys.argv[1]))
