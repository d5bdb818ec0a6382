"""Exchanges by mailbox between ranks of one machine: conservation, the reference, refusals, files."""

import pytest
from exchanges import ONE_BLOCK, conserve, interleave_all, move_about, refuse
from ranks import on_ranks


@pytest.mark.parametrize(
    ("ranks", "exchanges", "variants"),
    [
        (2, 30, [([0], 8, None, False), ([1], 1, None, False), ([1, 0], 2, None, False), ([0, 1], 2, None, True)]),
        (2, 30, [([0], 1, None, True), ([1], 8, None, True), ([0, 1], 8, ONE_BLOCK, False)]),
        (4, 15, [([0, 2], 2, None, False), ([0, 1, 2, 3], 1, None, True), ([3, 0, 1, 2], 8, ONE_BLOCK, False)]),
        (16, 3, [([0], 2, None, False), (list(range(16)), 8, None, True), (list(range(16)), 1, ONE_BLOCK, False)]),
    ],
)
def test_nothing_is_lost(ranks, exchanges, variants):
    on_ranks(ranks, conserve, exchanges, variants)


@pytest.mark.parametrize(("how", "ring"), [("asleep", "8"), ("busy", "2")])
def test_a_host_that_does_nothing_gives_what_the_reference_gives(how, ring, tmp_path):
    """Asleep, or busy in pure Python: no bit differs."""
    on_ranks(2, interleave_all, how, str(tmp_path), env={"HVD_AGN_RING_BLOCKS": ring})


def test_what_is_not_finite_is_refused(tmp_path):
    on_ranks(2, refuse, str(tmp_path))


def test_a_saved_center_goes_on_elsewhere(tmp_path):
    on_ranks(3, move_about, str(tmp_path))
