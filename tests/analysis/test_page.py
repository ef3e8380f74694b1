"""The page of ``vmoe routing --out``, used as a reader does, in a real browser (headless Chromium).

The pages show invented routing; one test lets the real command write the page of a trained model.
"""

import base64
import dataclasses
import html
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.browser import in_a_browser, started, wait
from tests.command import vmoe
from tests.random_models import random_params
from tests.routers import grouped
from vmoe import models
from vmoe.analysis import BlockRouting, Collected, collect, page, statistics
from vmoe.analysis.colors import COLORS
from vmoe.analysis.effects import removals
from vmoe.analysis.patches import find_top_patches
from vmoe.axes import Decision, RouterInputs
from vmoe.config import (
    AnyRouter,
    BiasBalanced,
    ExpertChoice,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.nn.inputs import is_label
from vmoe.passes import in_batches
from vmoe.routing.priority import Priority
from vmoe.routing.token_choice import assign

B, E, SIDE, SLOTS = 5, 4, 4, 12
GROUPS = np.array([0, 0, 1, 1, 2])  # of at most two images
PRIORITIES = get_args(Priority)
CLASSES = ("cat", "</script><img src=x onerror=alert(1)>", "&lt;cow", "'\"\u2028")
IMAGES = np.random.default_rng(0).uniform(-1, 1, (B, 16, 16, 3)).astype(np.float32)
LABELS = np.array([[0, -1], [1, -1], [2, 3], [3, -1], [-1, -1]])  # any of them is right


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as driver:
        yield driver


def config_of(
    router: AnyRouter, pooling: Any = "mean", *, images_per_group: int = 2, capacity: int = SLOTS
) -> ViTConfig:
    router = grouped(replace(router, capacity=capacity), images_per_group)
    experts = MlpExpert(implementation="batched")
    return models.model_config(
        "vit_test",
        **dict(image_size=16, patch_size=4, num_classes=len(CLASSES), pooling=pooling),
        **dict(depth=2, sparse_blocks=(0, 1)),
        moe=MoEConfig(num_experts=E, router=router, experts=experts),
    )


@jax.jit(static_argnums=(2, 3, 4))
def _assign(gates: jax.Array, valid: jax.Array, k: int, priority: str, normalize: bool) -> Any:
    c = gates.shape[1]
    return assign(gates, valid, k=k, c=c, priority=priority, normalize=normalize)


def decided(gates: np.ndarray, config: ViTConfig, priority: str) -> BlockRouting:
    """The model's own decision with a slot for every choice."""
    router, n = config.moe_blocks[0].router, gates.shape[1]
    assert isinstance(router, TokenChoice)
    padded = np.concatenate([gates, np.zeros_like(gates[:1])]).reshape(3, 2 * n, E)
    valid = (np.arange(6 * n) < B * n).reshape(3, -1)
    arrays = jnp.asarray(padded), jnp.asarray(valid)
    routing = _assign(*arrays, router.k, priority, router.normalize_weights)
    places = np.where(routing.kept, np.asarray(routing.slots) % (2 * n), -1)
    fields = (routing.experts, places, routing.weights)
    return BlockRouting(gates, *(np.asarray(x).reshape(6, n, -1)[:B] for x in fields), GROUPS)


def with_slots(block: BlockRouting, slots: int) -> BlockRouting:
    """Only the first slots of each expert: a place in a queue does not depend on their number."""
    kept = block.positions < slots
    positions, weights = np.where(kept, block.positions, -1), np.where(kept, block.weights, 0)
    return block._replace(positions=positions, weights=weights)


def invented(
    name: str = "a model", *, k: int = 2, pooling: str = "mean", normalize: bool = False
) -> page.ModelOnImages:
    """Gates with many ties, decided in order of the batch, and random logits."""
    config = config_of(TokenChoice(k=k, normalize_weights=normalize), pooling)
    rng = np.random.default_rng(k)
    shape = (B, SIDE**2 + config.has_class_token, E)
    blocks = {}
    for i in config.sparse_blocks:
        gates = rng.integers(1, 6, shape).astype(np.float32)
        gates /= gates.sum(-1, keepdims=True)
        blocks[i] = with_slots(decided(gates, config, "order"), SLOTS)

    def logits() -> np.ndarray:
        return rng.normal(0, 3, (B, len(CLASSES))).astype(np.float32)

    routing = Collected(logits(), LABELS, blocks, np.ones((B, SIDE, SIDE), bool), 0)
    grid = {(slots, priority): logits() for slots in (0, 8, 16) for priority in PRIORITIES}
    removed = {each: logits() for each in removals(config)}
    maps = rng.integers(0, 256, (3, shape[1], shape[1]), np.uint8)
    attention = dict.fromkeys(config.sparse_blocks, maps)
    sums, images = statistics([routing]), list(in_batches(IMAGES, LABELS, batch_size=len(IMAGES)))
    best = find_top_patches(images, [routing], config.patch_size, top=3)
    return page.ModelOnImages(name, config, routing, sums, grid, removed, best, attention)


def observed(
    config: ViTConfig, *, remove: bool = False, on_step: Callable[[], None] = lambda: None
) -> page.ModelOnImages:
    """A real model with random parameters."""
    model = models.with_params(config, random_params(config))
    batch = list(in_batches(IMAGES, LABELS, batch_size=len(IMAGES)))
    parts = list(collect(model, batch))
    best = find_top_patches(batch, parts, config.patch_size, top=3)
    gated = {i: best[i] for i, moe in config.moe_blocks.items() if moe.router.learned}
    fields = (model, IMAGES, LABELS, statistics(parts), gated)
    return page.observe("observed", *fields, remove=remove, on_step=on_step)


def written(
    folder: Path,
    *shown: page.ModelOnImages,
    title: str = "Routing",
    classes: tuple[str, ...] = CLASSES,
) -> Path:
    path = folder / "page.html"
    path.write_text(page.render(title, "five images", IMAGES, LABELS, classes, list(shown)))
    return path


def opened(browser: Any, path: Path, address: str = "") -> None:
    browser.get("about:blank")
    browser.get(f"{path.as_uri()}{address}")
    wait(browser, "return document.documentElement.dataset.drawn")
    assert browser.get_log("browser") == []


def text(browser: Any, identifier: str) -> str:
    return browser.find_element("id", identifier).text


def shown_top(logits: np.ndarray) -> list[str]:
    return [CLASSES[i] for i in np.argsort(-logits)]


def bar_names(element: Any) -> list[str]:
    names = element.find_elements("css selector", ".bars th")
    return [name.get_property("textContent").removeprefix("✓\u00a0") for name in names]


@in_a_browser
@pytest.mark.parametrize(
    ("k", "pooling", "normalize"), [(2, "mean", False), (3, "class_token", True)]
)
def test_the_page_drops_what_the_model_drops_at_every_number_of_slots_and_priority(
    browser: Any, tmp_path: Path, k: int, pooling: str, normalize: bool
) -> None:
    """Kept choices also have the model's combine weights."""
    model = invented(k=k, pooling=pooling, normalize=normalize)
    opened(browser, written(tmp_path, model))
    found = browser.execute_script(
        """const block = models[0].blocks[1], n = block.chosen.shape[1];
        return arguments[0].map(priority => arguments[1].map(slots => images.map((_, image) => {
          const kept = keptInGroup(block, image, slots, priority).get(image);
          return Array.from({length: n}, (_, token) =>
            choices(block, image, token, kept).map(({weight}) => weight));
        })))""",
        PRIORITIES,
        slots := list(range(2 * (SIDE**2 + 1) + 1)),
    )
    for priority, of_priority in zip(PRIORITIES, found, strict=True):
        every = decided(model.routing.blocks[1].gates, model.config, priority)
        for number, weights in zip(slots, of_priority, strict=True):
            expected = with_slots(every, number)
            np.testing.assert_array_equal(np.array(weights) > 0, expected.kept)
            np.testing.assert_allclose(weights, expected.weights, rtol=1e-6)


@in_a_browser
def test_a_clicked_patch_is_followed_through_all_blocks_and_the_address_brings_it_back(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains

    model = invented(pooling="class_token")
    path = written(tmp_path, model)
    opened(browser, path, "#image=2")
    canvas = browser.find_element("id", "picture-0-0")
    side = canvas.size["width"]
    third_row_last_column = (side * (3.5 / 4 - 0.5), side * (2.5 / 4 - 0.5))
    ActionChains(browser).move_to_element_with_offset(
        canvas, *third_row_last_column
    ).click().perform()
    token = 1 + 2 * SIDE + 3
    rows = browser.find_elements("css selector", "#path tbody tr")
    experts = [block.experts[2, token].tolist() for block in model.routing.blocks.values()]
    assert path_experts(browser.find_element("id", "path")) == experts
    for row, block in zip(rows, model.routing.blocks.values(), strict=True):
        weights = [f"{w:.3f}" if w else "dropped" for w in block.weights[2, token]]
        assert row.find_elements("css selector", "td")[2].text.split() == weights
    assert "row 3, column 4: expert" in text(browser, "live")
    before = text(browser, "path")
    address = browser.current_url.partition("#")[2]
    opened(browser, path, f"#{address}")
    assert f"token={token}" in address and text(browser, "path") == before


@in_a_browser
def test_the_arrow_keys_move_the_patch_and_stay_in_the_picture(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, written(tmp_path, invented()))
    places = []
    for key in (
        Keys.ARROW_RIGHT,
        Keys.ARROW_LEFT,
        Keys.ARROW_RIGHT,
        Keys.ARROW_DOWN,
        Keys.ARROW_UP,
    ):
        browser.find_element("id", "picture-0-1").send_keys(key)
        places.append(text(browser, "live").partition(":")[0])
        assert browser.switch_to.active_element.get_attribute("id") == "picture-0-1"
    first, second = "row 1, column 1", "row 1, column 2"
    assert places == [first, first, second, "row 2, column 2", second]
    browser.find_element("id", "gallery").send_keys(Keys.ARROW_RIGHT)
    assert (
        browser.find_element("css selector", "#gallery [aria-selected=true]").get_attribute("id")
        == "image-1"
    )


@in_a_browser
def test_dragging_the_slots_shows_what_is_dropped_and_what_the_whole_model_predicts(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains

    model, of_the_model = invented(pooling="class_token"), "the model as loaded"
    opened(browser, written(tmp_path, model), "#image=1")
    assert of_the_model not in text(browser, "panels")
    assert text(browser, "reset") == f"as loaded: {SLOTS} slots, order in the batch"
    slider = browser.find_element("id", "slots")
    ActionChains(browser).drag_and_drop_by_offset(slider, -60, 0).perform()
    number = int(browser.execute_script("return state.slots"))
    assert 0 < number < SLOTS
    assert f"{number} slots per expert" in text(browser, "slots-text")
    assert_drops_of_image_1(browser, model, number, "order")
    nearest = min((16, 8, 0), key=lambda slots: abs(slots - number))
    assert_whole_model(browser, model, nearest, "order", image=1)
    assert of_the_model in text(browser, "panels")
    right, as_loaded = (
        is_label(logits.argmax(-1), LABELS).sum()
        for logits in (model.capacities[nearest, "order"], model.routing.logits)
    )
    counted = f"{right} of 4 images are predicted correctly; as loaded, {as_loaded}"
    assert counted in text(browser, "capacity-result")


def assert_drops_of_image_1(
    browser: Any, model: page.ModelOnImages, slots: int, priority: Priority
) -> float:
    """The table says what block 1 drops of the image and of its group; returns the first.

    And how many of the patches, of which the class token is none, have no expert.
    """
    block = with_slots(decided(model.routing.blocks[1].gates, model.config, priority), slots)
    without = ~block.kept[:, int(model.config.has_class_token) :].any(-1)
    expected = [
        [x.mean() for x in (block.dropped[which], without[which])] for which in ([1], [0, 1])
    ]
    rows = browser.find_elements("css selector", "#capacity-result .scroll tbody tr")
    cells = [row.find_elements("tag name", "td") for row in rows]
    shown = [[float(cell.text.removesuffix("%")) / 100 for cell in row] for row in cells]
    np.testing.assert_allclose(shown, expected, atol=5.1e-4)
    return expected[0][0]


def assert_whole_model(
    browser: Any,
    model: page.ModelOnImages,
    slots: int,
    priority: Priority,
    image: int,
    which: str = "nearest computed: ",
) -> None:
    shown = f"the whole model, {which}{slots} slots in every sparse block"
    assert shown in text(browser, "capacity-result")
    result = browser.find_element("id", "capacity-result")
    assert bar_names(result) == shown_top(model.capacities[slots, priority][image])


@in_a_browser
def test_another_priority_drops_other_choices_and_changes_the_whole_models_prediction(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import Select

    model = invented()
    opened(browser, written(tmp_path, model), "#image=1&slots=8")
    dropped = set()
    for priority in reversed(PRIORITIES):
        choice = Select(browser.find_element("id", "choice-priority"))
        choice.select_by_value(json.dumps(priority))
        dropped.add(assert_drops_of_image_1(browser, model, 8, priority))
        assert_whole_model(browser, model, 8, priority, image=1, which="")
    assert len(dropped) > 2


@in_a_browser
def test_of_two_numbers_of_slots_as_near_the_larger_is_shown_and_a_computed_one_as_itself(
    browser: Any, tmp_path: Path
) -> None:
    model = invented()
    path = written(tmp_path, model)
    opened(browser, path, "#slots=4")
    assert_whole_model(browser, model, 8, "order", image=0)
    opened(browser, path, "#slots=8")
    assert_whole_model(browser, model, 8, "order", image=0, which="")


@pytest.mark.slow
def test_the_grid_is_dense_at_few_slots_and_has_the_models_own_and_enough_for_every_choice() -> (
    None
):
    config, steps = config_of(TokenChoice(k=2), capacity=17), []
    model = observed(config, on_step=lambda: steps.append(1))
    assert 0 < len(steps) <= page.count_passes(config, remove=False)
    slots = sorted({slots for slots, _ in model.capacities})
    most = max(
        np.bincount(block.experts[block.groups == group].ravel(), minlength=E).max()
        for block in model.routing.blocks.values()
        for group in set(GROUPS)
    )
    assert slots[:2] == [0, 2] and slots[-1] == most > 17 and 17 in slots
    assert np.median(slots) <= 0.375 * most
    np.testing.assert_allclose(model.capacities[17, "order"], model.routing.logits, atol=1e-5)
    first, *others = (model.capacities[most, priority] for priority in PRIORITIES)
    for other in others:  # nothing is dropped, so nothing depends on the priority
        np.testing.assert_allclose(other, first, atol=1e-5)


@in_a_browser
def test_a_removed_expert_shows_the_prediction_of_the_model_without_it(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import Select

    model = invented()
    opened(browser, written(tmp_path, model), "#image=3")
    choices = Select(browser.find_element("id", "choice-removal"))
    of_block = [each for each in model.removed if each.block == 1]
    assert len(choices.options) == len(of_block)
    choices.select_by_index(5)
    names = bar_names(browser.find_element("id", "removal-result"))
    with_all, without = model.routing.logits[3], model.removed[of_block[5]][3]
    assert names == shown_top(with_all) + shown_top(without)


@in_a_browser
def test_images_are_filtered_by_class_expert_and_error(browser: Any, tmp_path: Path) -> None:
    """The first visible image is shown if the filters hide the current one."""
    from selenium.webdriver.support.ui import Select

    model = invented(pooling="class_token")
    opened(browser, written(tmp_path, model))

    def images() -> list[str]:
        every = browser.find_elements("css selector", "#gallery img")
        names = [image.get_attribute("id") for image in every]
        assert f"image-{browser.execute_script('return state.image')}" in names
        return names

    predictions = model.routing.logits.argmax(-1)
    browser.find_element("id", "wrong").click()
    wrong = [i for i in range(B) if LABELS[i, 0] >= 0 and predictions[i] not in LABELS[i]]
    assert images() == [f"image-{i}" for i in wrong]
    browser.find_element("id", "wrong").click()
    Select(browser.find_element("id", "choice-class")).select_by_index(4)
    assert images() == ["image-2", "image-3"]
    Select(browser.find_element("id", "choice-class")).select_by_index(0)
    Select(browser.find_element("id", "choice-expert")).select_by_index(2)
    uses = (model.routing.blocks[1].experts[:, 1:] == 1).any(-1).sum(-1)  # of patches
    assert images() == [f"image-{i}" for i in np.argsort(-uses, kind="stable") if uses[i]]


NOT_AMONG = "The image below is not among them."


@in_a_browser
def test_a_chip_shows_an_image_that_uses_its_expert_and_the_page_says_if_none_does(
    browser: Any, tmp_path: Path
) -> None:
    """In block 1, image 0 has no patch at expert 2, and no image has one at expert 3."""
    model = invented(k=1)
    block = model.routing.blocks[1]
    experts = np.where(block.experts == 3, 0, block.experts)
    experts[0][experts[0] == 2] = 1
    routing = model.routing._replace(
        blocks=model.routing.blocks | {1: block._replace(experts=experts)}
    )
    path = written(tmp_path, model._replace(routing=routing))
    users = [i for i in np.argsort(-(experts == 2).sum((1, 2)), kind="stable") if i]

    def shown() -> tuple[int, int]:
        among = browser.find_elements("css selector", "#gallery [aria-selected=true]")
        assert (NOT_AMONG in text(browser, "count")) == (not among)
        gallery = browser.find_elements("css selector", "#gallery img")
        return browser.execute_script("return state.image"), len(gallery)

    for chips in ("#legend .chip", "#experts .bars .chip", "#experts .mosaic .chip"):
        opened(browser, path)
        browser.find_elements("css selector", chips)[2].click()
        assert shown() == (users[0], 4)
        browser.find_elements("css selector", chips)[3].click()
        assert shown() == (users[0], 0)
    browser.find_element("id", "expert-3").click()
    assert shown() == (users[0], B)
    opened(browser, path, "#image=0&expert=2")
    assert shown() == (0, 4) and NOT_AMONG in text(browser, "count")


@in_a_browser
def test_what_is_done_in_a_picture_keeps_the_image_also_if_a_filter_leaves_it_out(
    browser: Any, tmp_path: Path
) -> None:
    """A chip next to a patch; or a patch of another model, which is right about the image."""
    one, two = invented("one", pooling="class_token"), invented("two", k=1)
    right = two.routing.logits.copy()
    right[:2, 0] = 99  # the label of the first, not of the second
    wrong = one.routing.logits.copy()
    wrong[0, 1] = 99
    one = one._replace(routing=one.routing._replace(logits=wrong))
    two = two._replace(routing=two.routing._replace(logits=right))
    opened(browser, written(tmp_path, one, two), "#wrong=true&token=0")
    assert NOT_AMONG not in text(browser, "count") and "prediction of one" in text(browser, "count")
    browser.find_elements("css selector", "#path .chip")[0].click()
    assert browser.execute_script("return [state.image, state.token]") == [0, 0]
    browser.find_element("id", "picture-1-0").click()
    assert browser.execute_script("return [state.image, state.model]") == [0, 1]
    assert NOT_AMONG in text(browser, "count") and "prediction of two" in text(browser, "count")
    assert "expert" in text(browser, "live")
    browser.find_elements("css selector", "#gallery img")[0].click()
    assert NOT_AMONG not in text(browser, "count")
    assert text(browser, "live") == ""  # which was of a patch of the other image


@in_a_browser
def test_an_expert_of_soft_routing_is_used_by_the_patches_that_weigh_it_most(
    browser: Any, tmp_path: Path
) -> None:
    """Only these patches are bright, and images with the most such patches come first."""
    model = observed(config_of(Soft()))
    opened(browser, written(tmp_path, model), "#opacity=100")
    most = np.round(255 * model.routing.blocks[1].gates).argmax(-1)
    expert = int(np.bincount(most.ravel()).argmax())
    browser.find_element("id", f"expert-{expert}").click()
    image = browser.execute_script("return state.image")
    after = painted(browser, "picture-0-1", FILL)
    browser.find_element("id", f"expert-{expert}").click()
    dim = (painted(browser, "picture-0-1", FILL) != after).any(-1)
    np.testing.assert_array_equal(dim, most[image] != expert)


@in_a_browser
def test_the_attention_of_the_selected_patch_is_shown_or_said_to_be_missing(
    browser: Any, tmp_path: Path
) -> None:
    model = invented()
    path = written(tmp_path, model)
    opened(browser, path, "#show=attention&token=6&image=1")
    found = browser.execute_script("return Array.from(attentionOf(0, models[0].blocks[1], 1))")
    assert found == model.attention[1][1, 6].tolist()
    legend = "attention (mean over the heads): 0\nmaximum of the selected patch"
    assert text(browser, "legend") == legend
    opened(browser, path, "#show=attention")
    assert text(browser, "hint") == "Select a patch to see its attention."
    assert text(browser, "legend").split() == list("0123")  # of experts, as in the pictures
    opened(browser, path, "#show=attention&token=6&image=4")
    assert text(browser, "hint") == "Attention is stored for the first 3 images."


@in_a_browser
def test_the_patches_that_an_expert_weighs_most_are_shown_with_their_gates(
    browser: Any, tmp_path: Path
) -> None:
    model = invented()
    opened(browser, written(tmp_path, model))
    rows = browser.find_elements("css selector", ".mosaic .row")
    for row, gates in zip(rows, model.top_patches[1].gates, strict=True):
        patches = row.find_elements("tag name", "canvas")
        titles = [patch.get_attribute("title").rpartition("gate ")[2] for patch in patches]
        np.testing.assert_allclose(np.array(titles, float), gates, atol=0.0051)
    first, side = model.top_patches[1].patches[0, 0], model.config.patch_size
    wait(browser, "return document.querySelector('.mosaic canvas').dataset.drawn")
    pixels = browser.execute_script(
        """const canvas = document.querySelector(".mosaic canvas");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]"""
    )
    shown = np.array(pixels).reshape(side, side, 4)[..., :3]
    np.testing.assert_allclose(shown, (first + 1) * 127.5, atol=0.51)


@in_a_browser
def test_names_are_shown_as_they_are_and_nothing_is_fetched(browser: Any, tmp_path: Path) -> None:
    title = "<b>bold</b> & </title><script>alert(2)</script>"
    path = written(tmp_path, invented(title), invented("other"), title=title)
    assert html.escape(title) in path.read_text()
    opened(browser, path)  # an alert would end it, a refused request stand in the log
    assert browser.find_element("tag name", "h1").text == title == browser.title
    classes = browser.find_elements("css selector", "#choice-class option")
    assert [each.get_property("textContent") for each in classes] == ["all", *CLASSES]
    resources = "return performance.getEntriesByType('resource').map(({name}) => name)"
    assert all(name.startswith("data:") for name in browser.execute_script(resources))


@in_a_browser
def test_two_models_stand_one_above_the_other(browser: Any, tmp_path: Path) -> None:
    one, two = invented("one", k=1), invented("two", pooling="class_token")
    opened(browser, written(tmp_path, one, two))
    assert [each.text for each in browser.find_elements("css selector", ".model")] == ["one", "two"]
    for clicked, prefix in (("picture-0-1", 0), ("picture-1-0", 1)):  # the class token of "two"
        browser.find_element("id", clicked).click()
        patch = browser.execute_script("return state.token") - prefix
        tables = browser.find_elements("css selector", "#path .scroll")
        for table, model, token in zip(tables, (one, two), (patch, patch + 1), strict=True):
            experts = [block.experts[0, token].tolist() for block in model.routing.blocks.values()]
            assert path_experts(table) == experts
    assert text(browser, "capacity").startswith("block 0")


def path_experts(table: Any) -> list[list[int]]:
    """By sparse block, the experts that the path of a patch names."""
    rows = table.find_elements("css selector", "tbody tr")
    chips = (row.find_elements("css selector", ".chip") for row in rows)
    return [[int(chip.text) for chip in of_row] for of_row in chips]


@in_a_browser
def test_an_expert_is_highlighted_in_the_shown_block_alone_as_numbers_of_others_are_unrelated(
    browser: Any, tmp_path: Path
) -> None:
    model, pictures = invented(), ("picture-0-0", "picture-0-1", "picture-1-0", "picture-1-1")
    path = written(tmp_path, model, invented("two", k=1))
    opened(browser, path, "#opacity=100")
    before = [painted(browser, each, FILL) for each in pictures]
    browser.find_element("id", "expert-2").click()
    after = [painted(browser, each, FILL) for each in pictures]
    changed = [(one != other).any(-1) for one, other in zip(before, after, strict=True)]
    without = ~(model.routing.blocks[1].experts[0] == 2).any(-1)
    np.testing.assert_array_equal(changed[1], without)
    assert 0 < without.mean() < 1 and not np.any([changed[0], *changed[2:]])
    assert "experts are unrelated between blocks and between models" in text(browser, "hint")
    browser.find_element("id", "picture-0-0").click()
    assert browser.execute_script("return [state.block, state.expert]") == [0, None]
    browser.find_elements("css selector", "#path .chip")[-1].click()  # of the second model
    assert browser.execute_script("return [state.model, state.block]") == [1, 1]


FILL, STRIPE, CROSS = (0.5, 0.15), (0.25, 0.75), (0.25, 0.25)  # places in a patch, (x, y)


def painted(browser: Any, picture: str, place: tuple[float, float]) -> np.ndarray:
    """The color of each patch at a place in it, (patches, 3)."""
    x, y = place
    points = [((j + x) / SIDE, (i + y) / SIDE) for i in range(SIDE) for j in range(SIDE)]
    return np.array(
        browser.execute_script(
            """const canvas = document.getElementById(arguments[0]), {width, height} = canvas;
            const copy = Object.assign(document.createElement("canvas"), {width, height});
            const pen = copy.getContext("2d", {willReadFrequently: true});
            pen.drawImage(canvas, 0, 0);
            const {data} = pen.getImageData(0, 0, width, height);
            return arguments[1].map(([x, y]) => {
              const pixel = 4 * (Math.floor(y * height) * width + Math.floor(x * width));
              return [...data.slice(pixel, pixel + 3)];
            })""",
            picture,
            points,
        )
    )


@in_a_browser
def test_a_patch_has_the_color_of_its_first_choice_a_stripe_if_that_is_dropped_a_cross_if_all_are(
    browser: Any, tmp_path: Path
) -> None:
    """One block is as recorded, the other has the slots and the priority of the controls."""
    model = invented(pooling="class_token")
    opened(browser, written(tmp_path, model), "#opacity=100&slots=5&priority=largest_gate")
    recorded, gates = model.routing.blocks[0], model.routing.blocks[1].gates
    changed = with_slots(decided(gates, model.config, "largest_gate"), 5)
    kinds = set()
    for i, block in enumerate((recorded, changed)):
        first, kept = block.experts[0, 1:, 0], block.kept[0, 1:]
        some, picture = kept.any(-1), f"picture-0-{i}"
        names = np.where(some, np.array(COLORS)[first], "#8a8f96")
        colors = np.array([list(bytes.fromhex(name[1:])) for name in names])
        np.testing.assert_array_equal(painted(browser, picture, FILL), colors)
        for place, marked in ((STRIPE, ~kept[:, 0]), (CROSS, ~some)):
            expected = np.where(marked[:, None], 255, colors)
            np.testing.assert_array_equal(painted(browser, picture, place), expected)
        kinds |= set(map(tuple, kept.tolist()))
    assert len(kinds) == 4  # both choices kept, either, none


@in_a_browser
def test_a_patch_with_more_attention_is_drawn_stronger(browser: Any, tmp_path: Path) -> None:
    """Yellower, on pictures without colors."""
    model = invented()
    opened(browser, written(tmp_path, model), "#show=attention&token=6&image=1")
    red, green, blue = painted(browser, "picture-0-1", FILL).T
    in_order = ((red + green) / 2 - blue)[np.argsort(model.attention[1][1, 6])]
    assert (np.diff(in_order) > -2).all() and in_order[-1] - in_order[0] > 60


WRONG = (
    *(
        "image=999",
        "image=1.5",
        "image=",
        "model=5",
        "block=7",
        "token=-1",
        "token=99",
        "expert=99",
    ),
    *("expert=x", "show=x", "opacity=200", "slots=abc", "slots=-1", "slots=9999", "priority=foo"),
    *("removal=999", "class=99", "wrong=maybe", "toString=1", "%"),
)


@in_a_browser
def test_a_wrong_value_in_the_address_is_as_if_it_were_not_there(
    browser: Any, tmp_path: Path
) -> None:
    path, state = written(tmp_path, invented()), "return JSON.stringify(state)"
    opened(browser, path)
    start = browser.execute_script(state)
    read = "return arguments[0].map(x => JSON.stringify(fromAddress(new URLSearchParams(x))))"
    assert browser.execute_script(read, WRONG) == [start] * len(WRONG)
    for wrong in ("priority=foo", "&".join(WRONG)):
        opened(browser, path, f"#{wrong}")
        assert browser.execute_script(state) == start
        assert len(browser.find_elements("css selector", "#panels canvas")) == 2
    right = dict(image=2, model=0, block=0, token=3, expert=1, show="attention", opacity=0)
    right |= dict(slots=5, priority="random", removal=4, wrong=True)
    right["class"] = 1
    opened(
        browser, path, "#" + "&".join(f"{k}={str(v).replace('T', 't')}" for k, v in right.items())
    )
    assert json.loads(browser.execute_script(state)) == right


@in_a_browser
def test_a_logit_without_a_class_has_a_number(browser: Any, tmp_path: Path) -> None:
    logits = np.tile([0.0, 1, 2, 3], (B, 1))
    model = invented()._replace(routing=invented().routing._replace(logits=logits))
    opened(browser, written(tmp_path, model, classes=("cat", "dog", "cow")))
    (panel,) = browser.find_elements("css selector", ".panel.prediction")
    assert bar_names(panel) == ["class 3", "cow", "dog", "cat"]
    title = browser.find_element("id", "image-0").get_attribute("title")
    assert title == "cat, predicted class 3"


@pytest.mark.parametrize("sigmoid", [False, True])
def test_probabilities_are_those_that_the_model_was_trained_for(
    tmp_path: Path, sigmoid: bool
) -> None:
    """Two classes that are both sure have half each with a softmax, and all with a sigmoid."""
    model = invented()._replace(sigmoid=sigmoid)
    model = model._replace(routing=model.routing._replace(logits=np.tile([9.0, 9, -9, -9], (B, 1))))
    text = written(tmp_path, model).read_text().partition('id="record">')[2]
    shown = json.loads(text.partition("</script>")[0])["models"][0]["predictions"]
    first, second = base64.b64decode(shown["probabilities"]["data"])[:2]
    assert first == second == (255 if sigmoid else 127)


@in_a_browser
def test_the_size_shown_equals_the_file(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path, invented(), invented("two"))
    opened(browser, path)
    shown, _, _ = text(browser, "measured").partition(" MB")
    assert float(shown) == pytest.approx(path.stat().st_size / 1e6, abs=0.0051)


@in_a_browser
def test_statistics_stand_with_the_chance_baseline_also_where_a_table_has_no_room(
    browser: Any, tmp_path: Path
) -> None:
    model, many = invented(), (*CLASSES, *map(str, range(40)))
    opened(browser, written(tmp_path, model, classes=many))
    shown, block = text(browser, "experts"), model.statistics[1]
    assert "uniform\n25.0% 25.0%" in shown
    information = "expert and class: {:.3f}; chance baseline (shuffled classes): {:.3f}"
    assert information.format(*block.class_information(len(many))) in shown
    assert "The table is left out above 40 classes." in shown
    assert not browser.find_elements("css selector", ".heat")
    pictures = browser.find_elements("css selector", ".positions canvas")
    for expert, picture in enumerate(pictures):
        row, column = divmod(int(block.by_position[expert].argmax()), SIDE)
        place = f"expert {expert}: most choices in row {row + 1}, column {column + 1}"
        assert picture.get_attribute("aria-label") == place
    opened(browser, written(tmp_path, model))
    assert len(browser.find_elements("css selector", ".heat tbody tr")) == E == len(pictures)
    assert "left out" not in text(browser, "experts")
    unknown = {
        i: dataclasses.replace(x, labels=0 * LABELS - 1) for i, x in model.statistics.items()
    }
    opened(browser, written(tmp_path, model._replace(statistics=unknown)))
    assert "class" not in text(browser, "experts")


class ByPlace(ExpertChoice):
    """A router of its own: a token's place decides, and choices can be dropped."""

    can_drop = True
    logits_per = None

    def capacity(self, limits: Any, s: int) -> int:
        return 2

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        g, s, e = inputs.logits.shape
        gates = jnp.broadcast_to(jax.nn.one_hot(jnp.arange(s) % e, e), (g, s, e))
        return Decision(gates, assign(gates, inputs.valid, k=1, c=c))


@in_a_browser
@pytest.mark.parametrize(
    "router", [ExpertChoice(), Soft(), ByPlace()], ids=["expert_choice", "soft", "by_place"]
)
def test_a_router_without_a_priority_and_k_has_a_page_without_slots_to_change(
    browser: Any, tmp_path: Path, router: Any
) -> None:
    model = observed(config_of(router, images_per_group=1))
    opened(browser, written(tmp_path, model), "#slots=3&priority=random&image=1")
    browser.find_element("id", "picture-0-0").click()
    token = browser.execute_script("return state.token")
    expected = []
    for block in model.routing.blocks.values():
        experts, gates = block.experts[1, token], block.gates[1, token]
        if isinstance(router, Soft):  # weighs all experts, on the page in units of 1/255
            experts, gates = np.arange(E), np.round(255 * gates)
        chosen = experts[experts < E].tolist()
        expected.append(sorted(chosen, key=lambda expert: -gates[expert]))
    assert path_experts(browser.find_element("id", "path")) == expected and any(expected)
    chooses = not isinstance(router, Soft)
    assert ("share of the choices" in text(browser, "experts")) == chooses
    assert ("choices are dropped" in text(browser, "experts")) == chooses
    assert ("Top patches" in text(browser, "experts")) == router.learned
    gates = browser.find_element("css selector", "#path tbody td:nth-of-type(2)").text.split()
    assert {len(gate) for gate in gates} == {5 if chooses else 4}
    for section in ("capacity-section", "removal-section"):  # no expert is removed
        assert not browser.find_element("id", section).is_displayed()
    assert browser.get_log("browser") == []


@in_a_browser
def test_registers_are_named_and_attention_is_shown_relative_to_patches(
    browser: Any, tmp_path: Path
) -> None:
    model = observed(replace(config_of(TokenChoice(), "class_token"), registers=2))
    for maps in model.attention.values():
        assert (maps[..., 3:].max(-1) == 255).all()
    for token, name in ((0, "class token"), (2, "register"), (3, "row 1, column 1")):
        opened(browser, written(tmp_path, model), f"#token={token}")
        found = browser.execute_script("return described(0, models[0].blocks[0])")
        assert found.startswith(f"{name}: ")


@pytest.mark.slow
def test_a_page_of_a_bias_balanced_router_has_its_choices_and_slots_to_change(
    tmp_path: Path,
) -> None:
    """``tests/cli/test_kinds.py`` has the page of all routers."""
    model = observed(config_of(BiasBalanced()))
    text = written(tmp_path, model).read_text()
    start = text.index('{"summary"')
    record = json.JSONDecoder().raw_decode(text[start:])[0]["models"][0]
    for block, own in zip(record["blocks"], model.routing.blocks.values(), strict=True):
        chosen = np.frombuffer(base64.b64decode(block["chosen"]["data"]), "<u2")
        np.testing.assert_array_equal(chosen.reshape(block["chosen"]["shape"]), own.experts)
        assert block["drops"]
    assert record["grid"] is not None


@in_a_browser
def test_the_page_works_in_a_frame_without_rights_on_a_phone_and_in_the_dark(
    browser: Any, tmp_path: Path
) -> None:
    """A notebook embeds it in such a frame, which has no address to write to."""
    path = written(tmp_path, invented())
    outer = tmp_path / "outer.html"
    source = html.escape(path.read_text())
    outer.write_text(
        f'<iframe sandbox="allow-scripts" width=600 height=900 srcdoc="{source}"></iframe>'
    )
    browser.get(outer.as_uri())
    browser.switch_to.frame(0)
    wait(browser, "return document.documentElement.dataset.drawn")
    browser.find_element("id", "picture-0-0").click()
    assert "block 0" in text(browser, "path")
    browser.switch_to.default_content()

    size = dict(width=360, height=740, deviceScaleFactor=2, mobile=True)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    opened(browser, path, "#token=5")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    names = browser.find_elements("css selector", "#panels .bars th")
    assert len(names) == len(CLASSES)
    for name in names:
        assert name.get_property("scrollWidth") <= name.get_property("clientWidth")
    style = "return getComputedStyle(document.body)"
    assert browser.execute_script(f"{style}.backgroundColor") == "rgb(21, 24, 28)"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@in_a_browser
@pytest.mark.slow
def test_the_command_writes_a_page_that_shows_a_trained_model(
    browser: Any, tiny_run: Path, tmp_path: Path
) -> None:
    """In the browser it drops what the model dropped, also in groups with padding."""
    path = tmp_path / "report.html"
    data = ("--data", "digits", "--images", "64", "--page-images", "20")
    tight = ("--routing.capacity-factor", "0.5")
    command = ("routing", "--checkpoint", tiny_run, *data, *tight, "--out", path, "--json")
    result = vmoe(*command)
    assert result.returncode == 0, result.stderr
    assert f"{path}: 0." in result.stderr and json.loads(result.stdout)["blocks"]
    opened(browser, path)
    assert text(browser, "summary") == (
        "Data: digits:test, 64 of 360 images. "
        "Statistics are over 64 images; the first 20 of them are shown."
    )
    assert len(browser.find_elements("css selector", "#gallery img")) == 20
    assert len(browser.find_elements("css selector", "#panels canvas")) == 1
    blocks = browser.execute_script(
        """return models[0].blocks.map(block => images.map((_, image) => ({
          tokens: block.tokens,
          recorded: Array.from(at(block.kept, image)),
          decided: Array.from(keptInGroup(block, image, block.slots, block.priority).get(image)),
        })))"""
    )
    for block in blocks:
        recorded, decided = (
            np.array([image[name] for image in block]) for name in ("recorded", "decided")
        )
        np.testing.assert_array_equal(decided, recorded)
        assert 0 < recorded.mean() < 1 and block[0]["tokens"] == 7 * 5  # three groups, one padded
    milliseconds = int(browser.execute_script("return document.documentElement.dataset.drawn"))
    print(f"{path.stat().st_size / 1e6:.2f} MB, first picture after {milliseconds} ms")
