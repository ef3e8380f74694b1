"""Experts that are modules of equal structure: copies of one, or made one by one."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float, Int, Key

from vmoe.errors import UsageError, require
from vmoe.nn.experts.interface import OF_LAYER, OF_SLOTS, Experts, Slots, names_taken
from vmoe.nn.experts.structure import Path, difference, outline, variables_of
from vmoe.nn.inputs import taking
from vmoe.nn.keys import MaybeKey
from vmoe.trees import path_name


class Copies(Experts):
    """Modules of equal structure, computed at once: their variables are stacked along e.

    A module that acts on the last axis gets the tokens of all its slots as rows, f[r d], and
    returns f[r x]. An empty slot repeats one of the expert's tokens. What else a module wants to
    know it names in a tuple ``takes``, and gets by these names:

    - "filled", "images", "positions": arrays (g, c) about its slots, see ``OF_SLOTS``. Such a
      module may mix tokens: it gets the slots of each group, f[g c d], and returns f[g c x].
    - "n", "s": the number of tokens of an image and of a group.
    - "key": another key for each expert; None in evaluation.

    A module around one that has ``takes`` needs a ``takes`` of its own, and hands them on.

    Each expert has its own parameters, statistics and random streams, which change under
    ``nnx.jit`` as in any module. They start with the values of the modules, which are not used
    further, but for what different modules hold: that stays one. Random streams never do.

    Parameters: ``stacked``, the module with an axis e in front of every variable of its own.
    """

    def __init__(
        self,
        modules: nnx.Module | Sequence[nnx.Module],
        *,
        spatial: int = 0,
        shared: Collection[int] = (),
        numbers: Sequence[int] | None = None,
    ):
        """
        Args:
            modules: one for each expert; the same one several times for equal starts. Or one module
                whose variables have an axis e in front, as of ``nnx.vmap``.
            spatial: number of axes of size 1 between r and d that the modules need, such as 2 for a
                1x1 convolution of images.
            shared: ids of variables that other modules hold too, see ``shared_variables``.
            numbers: the number of each expert in its layer, by which its random streams differ from
                those of all others; if None, 0, 1, 2...

        Raises:
            UsageError: the modules differ in more than the values of variables, the variables in
                their first axis, or ``takes`` is wrong.
        """
        self.spatial, paths = spatial, frozenset[Path]()
        if is_stacked(modules):
            self.stacked, self.num_experts = modules, _first_axis(modules)
        else:
            for module in modules:
                check_expert(type(module).__name__, module)
            ids = {*shared, *shared_variables(modules)}
            first = outline(modules[0], ids)
            for i, module in enumerate(modules):
                path = None if module is modules[0] else difference(first, outline(module, ids))
                what = path_name(path or ()) or "their class"
                problem = f"experts 0 and {i} differ in {what}, so they cannot be stacked"
                require(path is None, f"{problem}: use experts_of")
            paths = frozenset(path for path, x in variables_of(modules[0]) if id(x) in ids)
            self.num_experts = len(modules)
            self.stacked = _stacked(modules, paths, numbers or range(len(modules)))
        self.shared = paths
        takes = _taken_by(self.stacked)
        self.asks, self.takes = takes.intersection(OF_SLOTS), takes.intersection(OF_LAYER)

    @jax.named_scope("experts")
    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots,
        key: MaybeKey = None,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c x"]:
        g, e, _, _ = tokens.shape
        form = "g e c ... -> e g c ..." if self.asks else "g e c ... -> e (g c) ..."
        tokens, named = jax.tree.map(lambda x: rearrange(x, form), (tokens, slots.inputs))
        sizes = {
            name: size for name, size in (("n", slots.n), ("s", slots.s)) if name in self.takes
        }
        keys = None if key is None else jax.random.split(key, e)

        def expert(
            module: nnx.Module, tokens: jax.Array, named: dict[str, Any], key: MaybeKey
        ) -> jax.Array:
            inputs = kwargs | sizes | named | ({"key": key} if "key" in self.takes else {})
            return self._apply(module, tokens, *args, **inputs)

        outputs = self._of_each(expert, tokens, named, keys)
        form = "e g c x -> g e c x" if self.asks else "e (g c) x -> g e c x"
        return rearrange(outputs, form, g=g)

    @jax.named_scope("experts")
    def on_same(self, rows: Float[Array, "r d"]) -> Float[Array, "e r x"]:
        """See ``Experts``. A linear layer of all experts is one product of matrices."""
        return self._of_each(lambda module: self._apply(module, rows))

    def __getitem__(self, number: int) -> nnx.Module:
        i = range(self.num_experts)[number]
        graph, state = nnx.graphdef(self.stacked, graph=True), []
        for path, x in variables_of(self.stacked):
            if path not in self.shared:
                x = jax.tree.map(lambda leaf: leaf[i], x)
                if names := getattr(x, "out_sharding", None):
                    x.set_metadata(out_sharding=tuple(names[1:]))
            state.append((path, x))
        return nnx.merge(graph, nnx.from_flat_state(state))

    def _of_each(self, apply: Callable[..., jax.Array], *inputs: Any) -> Float[Array, "e ..."]:
        """``apply(module, *inputs)`` for each expert; its state that changes is kept.

        Args:
            inputs: trees of arrays with an axis e in front.
        """
        graph, variables = nnx.graphdef(self.stacked, graph=True), dict(variables_of(self.stacked))
        changed: list[Path] = []

        def expert(own: dict[int, Any], *inputs: Any) -> Any:
            state = [own.get(i, x) for i, x in enumerate(variables.values())]
            module = nnx.graphlib.unflatten(graph, state, copy_variables=True)
            before = {path: jax.tree.leaves(x) for path, x in variables_of(module)}
            outputs = apply(module, *inputs)
            after, changed[:] = dict(variables_of(module)), []
            for path, x in after.items():
                sown = path not in before and isinstance(x, nnx.Intermediate)  # without a capture
                if not sown and not _same(before.get(path), jax.tree.leaves(x)):
                    changed.append(path)
            return outputs, [after[path].get_value() for path in changed]

        own = {i: x for i, (path, x) in enumerate(variables.items()) if path not in self.shared}
        outputs, values = jax.vmap(expert, axis_size=self.num_experts)(own, *inputs)
        for path, x in zip(changed, values, strict=True):
            name = f"{type(self.stacked).__name__}/{path_name(path)}"
            require(path in variables, f"{name} is new in a call: make it in __init__")
            require(
                path not in self.shared,
                f"{name} changes, but experts share it: give each its own, or call .eval() of it",
            )
            try:
                variables[path].set_value(x)
            except TraceContextError:
                raise UsageError(
                    f"{name} changes: call the layer under nnx.jit, nnx.grad and the like, which "
                    "keep what changes; or make experts that do not change, by layer.eval()"
                ) from None
        return outputs

    def _apply(
        self, module: nnx.Module, tokens: Float[Array, "*r d"], /, *args: Any, **kwargs: Any
    ) -> Float[Array, "*r x"]:
        """The outputs of one expert."""
        spatial, name = 0 if self.asks else self.spatial, f"expert {type(module).__name__}"
        with taking(name, tokens.shape):
            outputs = on_rows(module, tokens, spatial, *args, **kwargs)
        if not isinstance(outputs, jax.Array):
            raise UsageError(
                f"{name} makes a {type(outputs).__name__}: return one array; join several along "
                "the last axis, and split the outputs of the layer"
            )
        shape = outputs.shape
        require(
            len(shape) == tokens.ndim and shape[:-1] == tokens.shape[:-1],
            f"{name} makes {shape} from tokens {tokens.shape}: only the last axis may differ",
        )
        return outputs


def _same(before: list[Any] | None, after: list[Any]) -> bool:
    """Whether a variable has the arrays that it had; None if there was no such variable."""
    return before is not None and [*map(id, before)] == [*map(id, after)]


def shared_variables(modules: Iterable[nnx.Module]) -> set[int]:
    """The ids of variables that several modules hold, without random streams.

    These are of each expert, even if the modules were made with one stream.
    """
    different = {id(module): module for module in modules}.values()
    counts = Counter(
        id(x)
        for module in different
        for _, x in variables_of(module)
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.RngState)
    )
    return {variable for variable, count in counts.items() if count > 1}


def _stacked(
    modules: Sequence[nnx.Module], shared: Collection[Path], numbers: Sequence[int]
) -> nnx.Module:
    """One module with an axis e in front of every variable that is not shared."""
    graph, state = nnx.graphdef(modules[0], graph=True), []
    for leaves in zip(*map(variables_of, modules), strict=True):
        path, x = leaves[0]
        if path not in shared:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *(x for _, x in leaves))
            if isinstance(x, nnx.RngKey):
                keys = jax.vmap(_folded)(stacked.get_value(), jnp.array(numbers))
                stacked = stacked.replace(keys)
            x = nnx.spmd.add_axis(stacked, 0, {nnx.PARTITION_NAME: None})
        state.append((path, x))
    return nnx.merge(graph, nnx.from_flat_state(state))


def _folded(keys: Key[Array, "..."], number: Int[Array, ""]) -> Key[Array, "..."]:
    """The keys of one expert, made from those of its module."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.ravel()).reshape(keys.shape)


def _taken_by(module: nnx.Module) -> frozenset[str]:
    """What a module names in ``takes``, after checking it."""
    name, known = type(module).__name__, (*OF_SLOTS, *OF_LAYER)
    parts = dict(nnx.iter_modules(module, graph=True)).items()
    takers = {path: part for path, part in parts if hasattr(part, "takes")}
    if () not in takers:
        for path, part in takers.items():
            around = any(path[:i] in takers for i in range(len(path)))  # that one calls this part
            called = around or isinstance(part, Experts)
            names = "" if called else ", ".join(sorted(_taken_by(part)))
            require(
                not names,
                f"expert {name} holds {path_name(path)}, which takes {names}: give {name} the same "
                "`takes` to hand on, or takes = () if it needs none",
            )
        return frozenset()
    takes = names_taken(module, f"{name}.takes")
    unknown = ", ".join(sorted(set(takes) - set(known)))
    require(not unknown, f"{name}.takes names {unknown}: a layer has {', '.join(known)}")
    return frozenset(takes)


def is_stacked(modules: Any) -> bool:
    """Whether one module is given, and not a list of modules."""
    return isinstance(modules, nnx.Module) and not isinstance(modules, nnx.List)


def _first_axis(module: nnx.Module) -> int:
    """The size of the first axis of every variable of a stacked module."""
    shapes = {path_name(path): jnp.shape(jax.tree.leaves(x)[0]) for path, x in variables_of(module)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise UsageError(
            f"experts is one {type(module).__name__}, whose variables need an axis of experts in "
            f"front, all of one size: {shapes}; or give a list with a module for each expert"
        )
    return sizes.pop()[0]


def check_expert(name: str, module: Any) -> None:
    """Checks that an expert is a module."""
    if not isinstance(module, nnx.Module):
        raise UsageError(
            f"{name} ({type(module).__name__}) is not an nnx.Module: give a module; a function can "
            "be its __call__"
        )


def on_rows(
    module: nnx.Module, rows: Float[Array, "*r d"], spatial: int, /, *args: Any, **kwargs: Any
) -> Float[Array, "*x"]:
    """Applies a module to rows, with ``spatial`` axes of size 1 inserted; with 0, as they are."""
    if not spatial:
        return module(rows, *args, **kwargs)
    ones = (1,) * spatial
    outputs = module(rows.reshape(-1, *ones, rows.shape[-1]), *args, **kwargs)
    kept = outputs.shape[1 : 1 + spatial] == ones
    return outputs.reshape(len(outputs), *outputs.shape[1 + spatial :]) if kept else outputs
