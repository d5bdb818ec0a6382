"""The rooms of csrc/: an include points into its own room, or down."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ROOMS = ["python", "tensorflow", "center", "mailbox", "shard", "kernels", "mpi"]  # each knows those after it


def upward(includes):
    """Of (file, included file), both from csrc/ on: those that point up, or to no room."""
    room = {name: place for place, name in enumerate(ROOMS)}
    return [
        f"{file} includes {included}"
        for file, included in includes
        if room.get(included.split("/")[0], -1) < room[file.split("/")[0]]
    ]


def test_includes_point_down():
    files = [path for path in sorted(CSRC.rglob("*")) if path.is_file()]
    assert {path.parent.name for path in files} == set(ROOMS)
    includes = [
        (str(path.relative_to(CSRC)), included)
        for path in files
        for included in re.findall(r'^ *# *include "(.+)"', path.read_text(), re.M)
    ]
    assert len(includes) > 40
    assert upward(includes) == []


@pytest.mark.parametrize("included", ["center/exchange.hpp", "exchange.hpp"])
def test_an_include_that_points_up_is_named(included):
    includes = [("shard/shard.cpp", included), ("shard/shard.cpp", "shard/layout.hpp")]
    assert upward(includes) == [f"shard/shard.cpp includes {included}"]
