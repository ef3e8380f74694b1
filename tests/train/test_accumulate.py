"""A batch computed in parts, compared with the whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import TINY
from vmoe import config as configs
from vmoe.data.pipeline import Batch, training_batches
from vmoe.data.sources import open_source
from vmoe.errors import UsageError
from vmoe.sharding import ONE_DEVICE
from vmoe.train.accumulate import Gradient, over_parts
from vmoe.train.state import init_state
from vmoe.train.step import make_train_step


@pytest.mark.slow
def test_parts_with_the_same_groups_give_the_update_and_the_metrics_of_the_whole_batch() -> None:
    """A group is four images, a part eight; tokens drop, and the priority is by order."""
    config = configs.replace(
        configs.load(TINY),
        optim=dict(warmup_steps=0, kind="sgd", lr=0.1),
        model=dict(
            depth=1,
            sparse_blocks=(0,),
            head_std=0.5,
            moe=dict(
                router=dict(
                    noise_std=0.0, priority="order", capacity_factor=0.8, images_per_group=4
                )
            ),
        ),
    )
    batch = training_batches(open_source("digits", "train"), config)[0].batch
    (whole, expected), (parts, ours) = (
        make_train_step(each)(init_state(config), batch)
        for each in (config, configs.replace(config, accumulate=4))
    )
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, parts.params, whole.params)
    jax.tree.map(close, ours, expected)
    assert expected["dropped"] > 0.1 and expected["gradient_norm"] > 1e-2


def test_each_part_has_a_key_of_its_own_means_are_averaged_and_totals_are_summed() -> None:
    numbers = jnp.arange(6.0)
    batch = Batch(numbers.reshape(6, 1, 1, 1), jnp.zeros((6, 2)), numbers >= 0)
    key = jax.random.key(1)

    def gradient(batch: Batch, key: jax.Array) -> Gradient:
        totals = {0: {"tokens": batch.valid.sum()}}
        return {"draw": jax.random.uniform(key)}, ({"image": batch.images.mean()}, totals)

    params, (means, totals) = over_parts(gradient, batch, key, parts=3, placement=ONE_DEVICE)
    draws = [jax.random.uniform(jax.random.fold_in(key, part)) for part in range(3)]
    assert float(params["draw"]) == pytest.approx(float(np.mean(draws)))
    assert float(means["image"]) == 2.5 and int(totals[0]["tokens"]) == 6
    alone, _ = over_parts(gradient, batch, key, parts=1, placement=ONE_DEVICE)
    assert alone["draw"] == jax.random.uniform(key)


def test_parts_that_do_not_divide_the_images_of_a_device_are_refused() -> None:
    with pytest.raises(
        UsageError, match="accumulate=3: the 32 images of each device cannot be cut"
    ):
        ONE_DEVICE.check_batch(32, 3)
