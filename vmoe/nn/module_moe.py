"""An MoE layer whose experts are copies of any module that acts on the last axis."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from vmoe.axes import Record
from vmoe.config import MoEConfig
from vmoe.nn.gates.linear import LinearGate
from vmoe.nn.keys import Rngs
from vmoe.nn.moe import route
from vmoe.routing.groups import group, ungroup
from vmoe.routing.layout import combine, dispatch


class ModuleMoE(nnx.Module):
    """Mixture of experts with a linear gate; each expert is a copy of one module.

    Parameters: ``router`` kernel (d, e), and ``experts``, the module with an axis e added in front
    of every parameter. Experts compute all their slots, as in the implementation ``batched``.
    """

    def __init__(
        self, expert: nnx.Module, width: int, config: MoEConfig, *, spatial: int = 0, rngs: Rngs
    ):
        """The experts start with the parameters of the module.

        Args:
            expert: maps rows (r, d) to (r, x), each independently; it has no state but parameters.
            width: size d of the last axis of the rows.
            config: config of a token-choice layer without noise, expert dropout or a
                ``transfer_dtype``.
            spatial: number of axes between r and d that the module needs, such as 2 for a
                convolution of images.
        """
        self.config = config
        self.spatial = spatial
        self.router = LinearGate(width, 0, config, rngs=rngs)
        graph, params = nnx.split(expert)
        e = config.num_experts
        self.experts = nnx.merge(graph, jax.tree.map(lambda x: jnp.repeat(x[None], e, 0), params))

    def __call__(self, x: Float[Array, "*b d"], *args: Any, **kwargs: Any) -> Float[Array, "*b x"]:
        """The experts' weighted outputs for every row; other arguments are passed to each expert.

        The first axis is the image axis: rows with the same index there belong to one image.
        """
        return self.forward(x, *args, **kwargs)[0]

    def forward(
        self, x: Float[Array, "*b d"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Array, "*b x"], Record]:
        """The output, and the record of the routing, with its auxiliary loss."""
        b = x.shape[0] if x.ndim > 1 else 1
        tokens = x.reshape(b, -1, x.shape[-1])
        n = tokens.shape[1]
        groups, valid = group(tokens, jnp.ones(b, bool), self.config.images_per_group)
        record = route(self.router, groups, valid, None, self.config)
        slots = dispatch(groups, record.routing)
        g = len(slots)
        rows = self._experts(rearrange(slots, "g e c d -> e (g c) d"), args, kwargs)
        outputs = combine(rearrange(rows, "e (g c) d -> g e c d", g=g), record.routing)
        y = ungroup(outputs.astype(rows.dtype), b, n)
        return y.reshape(*x.shape[:-1], y.shape[-1]), record

    def _experts(
        self, rows: Float[Array, "e r d"], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Float[Array, "e r x"]:
        graph, params, rest = nnx.split(self.experts, nnx.Param, ...)

        def expert(params: nnx.State, rows: Float[Array, "r d"]) -> Float[Array, "r x"]:
            module = nnx.merge(graph, params, rest, copy=True)
            return on_rows(module, rows, self.spatial, *args, **kwargs)

        return jax.vmap(expert)(params, rows)


def capture_records(
    model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Any, dict[tuple[str | int, ...], tuple[Record, ...]]]:
    """``model(*args, **kwargs)``, and the records of its ModuleMoE layers by path, one per call.

    Add their ``aux_loss`` to the loss in training. Works inside ``jax.jit`` and ``jax.grad`` with
    a model that is merged there; unused parts of the records are then not computed.
    """
    layers = [path for path, part in nnx.iter_modules(model) if isinstance(part, ModuleMoE)]
    run = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    outputs, captured = run(*args, **kwargs)
    results = dict(nnx.to_flat_state(captured))
    calls = {path: results[*path, "forward"].get_value() for path in layers}
    return outputs, {path: tuple(record for _, record in made) for path, made in calls.items()}


def on_rows(
    module: nnx.Module, rows: Float[Array, "r d"], spatial: int, *args: Any, **kwargs: Any
) -> Float[Array, "*x"]:
    """Applies a module to rows, with ``spatial`` axes of size 1 inserted."""
    ones = (1,) * spatial
    outputs = module(rows.reshape(-1, *ones, rows.shape[-1]), *args, **kwargs)
    kept = outputs.shape[1 : 1 + spatial] == ones
    return outputs.reshape(len(outputs), *outputs.shape[1 + spatial :]) if kept else outputs
