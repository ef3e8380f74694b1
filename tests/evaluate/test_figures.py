"""Figures of a model under other settings, against the model with these settings."""

import re

import numpy as np
import pytest

from tests.random_models import random_images, random_params
from vmoe import models
from vmoe.analysis import collect, concatenate, labelled
from vmoe.checkpoints.stored import Origin
from vmoe.config import ExpertChoice, MoEConfig, RoutingOverrides, TokenChoice, replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.evaluate.plots import plots_of
from vmoe.factory import Loaded

IMAGES, P = random_images(b=8), 8


@pytest.mark.parametrize("router", [TokenChoice(k=2), ExpertChoice()])
def test_patches_are_crossed_out_where_a_model_with_so_few_slots_drops_them(
    router: TokenChoice | ExpertChoice,
) -> None:
    layer = MoEConfig(num_experts=4, router=router, images_per_group=4)
    config = replace(models.model_config("vit_tiny", depth=2), sparse_blocks=(0, 1), moe=layer)
    model = models.with_params(config, random_params(config))
    loaded = Loaded(model, ("a", "b"), Preprocessing(32), None, Origin("vmoe", "random"))
    figure = plots_of(config)["kept_patches"](loaded, lambda: labelled(IMAGES, batch_size=8), {})
    titles = [ax.get_title() for ax in figure.axes[1:4]]
    slots = [int(re.search(r"\n(\d+) slots", title)[1]) for title in titles]
    assert slots == sorted(slots, reverse=True) and len(set(slots)) == 3
    by_gate = {} if isinstance(router, ExpertChoice) else {"priority": "largest_gate"}
    few = RoutingOverrides(capacity=slots[-1], **by_gate).apply(config)
    limited = models.with_params(few, models.params_of(model))
    kept = concatenate(collect(limited, labelled(IMAGES, batch_size=8))).blocks[0].kept[:, 1:]
    crosses = [len(ax.collections[0].get_offsets()) for ax in figure.axes[3::4]]
    shown = np.unique(np.linspace(0, 7, 6).round().astype(int))
    assert crosses == (~kept.any(-1)).sum(1)[shown].tolist() and sum(crosses) > 0
    assert f"{kept.any(-1).mean():.0%} with a slot" in titles[-1]
