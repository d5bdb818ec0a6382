"""The center, free of any framework: arrays are NumPy's or anything with DLPack.

No array data is touched here. The work is in the native core: ``csrc/center/exchange.cpp`` for a worker's end,
``csrc/center/center.cpp`` for the shared memory.
"""

import itertools
import json
import operator
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from . import _core, alike, checkpoint, config, mpi, rules, shutdown
from .client import Client, Stats, register
from .errors import (
    AGNError,
    CheckpointError,
    ConfigError,
    LaunchError,
    LayoutError,
    SharedMemoryError,
    StallError,
    UsageError,
)

if TYPE_CHECKING:
    from mpi4py import MPI

_NO_FACTS = alike.Facts()
_CREATING = "waits for the other ranks to create their centers"

Arrays = Mapping[str, Any] | Sequence[Any]
T = TypeVar("T")


class Owner(Protocol):
    """An optimizer that trains on a center's arrays."""

    def before_close(self, failed: bool) -> None:
        """The center is about to close: push what is left. ``failed``: this rank ends with an error."""

    def before_load(self) -> None:
        """The center is about to be loaded: end what is under way, or raise UsageError if that makes no sense now."""

    def pull(self) -> None:
        """Take over the center."""

    def loaded(self) -> None:
        """Take over the center: it was loaded."""

    def closed(self) -> None:
        """The center has closed."""


class Center:
    """Shared parameters in memory that their hosts expose, and this rank's client of them.

    Construction is collective; afterwards no rank waits for another, except in :meth:`load`, :meth:`barrier` and at
    exit. All ranks start from rank 0's values. Ranks on a host's node work on its memory; the others send it messages
    (one-sided puts), which a thread of the host's process answers whatever its Python does.

    Args:
        arrays: name -> array, or a sequence of arrays. float32, float64, float16 or bfloat16, any shape, C-contiguous,
            writable, on the CPU; the same names and shapes on every rank. They are updated in place, and must stay
            where they are (or :meth:`Client.rebind`). The center holds float64 as float64, all others as float32.
        rule: what the center does with a delta; None is ``rules.Add()``. ``rules.Groups`` has one for each group.
        groups: the number of each array's group, by name or in the arrays' order, the same on every rank: which rule of
            ``rules.Groups`` is the array's, and which learning rate of a push with ``lr="follow"``. None: all are in
            group 0.
        comm: mpi4py communicator, duplicated here; None is ``MPI.COMM_WORLD``.
        center_ranks: ranks that host the center, an equal part of its blocks (a shard) each; or ``"nodes"``: the first
            rank of every node.
        transport: ``"auto"``: shared memory where a rank is on the host's node, a mailbox where it is not;
            ``"direct"``: shared memory only, or an error; ``"mailbox"``: mailboxes also within a node, for tests. None
            is ``HVD_AGN_TRANSPORT``, or ``"auto"``.
        wire_dtype: what travels between nodes. None: values as they are. ``"bf16"``, ``"fp16"``, ``"int8"``: deltas,
            and the center's changes, rounded to 2, 2 or 1 bytes; what was rounded away is sent later. Costs one more
            copy of the remote shards at the worker, and one per such worker at the hosts.
        overlap: allows :meth:`Client.start`, at the price of one more copy of the arrays.
        accumulate: ``"updates"``: what is pushed is how far the arrays have come since the last exchange.
            ``"gradients"``: the gradients given to :meth:`Client.accumulate`; ``rule`` must be given, and takes them as
            its gradients. Costs one more copy of the arrays, in the center's type, and one more with ``overlap``.
        on_nonfinite: ``"skip"`` or ``"raise"``, see :meth:`exchange`.
        max_norm: refuse a push whose Euclidean norm over all arrays, before the rule's ``clip_norm``, is above this, as
            one with a NaN. Costs one more pass over the arrays. None: do not.
        name: used in messages.
        resume: what rank 0 begins with instead of its arrays' values: a center as it was, with slots and version. On
            other ranks it says nothing.
        facts: what should be as on rank 0 and is not in ``arrays``; see :attr:`differences`.
        failed: an error of this rank's caller: all ranks raise it, instead of waiting for this one.

    Raises:
        LayoutError: an array cannot be used, or ranks differ in names, shapes, types, rule or block size. Every rank
            gets the error.
        LaunchError: see :func:`hvd_agn.mpi.initialize`.
        SharedMemoryError: no room for the center; the message has the bytes needed and found.
        ConfigError: an argument or an environment variable is none of its choices.
        CheckpointError: ``resume`` is of other arrays or of a rule with other slots.
    """

    def __init__(
        self,
        arrays: Arrays,
        rule: rules.Rule | None = None,
        comm: "MPI.Comm | None" = None,
        *,
        groups: Mapping[str, int] | Sequence[int] | None = None,
        center_ranks: Sequence[int] | str = config.CENTER_RANKS,
        transport: str | None = None,
        wire_dtype: str | None = config.WIRES[0],
        overlap: bool = False,
        accumulate: str = config.ACCUMULATE[0],
        on_nonfinite: str = config.ON_NONFINITE[0],
        max_norm: float | None = config.MAX_NORM,
        name: str = "Center",
        resume: checkpoint.Resume | None = None,
        facts: alike.Facts = _NO_FACTS,
        failed: Exception | None = None,
    ) -> None:
        config.check_environment()
        config.choose("on_nonfinite", on_nonfinite, config.ON_NONFINITE)
        config.choose("wire_dtype", wire_dtype, config.WIRES)
        chosen = config.TRANSPORT.read() if transport is None else transport
        self._transport = config.choose("transport", chosen, config.TRANSPORTS)
        self._wire_dtype, self._overlap = wire_dtype, overlap
        self.rule = rules.Add() if rule is None else rule
        if not isinstance(self.rule, rules.Rule):
            raise ConfigError(f"rule={rule!r}: give one of hvd_agn.rules, such as rules.Add().")
        pushes_values = self.rule._natives()[0].pushes_values
        if wire_dtype is not None and pushes_values:
            raise ConfigError(f"wire_dtype={wire_dtype!r}: {self.rule} pushes parameters, not deltas. Leave it out.")
        config.choose("accumulate", accumulate, config.ACCUMULATE)
        self._gradients = accumulate == "gradients"
        if self._gradients and (pushes_values or any(isinstance(each, rules.Add) for each in self.rule.each)):
            raise ConfigError(
                f"accumulate='gradients' needs a rule that takes gradients, not {rule}: give rules.SGD(lr)."
            )
        config.check_max_norm(max_norm)
        if max_norm is not None and pushes_values:
            raise ConfigError(f"max_norm={max_norm!r}: {self.rule} pushes parameters, not deltas. Leave it out.")
        self._on_nonfinite, self._max_norm = on_nonfinite, max_norm
        self._native: _core.Center | None = None
        self.closed = False
        """Whether :meth:`close` was called."""
        self._clients: list[Client] = []
        self._owner: Owner | None = None
        self._serial = next(_serials)
        self._loads = 0  # checkpoints that this rank has loaded

        MPI = mpi.initialize()
        parent = mpi.communicator(MPI, comm)
        shutdown.register(MPI)
        try:
            self._comm = _core.Comm(
                MPI._handleof(parent), config.STALL_SECONDS.read(), config.STALL_ABORT_SECONDS.read()
            )
        except StallError:
            shutdown.missing.append(name)
            raise
        self._name = name
        self._mpi_comm = MPI.Comm.fromhandle(self._comm.handle)
        self.label = f"[rank {mpi.world_rank()}] {name}"
        self.root = f"rank {self._comm.world_ranks[0]}"
        """The first of the communicator's ranks, by its number in ``MPI.COMM_WORLD``."""

        signature: list[tuple[Any, ...]] = []
        error: Exception | None = failed
        try:  # a rank that fails alone would leave the others waiting: all learn of it first
            self._names, self._shapes, values, signature = self._describe(arrays)
            self._group_of = rules.group_of(self.rule, self._names, groups)
            signature += self._describe_rules()
            hosts = self._hosts(center_ranks)
            signature.append(("center_ranks", hosts))
            planes = self._initial(values, signature, resume)
        except Exception as failure:
            error = error or failure
        self._wait(_CREATING)
        identity = resume.identity if resume else secrets.randbits(63)
        mine = (signature, resume is not None, facts, identity)
        expected, self.resumed, first, identity = self._mpi_comm.bcast(mine, root=0)
        """Whether it began with ``resume``."""
        self.identity: int = identity
        """Made at random with the center, and the same in all that is saved of it."""
        if error is None and signature != expected and expected:
            error = LayoutError(_first_difference(signature, expected, self.root))
        if error is None and (order := alike.misplaced(facts, first, self.root)):
            error = LayoutError(order)
        self._agree(error)
        self.differences = alike.differences(facts, first, self.root)
        """How this rank's ``facts`` differ from rank 0's, in words."""
        self._key = self._together(lambda: shutdown.free_finished(self._mpi_comm))
        self._allocate(hosts, planes, resume.version if resume else 0)
        self.arrays_client = self.client(dict(zip(self._names, values, strict=True)))
        """The client of this rank's ``arrays``."""

    def _describe(self, arrays: Arrays) -> tuple[list[str], list[tuple[int, ...]], list[Any], list[tuple[Any, ...]]]:
        if isinstance(arrays, Mapping):
            names, values = [str(key) for key in arrays], list(arrays.values())
        else:
            values = list(arrays)
            names = [f"array {i}" for i in range(len(values))]
        if not values:
            raise LayoutError(f"{self.label}: no arrays to exchange. Give at least one.")
        buffers = register(names, values)
        shapes = [tuple(int(n) for n in value.shape) for value in values]
        signature: list[tuple[Any, ...]] = [
            (name, shape, "float64" if buffer.dtype == "float64" else "float32")
            for name, shape, buffer in zip(names, shapes, buffers, strict=True)
        ]
        signature.append(("block bytes (HVD_AGN_BLOCK_BYTES)", config.BLOCK_BYTES.read()))
        signature.append(("blocks of a ring (HVD_AGN_RING_BLOCKS)", config.RING_BLOCKS.read()))
        signature.append(("transport (HVD_AGN_TRANSPORT)", self._transport))
        signature.append(("accumulate gradients", self._gradients))
        signature.append(("format of messages", _core.message_format))
        return names, shapes, values, signature

    @property
    def groups(self) -> int:
        """Groups of arrays, each with a rule and a learning rate of its own; 1 if that makes no difference."""
        return max(len(self.rule.each), 1 + max(self._group_of))

    def _describe_rules(self) -> list[tuple[Any, ...]]:
        if self.groups == 1:
            return [("rule", repr(self.rule))]
        described = [(f"rule of group {i}", repr(rule)) for i, rule in enumerate(self.rule.each)]
        return described + [(f"group of {name}", i) for name, i in zip(self._names, self._group_of, strict=True)]

    def _hosts(self, center_ranks: Sequence[int] | str) -> list[int]:
        if center_ranks == "nodes":
            return sorted(set(self._comm.nodes))
        try:  # NumPy's integers are welcome, a bool or a float is a mistake
            ranks = [-1 if isinstance(r, bool) else operator.index(r) for r in center_ranks]  # type: ignore[arg-type]
        except TypeError:
            ranks = []
        if not ranks or len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(self._comm.size)):
            raise ConfigError(
                f"center_ranks={center_ranks!r}: give 'nodes', or different ranks from 0 to {self._comm.size - 1}."
            )
        return ranks

    def _wait(self, what: str, undo: Callable[[], None] = lambda: None) -> None:
        """For all ranks. Given up on, the center is never to be, and this process must not end with MPI_Finalize."""
        try:
            self._comm.barrier(what)
        except StallError:
            shutdown.missing.append(self._name)
            undo()
            raise

    def _agree(self, error: Exception | None, undo: Callable[[], None] = lambda: None, waits: str = _CREATING) -> None:
        """Every rank raises if any rank has an error: its own, or else the first. ``undo``: before it does."""
        if error is not None and not isinstance(error, AGNError):  # which may not be possible to send
            error = LayoutError(f"{type(error).__name__}: {error}")
        if error is not None and not str(error).startswith("[rank"):
            error = type(error)(f"{self.label}: {error}")
        self._wait(waits, undo)
        errors = self._mpi_comm.allgather(error)
        first = next((e for e in errors if e is not None), None)
        if first is not None:
            undo()
            self._comm.free()
            raise error or first

    def _initial(
        self, values: Sequence[Any], signature: list[tuple[Any, ...]], resume: checkpoint.Resume | None
    ) -> list[list[np.ndarray]]:
        """Rank 0's values in the center's types, and its slots if it resumes; on other ranks nothing."""
        self._dtypes = [entry[2] for entry in signature[: len(values)]]
        if self._comm.rank != 0:
            return []
        if resume is not None:
            try:
                return resume.planes(self._like(), self.rule.active_slots())
            except CheckpointError as error:
                raise CheckpointError(f"{self.label}: the saved center does not fit {self.rule}: {error}") from None
        wide = [np.empty(shape, dtype) for shape, dtype in zip(self._shapes, self._dtypes, strict=True)]
        _core.widen(register(self._names, values), wide)
        for name, array in zip(self._names, wide, strict=True):
            if not np.isfinite(array).all():
                raise LayoutError(f"{self.label}: {name!r} has a NaN or an Inf. Initialise it on {self.root}.")
        return [wide]

    def _like(self) -> checkpoint.Like:
        return {name: (s, d) for name, s, d in zip(self._names, self._shapes, self._dtypes, strict=True)}

    def _allocate(self, hosts: list[int], planes: list[list[np.ndarray]], version: int) -> None:
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in self._shapes]
        layout = _core.Layout(counts, self._dtypes, config.BLOCK_BYTES.read())
        natives = self.rule._natives() * (self.groups // len(self.rule.each))  # one rule may be that of all groups
        plan = _core.Plan(self._comm, hosts, self._transport == "mailbox")
        self.nbytes = plan.memory_bytes(self._comm, layout, natives[0], shared=False)
        """Bytes of memory that the center takes on this rank's node."""
        shared = plan.memory_bytes(self._comm, layout, natives[0], shared=True)
        self._agree(self._refuse_surroundings(hosts, plan, shared))
        native = self._together(lambda: _core.Center(self._comm, plan, layout, natives, self._group_of))
        undo = native.disconnect
        self._together(lambda: native.connect(self._comm, config.RING_BLOCKS.read()), undo)
        waits = f"waits for {self.root} to write its parameters to the center"
        self._together(lambda: native.write(planes, version, 0) if self._comm.rank == 0 else None, undo, waits)
        self._native = native
        shutdown.centers.append(self)

    def _together(self, part: Callable[[], T], undo: Callable[[], None] = lambda: None, waits: str = _CREATING) -> T:
        """This rank's part of what all ranks do; an error of any rank is raised by all."""
        error: Exception | None = None
        try:
            result = part()
        except StallError:  # the others would be waited for as long again
            shutdown.missing.append(self._name)
            raise
        except Exception as failure:
            error = failure
        self._agree(error, undo, waits)
        return result

    def _refuse_surroundings(self, hosts: list[int], plan: _core.Plan, shared: int) -> Exception | None:
        """Why the center cannot be here: a host is out of reach, or there is no room for it."""
        if self._transport == "direct":
            for shard, host in enumerate(hosts):
                if not plan.direct(self._comm.rank, shard):
                    return LaunchError(
                        f"rank {self._comm.world_ranks[host]}, which hosts a part of the center, is on another node, "
                        "and transport='direct' was asked for. Use transport='auto', or a center for each node, with "
                        "comm= of its ranks."
                    )
        if self._comm.node_rank > 0 or shared == 0:
            return None
        try:
            free = mpi.shared_memory_free()
        except OSError as error:
            return SharedMemoryError(f"no place for shared memory: {error}. See docs/environment.md.")
        if free >= shared:
            return None
        return SharedMemoryError(
            f"the center needs {shared} bytes of shared memory, {mpi.shared_memory_directory()} on the host has "
            f"{free} free. Free some there, or mount it larger (docker run --shm-size, mount -o remount,size=...)."
        )

    # ---- exchange

    def client(self, arrays: Arrays) -> Client:
        """One more worker in this process, with arrays of its own like the center's. Local.

        They are set to the center. Clients of one process may run on threads of their own; they take turns, block by
        block on this node's shards and exchange by exchange on those of others.

        Raises:
            LayoutError: the arrays cannot be used or do not match the center's.
        """
        values = list(arrays.values()) if isinstance(arrays, Mapping) else list(arrays)
        names = self._names if len(values) == len(self._names) else [f"array {i}" for i in range(len(values))]
        register(names, values)
        shapes = [tuple(int(n) for n in value.shape) for value in values]
        if shapes != self._shapes:
            raise LayoutError(f"{self.label}: a client's arrays have shapes {shapes}, the center's {self._shapes}.")
        try:
            made = Client(
                self._open(),
                names,
                values,
                label=self.label,
                rule=self.rule,
                groups=self.groups,
                on_nonfinite=self._on_nonfinite,
                max_norm=self._max_norm,
                wire_dtype=self._wire_dtype,
                overlap=self._overlap,
                gradients=self._gradients,
                on_close=self._clients.remove,
                epoch=self._epoch,
            )
        except ValueError as error:
            raise LayoutError(f"{self.label}: {error}.") from error
        self._clients.append(made)
        return made

    @property
    def _epoch(self) -> int:
        """The latest that this rank knows of."""
        return max([self._loads, *(client.epoch for client in self._clients)])

    def exchange(self, steps: float = 1, *, exact: bool = False, lr: float | Sequence[float] | None = None) -> bool:
        """As :meth:`Client.exchange`, for this center's arrays.

        Raises:
            UsageError: an optimizer owns this center, and counts its steps.
        """
        self._open()
        if self._owner is not None:
            raise UsageError(f"{self.label}: this center is an optimizer's. Call its step() or flush().")
        return self.arrays_client.exchange(steps, exact=exact, lr=lr)

    def pull(self) -> None:
        """As :meth:`Client.pull`, for this center's arrays, or the optimizer's that owns it."""
        self._open()
        (self._owner or self.arrays_client).pull()

    def stats(self) -> Stats:
        """As :meth:`Client.stats`, for this center's arrays."""
        self._open()
        return self.arrays_client.stats()

    def barrier(self) -> None:
        """Wait, asleep, until every rank has called this. Collective; a host answers other nodes meanwhile.

        What was pushed before by any rank is in the center afterwards. With ``overlap`` that takes a ``flush()``.

        Raises:
            UsageError: the center is closed.
            StallError: the wait lasted longer than ``HVD_AGN_STALL_ABORT_SECONDS``; as of :meth:`load`.
        """
        self._open().await_thread()  # in MPI it may hold up the calls of this thread, which know no limit
        self._comm.barrier("waits for all ranks to call Center.barrier")

    # ---- state

    @property
    def rank(self) -> int:
        """Of this process in the communicator."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """Ranks of the communicator."""
        return self._comm.size

    @property
    def version(self) -> int:
        """Pushes that every block has had. Asks the hosts on other nodes."""
        return self._open().version()

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of the center: name -> array of the registered shape, float32 or float64. Not collective.

        Each block is consistent; blocks may differ by pushes that were under way.
        """
        return self._read()[0]

    def _read(self) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]], int]:
        """Center, slot name -> its arrays, version."""
        native = self._open()
        slots = self.rule.active_slots()
        planes = [
            [np.empty(shape, dtype) for shape, dtype in zip(self._shapes, self._dtypes, strict=True)]
            for _ in range(1 + len(slots))
        ]
        version = native.read(planes, self._epoch)
        named = [dict(zip(self._names, plane, strict=True)) for plane in planes]
        return named[0], dict(zip(slots, named[1:], strict=True)), version

    def resume(self) -> checkpoint.Resume:
        """A copy of all there is of the center, for another to go on from. Not collective."""
        center, slots, version = self._read()
        values = {slot: list(arrays.values()) for slot, arrays in slots.items()}
        return checkpoint.Resume(list(center.values()), values, version, repr(self.rule), self.identity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write center and slots to a safetensors file. Rank 0 writes; on other ranks nothing happens.

        Not collective: training may go on meanwhile. Each block is consistent in itself. The file appears whole or not
        at all. Parameters have their own names, slots ``slot/<slot>/<name>``.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        if self._comm.rank != 0:
            self._open()
            return
        center, slots, version = self._read()
        checkpoint.write(Path(path), center, slots, version, repr(self.rule), self.identity)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Set center and slots to a file written by :meth:`save`, by any number of ranks. Collective.

        Rank 0 reads; then every rank pulls. Restore a worker's own parameters and optimizer state after this.

        Raises:
            CheckpointError: on every rank; the file is missing, damaged, or of other arrays or a rule with other
                slots.
            UsageError: an exchange is under way in the background.
            StallError: a wait lasted longer than ``HVD_AGN_STALL_ABORT_SECONDS``. If it was for the other ranks, this
                one cannot call ``load()`` again, and its process ends without ``MPI_Finalize``.
        """
        native = self._open()
        if self._owner is not None:
            self._owner.before_load()
        if any(client.started for client in self._clients):
            raise UsageError(
                f"{self.label}: Center.load() while an exchange is under way in the background: call finish() first."
            )
        native.await_thread()  # in MPI it may hold up the calls of this thread, which know no limit
        self._comm.barrier("waits for all ranks to call Center.load")
        error: CheckpointError | None = None
        if self._comm.rank == 0:
            try:
                planes, version, identity = checkpoint.read(Path(path), self._like(), self.rule.active_slots())
                native.write(planes, version, self._epoch + 1)
                self.identity = secrets.randbits(63) if identity is None else identity
            except Exception as failure:  # of any kind: the other ranks wait to hear of it
                error = CheckpointError(f"{self.label}: {path} cannot be loaded into {self.rule}: {failure}")
        self._comm.barrier(f"waits for {self.root} to read the center's file")
        error, self.identity, epoch = self._mpi_comm.bcast((error, self.identity, self._epoch + 1), root=0)
        if error is not None:
            raise error
        self._loads = epoch
        for client in self._clients:
            client.epoch = epoch
            client.forget()
            if self._owner is None or client is not self.arrays_client:
                client.pull()
        if self._owner is not None:
            self._owner.loaded()

    def restore(self, resume: checkpoint.Resume | None, values: Sequence[Any], *, as_it_is: bool = False) -> None:
        """Set the center to one as it was, as every rank does, each when it comes to it: rank 0 writes.

        Exchanges of ranks that have come to it wait for that, asleep. Those of ranks that have not raise RestoredError;
        so do those of further clients, until they pull.

        Args:
            resume: the center; :meth:`fits` has been asked. None: it becomes ``values``.
            values: arrays like the center's.
            as_it_is: the center has just been loaded, and stays.

        Raises:
            LayoutError: ``values`` have a NaN or an Inf; nothing has changed.
            StallError: as an exchange; some blocks are set to it already.
        """
        native, client = self._open(), self.arrays_client
        epoch = max(client.epoch, self._loads + 1)
        if self.rank == 0 and as_it_is:
            native.begin_epoch(epoch)
        elif self.rank == 0:
            like = [(name, *shape_and_type) for name, shape_and_type in self._like().items()]
            native.write(self._initial(values, like, resume), resume.version if resume else 0, epoch)
        if not as_it_is:
            self.identity = resume.identity if resume else secrets.randbits(63)
        self._loads += 1
        client.epoch = epoch

    def fits(self, resume: checkpoint.Resume) -> None:
        """Raise CheckpointError if the center cannot be set to that one."""
        resume.planes(self._like(), self.rule.active_slots())

    @property
    def behind(self) -> bool:
        """Whether rank 0 has loaded a checkpoint more than this rank, which works with it."""
        return self.arrays_client.epoch > self._loads

    def restart(self, values: Sequence[Any], note: T) -> T:
        """Set the center to rank 0's ``values``, unless it was loaded: for a framework that has them only now.

        Collective, and before the first exchange. Clients pull afterwards.

        Returns:
            Rank 0's ``note``.

        Raises:
            LayoutError, StallError: as the constructor.
        """
        native = self._open()
        like = [(name, *shape_and_type) for name, shape_and_type in self._like().items()]
        self._comm.barrier("waits for the other ranks to begin training")
        error: LayoutError | None = None
        if self.rank == 0 and native.version() == 0:
            try:
                native.write(self._initial(values, like, None), 0, self._epoch)
            except LayoutError as failure:
                error = failure
        self._comm.barrier(f"waits for {self.root} to write its values to the center")
        error, first = self._mpi_comm.bcast((error, note), root=0)
        if error is not None:
            raise error
        return first  # type: ignore[no-any-return]

    # ---- end

    def own(self, owner: Owner | None) -> None:
        """Hand the center's arrays to an optimizer, which is told of what happens to it; None takes them back."""
        self._owner = owner

    def close(self) -> None:
        """This rank is done with the center. Waits for nobody; a second call does nothing.

        The arrays stay as they are. A host goes on answering other nodes. Its memory goes back to the system when all
        ranks have closed, or, if some are on other nodes, when they next make a center together, or at exit.
        """
        self.end(failed=False)

    def end(self, failed: bool) -> None:
        """As :meth:`close`; ``failed``: because of an error, after which an optimizer has nothing to push."""
        if self._native is None:
            return
        owner, self._owner = self._owner, None
        try:
            if owner is not None:
                owner.before_close(failed)
        finally:
            for client in list(self._clients):
                client.close()
            self._native.detach()
            if self._comm.size > 1:
                shutdown.finished.append(shutdown.Finished(self._serial, self._key, self._comm, self._native))
            else:
                self._comm.free()
            self._native, self.closed = None, True
            shutdown.centers.remove(self)
            if owner is not None:
                owner.closed()

    def __enter__(self) -> "Center":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(shutdown.is_failure(error))

    def check_open(self) -> None:
        """Raise UsageError if the center is closed."""
        self._open()

    def _open(self) -> _core.Center:
        if self._native is None:
            raise shutdown.used_after_close(self.label)
        return self._native


def _first_difference(mine: list[tuple[Any, ...]], rank0: list[tuple[Any, ...]], root: str) -> str:
    fix = "Build the same model and optimizer on every rank."
    arrays = [sum(len(entry) == 3 for entry in signature) for signature in (mine, rank0)]
    if arrays[0] != arrays[1]:
        return f"{arrays[0]} arrays here, {arrays[1]} on {root}. {fix}"
    named, theirs = mine[: arrays[0]], rank0[: arrays[0]]
    if named != theirs and sorted(named) == sorted(theirs):
        fix = "They come in another order, as from a set: give them in one order on every rank."
    differing = (pair for pair in zip(mine, rank0, strict=False) if pair[0] != pair[1])
    here, there = next(differing, ("its other arguments", "an error"))
    return f"{json.dumps(here)} here, {json.dumps(there)} on {root}. {fix}"


_serials = itertools.count()
