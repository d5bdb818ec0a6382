"""AGNOptimizer(overlap=True): what may be done to an optimizer while its exchange is under way."""

import numpy as np
import pytest
import torch
from mailboxes import same
from training_overlap import assert_all, backward, center_of, count, network, settle, steps

from hvd_agn.errors import UsageError
from hvd_agn.torch import AGNOptimizer


def test_flush_pull_and_looks_during_a_flight():
    p, opt = count(2)
    steps(opt, 3)
    opt.step()  # the second flight
    with opt.center_weights():
        assert_all(p, 2)
    assert_all(p, 2)
    opt.step()
    with opt.center_weights():
        assert_all(p, 2)
    assert_all(p, 3)
    opt.step()
    opt.step()
    opt.pull()  # ends the third flight and drops one step
    assert_all(p, 3)
    opt.step()
    opt.step()
    assert opt.stats()["exchanges"] in (3, 4)
    opt.flush()
    assert_all(p, 4)
    assert_all(center_of(opt), 4)
    assert opt.center.version == 4


def test_a_load_ends_the_flight(tmp_path):
    p, opt = count(2)
    opt.center.save(tmp_path / "c.safetensors")
    opt.step()
    opt.step()
    opt.center.load(tmp_path / "c.safetensors")
    assert_all(p, 0)
    assert_all(center_of(opt), 0)
    opt.step()
    opt.flush()
    assert_all(center_of(opt), 1)


@pytest.mark.parametrize("before", ["flush", "in flight", "between"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(before, tmp_path):
    model = network()
    opt = AGNOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), 3, overlap=True)

    def train(model, opt, first, last):
        for step in range(first, last):
            backward(model, step)
            opt.step()
            settle(opt)

    train(model, opt, 0, 8 if before == "between" else 9)
    assert opt._worker.client.started == (before != "between")
    if before == "flush":
        opt.flush()
    under_way, parameters = opt._worker.client.started, [p.detach().clone() for p in model.parameters()]
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "worker.pt")
    assert opt._worker.client.started == under_way
    same([p.detach() for p in model.parameters()], parameters)
    opt._worker.land()  # as loading will
    opt.center.save(tmp_path / "c.safetensors")
    train(model, opt, 9, 20)
    opt.flush()

    again = network(seed=5)
    resumed = AGNOptimizer(torch.optim.Adam(again.parameters(), lr=0.5), 3, overlap=True)
    train(again, resumed, 0, 3)  # and is itself in flight when it is loaded
    resumed.center.load(tmp_path / "c.safetensors")
    saved = torch.load(tmp_path / "worker.pt")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 9, 20)
    resumed.flush()
    same([p.detach() for p in again.parameters()], [p.detach() for p in model.parameters()])
    same(resumed.center.snapshot().values(), opt.center.snapshot().values())


def test_close_during_a_flight_pushes_everything():
    p, opt = count(2)
    arrays = [np.zeros(300, np.float32)]
    watch = opt.center.client(arrays)
    for _ in range(5):
        opt.step()
    seen = []
    close = type(watch).close

    def look_and_close(client):
        if client is watch:
            client.pull()
            seen.append(arrays[0].copy())
        close(client)

    watch.close = lambda: look_and_close(watch)
    opt.close()
    assert_all(seen[0], 3)
    assert_all(p, 3)
    opt.close()
    with pytest.raises(UsageError, match="used after close"):
        opt.step()
    opt.optimizer.step()
    assert_all(p, 4)


def test_several_optimizers():
    """Each with a flight of its own."""
    pairs = [count(period, name=f"count {period}") for period in (1, 2, 3)]
    for _ in range(12):
        for _, opt in pairs:
            opt.step()
    for (p, opt), expected in zip(pairs, (12, 6, 4), strict=True):
        opt.flush()
        assert_all(p, expected)
        assert_all(center_of(opt), expected)
