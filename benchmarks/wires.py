"""Does a rounding wire cost accuracy? The example across two emulated hosts, for every wire and several seeds.

    python benchmarks/wires.py [--seeds 0,1,2] [--epochs N] [--json FILE]

Needs root and iproute2, an MPI with one-sided communication over TCP, and about a minute per run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from hvd_agn import config
from hvd_agn.tools import bench, launch
from hvd_agn.tools.hosts import EmulatedHosts

EXAMPLE = str(Path(__file__).parents[1] / "examples/torch_mnist.py")
COLUMNS: bench.Columns = (
    ("wire", "wire", "{}"),
    ("accuracy", "mean accuracy", "{:.4f}"),
    ("lowest", "lowest", "{:.4f}"),
    ("highest", "highest", "{:.4f}"),
    ("points", "points from fp32", "{:+.2f}"),
)


def accuracy(hosts: EmulatedHosts, wire: str | None, seed: int, epochs: int | None) -> float:
    """Of the center on the held-out digits, after the example's run on two ranks of each host."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, EXAMPLE, "--seed", str(seed), "--report", folder]
        command += ["--wire-dtype", wire] if wire else []
        command += ["--epochs", str(epochs)] if epochs else []
        done = launch.run_ranks(4, command, timeout=600, hosts=hosts)
        if done.returncode != 0:
            sys.exit(done.stderr)
        return json.loads((Path(folder) / "report.json").read_text())["accuracy"]


def main() -> None:
    """Run it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, help="of each run, instead of the example's own number")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = []
    with EmulatedHosts(2) as hosts:
        for wire in config.WIRES:
            found = [accuracy(hosts, wire, seed, args.epochs) for seed in seeds]
            mean = statistics.mean(found)
            rows.append({"wire": wire or "fp32", "accuracy": mean, "lowest": min(found), "highest": max(found)})
            rows[-1] |= {"points": 100 * (mean - rows[0]["accuracy"]), "seeds": seeds, "accuracies": found}
    print(bench.table(rows, COLUMNS))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
