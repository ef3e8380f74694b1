"""Routing collected over a data set: the same as in one batch, image by image, and exported."""

import tracemalloc
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from tests.random_models import forward, random_images, random_params
from tests.routers import grouped
from vmoe import models
from vmoe.analysis.collect import (
    BlockRouting,
    Collected,
    collect,
    concatenate,
    foreground,
)
from vmoe.analysis.statistics import BINS, KINDS, mutual_information, statistics
from vmoe.config import (
    AnyRouter,
    ExpertChoice,
    MlpExpert,
    MoEConfig,
    Router,
    Soft,
    TokenChoice,
    replace,
)
from vmoe.data.pipeline import Batch
from vmoe.nn.vit import ViT
from vmoe.passes import in_batches

B, N, E = 10, 17, 4
ROUTERS: dict[str, Router] = {
    "token_choice": TokenChoice(k=2, priority="largest_gate"),
    "expert_choice": ExpertChoice(),
    "soft": Soft(),
}
LABELS = (np.arange(B) % 3)[:, None]


def model_of(router: AnyRouter) -> ViT:
    router = replace(router, capacity_factor=0.7)
    moe = MoEConfig(
        num_experts=E, router=grouped(router, 3), experts=MlpExpert(implementation="batched")
    )
    blocks = (0, 2) if isinstance(router, TokenChoice) else (1,)
    dense = models.model_config("vit_test", depth=blocks[-1] + 1)
    config = replace(dense, sparse_blocks=blocks, moe=moe)
    return models.with_params(config, random_params(config))


def images_on_white() -> np.ndarray:
    """Noise on white: in image i, the i % 6 first patches, left to right, show something."""
    images = random_images(b=B)
    for image, y, x in np.ndindex(B, 4, 4):
        if y * 4 + x >= image % 6:
            images[image, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 1
    return images


@pytest.fixture(scope="module", params=ROUTERS.values(), ids=ROUTERS.keys())
def collected(request: pytest.FixtureRequest) -> Collected:
    batches = in_batches(images_on_white(), LABELS, batch_size=6)
    return concatenate(collect(model_of(request.param), batches))


def test_every_image_is_collected_once_with_the_decisions_of_its_batch(
    collected: Collected, request: pytest.FixtureRequest
) -> None:
    router = request.node.callspec.params["collected"]
    images = images_on_white()
    np.testing.assert_array_equal(collected.labels, LABELS)
    for block in collected.blocks.values():
        assert block.gates.shape == (B, N, E)
        assert block.experts.shape == block.positions.shape == block.weights.shape
    # Batches of 6 images in groups of 3, or of 1; the second one has 4 images and 2 of padding.
    per_group = 1 if isinstance(router, Soft) else 3
    padded, valid = np.concatenate([images, 0 * images[:2]]), np.arange(12) < B
    for start, own in ((0, slice(0, 6)), (6, slice(6, B))):
        logits, records = forward(
            model_of(router), padded[start : start + 6], valid=valid[start : start + 6]
        )
        real = slice(0, own.stop - start)
        np.testing.assert_allclose(collected.logits[own], logits[real], atol=1e-5)
        for i, record in records.items():
            block = collected.blocks[i]
            expected = np.arange(start, own.stop) // per_group
            np.testing.assert_array_equal(block.groups[own], expected)
            if isinstance(router, Soft):
                assert block.experts.shape[-1] == 0
                continue
            for ours, theirs in (
                (block.kept, record.routing.kept),
                (block.weights, record.routing.weights),
                (block.gates, record.gates),
                (block.experts, record.routing.experts),
                (block.dropped, record.routing.dropped),
            ):
                by_image = np.asarray(theirs).reshape(6, N, -1)[real]
                np.testing.assert_allclose(ours[own], by_image, rtol=1e-5)
            assert block.dropped.any() == (router.kind == "token_choice")


def test_at_most_two_batches_are_held() -> None:
    """The devices compute one while the results of the other are used."""
    given = []

    def batches() -> Iterator[Batch]:
        for number in range(4):
            given.append(number)
            yield from in_batches(images_on_white()[:6], batch_size=6)

    for number, part in enumerate(collect(model_of(ROUTERS["token_choice"]), batches())):
        assert given == list(range(min(number + 2, 4))) and len(part.logits) == 6


def test_statistics_equal_loops_over_images_tokens_and_choices(collected: Collected) -> None:
    for i, own in statistics([collected]).items():
        block = collected.blocks[i]
        choices, kept = np.zeros(E, int), np.zeros(E, int)
        by_position, coactivation, uses = np.zeros((E, N)), np.zeros((E, E)), np.zeros((B, E))
        by_priority, kept_by, chosen_by = (np.zeros(BINS) for _ in range(3))
        entropy, unprocessed, by_kind = 0.0, 0, np.zeros((4, 2), int)
        for b, n in np.ndindex(B, N):
            gates = block.gates[b, n].astype(np.float64)
            entropy -= (gates * np.log(gates)).sum()
            own_bin = min(int(block.gates[b, n].max() * BINS), BINS - 1)
            by_priority[own_bin] += 1
            chosen = [e for e in block.experts[b, n] if e < E]
            chosen_by[own_bin] += len(chosen)
            kept_by[own_bin] += (block.positions[b, n] >= 0).sum()
            for e in chosen:
                choices[e] += 1
                by_position[e, n] += 1
                uses[b, e] += 1
            for e in set(chosen):
                for other in set(chosen):
                    coactivation[e, other] += 1
            got = block.experts[b, n][block.positions[b, n] >= 0]
            for e in got:
                kept[e] += 1
            kind = 0 if n == 0 else 3 if n - 1 < b % 6 else 2
            by_kind[kind] += len(got), len(chosen)
            unprocessed += not len(got) and block.experts.shape[-1] > 0
        assert own.tokens == B * N and own.unprocessed == unprocessed
        for ours, expected in (
            (own.choices, choices),
            (own.kept, kept),
            (own.by_position.reshape(E, -1), by_position[:, 1:]),  # without the class token
            (own.coactivation, coactivation),
            (own.uses, uses),
            (own.by_priority, by_priority),
            (own.kept_by_priority, kept_by),
            (own.choices_by_priority, chosen_by),
            (own.kept_by_kind, by_kind[:, 0]),
            (own.choices_by_kind, by_kind[:, 1]),
        ):
            np.testing.assert_array_equal(ours, expected)
        shares = [None if not of else kept / of for kept, of in by_kind.tolist()]
        assert list(own.kept_share.values()) == shares
        assert own.gate_entropy == pytest.approx(entropy / (B * N), rel=1e-6)
        assert own.importance.sum() == pytest.approx(1, rel=1e-5)
        if choices.sum():
            assert own.load.sum() == pytest.approx(1)
            assert own.dropped == pytest.approx(1 - kept.sum() / choices.sum())
        np.testing.assert_array_equal(own.idle, (uses == 0).mean(0) * choices.any())
        np.testing.assert_array_equal(own.by_weight.sum(0).sum(), choices.sum())


def test_statistics_do_not_depend_on_how_images_are_batched(collected: Collected) -> None:
    def part(rows: slice) -> Collected:
        return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, collected)

    whole, split = statistics([collected]), statistics([part(slice(7)), part(slice(7, B))])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12),
        *({i: vars(each) for i, each in total.items()} for total in (whole, split)),
    )


def test_a_patch_is_background_if_all_its_pixels_have_the_color_of_the_border() -> None:
    shown = foreground(images_on_white(), 8).reshape(B, 16)
    np.testing.assert_array_equal(shown, np.arange(16) < np.arange(B)[:, None] % 6)
    black = np.full((1, 16, 16, 3), -1, np.float32)
    black[0, 8, 8, 2] += 0.2  # one pixel of one channel
    assert foreground(black, 8).tolist() == [[[False, False], [False, True]]]
    assert not foreground(black, 8, tolerance=0.3).any()


def test_shares_of_images_without_plain_background_are_unknown() -> None:
    own = _routed(np.zeros((4, 5), int))
    assert statistics([own])[0].kept_share == dict.fromkeys(KINDS)
    half = own._replace(foreground=np.broadcast_to(np.arange(4) % 2 == 0, (4, 1, 4)))
    assert statistics([half])[0].kept_share == {
        "class_token": 1.0,
        "register": None,
        "background": 1.0,
        "foreground": 1.0,
    }


def test_registers_are_a_kind_of_token_of_their_own() -> None:
    config = model_of(ROUTERS["token_choice"]).config
    config = replace(config, depth=1, sparse_blocks=(0,), registers=2)
    (part,) = collect(models.build(config), in_batches(images_on_white()[:3]))
    block = statistics([part])[0]
    assert block.choices_by_kind.tolist() == [3 * 2, 3 * 2 * 2, 2 * (48 - 3), 2 * 3]
    kept = [part.blocks[0].kept[:, n].sum() for n in (slice(1), slice(1, 3), slice(3, None))]
    by_kind = block.kept_by_kind
    assert kept == [by_kind[0], by_kind[1], by_kind[2:].sum()]
    assert block.kept_share["register"] == kept[1] / 12


def test_a_batch_of_padding_alone_adds_nothing() -> None:
    images = images_on_white()[:3]
    batches = [*in_batches(images), Batch(images, LABELS[:3], np.zeros(3, bool))]
    real, padding = parts = list(collect(model_of(ROUTERS["token_choice"]), batches))
    assert padding.foreground.shape == (0, 4, 4) and len(concatenate(parts).logits) == 3
    for i, block in statistics(parts).items():
        assert block.choices_by_kind.sum() == statistics([real])[i].choices_by_kind.sum()


def test_mutual_information_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 9, (E, 5))
    rows, columns = np.indices(table.shape)
    counts = table.reshape(-1)
    expected = normalized_mutual_info_score(
        np.repeat(rows.reshape(-1), counts), np.repeat(columns.reshape(-1), counts)
    )
    assert mutual_information(table) == pytest.approx(expected, rel=1e-9)
    assert mutual_information(np.zeros((2, 2), int)) == 0


def test_experts_that_follow_the_class_are_far_above_chance() -> None:
    """Every image of class y sends all its tokens to expert y; or to an expert at random."""
    rng, b = np.random.default_rng(0), 300
    labels = rng.integers(0, 3, b)
    for experts, follows in ((labels, True), (rng.integers(0, 3, b), False)):
        own = statistics([_routed(np.repeat(experts[:, None], 5, axis=1), labels)])[0]
        information, chance = own.class_information(3)
        assert chance < 0.03
        assert information > 0.99 if follows else information < 0.03


def test_a_choice_counts_for_each_class_of_its_image_and_for_none_without_a_label() -> None:
    experts = np.array([[0, 0, 1], [2, 2, 2], [1, 1, 1]])
    labels = np.array([[2, 0], [1, -1], [-1, -1]])
    own = statistics([_routed(experts, labels)])[0]
    assert own.class_table(3).tolist() == [[2, 0, 2], [1, 0, 1], [0, 3, 0]]
    known = statistics([_routed(experts[:2], labels[:2])])[0]
    assert own.class_information(3) == known.class_information(3)


def test_counts_by_class_take_the_memory_of_the_classes_that_occur() -> None:
    """Dense counts by image and class would take 80 MB and more for 2,000 images."""
    rng, b, y = np.random.default_rng(0), 2_000, 40_000
    experts, labels = rng.integers(0, 3, (b, 5)), rng.integers(-1, y, (b, 3))
    labels[::5, 1] = labels[::5, 0]  # a class counts once
    own = statistics([_routed(experts, labels)])[0]
    expected = np.zeros((3, y), int)
    for uses, classes in zip(own.uses, labels, strict=True):
        expected[:, [each for each in {*classes} if each >= 0]] += uses[:, None]
    tracemalloc.start()
    table = own.class_table(y)
    _, largest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(table, expected)
    assert largest < 5e6


def test_experts_that_follow_the_position_are_far_above_chance() -> None:
    """Every token at position n goes to expert n mod 3; or each image has one expert."""
    rng, shape = np.random.default_rng(0), (300, 6)
    by_place = np.broadcast_to(np.arange(6) % 3, shape)
    by_image = np.broadcast_to(rng.integers(0, 3, (300, 1)), shape)
    for experts, follows in ((by_place, True), (by_image, False)):
        information, chance = statistics([_routed(experts)])[0].position_information
        assert chance < 0.003
        # log 3 nats of information; the entropies are log 3 and log 6
        expected = 2 * np.log(3) / np.log(18) if follows else 0
        assert information == pytest.approx(expected, abs=1e-6)


def test_a_class_token_has_no_position_in_an_image() -> None:
    """It always goes to expert 0, which patches choose wherever they are."""
    experts = np.random.default_rng(0).integers(0, 3, (300, 7))
    experts[:, 0] = 0
    routed = _routed(experts)
    with_class_token = routed._replace(foreground=routed.foreground[..., 1:])
    information, chance = statistics([with_class_token])[0].position_information
    assert information == pytest.approx(chance, abs=0.005) and information < 0.005


def _routed(experts: np.ndarray, labels: np.ndarray | None = None) -> Collected:
    """A group for each image, whose tokens make one choice each; there are three experts."""
    b, n = experts.shape
    labels = np.full((b, 1), -1) if labels is None else labels.reshape(b, -1)
    choices, gates = experts[..., None], np.eye(3, dtype=np.float32)[experts]
    block = BlockRouting(gates, choices, choices * 0, gates.max(-1, keepdims=True), np.arange(b))
    return Collected(np.zeros((b, 3)), labels, {0: block}, np.ones((b, 1, n), bool), 0)
