"""Pushes that are refused: those above ``max_norm``, and how often a client speaks of it."""

import warnings

import numpy as np
import pytest
from exchanges import bound

from hvd_agn import Center, rules
from hvd_agn.errors import ConfigError, NonFiniteWarning, RuleOverflowWarning


def test_a_push_above_the_bound_is_refused(kernels):
    bound(Center)


def test_a_clipped_push_is_bounded_by_what_it_was():
    theta = np.zeros(100)
    center = Center([theta], rules.Add(clip_norm=1.0), max_norm=20.0)
    theta += 1
    assert center.exchange(1)
    np.testing.assert_allclose(theta, 0.1)
    theta += 3
    with pytest.warns(NonFiniteWarning, match="norm of 30, above max_norm"):
        assert not center.exchange(1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_in_the_background_and_with_gradients(overlap, gradients):
    """What is pushed has a norm of 20, then 20.2; in gradients mode of arrays that have had one."""
    theta = [np.zeros(400), np.zeros(3)]
    options = {"rule": rules.SGD(1.0), "accumulate": "gradients"} if gradients else {}
    center = Center(theta, **options, overlap=overlap, max_norm=20.0)
    client = center.arrays_client

    def push(amount):
        if gradients:
            client.accumulate([np.full(400, -amount), None])
        else:
            theta[0] += amount
        if not overlap:
            return client.exchange(2)
        client.start(2)
        theta[1] += 1  # of the next push, or dropped
        return client.finish()

    assert push(2.0)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
    center.pull()
    with pytest.warns(NonFiniteWarning, match=r"norm of 20\.2, above max_norm"):
        assert not push(2.02)
    for array, value in zip(theta, (1, 0), strict=True):
        np.testing.assert_array_equal(array, value)
    assert center.version == 1
    assert push(2.0)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 2)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_bounds_that_are_none(value):
    with pytest.raises(ConfigError, match=f"max_norm={value!r}: give a finite number above 0, or None"):
        Center([np.zeros(3)], max_norm=value)


def test_parameters_that_are_pushed_have_no_bound():
    with pytest.raises(ConfigError, match=r"max_norm=1: Elastic.* pushes parameters, not deltas"):
        Center([np.zeros(3)], rules.Elastic(0.5), max_norm=1)


# ---- how often it is told

KINDS = {
    NonFiniteWarning: (rules.Add(), np.nan, "] Center: 4 more exchanges were refused"),
    RuleOverflowWarning: (rules.Add(scale=1e300), 1e300, "overflowed in 4 more exchanges"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ["default", "always", "error", "ignore"])
def test_one_warning_and_then_a_number(kind, action, capsys):
    rule, far, summary = KINDS[kind]
    theta = np.zeros(3)
    center = Center([theta], rule)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter(action)
        for _ in range(5):
            theta[0] = far
            if action == "error":
                with pytest.raises(kind):
                    center.exchange(1)
            else:
                center.exchange(1)
            np.testing.assert_array_equal(theta, 0)
        assert [w.category for w in given] == ([kind] if action in ("default", "always") else [])
        assert all(w.filename == __file__ for w in given)
    assert summary not in capsys.readouterr().err
    center.close()
    assert (summary in capsys.readouterr().err) == (action in ("default", "always"))
