"""A Keras optimizer around another one: what Keras, its callbacks and its files ask of it, the other answers."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

# What keras.optimizers.Optimizer has as plain attributes: they are the wrapped optimizer's.
_FORWARDED = (
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def _forwarded(name: str) -> property:
    def get(self: "Wrapper") -> Any:
        if self._own_only or "inner_optimizer" not in self.__dict__:
            return None
        return getattr(self.inner_optimizer, name)

    def set_(self: "Wrapper", value: Any) -> None:
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(get, set_, doc="The wrapped optimizer's.")


class Wrapper(keras.optimizers.Optimizer):
    """Is the wrapped optimizer to whoever asks; of its own it has nothing that Keras is to see.

    Args:
        optimizer: to be wrapped.
        name: of the wrapper; None: after its class.
    """

    _own_only = False

    def __init__(self, optimizer: Any, name: str | None) -> None:
        # A callable, so that Keras makes no variable for a learning rate of ours.
        super().__init__(learning_rate=lambda: optimizer.learning_rate, name=name)
        self.inner_optimizer = optimizer
        """The wrapped optimizer. Keras' own wrapper, its callbacks and its files know it by this name."""

    def build(self, variables: Iterable[Any]) -> None:
        """Make the wrapped optimizer's variables."""
        if self.built:
            return
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        # Keras would make a second set of averages and accumulators here, and evaluate with it.
        self._own_only = True
        try:
            super().build(variables)
        finally:
            self._own_only = False

    @property
    def variables(self) -> list[Any]:
        """The wrapped optimizer's, so that what lists them is the same with and without the wrapper."""
        return list(self.inner_optimizer.variables)

    @property
    def iterations(self) -> Any:
        """Updates applied: the wrapped optimizer's."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def scale_loss(self, loss: Any) -> Any:
        """The wrapped optimizer's."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """The wrapped optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """The wrapped optimizer's: set :attr:`variables`."""
        self.inner_optimizer.set_weights(weights)

    def load_of_wrapped(self, store: Any) -> None:
        """Load what was saved of the wrapped optimizer without the wrapper.

        Keras goes on to look for it in the wrapped optimizer's own place, where the file has nothing, and would warn.
        """
        inner = self.inner_optimizer
        inner.load_own_variables(store)

        def load(own: Any) -> None:
            del inner.load_own_variables  # which has hidden the method
            if len(own.keys()) > 0:
                inner.load_own_variables(own)

        inner.load_own_variables = load

    def __getattr__(self, name: str) -> Any:
        """What only the wrapped optimizer has: momentum, beta_1; SwapEMAWeights asks for its averages."""
        public = not name.startswith("_") or name == "_model_variables_moving_average"
        if not public or "inner_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["inner_optimizer"], name)


for _name in _FORWARDED:
    setattr(Wrapper, _name, _forwarded(_name))
