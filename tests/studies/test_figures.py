"""Figures of a model under other settings, against the model with these settings."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.random_models import random_images, random_params
from tests.routers import grouped
from vmoe import models
from vmoe.analysis import collect, concatenate, statistics
from vmoe.analysis.effects import BatchDependence
from vmoe.analysis.patches import find_top_patches
from vmoe.checkpoints.stored import Origin
from vmoe.config import (
    ExpertChoice,
    ExpertList,
    Hash,
    MlpExpert,
    MoEConfig,
    RoutingOverrides,
    TokenChoice,
    ZeroExpert,
    replace,
)
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import Batch
from vmoe.factory import Loaded
from vmoe.passes import in_batches
from vmoe.studies.routing import report
from vmoe.studies.routing.figures import OF_CLASSES, plots_of, write_plots
from vmoe.studies.routing.measure import MeasuredRouting, measure_routing

IMAGES, P = random_images(b=8), 8


def loaded_of(*layers: MoEConfig) -> Loaded:
    """A model with random parameters, all of whose blocks are sparse."""
    blocks = tuple(range(len(layers)))
    config = models.model_config("vit_test", depth=len(layers), num_classes=3)
    config = replace(config, sparse_blocks=blocks, moe=layers)
    model = models.with_params(config, random_params(config))
    return Loaded(model, ("a", "b", "c"), Preprocessing(32), None, Origin("vmoe", "random"))


def batches_of(labels: np.ndarray | None = None) -> Callable[[], Iterator[Batch]]:
    return functools.partial(in_batches, IMAGES, labels, batch_size=8)


def measured(loaded: Loaded, labels: np.ndarray | None = None) -> MeasuredRouting:
    batches = batches_of(labels)
    parts = list(collect(loaded.model, batches()))
    best, predictions = find_top_patches(batches(), parts, P), concatenate(parts).logits.argmax(-1)
    of_data = loaded, "random", batches, 8, predictions, statistics(parts), best
    return MeasuredRouting(*of_data, BatchDependence(0.0, 0.0), findings=[])


@pytest.mark.long_after(1)
@pytest.mark.parametrize("router", [TokenChoice(k=2), ExpertChoice()])
def test_patches_are_crossed_out_where_a_model_with_so_few_slots_drops_them(
    router: TokenChoice | ExpertChoice,
) -> None:
    layer = MoEConfig(num_experts=4, router=grouped(router, 4))
    loaded = loaded_of(layer, layer)
    model, config = loaded.model, loaded.model.config
    unused = np.zeros(0, int), {}, {}, BatchDependence(0.0, 0.0), []
    routing = MeasuredRouting(loaded, "random", batches_of(), 8, *unused)
    figure = plots_of(config)["kept_patches"](routing)
    titles = [ax.get_title() for ax in figure.axes[1:4]]
    slots = [int(re.search(r"\n(\d+) slots", title)[1]) for title in titles]
    assert slots == sorted(slots, reverse=True) and len(set(slots)) == 3
    by_gate = {} if isinstance(router, ExpertChoice) else {"priority": "largest_gate"}
    few = RoutingOverrides(capacity=slots[-1], **by_gate).apply(config)
    limited = models.with_params(few, models.params_of(model))
    kept = concatenate(collect(limited, in_batches(IMAGES, batch_size=8))).blocks[0].kept[:, 1:]
    crosses = [len(ax.collections[0].get_offsets()) for ax in figure.axes[3::4]]
    shown = np.unique(np.linspace(0, 7, 6).round().astype(int))
    assert crosses == (~kept.any(-1)).sum(1)[shown].tolist() and sum(crosses) > 0
    assert f"{kept.any(-1).mean():.0%} with a slot" in titles[-1]
    assert "percentages: over 8 images\n6 of 8 images" in figure.get_suptitle()


LAYERS = (
    MoEConfig(num_experts=2, router=TokenChoice(k=1, capacity=20, images_per_group=4)),
    MoEConfig(num_experts=4, router=TokenChoice(k=3, capacity_factor=1.0, images_per_group=4)),
)


@pytest.mark.slow
def test_without_classes_the_other_figures_are_written(tmp_path: Path) -> None:
    loaded, drawn = loaded_of(*LAYERS), []
    files = write_plots(measured(loaded), tmp_path / "plots", on_plot=lambda: drawn.append(1))
    names = plots_of(loaded.model.config)
    assert {file.stem for file in files} == names.keys() - set(OF_CLASSES)
    assert len(drawn) == len(names) and all(file.stat().st_size > 1000 for file in files)


@pytest.mark.slow
def test_k_goes_up_to_the_fewest_experts_of_layers_that_differ_with_its_slots() -> None:
    loaded = loaded_of(*LAYERS)
    routing = measured(loaded, np.arange(8)[:, None] % 3)
    (ax,) = plots_of(loaded.model.config)["k_at_inference"](routing).axes
    # capacity 20; and of 4 images with 17 tokens k / 4, rounded up to a multiple of 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1\n20", "2\n20–36"]


def test_the_report_says_what_shared_and_zero_experts_do_with_unprocessed_tokens() -> None:
    experts = ExpertList(each=(MlpExpert(), ZeroExpert()))
    loaded = loaded_of(LAYERS[0], replace(LAYERS[0], shared_experts=1, experts=experts))
    lines = list(report.remarks(measured(loaded)))
    assert "unprocessed: tokens without a routed expert" in lines[0]
    assert [line for line in lines if "process" in line and line.startswith("block")] == [
        "block 1: shared experts process every token; tokens with a slot at a zero expert (1) "
        "count as processed"
    ]


@pytest.mark.slow
def test_without_a_gate_no_patch_is_shown_as_the_one_with_the_largest_gate() -> None:
    hashed = replace(LAYERS[0], router=Hash(k=1))
    for layers, learned in (((hashed, LAYERS[0]), [1]), ((hashed,), [])):
        loaded = loaded_of(*layers)
        few = in_batches(IMAGES[:4], batch_size=4)
        routing = measure_routing(loaded, "random", batches_of(), few, batch_size=4)
        assert list(routing.top_patches) == learned
        assert ("top_patches" in plots_of(loaded.model.config)) == bool(learned)


def test_statistics_predictions_and_top_patches_are_measured_in_one_pass() -> None:
    loaded, passes = loaded_of(LAYERS[0]), []

    def batches() -> Iterator[Batch]:
        passes.append(1)
        return in_batches(IMAGES, batch_size=3)  # the last one is padded

    reordered = in_batches(IMAGES[:4], batch_size=4)
    routing = measure_routing(loaded, "random", batches, reordered, batch_size=4)
    assert len(passes) == 1
    parts = list(collect(loaded.model, batches()))
    np.testing.assert_array_equal(routing.predictions, concatenate(parts).logits.argmax(-1))
    np.testing.assert_array_equal(routing.blocks[0].uses, statistics(parts)[0].uses)
    expected = find_top_patches(batches(), parts, P, top=3)[0]
    for ours, theirs in zip(routing.top_patches[0].first(3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
