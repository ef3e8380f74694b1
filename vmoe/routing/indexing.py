"""Rows of each group by number, and their inverse.

Routing consists of these. They are written with ``jax.lax``, which traces faster than the indexing
and the division of ``jax.numpy``: those also allow negative numbers.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped


def rows_at(
    rows: Shaped[Array, "g r ..."], index: Int[Array, "g ..."], *, within: bool = False
) -> Shaped[Array, "g ..."]:
    """Rows of each group by index, from 0; zeros for an index past the end.

    Args:
        within: no index is past the end, or it does not matter which row such an index has.
    """
    _, _, *rest = rows.shape
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + len(rest))),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    index = lax.expand_dims(index, (index.ndim,))
    mode, beyond = ("clip", None) if within else ("fill", 0)
    return lax.gather(rows, index, numbers, (1, 1, *rest), mode=mode, fill_value=beyond)


def placed(
    values: Int[Array, "g x"],
    places: Int[Array, "g x"],
    size: int,
    empty: int,
    *,
    within: bool = False,
) -> Int[Array, "g size"]:
    """What is at each of ``size`` places, from the place of each value; ``empty`` at other places.

    Args:
        places: all different, but for values at no place, whose number is at least ``size``.
        within: all values have a place, which accelerators need not check.
    """
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    start, places = lax.full((len(places), size), empty, jnp.int32), lax.expand_dims(places, (2,))
    mode = "promise_in_bounds" if within else "drop"
    return lax.scatter(start, places, values, numbers, unique_indices=within, mode=mode)


def divide(x: Int[Array, "*x"], n: int) -> tuple[Int[Array, "*x"], Int[Array, "*x"]]:
    """The quotients and remainders of numbers that are 0 or more."""
    divisor = lax.full_like(x, n)
    return lax.div(x, divisor), lax.rem(x, divisor)
