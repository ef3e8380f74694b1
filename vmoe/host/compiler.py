"""Is JAX's compiler right? Versions that are known to err, and a program that finds them.

``import vmoe`` warns of such a version, and ``vmoe check`` also runs the program. jaxlib 0.10.2 and
0.11.0 compute wrong numbers on CPUs without a message (jax issue 39103).
"""

import importlib.metadata
import os
import sys
from typing import Any

ROWS = 32_769  # the least at which float32 goes wrong; float64 does at 16,385
WRONG = ("0.10.2", "0.11.0")  # versions of jaxlib, which holds the compiler
RIGHT_FLAG = "--xla_cpu_experimental_ynn_fusion_type="  # with no value; then they are right
REMEDY = "pip install " + repr("jax>=0.10.1," + ",".join(f"!={each}" for each in WRONG))


def known_wrong() -> str:
    """What is wrong with the installed jaxlib, and the remedy; empty if nothing is known.

    Reads the metadata of the package only, so it is quick and imports no jax. With the flag that
    turns the wrong part of the compiler off, nothing is wrong.
    """
    try:
        version = importlib.metadata.version("jaxlib").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:  # importing vmoe.nn reports it
        return ""
    if version not in WRONG or RIGHT_FLAG in os.environ.get("XLA_FLAGS", "").split():
        return ""
    return (
        f"jaxlib {version} computes wrong numbers on CPUs without a message (jax issue 39103): "
        f"{REMEDY}; or, if you must keep it, XLA_FLAGS={RIGHT_FLAG}"
    )


def warn_if_wrong() -> None:
    """Warns of a jaxlib that is known to err; a process that reads batches stays silent."""
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return
    if problem := known_wrong():
        import warnings

        warnings.warn(f"{problem}; `vmoe check` checks it", RuntimeWarning, stacklevel=3)


def wrong_rows(dtype: str = "float32", rows: int = ROWS) -> list[str]:
    """Rows of a small program that the compiler gets wrong, as text; empty if it is right.

    Row i of its input is (i, 0, 0), multiplied by the identity; the result is i * i exactly.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    points = np.zeros((rows, 3), dtype)
    points[:, 0] = np.arange(rows)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=dtype) @ row) ** 2)))
    # at full precision; a GPU or TPU would round the products
    with jax.default_matmul_precision("highest"):
        computed = np.asarray(squares(points))
    expected = points[:, 0] ** 2
    assert computed.dtype == expected.dtype == np.dtype(dtype)
    return [
        f"{computed[i]:.0f} for {i} squared, which is {expected[i]:.0f}"
        for i in np.flatnonzero(computed != expected)
    ]
