"""Whatever the rule, the shapes, the types, the workers and the order of what they do: as the reference, bit for bit.

A case is drawn as plain lists and numbers, so that ranks of other processes can be given it.
"""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mailboxes import add_integers, at_a_worker, meet
from ranks import on_ranks
from reference import RULES, GradientsClient, ReferenceBlocks, ReferenceCenter, ReferenceClient, narrow, wide

from hvd_agn import Center, rules

BLOCK_BYTES = 256  # 64 float32, or 32 float64
SETTINGS = {"HVD_AGN_BLOCK_BYTES": str(BLOCK_BYTES), "HVD_AGN_RING_BLOCKS": "3"}
SHAPES = st.one_of(
    st.sampled_from([0, 1, 31, 32, 33, 48, 63, 64, 65, 128, 200]).map(lambda n: [n]),
    st.lists(st.integers(0, 12), max_size=3),
)
LEARNING_RATE = 0.25  # of every worker, where a rule follows it
drawn = functools.partial(settings, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def blocks_of_a_few_elements(small_blocks, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@st.composite
def cases(draw, gradients, dtypes=("f4", "f8", "f2", "bf16"), clients=None):
    taken = [i for i, rule in enumerate(RULES) if not (gradients and isinstance(rule, (rules.Add, rules.Elastic)))]
    index = draw(st.sampled_from(taken))
    changes = {"staleness": draw(st.sampled_from(["none", "inverse", "sqrt"]))}
    if not isinstance(RULES[index], rules.Elastic):
        changes["clip_norm"] = draw(st.sampled_from([None, None, 0.5, 10.0]))
    if hasattr(RULES[index], "lr") and draw(st.booleans()):
        changes["lr"] = "follow"
    arrays = draw(st.lists(st.tuples(SHAPES, st.sampled_from(dtypes)), min_size=1, max_size=6))
    clients = clients or draw(st.integers(1, 4))
    event = st.fixed_dictionaries(
        {
            "who": st.integers(0, clients - 1),
            "trained": st.lists(st.booleans(), min_size=len(arrays), max_size=len(arrays)),
            "then": st.sampled_from(["exchange", "exchange", "exchange", "go on", "pull"]),
            "steps": st.sampled_from([1, 2, 3, 7, 10, 49, 0.5]),
        }
    )
    return {
        "gradients": gradients,
        "rule": index,
        "changes": changes,
        "shapes": [shape for shape, _ in arrays],
        "dtypes": [dtype for _, dtype in arrays],
        "clients": clients,
        "events": draw(st.lists(event, min_size=1, max_size=10)),
        "seed": draw(st.integers(0, 999)),
    }


class Parameter:
    """An array as the core is given it; bfloat16 is torch's."""

    def __init__(self, values, dtype):
        self.dtype = dtype
        self.native = np.array(values)
        if dtype == "bf16":
            import torch

            self.native = torch.from_numpy(self.native).bfloat16()

    def read(self):
        return self.native.float().numpy() if self.dtype == "bf16" else self.native

    def add(self, update):
        values = narrow(wide(self.read()) + wide(update), self.dtype)
        if self.dtype == "bf16":
            import torch

            self.native.copy_(torch.from_numpy(values))
        else:
            self.native[...] = values


def as_the_reference(case, make, rank=None, turn=lambda: None, remote=False):
    """Play a case; after each event all that can be seen equals the reference.

    ``rank``: the one of the case's workers that this process is, of others on other ranks; None: it is all of them.
    ``turn``: waits for those others. ``remote``: hosts are reached by mailbox.
    """
    rng = np.random.default_rng(case["seed"])
    rule = dataclasses.replace(RULES[case["rule"]], **case["changes"])
    if rule.gap_aware and remote and len(set(case["dtypes"])) > 1:
        rule = dataclasses.replace(rule, gap_aware=False)  # a host remembers blocks of mixed types unrounded
    gradients, shapes, dtypes = case["gradients"], case["shapes"], case["dtypes"]
    lr = LEARNING_RATE if rule.follows else None

    def values():
        return [narrow(rng.standard_normal(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    initial = values()
    reference = ReferenceBlocks(initial, rule, BLOCK_BYTES) if gradients else ReferenceCenter(initial, rule)
    theirs = [(GradientsClient if gradients else ReferenceClient)(reference, dtypes) for _ in range(case["clients"])]
    ours = {
        who: [Parameter(*pair) for pair in zip(initial, dtypes, strict=True)]
        for who in (range(case["clients"]) if rank is None else [rank])
    }
    first, *others = ours
    given = {who: [p.native for p in parameters] for who, parameters in ours.items()}
    with make(given[first], rule, accumulate="gradients" if gradients else "updates") as center:
        native = {first: center.arrays_client} | {who: center.client(given[who]) for who in others}
        equal = functools.partial(alike, exact=rule.clip_norm is None)
        turn()  # a worker begins with the center as it is by then
        for event in case["events"]:
            who, trained = event["who"], event["trained"]
            expected = theirs[who]
            updates = [u if t or gradients else np.zeros_like(u) for u, t in zip(values(), trained, strict=True)]
            pushed = [g if t else None for g, t in zip(values(), trained, strict=True)]
            for theta, update, dtype in zip(expected.arrays, updates, dtypes, strict=True):
                theta[...] = narrow(wide(theta) + wide(update), dtype)
            if gradients:
                expected.accumulate(pushed)
            if event["then"] == "exchange":
                expected.exchange(event["steps"], lr)
            elif event["then"] == "pull":
                expected.pull()
            if who in ours:
                for parameter, update in zip(ours[who], updates, strict=True):
                    parameter.add(update)
                if gradients:
                    native[who].accumulate(
                        [g if g is None else Parameter(g, t).native for g, t in zip(pushed, dtypes, strict=True)]
                    )
                if event["then"] == "exchange":
                    assert native[who].exchange(event["steps"], lr=lr)
                elif event["then"] == "pull":
                    native[who].pull()
                equal([p.read() for p in ours[who]], expected.arrays)
                assert native[who].power == expected.power
                if gradients:
                    equal(native[who].accumulators(), expected.sums)
                    assert native[who].touched == expected.touched
            turn()
            center_values, slots, version = center._read()
            equal(center_values.values(), reference.center)
            assert slots.keys() == reference.slots.keys()
            for name, arrays in slots.items():
                equal(arrays.values(), reference.slots[name])
            assert (center.version, version) == (min(reference.counts), max(reference.counts))
            turn()


def alike(actual, expected, exact):
    """A norm is a sum in some order, in float64: with one, float64 arrays may differ in their last bits."""
    for a, e in zip(actual, expected, strict=True):
        if exact or a.dtype != np.float64:
            np.testing.assert_array_equal(a, e)
        else:
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-12)


@drawn(max_examples=250)
@given(case=st.booleans().flatmap(cases))
def test_in_shared_memory(case):
    as_the_reference(case, functools.partial(Center, transport="direct"))


def by_mailbox(folder, gradients):
    def drive(host):
        @drawn(max_examples=30, phases=[Phase.generate])  # a host has a thread for each center until the job ends
        @given(case=cases(gradients))
        def check(case):
            as_the_reference(case, host.center, remote=True)

        check()
        return "done"

    return at_a_worker(folder, drive)


@pytest.mark.parametrize("gradients", [False, True])
def test_by_mailbox(gradients, tmp_path):
    assert on_ranks(2, by_mailbox, str(tmp_path), gradients) == [None, "done"]


# ---- on several ranks


@st.composite
def jobs(draw):
    ranks = draw(st.integers(2, 4))
    halves = ("f4", "f8", "f2")  # torch takes longer to import than all of this
    return {
        "ranks": ranks,
        "hosts": draw(st.permutations(range(ranks)))[: draw(st.integers(1, ranks))],
        "in turn": [draw(cases(gradients, halves, ranks)) for gradients in (False, False, True)],
        "all at once": draw(st.lists(st.tuples(SHAPES, st.sampled_from(halves)), min_size=1, max_size=6)),
        "seed": draw(st.integers(0, 999)),
    }


def play(job, transport):
    """Ranks that take turns, and then ranks that do not and push integers: the center is their exact sum."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    make = functools.partial(Center, center_ranks=job["hosts"], transport=transport)

    turn = functools.partial(meet, comm)
    for case in job["in turn"]:
        as_the_reference(case, make, comm.rank, turn, remote=transport == "mailbox")

    rng = np.random.default_rng([job["seed"], comm.rank])
    arrays = [np.zeros(shape, dtype) for shape, dtype in job["all at once"]]
    exchanges = int(rng.integers(0, 40))
    with make(arrays) as center:
        add_integers(center, arrays, exchanges, rng)
        assert center.version == comm.allreduce(exchanges)


@pytest.mark.parametrize("transport", ["direct", "mailbox"])
def test_on_several_ranks(transport):
    @drawn(max_examples=4, phases=[Phase.generate])  # a smaller case would take minutes to find
    @given(job=jobs())
    def check(job):
        on_ranks(job["ranks"], play, job, transport)

    check()
