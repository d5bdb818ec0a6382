"""A worker's part in a center, for every framework: when it exchanges, and what becomes of its steps meanwhile.

A framework's optimizer counts its applied updates here, and brings its parameters (:class:`Arrays`). Everything that
touches them goes through :meth:`Worker.perform`: torch's parameters lie where they are, so there it is called at once;
TensorFlow's variables have an address only inside an op, which then calls it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from . import config, rules, shutdown
from .center import Center
from .checkpoint import Resume
from .errors import (
    AGNError,
    CheckpointError,
    ConfigError,
    LayoutError,
    NonFiniteWarning,
    RuleOverflowWarning,
    StalenessWarning,
    UsageError,
    warn,
)

if TYPE_CHECKING:
    from mpi4py import MPI

    from .client import Client


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments that the wrappers of all frameworks take; ``hvd_agn.torch.AGNOptimizer`` has their meaning.

    Raises:
        ConfigError: one is none of its choices.
    """

    communication_period: int = config.COMMUNICATION_PERIOD
    rule: rules.Rule | None = None
    normalize: bool = True
    accumulate: str = config.ACCUMULATE[0]
    overlap: bool = False
    comm: "MPI.Comm | None" = None
    center_ranks: Sequence[int] | str = config.CENTER_RANKS
    transport: str | None = None
    wire_dtype: str | None = config.WIRES[0]
    on_nonfinite: str = config.ON_NONFINITE[0]
    max_norm: float | None = config.MAX_NORM
    push_on_error: bool = config.PUSH_ON_ERROR
    name: str = "AGNOptimizer"

    def __post_init__(self) -> None:
        period = self.communication_period
        if isinstance(period, bool) or not isinstance(period, int):
            raise ConfigError(f"communication_period={period!r}: give a whole number of steps.")
        if period < 1:
            raise ConfigError(f"communication_period={period}: give 1 or more.")
        if self.rule is not None and not isinstance(self.rule, rules.Rule):
            raise ConfigError(f"rule={self.rule!r}: give one of hvd_agn.rules, such as rules.Add().")
        config.choose("accumulate", self.accumulate, config.ACCUMULATE)
        config.choose("wire_dtype", self.wire_dtype, config.WIRES)
        config.choose("on_nonfinite", self.on_nonfinite, config.ON_NONFINITE)
        config.check_max_norm(self.max_norm)
        config.choose("push_on_error", self.push_on_error, (True, False))
        if self.transport is not None:
            config.choose("transport", self.transport, config.TRANSPORTS)

    @property
    def gradients(self) -> bool:
        """Whether gradients are pushed, and not how far the parameters have come."""
        return self.accumulate == "gradients"


class Arrays(Protocol):
    """A framework's parameters, as a worker needs them."""

    def tensors(self) -> Mapping[str, Any]:
        """Name -> what the center is made with."""

    def read(self, client: "Client") -> None:
        """Make sure that the client knows each where it is now; LayoutError if they are not those of the start."""

    def write_back(self) -> None:
        """The client has changed them."""

    def copy(self) -> Any:
        """Their values, to be put back."""

    def put_back(self, copy: Any) -> None:
        """Set them to what :meth:`copy` returned."""


A = TypeVar("A", bound=Arrays)


class Worker(Generic[A]):
    """Counts the steps of one optimizer, and exchanges its parameters when a period is over.

    Construction is collective, as that of :class:`hvd_agn.Center`.

    Args:
        settings: the wrapper's arguments.
        optimizer: the wrapped optimizer, for a rule like it.
        arrays: makes the parameters; called once.
        rates: the optimizer's learning rates now.
        through: calls :meth:`perform` where the parameters can be reached; None: at once.
        closed: called when the center has closed.
        resume: as of :class:`hvd_agn.Center`.

    Raises:
        CheckpointError, ConfigError, LayoutError, LaunchError, SharedMemoryError: see :class:`hvd_agn.Center`.
    """

    def __init__(
        self,
        settings: Settings,
        optimizer: Any,
        arrays: Callable[[], A],
        rates: Callable[[], Collection[float]],
        through: Callable[[str], None] | None = None,
        closed: Callable[[], None] = lambda: None,
        resume: Resume | None = None,
    ) -> None:
        self.settings = settings
        self._rates = rates
        self._period, self._overlap = settings.communication_period, settings.overlap
        self._through = through or self.perform
        self.closed = closed
        self.steps_since_exchange = 0
        self._steps_under_way = 0  # of the exchange in the background
        self._viewing_center = False
        self._layout_changed = False
        rule = settings.rule
        tensors: Mapping[str, Any] = {}
        failed: AGNError | None = None
        try:
            if rule is None and settings.gradients:
                rule = rules.SGD(0.0)  # stands in, should the next line fail
                rule = rules.like(optimizer, lr=rules.FOLLOW)
            if isinstance(rule, rules.Rule) and rule.follows:
                _only(rates())
            if not settings.normalize and getattr(rule, "bias_correction", None) == "tf_contrib":
                raise ConfigError("bias_correction='tf_contrib' counts the steps of a mean: leave normalize=False out.")
            self.arrays = arrays()
            tensors = self.arrays.tensors()
        except (CheckpointError, ConfigError, LayoutError) as error:  # the center tells the other ranks
            failed = error
        self.center = Center(
            tensors,
            rule,
            settings.comm,
            center_ranks=settings.center_ranks,
            transport=settings.transport,
            wire_dtype=settings.wire_dtype,
            overlap=settings.overlap,
            accumulate=settings.accumulate,
            on_nonfinite=settings.on_nonfinite,
            max_norm=settings.max_norm,
            name=settings.name,
            resume=resume,
            failed=failed,
        )
        self.client = self.center.arrays_client
        self.arrays.write_back()
        self.center.own(self)
        self._warn_if_stale()

    def _warn_if_stale(self) -> None:
        settings, factor = self.settings, self.center.rule.factor
        if factor is None or settings.gradients or self.center.rule.staleness != rules.STALENESS[0]:
            return
        moves = factor * self.center.size  # mean updates that the center moves by in a period
        if not settings.normalize:
            moves *= settings.communication_period
        ratio = moves / settings.communication_period
        if ratio > config.STALENESS_LIMIT and self.center.rank == 0:
            period = math.ceil(moves / config.STALENESS_LIMIT)
            longer = f"communication_period={period} or more, or "
            if not settings.normalize:
                helps = moves / settings.communication_period**2 <= config.STALENESS_LIMIT
                longer = "normalize=True, or " if helps else ""
            warn(
                f"{self.center.label}: {self.center.size} workers, a communication period of "
                f"{settings.communication_period} and {self.center.rule} move the center by {ratio:.1f} mean updates "
                f"per step; published runs of AGN diverge above about 2.5. Use {longer}"
                f"a rule with {factor * config.STALENESS_LIMIT / ratio:.2g} for {factor:g}.",
                StalenessWarning,
            )

    # ---- steps

    @property
    def viewing_center(self) -> bool:
        """Whether the parameters are the center's just now, within :meth:`center_weights`."""
        return self._viewing_center

    def check_open(self, call: str) -> None:
        """Raise UsageError after ``close()`` or inside ``center_weights()``; ``call`` is named in the message."""
        if self._viewing_center:
            raise UsageError(f"{self.center.label}: {call} inside center_weights(). Leave that context first.")
        self.center.check_open()

    def step(self, update: Callable[[], Any]) -> Any:
        """Apply an update and count it; when the period is over, exchange, or with ``overlap`` start to.

        What an exchange in the background has brought is merged before, if it has ended.
        """
        if self._viewing_center or self.center.closed:
            self.check_open("step()")
        if self._overlap and self.client.ready:
            self._through("land")
        result = update()
        self.steps_since_exchange += 1
        if self.steps_since_exchange >= self._period:
            self._through("exchange")
        return result

    def perform(self, what: str) -> None:
        """Do what :meth:`exchange` and the others ask for, here and now: the parameters can be reached."""
        _PERFORMED[what](self)

    def flush(self) -> None:
        """Push the steps taken since the last exchange, if any, and pull. Waits for no other worker.

        With ``rules.Elastic`` an exchange, after which the parameters are not the center's: ``pull()`` makes them so.

        What ``wire_dtype`` has rounded away so far is pushed too.
        """
        self.check_open("flush()")
        self._through("flush")

    def pull(self) -> None:
        """Set the parameters to the center. Steps not yet pushed are dropped; ``flush()`` keeps them."""
        self.check_open("pull()")
        self._through("pull")

    def land(self) -> None:
        """End the exchange in the background, if there is one: wait for it, and merge what it brought."""
        if self.client.started:
            self._through("land")

    def before_load(self) -> None:
        """For ``Center.load``: end the exchange under way; UsageError inside ``center_weights()``."""
        self.check_open("Center.load()")
        self.land()

    @contextmanager
    def center_weights(self) -> Iterator[None]:
        """Within the context the parameters are the center's, for evaluation; then they are the local ones again.

        Takes a copy of the parameters for as long. Buffers, such as those of batch norm, stay local.
        """
        self.check_open("center_weights()")
        self.land()
        local = self.arrays.copy()
        try:
            self._through("peek")
            self._viewing_center = True
            yield
        finally:
            self._viewing_center = False
            if not self._layout_changed:  # else nothing was done to them
                self.arrays.put_back(local)

    def close(self, error: BaseException | None = None) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.

        Args:
            error: what this comes from; then nothing is pushed, unless ``push_on_error`` was given.
        """
        if self._viewing_center:
            self.check_open("close()")
        if self._layout_changed:  # the last exchange has said that they cannot be pushed
            self.center.own(None)
        self.center.end(shutdown.is_failure(error))
        self.closed()

    def before_close(self, failed: bool) -> None:
        """For ``Center.end``: push what is left."""
        if self.settings.push_on_error or not failed:
            self.flush()

    # ---- what is done where the parameters can be reached

    def _read(self) -> None:
        self._layout_changed = True
        try:
            self.arrays.read(self.client)
        except LayoutError as error:
            raise LayoutError(f"{self.center.label}: {error}") from None
        self._layout_changed = False

    def _exchange(self) -> None:
        if not self._overlap:
            self._exchange_now(exact=False)
            return
        self._land()
        self._start()

    def _start(self) -> None:
        if self.steps_since_exchange == 0:  # the one before was refused, and the steps since with it
            return
        self._read()
        self.client.start(self._divisor(), lr=self._rate())
        self._steps_under_way, self.steps_since_exchange = self.steps_since_exchange, 0

    def _exchange_now(self, *, exact: bool) -> None:
        self._read()
        try:
            self.client.exchange(self._divisor(), exact=exact, lr=self._rate())
        except NonFiniteWarning:  # made an error by a filter: the parameters are the center's all the same
            self.steps_since_exchange = 0
            raise
        finally:
            self.arrays.write_back()
        self.steps_since_exchange = 0

    def _flush(self) -> None:
        self._land()
        if self.steps_since_exchange > 0 or self.client.owes:
            self._exchange_now(exact=True)

    def _pull(self) -> None:
        self._land()
        self._read()
        try:
            self.client.pull()
        finally:  # also when it was cut short: what was pulled has its anchor
            self.arrays.write_back()
        self.steps_since_exchange = 0

    def _peek(self) -> None:
        self._read()
        try:
            self.client.peek()
        finally:
            self.arrays.write_back()

    def _land(self) -> None:
        if not self.client.started:
            return
        self._read()
        try:
            accepted = self.client.finish()
        except NonFiniteWarning as warning:  # as in _exchange_now()
            if not isinstance(warning, RuleOverflowWarning):  # of an exchange that was accepted
                self.steps_since_exchange = 0
            raise
        except AGNError:  # what was not pushed is still in the parameters
            self.steps_since_exchange += self._steps_under_way
            raise
        finally:
            self.arrays.write_back()
        if not accepted:
            self.steps_since_exchange = 0

    def _divisor(self) -> int:
        return max(self.steps_since_exchange, 1) if self.settings.normalize else 1

    def _rate(self) -> float | None:
        """For a rule that follows it."""
        if not self.center.rule.follows:
            return None
        try:
            return _only(self._rates())
        except ConfigError as error:
            raise ConfigError(f"{self.center.label}: {error}") from None

    # ---- checkpoints

    def counters(self) -> dict[str, Any]:
        """Where this worker is in its period, for a checkpoint."""
        return {
            "rank": self.center.rank,
            "size": self.center.size,
            "steps_since_exchange": self.steps_since_exchange,
            "power": self.client.power,
        }

    def owns(self, counters: Mapping[str, Any]) -> bool:
        """Whether they are this worker's: of its rank, among as many."""
        return (counters["rank"], counters["size"]) == (self.center.rank, self.center.size)

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Set those that :meth:`counters` gave; what was rounded away or accumulated here is forgotten."""
        self.steps_since_exchange = counters["steps_since_exchange"]
        self.client.power = counters.get("power", 0.0)
        self.client.forget()


_PERFORMED: Mapping[str, Callable[[Worker[Any]], None]] = {
    "exchange": Worker._exchange,
    "start": Worker._start,
    "land": Worker._land,
    "flush": Worker._flush,
    "pull": Worker._pull,
    "peek": Worker._peek,
}


def _only(rates: Collection[float]) -> float:
    """The one learning rate that a rule can follow."""
    different = sorted(set(rates))
    if len(different) != 1:
        found = f"the parameter groups have {different}" if different else "this optimizer has none"
        raise ConfigError(
            f"the rule follows one learning rate, {found}. Give the rule a number, or wrap one optimizer per group."
        )
    return different[0]
