"""Exchanges in the background: updates that are refused, and calls that are not allowed meanwhile."""

import numpy as np
import pytest
from overlaps import land

from hvd_agn import Center
from hvd_agn.errors import NonFiniteError, NonFiniteWarning, UsageError


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_refused_snapshot(poison):
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    client = center.arrays_client
    theta += 1
    theta[7] = poison
    client.start(1)
    theta[7] = 0
    theta += 1
    with pytest.warns(NonFiniteWarning, match=r"the update of 'array 0' has a NaN or an Inf.*1 so far"):
        assert not client.finish()
    np.testing.assert_array_equal(theta, 0)  # what was done since is dropped too
    assert center.version == 0
    assert not client.started
    theta += 3
    client.start(1)
    assert client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 3)


def test_a_refused_snapshot_raises_if_asked_to():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True, on_nonfinite="raise")
    theta[7] = np.nan
    center.arrays_client.start(1)
    theta += 2
    with pytest.raises(NonFiniteError, match="left as they are"):
        center.arrays_client.finish()
    np.testing.assert_array_equal(np.delete(theta, 7), 2)
    center.pull()
    np.testing.assert_array_equal(theta, 0)


def test_what_is_poisoned_during_a_flight_is_refused_at_the_next():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    theta += 1
    center.arrays_client.start(1)
    theta[9] = np.nan
    assert center.arrays_client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
    with pytest.warns(NonFiniteWarning):
        assert not center.exchange(1)
    np.testing.assert_array_equal(theta, 1)


def test_what_is_not_allowed_during_a_flight():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    client = center.arrays_client
    theta += 1
    client.start(1)
    refused = {
        "exchange": lambda: client.exchange(1),
        "start": lambda: client.start(1),
        "pull": client.pull,
        "peek": client.peek,
        "forget": client.forget,
        "write_anchor": lambda: client.write_anchor(0, theta.copy()),
    }
    for name, call in refused.items():
        with pytest.raises(UsageError, match=rf"\[rank 0\] {name}\(\) while an exchange is under way.*call finish"):
            call()
    with pytest.raises(UsageError, match="under way"):
        center.exchange(1)
    assert client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)


def test_a_center_is_not_loaded_during_a_flight(tmp_path):
    """Refused before anything has changed."""
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    center.save(tmp_path / "c.safetensors")
    theta += 1
    center.arrays_client.start(1)
    land(center.arrays_client)
    with pytest.raises(UsageError, match=r"Center.load.* while an exchange is under way.*finish\(\)"):
        center.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
    center.arrays_client.finish()
    center.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(theta, 0)


def test_misuse():
    center = Center([np.zeros(3, np.float32)])
    with pytest.raises(UsageError, match=r"start\(\) needs a client made with overlap=True"):
        center.arrays_client.start(1)
    with pytest.raises(UsageError, match=r"finish\(\) without start\(\)"):
        center.arrays_client.finish()
    overlapping = Center([np.zeros(3, np.float32)], overlap=True).arrays_client
    with pytest.raises(ValueError, match="exchange after 0 steps: give a positive number"):
        overlapping.start(0)
    assert not overlapping.started
    assert overlapping.extra_bytes > center.arrays_client.extra_bytes
