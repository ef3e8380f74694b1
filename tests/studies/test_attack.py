"""Attacks: equal to stored runs of the authors' code, and along single paths of the gradient."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.published import published_config, published_params
from tests.random_models import outputs, random_images, random_params
from vmoe import models
from vmoe.config import ExpertChoice, Hash, MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.errors import Failure, UsageError
from vmoe.nn.inputs import check_labels
from vmoe.nn.vit import ViT
from vmoe.studies.attack.config import AttackConfig
from vmoe.studies.attack.images import PIXEL, attack, gradient
from vmoe.studies.attack.mates import measures
from vmoe.studies.attack.mates_program import Outcome

FOLDER = Path(__file__).parents[1] / "golden" / "attack"


@pytest.mark.long_after(1)
@pytest.mark.parametrize("name", ["attack_eps8", "attack_aux_bpr"])
def test_an_attack_equals_the_published_one(name: str) -> None:
    """In the second run the last image was padding for the results, not for the attack."""
    stored = dict(np.load(FOLDER / f"{name}.npz"))
    theirs = json.loads(str(stored["config"]))
    config = published_config(theirs["model"], 32)
    params = {k.removeprefix("params/"): v for k, v in stored.items() if k.startswith("params/")}
    model = models.with_params(config, jax.device_put(published_params(config, params)))
    settings = AttackConfig(
        epsilon=theirs["max_epsilon"] / PIXEL,
        steps=theirs["num_updates"],
        auxiliary_loss=theirs["loss"]["attack_auxiliary_loss"],
    )
    labels, valid = stored["labels"][:, None], stored["valid"]
    result = attack(model, stored["images"], labels, settings)
    close = np.abs(result.images - stored["images_after"]) < 1e-6
    assert close.mean() > 0.99  # the sign of a gradient near zero is rounding
    before, after = result.predictions_before[valid], result.predictions_after[valid]
    np.testing.assert_array_equal(before, stored["prediction_before"][valid])
    np.testing.assert_array_equal(after, stored["prediction_after"][valid])
    changes = (before != after).sum()
    assert changes == stored["state/num_changes"]
    for i, overlap in result.overlap.items():
        expected = stored[f"iou_mean/encoderblock_{i}"]
        assert overlap[valid].mean() == pytest.approx(expected, abs=0.02)
    if not settings.auxiliary_loss:  # the stored losses include it
        np.testing.assert_allclose(result.losses_before, stored["loss_before"], atol=1e-5)
        np.testing.assert_allclose(result.losses_after, stored["loss_after"], atol=1e-2)


LABELS = np.array([[0, -1], [3, -1], [1, -1], [2, -1]])


def model_of(**fields: Any) -> ViT:
    layer = MoEConfig(num_experts=3, router=TokenChoice(k=2, dropless=True, images_per_group=2))
    dense = models.model_config("vit_test", depth=1, pooling="mean")
    config: ViTConfig = replace(dense, **{"sparse_blocks": (0,), "moe": layer} | fields)
    return models.with_params(config, random_params(config))


@pytest.mark.long_after(1)
@pytest.mark.parametrize("project", [False, True])
def test_changes_are_at_most_epsilon_and_raise_the_loss(project: bool) -> None:
    images = random_images(b=4)
    result = attack(model_of(), images, LABELS, AttackConfig(4.0, steps=5, project=project))
    change = np.abs(result.images - images).max()
    assert 3 * PIXEL < change <= 4 * PIXEL + 1e-6
    assert (np.abs(result.images).max() <= 1) == project
    assert result.losses_after.mean() > result.losses_before.mean()


def test_the_loss_is_the_mean_over_the_labels_and_an_image_without_any_is_not_attacked() -> None:
    """The model is dropless, so no image changes another."""
    model, images = model_of(), random_images(b=4)
    labels = np.array([[0, 5], [3, -1], [-1, -1], [9, 2]])
    result = attack(model, images, labels, AttackConfig(2.0, steps=5))
    log_p = scipy.special.log_softmax(np.asarray(outputs(model, images)), axis=-1)
    expected = [-log_p[0, [0, 5]].mean(), -log_p[1, 3], 0, -log_p[3, [9, 2]].mean()]
    np.testing.assert_allclose(result.losses_before, expected, 1e-5)
    assert result.losses_after[2] == 0
    moved = np.abs(result.images - images).max((1, 2, 3))
    assert (moved > 0).tolist() == [True, True, False, True]
    for wrong, message in (
        (LABELS[:, 0], r"labels of shape \(4,\): use \(b, l\), padded with -1"),
        (
            LABELS[:, :1] + 8,
            "labels from 8 to 11: the model has classes 0 to 9, and -1 is for none",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            check_labels(wrong, 10)


def test_nan_logits_raise_a_failure_and_give_no_accuracy() -> None:
    """Their largest one would be the first class."""
    broken = model_of()
    broken.head.classes.bias[...] = np.full(10, np.nan, np.float32)
    with pytest.raises(Failure, match="^4 of 4 images have logits that are NaN or infinite$"):
        attack(broken, random_images(b=4), LABELS, AttackConfig(0.0, steps=5))
    lost = Outcome(np.array([0.1, np.nan]), np.array([2, 0]), np.zeros(2))
    with pytest.raises(Failure, match="^1 of 2 images have logits that are NaN or infinite$"):
        measures(lost, lost, LABELS[:2])


def test_without_epsilon_nothing_changes() -> None:
    images = random_images(b=4)
    result = attack(model_of(), images, LABELS, AttackConfig(0.0, steps=5))
    np.testing.assert_array_equal(result.images, images)
    assert all((overlap == 1).all() for overlap in result.overlap.values())


@models.compiled
def gradients_of(model: ViT, images: jax.Array) -> dict[str, jax.Array]:
    """The gradient by four images along each path."""
    _, records = model.forward(images)
    return {
        path: gradient(
            model, images, jnp.asarray(LABELS), records, AttackConfig(gradient_path=path)
        )
        for path in ("all", "experts", "routers")
    }


@pytest.mark.slow
def test_the_gradients_of_both_paths_add_up_to_the_whole_one_in_a_single_sparse_block() -> None:
    gradients = gradients_of(model_of())(random_images(b=4))
    both = gradients["experts"] + gradients["routers"]
    largest = np.abs(gradients["all"]).max()
    np.testing.assert_allclose(both, gradients["all"], atol=1e-5 * largest)
    assert min(np.abs(gradients[path]).max() for path in ("experts", "routers")) > 0.01 * largest


def test_a_router_that_ignores_the_image_has_no_gradient_along_its_path() -> None:
    """Its kernel is 0, so that the combine weights are constants."""
    model = model_of()
    model.blocks[0].mlp.gate.kernel[...] *= 0.0
    gradients = gradients_of(model)(random_images(b=4))
    assert not np.any(gradients["routers"]) and np.any(gradients["all"])
    np.testing.assert_allclose(gradients["experts"], gradients["all"], rtol=1e-4, atol=1e-7)


def test_only_the_full_gradient_has_the_auxiliary_losses() -> None:
    message = "attack.gradient_path=routers with attack.auxiliary_loss=True: this path has no"
    with pytest.raises(UsageError, match=message):
        AttackConfig(auxiliary_loss=True, gradient_path="routers")


def test_the_path_of_the_routers_needs_one_that_reads_the_image() -> None:
    """The image changes neither the choices nor the weights of a hash router."""
    config = AttackConfig(gradient_path="routers", steps=1)
    model = model_of(moe=MoEConfig(num_experts=3, router=Hash()))
    with pytest.raises(UsageError, match="gradient_path=routers: no router of this model reads"):
        attack(model, random_images(b=4), LABELS, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sparse_blocks=()), "no block of this model is sparse"),
        (
            dict(moe=MoEConfig(num_experts=3, router=ExpertChoice())),
            "router expert_choice makes no choices of tokens",
        ),
    ],
)
def test_a_path_needs_routers_that_drop(fields: dict, message: str) -> None:
    model = model_of(**fields)
    with pytest.raises(UsageError, match=f"attack.gradient_path=experts: {message}"):
        attack(model, random_images(b=4), LABELS, AttackConfig(gradient_path="experts"))
