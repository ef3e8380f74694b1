"""Forward-mode differentiation of functions with custom backward passes is refused in one line."""

from typing import Any, Never, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from vmoe.errors import UsageError

Tree = TypeVar("Tree")


def reverse_only(tree: Tree) -> Tree:
    """The same floating-point arrays, for a function with a custom backward pass.

    JAX would raise a TypeError about a custom_vjp function, which names neither the layer nor a
    remedy. In reverse mode tangents are only transposed; here, computing one raises the error.

    Raises:
        UsageError: in ``jax.jvp``, ``jax.jacfwd`` or ``jax.hessian``; in ``jax.jit`` when the
            program is compiled.
    """
    return jax.tree.map(REVERSE_ONLY.bind, tree)


def _refuse(*_: Any, **__: Any) -> Never:
    raise UsageError(
        "an MoE layer has no forward-mode derivatives (jax.jvp, jax.jacfwd, jax.hessian): use "
        "jax.grad, jax.vjp or jax.jacrev; with implementation=batched, jax.jacrev(jax.grad(f)) is "
        "the Hessian"
    )


def _jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, Any]:
    return REVERSE_ONLY.bind(*primals), TANGENT.bind(*tangents)


REVERSE_ONLY, TANGENT = Primitive("reverse_only"), Primitive("reverse_only_tangent")
for primitive in (REVERSE_ONLY, TANGENT):
    primitive.def_abstract_eval(lambda x: x)
REVERSE_ONLY.def_impl(lambda x: x)
ad.primitive_jvps[REVERSE_ONLY] = _jvp
batching.defvectorized(REVERSE_ONLY)
mlir.register_lowering(REVERSE_ONLY, lambda _, x: [x])
TANGENT.def_impl(_refuse)
ad.deflinear2(TANGENT, lambda gradient, _: [gradient])
batching.primitive_batchers[TANGENT] = _refuse
mlir.register_lowering(TANGENT, _refuse)
