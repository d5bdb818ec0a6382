"""Train a small convolutional network on handwritten digits, asynchronously.

    mpirun -np 4 python examples/torch_mnist.py

Every rank trains on its own share of the digits with its own Adam; every ``--period`` steps it exchanges with the
center. Lines marked AGN are all that a script for one process needs to change.
"""

import digits
import torch
from torch import nn

import hvd_agn.torch as agn  # AGN


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


def main() -> None:
    args = digits.arguments(__doc__, epochs=40).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train_x, train_y, test_x, test_y = (torch.from_numpy(part) for part in digits.load(args.data))

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
    rank, size = optimizer.center.rank, optimizer.center.size  # AGN
    torch.manual_seed(args.seed + rank)
    share_x, share_y = train_x[rank::size, None], train_y[rank::size]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    def center_accuracy() -> float:
        with optimizer.center_weights():  # AGN
            return accuracy(model, test_x[:, None], test_y)

    run = digits.Run(digits.world(), args, len(share_y) // args.batch)
    for _ in range(args.epochs):
        order = torch.randperm(len(share_y))
        for batch in order[: run.steps * args.batch].split(args.batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(share_x[batch]), share_y[batch])
            loss.backward()
            optimizer.step()
            run.advance(1, loss.item, optimizer.stats)
        schedule.step()
        if rank == 0:
            run.measured(center_accuracy())

    optimizer.flush()  # AGN: what was not yet pushed
    run.report(optimizer.stats(), center_accuracy, len(test_y))


if __name__ == "__main__":
    main()
