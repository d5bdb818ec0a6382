"""``python -m hvd_agn bench multihost``: exchanges between emulated hosts, with fast links and with slow ones."""

from collections.abc import Sequence
from typing import Any

from . import bench
from .hosts import EmulatedHosts

RATE = "1gbit"
COLUMNS: bench.Columns = (
    ("what", "what", "{}"),
    ("hosts", "hosts", "{:d}"),
    ("workers", "workers", "{:d}"),
    ("shards", "shards", "{:d}"),
    ("wire", "wire", "{}"),
    ("link", "link", "{}"),
    ("exchange_ms", "exchange", "{:.0f}"),
    ("per_exchange_ms", "per exchange", "{:.0f}"),
    ("link_share", "of the link", "{:.2f}"),
    ("allreduce_ms", "allreduce", "{:.0f}"),
    ("naive_ms", "Get_accumulate", "{:.0f}"),
    ("blocked_ms", "start blocks", "{:.1f}"),
    ("merge_ms", "merge", "{:.1f}"),
)


def run(params: int) -> list[dict[str, Any]]:
    """Every scenario in turn, on ``params`` float32 parameters. Times in ms.

    Raises:
        AGNError: a run failed, or this machine cannot have emulated hosts; the message says why.
    """
    rows = []
    with EmulatedHosts(2) as hosts:
        rows.append(_row(hosts, params, 2, link="fast"))
        rows.append(_row(hosts, params, 2, link="fast", overlap=True))
    with EmulatedHosts(2, rate=RATE) as hosts:
        rows += [_row(hosts, params, 2, link=RATE, wire=wire) for wire in (None, "bf16", "fp16", "int8")]
        rows.append(_row(hosts, params, 2, link=RATE, overlap=True))
        rows += [_row(hosts, params, 4, link=RATE, shards=shards) for shards in ([0], [0, 2])]
    with EmulatedHosts(6, rate=RATE) as hosts:  # two that only host, four that only train
        rows += [_row(hosts, params, 6, link=RATE, shards=shards, idle=[0, 1]) for shards in ([0], [0, 1])]
    return rows


def _row(
    hosts: EmulatedHosts,
    params: int,
    ranks: int,
    *,
    link: str,
    wire: str | None = None,
    shards: list[int] | None = None,
    overlap: bool = False,
    idle: Sequence[int] = (),
) -> dict[str, Any]:
    fast = link != RATE
    hosted_by = shards or [0]
    center = {"center_ranks": hosted_by, "wire_dtype": wire, "overlap": overlap}
    rounds, alone = bench.ROUNDS if fast else 1, not fast or overlap
    options = {"params": params, "center": center, "rounds": rounds, "alone": alone, "idle": list(idle)}
    found = bench.run_job(ranks, options, hosts)
    found |= {
        "what": "overlap" if overlap else "exchange",
        "hosts": len(hosts.names),
        "workers": ranks - len(idle),
        "shards": len(hosted_by),
        "wire": wire or "fp32",
    }
    found["link"] = link
    if not fast and ranks == 2 and wire is None and not overlap:
        # Each direction carries one copy of the parameters.
        found["link_share"] = 4 * params * 8 / 1e9 / (found["exchange_ms"] / 1e3)
    return found
