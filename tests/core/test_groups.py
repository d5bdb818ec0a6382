"""rules.Groups, and a learning rate per group: against the reference, bit for bit, on every way to the center."""

import numpy as np
import pytest
from mailboxes import meet, same, wait_until
from ranks import on_ranks
from reference import GradientsClient, ReferenceBlocks

from hvd_agn import Center, checkpoint, config, rules
from hvd_agn.errors import CheckpointError, ConfigError, LayoutError, UsageError
from hvd_agn.rules import Groups

SIZES = [600, 40, 0, 1024, 7, 256, 3]  # some blocks of 1024 bytes belong to one array, some to several
GROUPS = [0, 1, 2, 1, 0, 2, 2]
FOLLOW = "follow"
RULES = [
    rules.SGD(FOLLOW, 0.9, nesterov=True, weight_decay=0.1),  # one rule, three learning rates
    Groups([rules.SGD(FOLLOW, 0.9, weight_decay=0.1), rules.SGD(FOLLOW), rules.SGD(0.3, 0.5, dampening=0.2)]),
    Groups([rules.SGD(0.3), rules.SGD(FOLLOW, weight_decay=0.1), rules.SGD(0.1)]),
    Groups([rules.Adam(FOLLOW), rules.AdamW(FOLLOW, (0.5, 0.7)), rules.Adam(0.1, eps=1e-3, weight_decay=0.1)]),
    Groups([rules.AdamW(0.1, weight_decay=w, gap_aware=True, staleness="sqrt") for w in (0.0, 0.3, 0.1)]),
    Groups([rules.Adagrad(FOLLOW, initial_accumulator_value=s, lr_decay=s) for s in (0.1, 0.2, 0.5)]),
    Groups([rules.RMSprop(FOLLOW, momentum=m, eps_inside_root=m > 0) for m in (0.0, 0.5, 0.0)]),
    Groups(
        [rules.RMSprop(0.1, centered=True, initial_square_avg=s, alpha=a) for s, a in ((1, 0.9), (2, 0.5), (3, 0.7))]
    ),
    Groups([rules.Lion(FOLLOW, weight_decay=w) for w in (0.0, 0.1, 0.2)]),
    Groups([rules.DelayedNesterov(FOLLOW, 0.5, n) for n in (1, 2, 3)]),
]


def in_turn(comm, rule, dtype, seed, overlap=False, **options):
    """Each rank pushes in its turn; every rank follows all of them with the reference."""
    rng = np.random.default_rng(seed)
    initial = [rng.standard_normal(n).astype(dtype) for n in SIZES]
    reference = ReferenceBlocks(initial, rule, config.BLOCK_BYTES.read(), GROUPS)
    theirs = [GradientsClient(reference, [dtype] * len(SIZES)) for _ in range(comm.size)]
    ours = [a.copy() for a in initial]
    with Center(ours, rule, comm, groups=GROUPS, accumulate="gradients", overlap=overlap, **options) as center:
        client = center.arrays_client
        meet(comm)  # all have received it
        for turn in range(3 * comm.size):
            gradients = [rng.standard_normal(n).astype(dtype) if rng.random() < 0.8 else None for n in SIZES]
            rates = [float(rate) for rate in rng.random(3)]
            expected, lr = theirs[turn % comm.size], rates if rule.follows else None
            expected.accumulate(gradients)
            (expected.start if overlap else expected.exchange)(1 + turn % 3, lr)
            if overlap:
                expected.finish()
            if turn % comm.size == comm.rank:
                client.accumulate(gradients)
                (client.start if overlap else client.exchange)(1 + turn % 3, lr=lr)
                if overlap:
                    wait_until(lambda: client.ready, "the exchange in the background")
                    client.finish()
            meet(comm)
            values, slots, _ = center._read()
            same(values.values(), reference.center)
            same(ours, theirs[comm.rank].arrays)
            for name, arrays in slots.items():
                same(arrays.values(), reference.slots[name])
            meet(comm)


def test_one_rank(kernels):
    from mpi4py import MPI

    for seed, rule in enumerate(RULES):
        for dtype in ("f4", "f8", "f2"):
            in_turn(MPI.COMM_WORLD, rule, dtype, seed)
        in_turn(MPI.COMM_WORLD, rule, "f4", seed, overlap=True)


def several_ranks():
    """Two ranks, then all four: through shared memory, and through mailboxes."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    # One center at a time: Open MPI 4 names the files of windows alike for communicators that have no rank in common.
    pair = world.Split(0 if world.rank < 2 else MPI.UNDEFINED)
    for comm, hosts, transport in ((pair, [1, 0], "mailbox"), (world, [2], "auto"), (world, [2, 0], "mailbox")):
        for seed, rule in enumerate(RULES if comm != MPI.COMM_NULL else []):
            how = {"transport": transport, "center_ranks": hosts, "overlap": seed % 3 == 0}
            in_turn(comm, rule, ("f4", "f8")[seed % 2], seed, **how)
        meet(world)
    differ(world)
    return "done"


def differ(comm):
    """Ranks must agree on the groups and their rules, not on the learning rates that are followed."""
    arrays = {"w": np.zeros(3), "b": np.zeros(2)}
    two = {"w": 0, "b": 1}
    decay = 0.5 if comm.rank == 2 else 0.25
    said = r'"rule of group 1", "AdamW\(.*weight_decay=0.5.* here, .*weight_decay=0.25.* on rank 0'
    with pytest.raises(LayoutError, match=rf"\[rank 2\] .*{said}"):
        Center(arrays, Groups([rules.AdamW(), rules.AdamW(weight_decay=decay)]), groups=two)
    with pytest.raises(LayoutError, match=r'\["group of w", 1\] here, \["group of w", 0\] on rank 0'):
        Center(arrays, rules.SGD(FOLLOW), groups=two if comm.rank != 3 else {"w": 1, "b": 0})
    with Center(arrays, rules.SGD(FOLLOW), groups=two) as center:
        arrays["w"] += 1
        arrays["b"] += 1
        center.exchange(1, lr=[comm.rank + 1, 0.5])
        meet(comm)
        same(center.snapshot().values(), [np.full(3, 10.0), np.full(2, 2.0)])
        meet(comm)


def test_several_ranks():
    assert on_ranks(4, several_ranks, env={"HVD_AGN_BLOCK_BYTES": "1024"}) == ["done"] * 4


def test_updates_of_groups_by_hand():
    w, b, c = np.zeros(300, "f4"), np.zeros(2), np.zeros(200, "f4")
    rule = Groups([rules.Add(1.0), rules.Add(0.5)])
    with Center({"w": w, "b": b, "c": c}, rule, groups={"b": 1, "c": np.int64(0), "w": 0}) as center:
        for array in (w, b, c):
            array += 8
        center.exchange(2)
        same((w, b, c), (np.full(300, 4.0), np.full(2, 2.0), np.full(200, 4.0)))
        assert center.groups == 2
    one, two = np.zeros(1), np.zeros(1)
    with Center(
        [one, two], Groups([rules.Add(1.0, clip_norm=5), rules.Add(0.5, clip_norm=5)]), groups=[0, 1]
    ) as center:
        one += 6
        two += 8
        center.exchange(1)  # of norm 10
        np.testing.assert_allclose((one[0], two[0]), (3, 2), rtol=1e-15)
    with Center([w, b], rules.SGD(0.5), groups=[0, 1]) as center:  # no difference
        assert center.groups == 1


def test_files_of_rules_with_the_same_slots(tmp_path):
    theta = np.zeros(3)
    with Center([theta], rules.SGD(1.0, 0.5)) as center:
        theta += 1
        center.exchange(1)
        center.save(tmp_path / "center")
    two = [np.zeros(3)]
    rule = Groups([rules.SGD(1.0), rules.SGD(1.0, 0.5)])
    with Center(two, rule, groups=[1]) as center:
        center.load(tmp_path / "center")
        two[0] += 1
        center.exchange(1)
        np.testing.assert_array_equal(two[0], 1 + 1.5)
        center.save(tmp_path / "groups")
    planes, version, _ = checkpoint.read(tmp_path / "groups", {"array 0": ((3,), "float64")}, ("momentum",))
    assert version == 2
    np.testing.assert_array_equal(planes[1][0], -1.5)
    with Center(two, rules.Adam()) as center, pytest.raises(CheckpointError, match="exp_avg"):
        center.load(tmp_path / "groups")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Groups([]), r"rules.Groups: rules=\[\]: give one for each group"),
        (lambda: Groups(rules.Add()), r"rules=Add\(scale=1.0\): give one for each group"),
        (lambda: Groups([Groups([rules.Add()])]), r"rules=\[Groups\(Add\(scale=1.0\)\)\]: give one for each group"),
        (lambda: Groups([rules.SGD(0.1), rules.Adam()]), r"Adam\(.*\) and SGD\(.*\) keep different slots"),
        (lambda: Groups([rules.Add(), rules.SGD(0.1)]), "keep different slots at the center: give rules of one kind"),
        (lambda: Groups([rules.RMSprop(momentum=0.5), rules.RMSprop(centered=True)]), "keep different slots"),
        (lambda: Groups([rules.RMSprop(), rules.RMSprop(centered=True)]), "keep different slots"),
        (lambda: Groups([rules.Custom(len, "m"), rules.Custom(len, "v")]), "keep different slots"),
        (lambda: Groups([rules.Add(), rules.Add(clip_norm=1)]), r"clip_norm=\[None, 1.0\]: it concerns whole pushes"),
        (lambda: Groups([rules.Add(gap_aware=True), rules.Add()]), r"gap_aware=\[True, False\]: it concerns"),
        (lambda: Center([np.zeros(3)], Groups([rules.Add(), rules.Add()])), "needs groups=: the number of each array"),
    ],
)
def test_groups_that_are_none(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0], r"groups=\[0\]: give a number for each of the 2 arrays"),
        ([0, 1, 1], "give a number for each of the 2 arrays"),
        ({"a": 0}, r"groups=\{'a': 0\}: give a number for each of the 2 arrays"),
        ({"a": 0, "c": 1}, "give a number for each of the 2 arrays"),
        ([0, 2], "groups: 'b' is in 2: give a number from 0 to 1"),
        ([-1, 1], "groups: 'a' is in -1: give a number from 0 to 1"),
        ([0, 1.0], "groups: 'b' is in 1.0: give a number from 0 to 1"),
        ([0, True], "groups: 'b' is in True: give a number from 0 to 1"),
    ],
)
def test_arrays_in_no_group(groups, message):
    with pytest.raises(ConfigError, match=message):
        Center({"a": np.zeros(3), "b": np.zeros(3)}, Groups([rules.Add(), rules.Add()]), groups=groups)


def test_learning_rates_for_groups():
    arrays = [np.zeros(2), np.zeros(2)]
    with Center(arrays, rules.SGD(FOLLOW), groups=[0, 1]) as center:
        for lr, message in (
            ([0.1], r"lr=\[0.1\]: give one number, or one for each of the 2 groups"),
            ([0.1, float("nan")], "give a finite number, 0 or more"),
            ([0.1, -1], "give a finite number, 0 or more"),
            ("12", "lr='12': give a finite number"),
            (None, r"SGD\(lr='follow'.* needs the worker's learning rate: give lr="),
        ):
            with pytest.raises(UsageError, match=message):
                center.exchange(1, lr=lr)
        for array in arrays:
            array += 1
        center.exchange(1, lr=0.5)  # of both
        same(arrays, [np.full(2, 0.5)] * 2)
