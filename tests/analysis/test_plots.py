"""What figures show equals what was collected; the oracles are plain loops over tokens."""

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from tests.random_models import random_images, random_params
from vmoe import models
from vmoe.analysis import BlockRouting, BlockStatistics, Collected, collect, concatenate, statistics
from vmoe.analysis.colors import COLORS, expert_colors, text_color
from vmoe.analysis.patches import find_top_patches
from vmoe.analysis.plots import (
    capacity_curves,
    experts_by_class,
    experts_of_patches,
    k_at_inference,
    kept_patches,
    random_routers,
    top_patches,
    weight_histograms,
)
from vmoe.config import ExpertChoice, MoEConfig, Soft, TokenChoice, replace
from vmoe.errors import UsageError
from vmoe.passes import in_batches

B, N, P, TOP = 7, 16, 8, 5
IMAGES = random_images(b=B)
LABELS = np.array([[0, -1], [1, -1], [2, 0], [0, -1], [1, -1], [2, -1], [-1, -1]])
CLASSES = ["shoe", "a $10 bag", "hat", "of no image"]
TOKENS, EXPERTS, SOFT, ONE = range(4)  # blocks by router; the last one has a single expert


def batches() -> Any:
    return in_batches(IMAGES, LABELS, batch_size=4)


@pytest.fixture(scope="module")
def parts() -> list[Collected]:
    """Of a model with a class token."""
    layers = (
        MoEConfig(num_experts=4, router=TokenChoice(k=2, capacity_factor=0.4, images_per_group=2)),
        MoEConfig(num_experts=4, router=ExpertChoice(capacity_factor=0.7, images_per_group=2)),
        MoEConfig(num_experts=3, router=Soft()),
        MoEConfig(num_experts=1, router=TokenChoice(k=1, capacity_factor=0.5, images_per_group=2)),
    )
    config = replace(models.model_config("vit_test", depth=4), sparse_blocks=(0, 1, 2, 3))
    config = replace(config, moe=layers)
    return list(collect(models.with_params(config, random_params(config)), batches()))


@pytest.fixture(scope="module")
def blocks(parts: list[Collected]) -> dict[int, BlockStatistics]:
    return statistics(parts)


def texts(figure: Any) -> str:
    """All that is written in a figure but the ticks of y."""
    words = [figure.get_suptitle()]
    for ax in figure.axes:
        words += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        words += [text.get_text() for text in ax.get_xticklabels()]
        legends = [*figure.legends, *([ax.get_legend()] if ax.get_legend() else [])]
        words += [text.get_text() for legend in legends for text in legend.texts]
    return " ".join(words)


def test_colors_of_experts_differ_for_every_kind_of_vision_and_their_text_can_be_read() -> None:
    """Simulated dichromacy (Machado et al. 2009) in linear RGB; 0.02 of OKLab can just be seen."""
    views = np.array(
        [
            [1, 0, 0, 0, 1, 0, 0, 0, 1],
            [0.1523, 1.0526, -0.2049, 0.1145, 0.7863, 0.0992, -0.0039, -0.0481, 1.0520],
            [0.3673, 0.8606, -0.2280, 0.2801, 0.6725, 0.0474, -0.0118, 0.0429, 0.9689],
            [1.2555, -0.0767, -0.1788, -0.0784, 0.9308, 0.1476, 0.0047, 0.6914, 0.3039],
        ]
    ).reshape(-1, 3, 3)
    cones = np.array(
        [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]], float
    )
    lab = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    rgb = [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS]
    linear = np.array([[((x + 0.055) / 1.055) ** 2.4 for x in color] for color in rgb])
    seen = np.einsum("vij,cj->vci", views, linear).clip(0, 1)
    seen = np.cbrt(seen @ cones.T) @ np.array(lab).T
    for number, least in ((8, 0.07), (32, 0.05)):
        pairs = itertools.combinations(range(number), 2)
        nearest = min(np.linalg.norm(seen[:, a] - seen[:, b], axis=-1).min() for a, b in pairs)
        assert nearest > least
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    for color, own in zip(COLORS, luminance, strict=True):
        lighter = text_color(color) == "#ffffff"
        assert (1.05 / (own + 0.05) if lighter else (own + 0.05) / 0.05) > 4.5
    assert expert_colors(33) == (*COLORS, COLORS[0])


def test_experts_by_class_are_the_shares_of_the_choices_with_the_chance_baseline(
    parts: list[Collected], blocks: dict[int, BlockStatistics]
) -> None:
    shown = [TOKENS, EXPERTS]
    figure = experts_by_class(blocks, CLASSES, shown)
    whole = concatenate(parts)
    for i, ax in zip(shown, figure.axes, strict=True):
        counts = np.zeros((4, 5))  # the last column is of no expert
        for image, label in ((image, y) for image, own in enumerate(LABELS) for y in own if y >= 0):
            for expert in whole.blocks[i].experts[image].ravel():
                counts[label, expert] += 1
        counts = counts[:, :4]
        table = ax.images[0].get_array().filled(np.nan)
        np.testing.assert_allclose(table[:3], 100 * counts[:3] / counts[:3].sum(1, keepdims=True))
        assert np.isnan(table[3]).all()
        written = [int(text.get_text()) for text in ax.texts]
        np.testing.assert_allclose(written, table[:3].ravel(), atol=0.51)
        information, chance = blocks[i].class_information(4)
        assert f"{information:.3f}\n(chance {chance:.3f})" in ax.get_title()
        labels = ax.get_xticklabels()
        assert [label.get_text() for label in labels] == list("0123")
        colors = [to_hex(label.get_bbox_patch().get_facecolor()) for label in labels]
        assert tuple(colors) == expert_colors(4)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [name.replace("$", r"\$") for name in CLASSES]
    assert "expert" in texts(figure) and "class" in texts(figure)


def test_many_classes_are_sorted_by_their_most_frequent_expert(
    blocks: dict[int, BlockStatistics],
) -> None:
    figure = experts_by_class(blocks, [f"class {i}" for i in range(40)], [TOKENS])
    table = figure.axes[0].images[0].get_array().filled(0)
    assert table.shape == (40, 4) and (np.diff(table.argmax(1)) >= 0).all()
    assert not figure.axes[0].texts and "40 classes, by most frequent expert" in texts(figure)


def test_weight_histograms_count_the_gates_of_choices_by_rank_where_tokens_choose(
    parts: list[Collected], blocks: dict[int, BlockStatistics]
) -> None:
    shown = [TOKENS, EXPERTS, ONE]
    figure = weight_histograms(blocks, shown)
    whole = concatenate(parts)
    for i, ax, ranks in zip(shown, figure.axes, (2, 1, 1), strict=True):
        block = whole.blocks[i]
        e, k = block.gates.shape[-1], block.experts.shape[-1]
        gates: list[list[float]] = [[] for _ in range(k)]
        for (image, token, r), expert in np.ndenumerate(block.experts):
            if expert < e:
                gates[r].append(block.gates[image, token, expert])
        own = gates if ranks == 2 else [list(itertools.chain(*gates))]
        assert len(ax.patches) == ranks
        for rank, stairs in zip(own, ax.patches, strict=True):
            assert stairs.get_label().endswith(f", mean {np.mean(rank):.3f}")
            values, edges, _ = stairs.get_data()
            expected = np.histogram(np.minimum(rank, 0.999), edges)[0] / len(rank)
            np.testing.assert_allclose(values, expected)
    words = ("choice 2, mean", "all choices, mean", "share of the choices", "gate")
    assert all(word in texts(figure) for word in words)


def test_patches_have_the_color_and_number_of_the_expert_with_the_largest_weight(
    parts: list[Collected],
) -> None:
    whole, without = concatenate(parts), 0
    columns = (TOKENS, EXPERTS, ONE)
    figure = experts_of_patches(IMAGES, whole, patch_size=P, blocks=columns, show=4)
    for (row, image), (column, i) in itertools.product(
        enumerate((0, 2, 4, 6)), enumerate(columns, start=1)
    ):
        ax, block = figure.axes[(1 + len(columns)) * row + column], whole.blocks[i]
        picture, e = ax.images[0].get_array(), block.gates.shape[-1]
        written = {text.get_position(): text.get_text() for text in ax.texts}
        for token in range(N):
            weights, experts = block.weights[image, 1 + token], block.experts[image, 1 + token]
            chosen = [each for each in zip(weights, experts, strict=True) if each[0] > 0]
            best = max(chosen)[1] if chosen else None
            y, x = P * (token // 4), P * (token % 4)
            number = written.get((x + P / 2 - 0.5, y + P / 2 - 0.5))
            assert number == (None if best is None else str(best))
            color = np.full(3, 0.5) if best is None else to_rgb(expert_colors(e)[best])
            gray = (IMAGES[image, y : y + P, x : x + P].mean(-1, keepdims=True) + 1) / 2
            tinted = 0.7 * np.asarray(color) + 0.3 * gray
            np.testing.assert_allclose(picture[y : y + P, x : x + P], tinted, atol=1e-6)
            without += best is None
    assert without
    assert "block 3" in texts(figure)


def test_the_numbers_of_a_grid_of_many_patches_do_not_overlap() -> None:
    i, p, b = 16, 4, 4
    n = i * i
    ten = np.full((b, n, 1), 10)
    gates = np.ones((b, n, 11), np.float32)
    weights = np.ones((b, n, 1), np.float32)
    block = BlockRouting(gates, ten, np.zeros_like(ten), weights, np.zeros(b, int))
    shown = np.ones((b, i, i), bool)
    collected = Collected(np.zeros((b, 0)), np.full((b, 1), -1), {0: block}, shown, 0)
    figure = experts_of_patches(np.zeros((b, i * p, i * p, 3)), collected, patch_size=p)
    figure.draw_without_rendering()  # places the panels
    first, right, *_ = (text.get_window_extent() for text in figure.axes[1].texts)
    below = figure.axes[1].texts[i].get_window_extent()
    assert not first.overlaps(right)
    assert not first.overlaps(below)


def test_dimmed_patches_are_exactly_the_dropped_ones(parts: list[Collected]) -> None:
    """The class token is no patch."""
    whole, dropped = concatenate(parts), 0
    for i in (TOKENS, EXPERTS, ONE):
        figure = kept_patches(IMAGES, {"few": whole}, block=i, patch_size=P, show=4)
        for row, image in enumerate((0, 2, 4, 6)):
            before, after = (figure.axes[2 * row + x].images[0].get_array() for x in (0, 1))
            np.testing.assert_allclose(before, (IMAGES[image] + 1) / 2, atol=1e-6)
            (crosses,) = figure.axes[2 * row + 1].collections
            places = []
            for token in range(N):
                y, x = P * (token // 4), P * (token % 4)
                same = np.array_equal(*(each[y : y + P, x : x + P] for each in (before, after)))
                assert same == whole.blocks[i].kept[image, 1 + token].any()
                if not same:
                    places.append((x + P / 2 - 0.5, y + P / 2 - 0.5))
            np.testing.assert_allclose(crosses.get_offsets(), np.reshape(places, (-1, 2)))
            dropped += len(places)
        share = whole.blocks[i].kept[:, 1:].any(-1).mean()
        assert f"few\n{share:.0%} with a slot" in texts(figure)
    assert dropped


def test_the_mosaic_has_the_patches_with_the_largest_gates_one_of_each_image(
    parts: list[Collected],
) -> None:
    whole, result = concatenate(parts), find_top_patches(batches(), parts, P, top=TOP)
    figure = top_patches(result, [TOKENS, SOFT, ONE])
    for i, own in result.items():
        for expert in range(whole.blocks[i].gates.shape[-1]):
            best = []
            for image in range(B):
                gates = whole.blocks[i].gates[image, 1:, expert].tolist()
                best.append((max(gates), image, gates.index(max(gates))))
            best = sorted(best, key=lambda each: -each[0])[:TOP]
            for place, (gate, image, token) in enumerate(best):
                assert own.gates[expert, place] == np.float32(gate)
                assert (own.images[expert, place], own.positions[expert, place]) == (image, token)
                y, x = P * (token // 4), P * (token % 4)
                patch = IMAGES[image, y : y + P, x : x + P]
                np.testing.assert_array_equal(own.patches[expert, place], patch)
    for i, ax in zip((TOKENS, SOFT, ONE), figure.axes, strict=True):
        picture, e = np.asarray(ax.images[0].get_array()), len(result[i].gates)
        assert picture.shape == (e * (P + 2), TOP * (P + 2), 3)
        last = picture[-P - 1 : -1, -P - 1 : -1]
        np.testing.assert_allclose(last, (result[i].patches[-1, -1] + 1) / 2, atol=1e-6)
        first, worst = result[i].gates[0, [0, -1]]
        assert ax.texts[0].get_text() == f"{first:.2f}–{worst:.2f}"


def test_lines_and_bars_are_accuracies_on_images_of_known_class() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, B, 3))
    right = [
        np.mean([each[i].argmax() in LABELS[i] for i in range(B) if LABELS[i, 0] >= 0])
        for each in logits
    ]
    settings = [(0, "order"), (4, "order"), (8, "order"), (4, "random"), (8, "random")]
    figure = capacity_curves(
        dict(zip(settings, logits, strict=False)), LABELS, {4: 1e6, 8: 3e6}, even=6.0
    )
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    order, random = (container.lines[0] for container in figure.axes[0].containers)
    np.testing.assert_allclose(order.get_xydata(), [(4, right[1]), (8, right[2])])
    np.testing.assert_allclose(random.get_xydata()[:, 1], right[3:5])
    np.testing.assert_allclose(lines["every choice dropped"].get_ydata(), right[0])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_xydata(), [(4, 1), (8, 3)])
    words = ("every choice dropped", "random", "slots per expert", "MFLOPs per image", "6 images")
    assert all(word in texts(figure) for word in (*words, "capacity factor 1"))
    ks = {2: logits[1], 1: logits[0]}
    figure = k_at_inference(ks, LABELS, own=2, slots={1: [8], 2: [24, 16]})
    of_k = figure.axes[0].containers[0]
    np.testing.assert_allclose(of_k.lines[0].get_xydata(), [(1, right[0]), (2, right[1])])
    assert "slots per expert and group" in texts(figure) and "1\n8 2\n16–24" in texts(figure)
    figure = random_routers({3: logits[0], 5: logits[1]}, logits[2].argmax(-1), LABELS)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, right[:2])
    assert f"own routers, {right[2]:.1%}" in texts(figure) and "one draw" in texts(figure)


def test_the_bars_of_a_model_that_is_never_right_are_empty() -> None:
    """Any warning fails a test; matplotlib warns of an axis of no length."""
    wrong = np.eye(2)[np.ones(6, int)]
    (ax,) = random_routers({0: wrong}, wrong.argmax(-1), np.zeros((6, 1), int)).axes
    assert ax.get_ylim() == (0, 1) and ax.patches[0].get_height() == 0


def test_bars_are_of_differences_on_the_same_images() -> None:
    """Two settings that predict the same have none, however wrong both are."""
    labels = np.zeros((100, 1), int)
    right, other = np.eye(2)[np.arange(100) % 2], np.eye(2)[(np.arange(100) < 10) * 1]
    differences = [int(a[0] > a[1]) - int(b[0] > b[1]) for a, b in zip(other, right, strict=True)]
    expected = np.std(differences, ddof=1) / 10
    figures = (
        (k_at_inference({1: right, 2: other, 4: right}, labels, own=1), [0, expected, 0]),
        (random_routers({1: other, 2: right}, right.argmax(-1), labels), [expected, 0]),
    )
    for figure, sizes in figures:
        (bars,) = figure.axes[0].containers[0].lines[2]  # the caps' vertical lines
        np.testing.assert_allclose([np.ptp(each[:, 1]) / 2 for each in bars.get_segments()], sizes)
    settings = {(4, "order"): right, (4, "sum_of_gates"): other}
    order, summed = capacity_curves(settings, labels, {4: 1e6}).axes[0].containers
    assert not order.has_yerr
    np.testing.assert_allclose(np.ptp(summed.lines[2][0].get_segments()[0][:, 1]) / 2, expected)


def test_a_title_that_is_wider_than_its_figure_is_wrapped(parts: list[Collected]) -> None:
    whole = concatenate(parts)
    for figure in (
        experts_of_patches(IMAGES, whole, patch_size=P, blocks=[TOKENS], show=4),
        kept_patches(IMAGES, {"few": whole}, block=TOKENS, patch_size=P, show=4),
    ):
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= figure.bbox.width
        assert all(title.y0 >= ax.get_tightbbox().y1 for ax in figure.axes)
        assert "4 of 7 images" in texts(figure)


def test_what_has_no_picture_is_refused(
    parts: list[Collected], blocks: dict[int, BlockStatistics]
) -> None:
    whole = concatenate(parts)
    for draw in (lambda: experts_by_class(blocks, CLASSES), lambda: weight_histograms(blocks)):
        with pytest.raises(UsageError, match="block 2: its router makes no choices"):
            draw()
    with pytest.raises(UsageError, match="block 2: its router makes no choices"):
        experts_of_patches(IMAGES, whole, patch_size=P)
    with pytest.raises(UsageError, match="block=2: a soft router processes every token"):
        kept_patches(IMAGES, {"": whole}, block=SOFT, patch_size=P)
    with pytest.raises(UsageError, match=r"block=9: use one of \[0, 1, 2, 3\]"):
        kept_patches(IMAGES, {"": whole}, block=9, patch_size=P)
    with pytest.raises(UsageError, match="patch_size=4: 7 images of 32 x 32 pixels do not have 7"):
        kept_patches(IMAGES, {"": whole}, block=0, patch_size=4)
    with pytest.raises(UsageError, match=r"blocks=\[7\]: use some of \[0, 1, 2, 3\]"):
        top_patches(find_top_patches(batches(), parts, P), [7])
    with pytest.raises(UsageError, match="no image, or no sparse block"):
        find_top_patches([], [], P)
    with pytest.raises(UsageError, match="no image has a known class"):
        k_at_inference({1: whole.logits}, np.full((B, 1), -1))
    with pytest.raises(UsageError, match=r"flops: none for \[4\] slots"):
        capacity_curves({(4, "order"): whole.logits}, LABELS, {})
