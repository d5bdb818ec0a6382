"""A worker's part in a center, for every framework: when it exchanges, and what becomes of its steps meanwhile.

A framework's optimizer counts its applied updates here, and brings its parameters (:class:`Arrays`). Everything that
touches them goes through :meth:`Worker.perform`: torch's parameters lie where they are, so there it is called at once;
TensorFlow's variables have an address only inside an op, which then calls it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from . import config, rules, shutdown
from .alike import Facts
from .center import Center
from .checkpoint import Resume, WorkerState
from .errors import (
    AGNError,
    CheckpointError,
    ConfigError,
    LayoutError,
    NonFiniteWarning,
    RankDifferenceWarning,
    RestoredError,
    RestoredWarning,
    RuleOverflowWarning,
    StalenessWarning,
    UsageError,
    UsageWarning,
    warn,
)
from .rules.base import whole

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
        period = whole("communication_period", self.communication_period, "steps")
        object.__setattr__(self, "communication_period", period)
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

    @property
    def groups(self) -> int:
        """Parameter groups of the optimizer."""

    @property
    def group_of(self) -> Sequence[int]:
        """Of each tensor: the number of its group."""

    def tensors(self) -> Mapping[str, Any]:
        """Name -> what the center is made with."""

    def ids(self) -> set[int]:
        """The identities of those that are exchanged."""

    def facts(self, optimizer: Any) -> Facts:
        """What the ranks should have alike besides."""

    def read(self, client: "Client") -> None:
        """Make sure that the client knows each where it is now; LayoutError if they are not those of the start."""

    def write_back(self) -> None:
        """The client has changed them."""

    def values(self) -> Sequence[Any]:
        """Arrays on the CPU with their values; as :meth:`tensors`."""

    def assign(self, values: Sequence[Any]) -> None:
        """Set them to arrays of their shapes."""

    def anchor(self, client: "Client") -> Sequence[Any]:
        """A copy of the anchor of each."""

    def snapshot(self, client: "Client") -> Sequence[Any]:
        """A copy of what an exchange in the background has pushed of each."""

    def merge(self, anchor: Sequence[Any], snapshot: Sequence[Any]) -> None:
        """Add the difference to each."""

    def set_anchor(self, client: "Client", anchor: Sequence[Any]) -> None:
        """Set the anchor of each to an array of its shape."""

    def accumulated(self, client: "Client") -> Sequence[Any]:
        """A copy of the sum of gradients of each; None where there has been none."""

    def set_accumulated(self, client: "Client", sums: Sequence[Any]) -> None:
        """Set them to what :meth:`accumulated` returned."""

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
        rates: the optimizer's learning rates now, one per parameter group; called at the start, and at exchanges.
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
        rates: Callable[[], Sequence[float]],
        through: Callable[[str], None] | None = None,
        closed: Callable[[], None] = lambda: None,
        resume: Resume | None = None,
    ) -> None:
        self.settings = settings
        self._rates = rates
        self.period, self._overlap = settings.communication_period, settings.overlap
        self._through = through or self.perform
        self._on_close = closed
        self.steps_since_exchange = 0
        self._steps_under_way = 0  # of the exchange in the background
        self.viewing_center = False
        """Whether the parameters are the center's just now, within :meth:`center_weights`."""
        self.careful = self._always_careful = settings.overlap or settings.gradients
        """Whether a step is more than an update that is counted."""
        self._layout_changed = False
        self._took_over = False
        self._center_loaded = False  # by Center.load(), and this worker has not exchanged since
        rule = settings.rule
        tensors: Mapping[str, Any] = {}
        facts = Facts()

        groups: Sequence[int] | None = None
        failed: Exception | None = None
        try:
            if rule is None and settings.gradients:
                rule = rules.SGD(0.0)  # stands in, should the next line fail
                rule = rules.like(optimizer, lr=rules.FOLLOW)
            by_worker = rule and any(getattr(each, "bias_correction", None) == "tf_contrib" for each in rule.each)
            if not settings.normalize and by_worker:
                raise ConfigError("bias_correction='tf_contrib' counts the steps of a mean: leave normalize=False out.")
            self.arrays = arrays()
            _close_others(self.arrays.ids())
            tensors, groups = self.arrays.tensors(), self.arrays.group_of
            facts = self.arrays.facts(optimizer)
            if rule and rule.follows:
                self._check_rates(rates())
            if isinstance(rule, rules.Groups) and len(rule.rules) != self.arrays.groups:
                raise ConfigError(
                    f"{len(rule.rules)} rules in rules.Groups, {self.arrays.groups} parameter groups in the wrapped "
                    "optimizer: give one for each."
                )
        except Exception as error:  # the center tells the other ranks
            failed = error
        self.center = Center(
            tensors,
            rule,
            settings.comm,
            groups=groups,
            center_ranks=settings.center_ranks,
            transport=settings.transport,
            wire_dtype=settings.wire_dtype,
            overlap=settings.overlap,
            accumulate=settings.accumulate,
            on_nonfinite=settings.on_nonfinite,
            max_norm=settings.max_norm,
            name=settings.name,
            resume=resume,
            facts=facts,
            failed=failed,
        )
        self.client = self.center.arrays_client
        self.arrays.write_back()
        self.center.own(self)
        _open.append(self)
        self._warn_if_stale()
        for difference in self.center.differences:
            warn(f"{self.center.label}: {difference}", RankDifferenceWarning)

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

    def check_open(self, call: str) -> None:
        """Raise UsageError after ``close()`` or inside ``center_weights()``; ``call`` is named in the message."""
        if self.viewing_center:
            raise UsageError(f"{self.center.label}: {call} inside center_weights(). Leave that context first.")
        self.center.check_open()

    def take_care(self) -> None:
        """From now on a step is more than an update that is counted."""
        self.careful = self._always_careful = True

    def begin_step(self) -> None:
        """Before an update: merge what an exchange in the background has brought, if it has ended."""
        self.check_open("step()")
        if self._overlap and self.client.ready:
            self._through("land")

    def count(self) -> None:
        """An update was applied: when the period is over, exchange, or with ``overlap`` start to."""
        self.steps_since_exchange += 1
        if self.steps_since_exchange >= self.period:
            self._through("exchange")

    def perform(self, what: str) -> None:
        """Do what :meth:`flush` and the others ask for, here and now: the parameters can be reached."""
        try:
            _PERFORMED[what](self)
        except RestoredError:
            self._take_over()

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
            self.viewing_center = self.careful = True
            yield
        finally:
            self.viewing_center, self.careful = False, self._always_careful
            if not self._layout_changed:  # else nothing was done to them
                self.arrays.put_back(local)

    def close(self, error: BaseException | None = None) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.

        Args:
            error: what this comes from; then nothing is pushed, unless ``push_on_error`` was given.
        """
        if self.viewing_center:
            self.check_open("close()")
        if self._layout_changed:  # the last exchange has said that they cannot be pushed
            self.center.own(None)
        self.center.end(shutdown.is_failure(error))
        self.closed()

    def closed(self) -> None:
        """The center has closed. A second call does nothing."""
        if self in _open:
            _open.remove(self)
            self._on_close()

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
        self._center_loaded = False
        if self.steps_since_exchange == 0:  # the one before was refused, and the steps since with it
            return
        self._read()
        self.client.start(self._divisor(), lr=self._rates_now())
        self._steps_under_way, self.steps_since_exchange = self.steps_since_exchange, 0

    def _exchange_now(self, *, exact: bool) -> None:
        self._center_loaded = False
        self._read()
        try:
            self.client.exchange(self._divisor(), exact=exact, lr=self._rates_now())
        except NonFiniteWarning:  # made an error by a filter: the parameters are the center's all the same
            self.steps_since_exchange = 0
            raise
        finally:
            self.arrays.write_back()
        self.steps_since_exchange = 0
        self._warn_if_behind()

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
        else:
            self._warn_if_behind()

    def _take_over(self) -> None:
        """Rank 0 has set the center to a checkpoint: what was done here since the last exchange belongs to the past."""
        self.client.forget()
        self._pull()
        self._took_over = True

    def _warn_if_behind(self) -> None:
        """Not at once: this rank may be about to load the checkpoint too."""
        if self._took_over and self.center.behind:
            warn(
                f"{self.center.label}: {self.center.root} has loaded a checkpoint, and this rank has not: it has taken "
                "the center over, and dropped what it had not pushed. Its optimizer is not restored. Load it on every "
                "rank.",
                RestoredWarning,
            )
        self._took_over = False

    def _divisor(self) -> int:
        return max(self.steps_since_exchange, 1) if self.settings.normalize else 1

    def _rates_now(self) -> Sequence[float] | None:
        """For a rule that follows them."""
        if not self.center.rule.follows:
            return None
        rates = self._rates()
        try:
            self._check_rates(rates)
        except ConfigError as error:
            raise ConfigError(f"{self.center.label}: {error}") from None
        return rates[: self.center.groups]

    def _check_rates(self, rates: Sequence[float]) -> None:
        if len(rates) != self.arrays.groups:
            raise ConfigError(
                f"the rule follows the learning rates of {self.arrays.groups} parameter groups, the wrapped optimizer "
                f"has {len(rates)}: give the rule a number, or leave the groups as they were at the start."
            )

    # ---- checkpoints

    def loaded(self) -> None:
        """``Center.load`` has loaded the center: take it over."""
        self.pull()
        self._center_loaded = True

    def state(self) -> WorkerState:
        """As it is now; changes nothing. An exchange in the background is waited for, and left to be merged."""
        counters = {
            "rank": self.center.rank,
            "size": self.center.size,
            "steps_since_exchange": self.steps_since_exchange,
            "power": self.client.power,
        }
        anchor = self.arrays.anchor(self.client)  # waits
        snapshot = self.arrays.snapshot(self.client) if self.client.started else None
        sums = self.arrays.accumulated(self.client) if self.settings.gradients else None
        return WorkerState({**counters, "versions": self.client.versions}, anchor, snapshot, sums)

    def owns(self, state: WorkerState | None) -> bool:
        """Whether it is this worker's: of its rank, among as many, that pushes the same."""
        if state is None or (state.sums is not None) != self.settings.gradients:
            return False
        return (state.counters["rank"], state.counters["size"]) == (self.center.rank, self.center.size)

    def check_state(self, center: Resume | None) -> None:
        """Whether :meth:`load` can be called.

        Raises:
            CheckpointError: the center is of other arrays, of a rule with other slots, or another than the one that
                ``Center.load`` has just loaded.
            UsageError: after ``close()`` or inside ``center_weights()``.
        """
        self.check_open("loading a checkpoint")
        if center is None:
            return
        label = self.center.label
        try:
            self.center.fits(center)
        except CheckpointError as error:
            raise CheckpointError(f"{label}: the saved center does not fit {self.center.rule}: {error}") from None
        if self._center_loaded and center.identity != self.center.identity:
            raise CheckpointError(
                f"{label}: the optimizer's state was saved with another center than the one that was just loaded. "
                "Load the file that belongs to it, optimizer.center.load(path) and then "
                "optimizer.load_state_dict(state); or the state alone, which holds its center."
            )

    def load(self, own: WorkerState | None, center: Resume | None) -> None:
        """Go on from a checkpoint, as every rank does, each for itself; the parameters have been loaded before.

        The center becomes the one that was saved, unless ``Center.load`` has just loaded that. A worker to which the
        state does not belong takes the saved center over, or, if there is none, begins from its parameters as they are.

        Args:
            own: of a worker, not necessarily this one.
            center: as it was; None: it becomes rank 0's parameters.
        """
        self._discard()
        self._read()
        as_it_is = self._center_loaded and center is None  # from a file of its own
        self.center.restore(center, self.arrays.values(), as_it_is=as_it_is)
        self._center_loaded = False
        self.client.forget()
        if own is not None and self.owns(own) and (as_it_is or center is not None):
            self.restore(own)
        elif as_it_is:
            self.pull()
        else:
            if center is not None:
                self.arrays.assign(center.center)
            self.arrays.set_anchor(self.client, self.arrays.values())
            self.client.versions = [center.version if center else 0]
            self.steps_since_exchange = 0

    def restore(self, own: WorkerState) -> None:
        """Be this worker, which it was, and whose parameters and center are there."""
        self.steps_since_exchange = own.counters["steps_since_exchange"]
        self.client.power = own.counters.get("power", 0.0)
        self.client.versions = own.counters.get("versions") or self.client.versions
        self.client.forget()
        if own.snapshot is not None:
            self.arrays.merge(own.anchor, own.snapshot)
        self.arrays.set_anchor(self.client, own.anchor)
        if own.sums is not None:
            self.arrays.set_accumulated(self.client, own.sums)

    def _discard(self) -> None:
        """End the exchange in the background, and merge nothing: the parameters were loaded."""
        if not self.client.started:
            return
        loaded = self.arrays.copy()
        try:
            self.land()
        except (AGNError, NonFiniteWarning):  # of an exchange that is past
            pass
        finally:
            self.arrays.put_back(loaded)


_PERFORMED: Mapping[str, Callable[[Worker[Any]], None]] = {
    "exchange": Worker._exchange,
    "start": Worker._start,
    "land": Worker._land,
    "flush": Worker._flush,
    "pull": Worker._pull,
    "peek": Worker._peek,
}


_open: list[Worker[Any]] = []  # whose centers are


def _close_others(ids: set[int]) -> None:
    """Close the workers that train any of these: two would write each other's center into the parameters."""
    for worker in [each for each in _open if not ids.isdisjoint(each.arrays.ids())]:
        label = worker.center.label
        worker.close()
        warn(
            f"{label} had some of these parameters and was open: its last steps were pushed, and it was closed. Call "
            "close() before the parameters are wrapped again.",
            UsageWarning,
        )
