"""What should be alike on all ranks and is not the center's, so that nothing makes it so: compared with rank 0's."""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_ROW = 1024  # words


class Facts(NamedTuple):
    """A rank's, to be sent: texts."""

    values: Mapping[str, str] = {}
    """What it is -> its value, or its checksum."""
    nameless: Mapping[str, tuple[str, str]] = {}
    """Place of an exchanged array that is known by its place alone -> its type and shape, its checksum."""


def checksum(data: np.ndarray, kind: str = "") -> str:
    """For telling arrays apart, at the speed of memory.

    Args:
        data: contiguous, uint8, one dimension: an array's bytes.
        kind: its type and shape.
    """
    whole = data.nbytes // (8 * _ROW) * (8 * _ROW)
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, _ROW), axis=0, dtype=np.uint64)
    code = zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes(), zlib.crc32(kind.encode())))
    return f"{kind} of checksum {code:08x}".lstrip()


def misplaced(mine: Facts, first: Facts, root: str) -> str | None:
    """Why this rank's nameless arrays cannot be in rank 0's order, although types and shapes agree.

    They are the same arrays if their values are: then another order of the same values is another order of the arrays.
    Ranks that were seeded differently, or of which rank 0 alone has loaded a file, have no value in common, and say
    nothing of their order: :func:`differences`. Only a whole group of one shape is compared. Single equal values are no
    evidence: biases that are all zero on a fresh rank equal any that rank 0's file has left at zero.
    """
    for places, ours, theirs in _groups(mine, first):
        if ours != theirs and sorted(ours) == sorted(theirs):
            place, other = next((p, ours.index(t)) for p, o, t in zip(places, ours, theirs, strict=True) if o != t)
            return (
                f"{places[other]} here has the values of {place} on {root}: the parameters come in another order, as "
                "from a set. Give them in one order on every rank: from a list, or sorted by name."
            )
    return None


def differences(mine: Facts, first: Facts, root: str) -> list[str]:
    """What is not as on rank 0, which messages call ``root``: the first value, and an order that nobody can tell."""
    return [text for text in (_difference(mine, first, root), _unknown(mine, first, root)) if text]


def _unknown(mine: Facts, first: Facts, root: str) -> str | None:
    """That it cannot be told whether nameless arrays of one shape come in rank 0's order."""
    for places, ours, theirs in _groups(mine, first):
        if sorted(ours) != sorted(theirs):
            return (
                f"{places[0]} and {places[1]} have one shape and no names, and this rank begins with other values than "
                f"{root}: if it has them in another order, as from a set, layers are mixed up and nobody can tell. "
                "Give named_parameters=model.named_parameters(): then it is checked."
            )
    return None


def _difference(mine: Facts, first: Facts, root: str) -> str | None:
    """The first value that is not rank 0's."""
    for name in {**mine.values, **first.values}:
        here, there = (facts.values.get(name, "not there") for facts in (mine, first))
        if here != there:
            return (
                f"{name} is {here} here and {there} on {root}. The center does not hold it, so it stays different. "
                "Make it equal on all ranks, by one seed or one file, or filter this warning if it is to differ."
            )
    return None


def _groups(mine: Facts, first: Facts) -> list[tuple[list[str], list[str], list[str]]]:
    """Of each type and shape that several arrays have: their places, and the checksums here and on rank 0."""
    by_kind: dict[str, list[str]] = {}
    for place, (what, _) in mine.nameless.items():
        if place in first.nameless:
            by_kind.setdefault(what, []).append(place)
    return [
        (places, [mine.nameless[p][1] for p in places], [first.nameless[p][1] for p in places])
        for places in by_kind.values()
        if len(places) > 1
    ]
