"""Experts that are modules of equal structure: copies of one, or made one by one."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError, require
from vmoe.nn.experts.interface import OF_LAYER, OF_SLOTS, Experts, Slots
from vmoe.nn.inputs import taking
from vmoe.nn.keys import MaybeKey
from vmoe.trees import path_name


class Copies(Experts):
    """Modules of equal structure, computed at once: their parameters are stacked along e.

    A module that acts on the last axis gets the tokens of all its slots as rows, f[r d], and
    returns f[r x]. A module that mixes tokens has a parameter ``filled``, ``images`` or
    ``positions`` (see ``OF_SLOTS``). It gets the slots of each group, f[g c d], and these arrays
    (g, c) by name, and returns f[g c x]. Parameters ``n`` and ``s`` get the number of tokens of an
    image and of a group. A parameter ``key`` gets another key for each expert, and None in
    evaluation.

    Parameters: ``stacked``, the module with an axis e in front of every parameter.
    """

    def __init__(self, modules: Sequence[nnx.Module], *, spatial: int = 0):
        """The experts start with the parameters of the modules.

        Args:
            modules: one for each expert; the same one several times for equal starts.
            spatial: number of axes of size 1 between r and d that the modules need, such as 2 for a
                1x1 convolution of images.

        Raises:
            UsageError: a module has state other than parameters, or another structure.
        """
        self.num_experts = len(modules)
        self.spatial = spatial
        for module in modules:
            check_expert(type(module).__name__, module)
        if any(structure(module) != structure(modules[0]) for module in modules):
            raise UsageError("only modules of equal structure can be stacked: use experts_of")
        states = [nnx.state(module, graph=True) for module in modules]
        stacked = jax.tree.map(lambda *params: jnp.stack(params), *states)
        self.stacked = nnx.merge(nnx.graphdef(modules[0], graph=True), stacked)
        parameters = inspect.signature(modules[0].__call__).parameters
        self.asks = frozenset(OF_SLOTS).intersection(parameters)
        self.takes = frozenset(OF_LAYER).intersection(parameters)

    @jax.named_scope("experts")
    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots,
        key: MaybeKey = None,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c x"]:
        g, e, _, _ = tokens.shape
        graph, params = nnx.split(self.stacked, graph=True)
        named = {k: v for k, v in slots.inputs.items() if k not in OF_SLOTS or k in self.asks}
        form = "g e c ... -> e g c ..." if self.asks else "g e c ... -> e (g c) ..."
        tokens, named = jax.tree.map(lambda x: rearrange(x, form), (tokens, named))
        sizes = {
            name: size for name, size in (("n", slots.n), ("s", slots.s)) if name in self.takes
        }
        expert_keys = None if key is None else jax.random.split(key, e)

        def expert(
            params: nnx.State, tokens: jax.Array, named: dict[str, Any], key: MaybeKey
        ) -> jax.Array:
            inputs = kwargs | sizes | named | ({"key": key} if "key" in self.takes else {})
            return self._apply(nnx.merge(graph, params, copy=True), tokens, *args, **inputs)

        outputs = jax.vmap(expert)(params, tokens, named, expert_keys)
        form = "e g c x -> g e c x" if self.asks else "e (g c) x -> g e c x"
        return rearrange(outputs, form, g=g)

    @jax.named_scope("experts")
    def on_same(self, rows: Float[Array, "r d"]) -> Float[Array, "e r x"]:
        """See ``Experts``. A linear layer of all experts is one product of matrices."""
        graph, params = nnx.split(self.stacked, graph=True)

        def expert(params: nnx.State) -> jax.Array:
            return self._apply(nnx.merge(graph, params, copy=True), rows)

        return jax.vmap(expert, axis_size=self.num_experts)(params)

    def _apply(
        self, module: nnx.Module, tokens: Float[Array, "*r d"], *args: Any, **kwargs: Any
    ) -> Float[Array, "*r x"]:
        """The outputs of one expert."""
        spatial, name = 0 if self.asks else self.spatial, f"expert {type(module).__name__}"
        with taking(name, tokens.shape):
            outputs = on_rows(module, tokens, spatial, *args, **kwargs)
        shape = getattr(outputs, "shape", type(outputs).__name__)
        require(
            len(shape) == tokens.ndim and shape[:-1] == tokens.shape[:-1],
            f"{name} makes {shape} from tokens {tokens.shape}: only the last axis may differ",
        )
        return outputs


def structure(module: nnx.Module) -> Any:
    """What modules have in common that can be stacked: everything but the values of parameters."""
    graph, state = nnx.split(module, graph=True)
    shapes = [(path, leaf.shape, str(leaf.dtype)) for path, leaf in nnx.to_flat_state(state)]
    return graph, tuple(shapes)


def check_expert(name: str, module: Any) -> None:
    """Checks that a module has parameters and no other state."""
    if not isinstance(module, nnx.Module):
        raise UsageError(
            f"{name} ({type(module).__name__}) is not an nnx.Module: give a module; a function can "
            "be its __call__"
        )
    for path, leaf in nnx.to_flat_state(nnx.state(module, graph=True)):
        if not isinstance(leaf, nnx.Param):
            raise UsageError(
                f"{name}/{path_name(path)} is not a parameter: experts cannot have other state, "
                "such as statistics or random streams"
            )


def on_rows(
    module: nnx.Module, rows: Float[Array, "*r d"], spatial: int, *args: Any, **kwargs: Any
) -> Float[Array, "*x"]:
    """Applies a module to rows, with ``spatial`` axes of size 1 inserted; with 0, as they are."""
    if not spatial:
        return module(rows, *args, **kwargs)
    ones = (1,) * spatial
    outputs = module(rows.reshape(-1, *ones, rows.shape[-1]), *args, **kwargs)
    kept = outputs.shape[1 : 1 + spatial] == ones
    return outputs.reshape(len(outputs), *outputs.shape[1 + spatial :]) if kept else outputs
