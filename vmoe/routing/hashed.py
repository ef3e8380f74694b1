"""Each position in the image has k fixed experts, with weights 1/k: Hash layers, without a gate.

The paper hashes words. A patch is no word, so this router hashes what an image has in common with
all others, its grid: the paper's position hash. A hash function sends more positions to some
experts by chance, so a table is used: the paper's balanced hash. Each run of e positions has a
random permutation of the experts, so the loads of two experts differ by at most one position per
rank. The entry of a position does not depend on the size of the image.

Source: "Hash Layers For Large Sparse Models" (arXiv 2106.04426).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.axes import Decision, RouterInputs
from vmoe.config import Hash, MoEConfig
from vmoe.routing import token_choice

capacity = token_choice.capacity


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently; tokens get slots by their order in the group.

    Args:
        inputs: the position of each token.
    """
    assert inputs.positions is not None
    experts = table(config, inputs.positions.shape[1])[inputs.positions]
    return token_choice.evenly_weighted(experts, inputs.valid, e=config.num_experts, c=capacity)


def table(config: MoEConfig, n: int) -> Int[Array, "n k"]:
    """The experts of the first n positions.

    Rank r of a position has the first expert of the position r steps further in its run.
    """
    router, e = config.router, config.num_experts
    assert isinstance(router, Hash)
    runs = jnp.arange(-(-n // e))
    key = jax.random.key(router.seed)
    permutations = jax.vmap(lambda run: jax.random.permutation(jax.random.fold_in(key, run), e))
    ranks = [jnp.roll(permutations(runs), -rank, axis=1) for rank in range(router.k)]
    return jnp.stack(ranks, axis=-1).reshape(-1, router.k)[:n]
