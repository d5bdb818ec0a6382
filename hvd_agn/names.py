"""Names of parameters, without what wrappers around a module put into them.

``torch.compile``, activation checkpoints and data-parallel wrappers rename parameters, some of them but not in
``state_dict``: what is saved with one is to be found without it.
"""

import difflib
from collections.abc import Collection, Sequence

_ANYWHERE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # names that a model's author avoids
_AROUND_ALL = "module."  # of DistributedDataParallel and others; a part of a model may well have this name


def plain(names: Sequence[str]) -> list[str]:
    """The names without wrappers' parts; as they are, should two become one."""
    found = [".".join(part for part in name.split(".") if part not in _ANYWHERE) for name in names]
    while found and all(name.startswith(_AROUND_ALL) for name in found):
        found = [name.removeprefix(_AROUND_ALL) for name in found]
    return found if len(set(found)) == len(names) and all(found) else list(names)


def match(expected: Sequence[str], found: Collection[str]) -> dict[str, str]:
    """Of each expected name: the one found that means the same, where there is one."""
    there = list(found)
    meanings = dict(zip(plain(there), there, strict=True))
    matched = {}
    for name, meaning in zip(expected, plain(expected), strict=True):
        if name in found:
            matched[name] = name
        elif meaning in meanings:
            matched[name] = meanings[meaning]
    return matched


def missing(name: str, expected: Sequence[str], found: Collection[str]) -> str:
    """That an expected name was not found, and what is there instead, if that can be told."""
    matched = match(expected, found).values()
    nearest = difflib.get_close_matches(name, [each for each in found if each not in matched], 1, 0.0)
    return f"{name!r} is missing" + (f"; {nearest[0]!r} is there instead" if nearest else "")
