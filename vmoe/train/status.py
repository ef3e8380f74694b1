"""Whether a step was finite and whether a stop is requested, as agreed by all processes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.sharding import Placement
from vmoe.train.step import Metrics


class NotFinite(Exception):
    """The loss or the gradient of a step is NaN or infinite.

    Attributes:
        batch: number of the batch of that step.
    """

    def __init__(self, step: int, batch: int, metrics: Metrics):
        loss, norm, lr = jax.device_get([metrics[name] for name in ("loss", "gradient_norm", "lr")])
        super().__init__(
            f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate {lr:.3g}"
        )
        self.batch = batch


def make_reduction(placement: Placement) -> jax.stages.Wrapped:
    """A jitted function of a scalar and of one flag per device.

    Returns:
        whether the scalar is finite and whether any flag is set, replicated on all devices.
    """

    def reduce(
        total: Float[Array, ""], stops: Bool[Array, "x"]
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        return placement.replicate((jnp.isfinite(total), stops.any()))

    return jax.jit(reduce)


class _Pending(NamedTuple):
    """A step that was dispatched, perhaps not finished yet."""

    step: int
    batch: int
    metrics: Metrics
    finite: jax.Array
    stop: jax.Array


class StepStatus:
    """The status of the steps of a run, reduced over all processes by a small separate program.

    The status of a step is read when the next one has been dispatched, so that the device never
    waits; or by ``read``, before anything depends on the step.
    """

    def __init__(self, placement: Placement):
        self._placement = placement
        self._reduce = make_reduction(placement)
        self._pending: _Pending | None = None
        self.stop = False
        """Whether any process was asked to stop, as of the last step read."""

    def add(self, step: int, batch: int, metrics: Metrics, *, stop: bool) -> None:
        """Adds a step that was dispatched, and reads the one before.

        Args:
            batch: number of its batch.
            metrics: metrics of ``train_step``.
            stop: whether this process was asked to stop.

        Raises:
            NotFinite: the step before was not finite.
        """
        total = metrics["loss"] + metrics["aux_loss"] + metrics["gradient_norm"]
        finite, stops = self._reduce(total, self._placement.per_device_flag(stop))
        previous, self._pending = self._pending, _Pending(step, batch, metrics, finite, stops)
        self._read(previous)

    def read(self) -> None:
        """Reads the last step added, and waits for it.

        Raises:
            NotFinite: it was not finite.
        """
        self._read(self._pending)

    def _read(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        finite, stop = jax.device_get((pending.finite, pending.stop))
        if not finite:
            raise NotFinite(pending.step, pending.batch, pending.metrics)
        self.stop |= bool(stop)
