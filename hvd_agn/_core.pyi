"""
Native core of hvd_agn. Private: use hvd_agn.Center or hvd_agn.torch.AGNOptimizer.
"""

from collections.abc import Callable, Sequence
import enum
from typing import Annotated

import numpy
from numpy.typing import NDArray


class Comm:
    """The plugin's duplicate of a communicator."""

    def __init__(self, handle: int, stall_seconds: float, stall_abort_seconds: float) -> None: ...

    @property
    def handle(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def world_ranks(self) -> list[int]: ...

    @property
    def node_rank(self) -> int: ...

    @property
    def given_up(self) -> bool: ...

    @property
    def node_size(self) -> int: ...

    @property
    def nodes(self) -> list[int]: ...

    def barrier(self, what: str) -> None: ...

    def free(self) -> None: ...

class Function:
    """What a custom rule does to a piece of a block."""

    def __init__(self, function: Callable, name: str, slots: Sequence[str]) -> None: ...

class Rule:
    """A rule's kind and hyper-parameters, by name."""

    def __init__(self, kind: str, hyper: dict) -> None: ...

    @property
    def kind(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def pushes_values(self) -> bool: ...

class Layout:
    """Where the arrays lie in the center's blocks."""

    def __init__(self, counts: Sequence[int], dtypes: Sequence[str], block_bytes: int) -> None: ...

    @property
    def blocks(self) -> int: ...

class Plan:
    """Which rank hosts what, and who reaches it how."""

    def __init__(self, comm: Comm, hosts: Sequence[int], mailbox_only: bool) -> None: ...

    def direct(self, rank: int, shard: int) -> bool: ...

    def memory_bytes(self, comm: Comm, layout: Layout, rule: Rule, shared: bool) -> int: ...

class Center:
    """Shared parameters in the host's memory."""

    def __init__(self, comm: Comm, plan: Plan, layout: Layout, rules: Sequence[Rule], groups: Sequence[int]) -> None:
        """`rules`: one per group; `groups`: of each array, its group."""

    def connect(self, comm: Comm, ring: int) -> None: ...

    def disconnect(self) -> None: ...

    def read(self, planes: Sequence[Sequence[Annotated[NDArray, dict(device='cpu')]]], epoch: int) -> int: ...

    def write(self, planes: Sequence[Sequence[Annotated[NDArray, dict(device='cpu')]]], version: int, epoch: int) -> None: ...

    def begin_epoch(self, epoch: int) -> None: ...

    def version(self) -> int: ...

    @property
    def recoveries(self) -> int: ...

    def detach(self) -> None: ...

    def await_thread(self) -> None: ...

    def free(self, comm: Comm) -> None: ...

class Buffer:
    """Address, size and type of a contiguous array."""

    def __init__(self, array: Annotated[NDArray, dict(device='cpu')]) -> None: ...

    @staticmethod
    def of_bfloat16(bits: Annotated[NDArray[numpy.uint16], dict(order='C', device='cpu')]) -> Buffer:
        """For an array library that has the type and does not pass it on."""

    @property
    def address(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def dtype(self) -> str: ...

class Client:
    """One worker's arrays and anchor."""

    def __init__(self, center: Center, buffers: Sequence[Buffer], wire: str, overlap: bool, gradients: bool, max_norm: float, epoch: int) -> None: ...

    def accumulate(self, gradients: Sequence[Buffer | None]) -> None: ...

    @property
    def touched(self) -> list[bool]: ...

    def accumulator(self, index: int) -> NDArray:
        """What is accumulated for an array, flat; the memory itself."""

    def touch(self, segments: Sequence[bool]) -> None: ...

    def bind(self, index: int, buffer: Buffer) -> None: ...

    def unbind(self) -> None: ...

    def exchange(self, steps: float, exact: bool, rates: Sequence[float]) -> int:
        """
        Index of the array whose delta was refused, -1 if none was, -2 if its norm was too large. `rates`: a learning rate per group, if a rule follows.
        """

    def start(self, steps: float, rates: Sequence[float]) -> None: ...

    @property
    def started(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def finish(self) -> int:
        """As exchange()."""

    @property
    def owes(self) -> bool: ...

    def pull(self) -> None: ...

    def forget(self) -> None: ...

    def peek(self) -> None: ...

    def read_anchor(self, index: int, values: Buffer) -> None: ...

    def read_snapshot(self, index: int, values: Buffer) -> None: ...

    def write_anchor(self, index: int, values: Buffer) -> None: ...

    def close(self) -> None: ...

    def stats(self) -> dict: ...

    @property
    def blocks_refused(self) -> int: ...

    @property
    def refused_norm(self) -> float: ...

    @property
    def latest_version(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @epoch.setter
    def epoch(self, arg: int, /) -> None: ...

    @property
    def versions(self) -> list[int]: ...

    @versions.setter
    def versions(self, arg: Sequence[int], /) -> None: ...

    @property
    def power(self) -> float: ...

    @power.setter
    def power(self, arg: float, /) -> None: ...

    @property
    def extra_bytes(self) -> int: ...

def op_enter(client: Client, decides: Callable) -> int:
    """A number by which ops find a worker."""

def op_leave(number: int) -> None:
    """Ops find it no more."""

def op_calls() -> int:
    """Address of what ops call."""

class Views:
    """
    Tensors as they were: the objects, their addresses, types, shapes and strides.
    """

    def __init__(self, tensors: list) -> None: ...

    def remember(self, tensors: list) -> None:
        """They are to be as they are now."""

    def changed(self, tensors: list) -> bool:
        """Whether one is another than it was, or does not tell by DLPack."""

def widen(buffers: Sequence[Buffer], arrays: Sequence[Annotated[NDArray, dict(device='cpu')]]) -> None:
    """Copies buffers to arrays in the center's dtypes."""

class Stage(enum.Enum):
    """Places of a pass at which a test can stop the process."""

    none = 0

    half_written = 1

    written = 2

    committed = 3

def signal_at(stage: Stage, block: int, signal: int) -> None:
    """
    For tests: raise a signal, once, when this process reaches a stage of a pass over a block.
    """

def time_private_pass(count: int, block_bytes: int, repeats: int, rule: Rule) -> list[float]:
    """Seconds of each run of the fused pass over private memory."""

def kernels() -> str:
    """Instruction set of the loops in use."""

def set_leak_warnings(on: bool) -> None:
    """Whether nanobind reports what is left at exit."""

def use_kernels(name: str) -> bool:
    """For tests: use another instruction set; false if it is not here."""

def compiler() -> str:
    """Compiler and flags of this build."""

def mpi_library_version() -> str: ...

def mpi_thread_level() -> str: ...

def mpi_init_address() -> int: ...

def path_of(address: int) -> str: ...

message_format: int = 2

cuda: bool = False
