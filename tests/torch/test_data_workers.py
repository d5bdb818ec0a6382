"""Workers that load data: started as copies of the rank, or as fresh interpreters, which import the script again."""

import sys

from hvd_agn.tools import launch

SCRIPT = """
import torch
import hvd_agn.torch as agn


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.ones(3)


def main():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = agn.AGNOptimizer(torch.optim.SGD([p], lr=1.0), 4, normalize=False)
    steps = 0
    for context in ("spawn", "fork"):
        optimizer.center.barrier()  # as the README's recipe does
        for x in torch.utils.data.DataLoader(Ones(), num_workers=1, multiprocessing_context=context):
            optimizer.zero_grad()
            (-p * x).sum().backward()
            optimizer.step()
            steps += 1
    optimizer.flush()
    optimizer.center.barrier()
    center = optimizer.center.snapshot()["param_groups[0].params[0]"]
    print("rank", optimizer.center.rank, "took", steps, "steps, center", *center, flush=True)


if __name__ == "__main__":
    main()
"""


def test_workers_of_both_kinds(tmp_path):
    """Each step adds 1: all that both ranks took are in the center, seen by both after the barrier."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch.run_ranks(2, [sys.executable, str(tmp_path / "script.py")], timeout=100)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} took 12 steps, center 24.0 24.0 24.0\n" in done.stdout
