"""The center, free of any framework: arrays are NumPy's or anything with DLPack.

No array data is touched here. The work is in the native core: ``csrc/exchange.cpp`` for a worker's end,
``csrc/center.cpp`` for the shared memory.
"""

import atexit
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import _core, checkpoint, config, mpi, rules
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

_CREATING = "waits for the other ranks to create their centers"

Arrays = Mapping[str, Any] | Sequence[Any]


class Owner(Protocol):
    """An optimizer that trains on a center's arrays."""

    def flush(self) -> None:
        """Push what is left: the center closes."""

    def pull(self) -> None:
        """Take over the center: it was loaded."""

    def check_open(self, call: str) -> None:
        """Raise UsageError if this call makes no sense now."""


class Center:
    """Shared parameters in memory that rank 0 of the communicator exposes, and this rank's client of them.

    Construction is collective; afterwards no rank waits for another, except in :meth:`load` and at exit. All ranks
    start from rank 0's values.

    Args:
        arrays: name -> array, or a sequence of arrays. float32, float64, float16 or bfloat16, any shape, C-contiguous,
            writable, on the CPU; the same names and shapes on every rank. They are updated in place, and must stay
            where they are (or :meth:`Client.rebind`). The center holds float64 as float64, all others as float32.
        rule: what the center does with a delta; None is ``rules.Add()``.
        comm: mpi4py communicator, duplicated here; None is ``MPI.COMM_WORLD``.
        on_nonfinite: ``"skip"`` or ``"raise"``, see :meth:`exchange`.
        name: used in messages.
        failed: an error of this rank's caller: all ranks raise it, instead of waiting for this one.

    Raises:
        LayoutError: an array cannot be used, or ranks differ in names, shapes, types, rule or block size. Every rank
            gets the error.
        LaunchError: see :func:`hvd_agn.mpi.initialize`.
        SharedMemoryError: no room for the center; the message has the bytes needed and found.
        ConfigError: an argument or an environment variable is none of its choices.
    """

    def __init__(
        self,
        arrays: Arrays,
        rule: rules.Rule | None = None,
        comm: "MPI.Comm | None" = None,
        *,
        on_nonfinite: str = config.ON_NONFINITE[0],
        name: str = "Center",
        failed: AGNError | None = None,
    ) -> None:
        config.check_environment()
        if on_nonfinite not in config.ON_NONFINITE:
            raise ConfigError(f"on_nonfinite={on_nonfinite!r}: give one of {', '.join(config.ON_NONFINITE)}.")
        self.rule = rules.Add() if rule is None else rule
        if not isinstance(self.rule, rules.Rule):
            raise ConfigError(f"rule={rule!r}: give one of hvd_agn.rules, such as rules.Add().")
        self._on_nonfinite = on_nonfinite
        self._native: _core.Center | None = None
        self._clients: list[Client] = []
        self._owner: Owner | None = None
        self._serial = next(_serials)

        MPI = mpi.initialize()
        parent = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(parent, MPI.Intracomm):
            raise ConfigError(f"comm={comm!r}: give an mpi4py communicator, or None for MPI.COMM_WORLD.")
        _register_at_exit(MPI)
        try:
            self._comm = _core.Comm(
                MPI._handleof(parent), config.STALL_SECONDS.read(), config.STALL_ABORT_SECONDS.read()
            )
        except StallError:
            _missing.append(name)
            raise
        self._mpi_comm = MPI.Comm.fromhandle(self._comm.handle)
        self.label = f"[rank {self._comm.rank}] {name}"

        signature: list[tuple[Any, ...]] = []
        error: Exception | None = failed
        try:  # a rank that fails alone would leave the others waiting: all learn of it first
            self._names, self._shapes, values, signature = self._describe(arrays)
            wide = self._initial(values, signature)
        except Exception as failure:
            error = error or failure
        self._comm.barrier(_CREATING)
        expected = self._mpi_comm.bcast(signature, root=0)
        if error is None and signature != expected and expected:
            error = LayoutError(_first_difference(signature, expected))
        self._agree(error)
        self._allocate(wide)
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
        signature.append(("rule", repr(self.rule)))
        return names, shapes, values, signature

    def _agree(self, error: Exception | None) -> None:
        """Every rank raises if any rank has an error: its own, or else the first."""
        if error is not None and not isinstance(error, AGNError):  # which may not be possible to send
            error = LayoutError(f"{type(error).__name__}: {error}")
        if error is not None and not str(error).startswith("[rank"):
            error = type(error)(f"{self.label}: {error}")
        self._comm.barrier(_CREATING)
        errors = self._mpi_comm.allgather(error)
        first = next((e for e in errors if e is not None), None)
        if first is not None:
            self._comm.free()
            raise error or first

    def _initial(self, values: list[Any], signature: list[tuple[Any, ...]]) -> list[np.ndarray]:
        """Rank 0's values in the center's types; on other ranks nothing."""
        self._dtypes = [entry[2] for entry in signature[: len(values)]]
        if self._comm.rank != 0:
            return []
        wide = [np.empty(shape, dtype) for shape, dtype in zip(self._shapes, self._dtypes, strict=True)]
        _core.widen(register(self._names, values), wide)
        for name, array in zip(self._names, wide, strict=True):
            if not np.isfinite(array).all():
                raise LayoutError(f"{self.label}: {name!r} has a NaN or an Inf. Initialise it on rank 0.")
        return wide

    def _allocate(self, wide: list[np.ndarray]) -> None:
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in self._shapes]
        layout = _core.Layout(counts, self._dtypes, int(config.BLOCK_BYTES.read()))
        native_rule = self.rule._native()
        self.nbytes = layout.memory_bytes(native_rule, self._comm.size)
        """Bytes of shared memory that the center takes at its host."""
        self._agree(self._refuse_surroundings())
        self._native = _core.Center(self._comm, layout, native_rule)
        _centers.append(self)
        if self._comm.rank == 0:
            self._native.write([wide], 0)
        self._comm.barrier("waits for rank 0 to write its parameters to the center")

    def _refuse_surroundings(self) -> Exception | None:
        """Why the center cannot be here: other nodes, or no room for it."""
        elsewhere = self._comm.size - self._comm.node_size
        if elsewhere > 0:
            return LaunchError(
                f"{elsewhere} of {self._comm.size} ranks are on another node than this one. This version exchanges "
                "through shared memory only: run on one node, or give comm=COMM_WORLD.Split_type(COMM_TYPE_SHARED)."
            )
        if self._comm.rank > 0 or self._comm.size == 1:
            return None
        try:
            free = mpi.shared_memory_free()
        except OSError as error:
            return SharedMemoryError(f"no place for shared memory: {error}. See docs/environment.md.")
        if free >= self.nbytes:
            return None
        return SharedMemoryError(
            f"the center needs {self.nbytes} bytes of shared memory, {mpi.shared_memory_directory()} on the host has "
            f"{free} free. Free some there, or mount it larger (docker run --shm-size, mount -o remount,size=...)."
        )

    # ---- exchange

    def client(self, arrays: Arrays) -> Client:
        """One more worker in this process, with arrays of its own like the center's. Local.

        They are set to the center. Clients of one process may run on threads of their own; they take turns block by
        block.

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
            made = Client(self, names, values, self._on_nonfinite)
        except ValueError as error:
            raise LayoutError(f"{self.label}: {error}.") from error
        self._clients.append(made)
        return made

    def exchange(self, steps: float = 1) -> bool:
        """As :meth:`Client.exchange`, for this center's arrays.

        Raises:
            UsageError: an optimizer owns this center, and counts its steps.
        """
        self._open()
        if self._owner is not None:
            raise UsageError(f"{self.label}: this center is an optimizer's. Call its step() or flush().")
        return self.arrays_client.exchange(steps)

    def pull(self) -> None:
        """As :meth:`Client.pull`, for this center's arrays, or the optimizer's that owns it."""
        self._open()
        (self._owner or self.arrays_client).pull()

    def stats(self) -> Stats:
        """As :meth:`Client.stats`, for this center's arrays."""
        self._open()
        return self.arrays_client.stats()

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
        """Pushes that every block has had."""
        return self._open().version

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
        version = native.read(planes)
        named = [dict(zip(self._names, plane, strict=True)) for plane in planes]
        return named[0], dict(zip(slots, named[1:], strict=True)), version

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
        checkpoint.write(Path(path), center, slots, version, repr(self.rule))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Set center and slots to a file written by :meth:`save`, by any number of ranks. Collective.

        Rank 0 reads; then every rank pulls. Restore a worker's own parameters and optimizer state after this.

        Raises:
            CheckpointError: on every rank; the file is missing, damaged, or of other arrays or a rule with other
                slots.
        """
        native = self._open()
        if self._owner is not None:
            self._owner.check_open("Center.load()")
        self._comm.barrier("waits for all ranks to call Center.load")
        error: CheckpointError | None = None
        if self._comm.rank == 0:
            try:
                like = {name: (s, d) for name, s, d in zip(self._names, self._shapes, self._dtypes, strict=True)}
                native.write(*checkpoint.read(Path(path), like, self.rule.active_slots()))
            except Exception as failure:  # of any kind: the other ranks wait to hear of it
                error = CheckpointError(f"{self.label}: {path} cannot be loaded into {self.rule}: {failure}")
        self._comm.barrier("waits for rank 0 to read the center's file")
        error = self._mpi_comm.bcast(error, root=0)
        if error is not None:
            raise error
        for client in self._clients:
            if self._owner is None or client is not self.arrays_client:
                client.pull()
        if self._owner is not None:
            self._owner.pull()

    # ---- end

    def own(self, owner: Owner) -> None:
        """Hand the center's arrays to an optimizer, which is told of what happens to the center."""
        self._owner = owner

    def close(self) -> None:
        """This rank is done with the center. Waits for nobody; a second call does nothing.

        The arrays stay as they are. The host's memory goes back to the system when all ranks have closed.
        """
        if self._native is None:
            return
        owner, self._owner = self._owner, None
        try:
            if owner is not None:
                owner.flush()
        finally:
            for client in self._clients:
                client._close()
            self._clients.clear()
            self._native.detach()
            if self._comm.size > 1:
                _finished.append((self._serial, self._comm, self._native))
            else:
                self._comm.free()
            self._native = None
            _centers.remove(self)

    def __enter__(self) -> "Center":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_open(self) -> None:
        """Raise UsageError if the center is closed."""
        self._open()

    def _open(self) -> _core.Center:
        if self._native is None:
            raise UsageError(f"{self.label}: used after close().")
        return self._native


def _first_difference(mine: list[tuple[Any, ...]], rank0: list[tuple[Any, ...]]) -> str:
    fix = "Build the same model and optimizer on every rank."
    if len(mine) != len(rank0):
        return f"{len(mine) - 2} arrays here, {len(rank0) - 2} on rank 0. {fix}"
    ours, theirs = next(pair for pair in zip(mine, rank0, strict=True) if pair[0] != pair[1])
    return f"{json.dumps(ours)} here, {json.dumps(theirs)} on rank 0. {fix}"


_centers: list[Center] = []  # open, in order of creation
_finished: list[tuple[int, _core.Comm, _core.Center]] = []  # closed; their windows go at exit, which is collective
_missing: list[str] = []  # centers for which a rank did not come
_serials = itertools.count()
_process = os.getpid()
_finalize_key: int | None = None  # of the attribute that MPI_Finalize deletes first


def _register_at_exit(MPI: ModuleType) -> None:
    """Finish before MPI does: at exit, or when someone calls MPI_Finalize before."""
    global _finalize_key
    if _finalize_key is None:
        _finalize_key = MPI.Comm.Create_keyval(delete_fn=lambda *_: _finish())
        MPI.COMM_SELF.Set_attr(_finalize_key, True)
        atexit.register(_finish_at_exit)  # after mpi4py's import: runs before its MPI_Finalize


def _finish_at_exit() -> None:
    from mpi4py import MPI

    if os.getpid() == _process and _finalize_key is not None and not MPI.Is_finalized():
        MPI.COMM_SELF.Delete_attr(_finalize_key)


def _finish() -> None:
    """Push what is left, then wait, asleep, for the other ranks, and give the windows back in the same order."""
    try:
        for center in list(_centers):
            try:
                center.close()
            except Exception as error:  # the others are closed all the same
                print(f"{center.label}: closing failed: {error}", file=sys.stderr)
        failure = getattr(sys, "last_type", None)
        if failure is not None and _finished:
            print(
                f"[rank {_finished[0][1].rank}] hvd_agn: this rank ends with {failure.__name__}. What it pushed stays "
                "in the center and the other ranks go on; this one waits for them to end.",
                file=sys.stderr,
                flush=True,
            )
        for _, comm, memory in sorted(_finished, key=lambda entry: entry[0]):
            memory.free(comm)
            comm.free()
        _finished.clear()
        if _missing:
            raise StallError(f"hvd_agn: not all ranks created {_missing[0]}; this process ends without MPI_Finalize.")
    except BaseException as error:
        # MPI_Finalize would wait for the same ranks, without a limit.
        print(str(error) or type(error).__name__, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
