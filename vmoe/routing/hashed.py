"""Each position in the image has k fixed experts, with weights 1/k: Hash layers, without a gate.

The paper hashes words. A patch is no word, so this router hashes what an image has in common with
all others, its grid: the paper's position hash. A hash function sends more positions to some
experts by chance, so a table is used: the paper's balanced hash. Each run of e positions has a
random permutation of the experts, so the loads of two experts differ by at most one position per
rank. The entry of a position does not depend on the size of the image.

Source: "Hash Layers For Large Sparse Models" (arXiv 2106.04426).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import at_least, less_than
from vmoe.routing.router import Router
from vmoe.routing.token_choice import evenly_weighted


@dataclasses.dataclass(frozen=True)
class Hash(Router):
    """Each position in the image has its k experts, without a gate (Hash layers, arXiv
    2106.04426)."""

    kind: Literal["hash"] = "hash"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    seed: Annotated[int, at_least(0), less_than(2**32)] = 0
    """Determines the experts of each position."""

    logits_per = None
    normalized = True

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        positions, e = inputs.positions, inputs.logits.shape[-1]
        assert positions is not None
        run = positions.min(axis=1) // e  # 0, unless a sequence is cut
        tables = jax.vmap(lambda run: self.table(e, positions.shape[1] + e, run))(run)  # g x k
        experts = jnp.take_along_axis(tables, (positions - run[:, None] * e)[..., None], axis=1)
        return evenly_weighted(experts, inputs.valid, e=e, c=c)

    def table(self, e: int, n: int, run: Int[Array, ""] | int = 0) -> Int[Array, "n k"]:
        """The experts of the first n positions, or of those from a later run on.

        Rank r of a position has the first expert of the position r steps further in its run.
        """
        runs, key = run + jnp.arange(-(-n // e)), jax.random.key(self.seed)
        permutations = jax.vmap(lambda run: jax.random.permutation(jax.random.fold_in(key, run), e))
        ranks = [jnp.roll(permutations(runs), -rank, axis=1) for rank in range(self.k)]
        return jnp.stack(ranks, axis=-1).reshape(-1, self.k)[:n]
