"""Captures intermediate outputs of a model: routing records, features and attention maps."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxtyping import Array, Float

from vmoe.axes import Images, Record, Route, Valid
from vmoe.errors import UsageError, unknown
from vmoe.nn.keys import MaybeKey
from vmoe.nn.vit import ViT


def capture(
    model: ViT,
    images: Images,
    *,
    train: bool = False,
    key: MaybeKey = None,
    valid: Valid | None = None,
    decide: Mapping[int, Route] | None = None,
) -> tuple[Float[Array, "b y"], dict[int, Record]]:
    """``model(images)``, and the routing record of each sparse block by its number.

    A record has logits, gates, choices, slots and combine weights; ``expert_totals`` and
    ``block_measures`` give its load, importance, drops and entropy.
    Works inside ``jax.jit`` and ``jax.grad``, where unused parts of the records are not computed.

    Args:
        train: as for the model.
        key: as for the model.
        valid: as for the model.
        decide: by block, a function that decides instead of its router;
            ``vmoe/analysis/interventions.py`` has several.
    """
    return model.forward(images, train=train, key=key, valid=valid, decide=decide)


class Captured(NamedTuple):
    """The result of ``capture_features``.

    Attributes:
        logits: as ``capture`` returns them.
        records: as ``capture`` returns them.
        features: the requested arrays, by name.
    """

    logits: Float[Array, "b y"]
    records: dict[int, Record]
    features: dict[str, Float[Array, "b ..."]]


def feature_names(model: ViT) -> list[str]:
    """The names that ``capture_features`` accepts; "blocks.3.mlp" is the MLP of block 3.

    Names, with n tokens of an image, of which the class token and the registers are the first:
        blocks.I: f[b n d], the tokens after block I.
        blocks.I.attention, blocks.I.mlp: f[b n d], the outputs of the attention and of the MLP or
            MoE layer, which are added to the tokens.
        blocks.I.attention.weights: f32[b a n n], how much each token (third axis) attends to each
            token (last axis), by head.
        encoded: f[b n d], the tokens that are pooled, as ``ViT.forward_features`` returns them.
        pre_logits: f[b r], the inputs of the last linear layer.
    """
    parts = ("", ".attention", ".attention.weights", ".mlp")
    blocks = [f"blocks.{i}{part}" for i in range(model.config.depth) for part in parts]
    return [*blocks, "encoded", "pre_logits"]


def capture_features(
    model: ViT,
    images: Images,
    names: Iterable[str],
    *,
    valid: Valid | None = None,
    decide: Mapping[int, Route] | None = None,
) -> Captured:
    """Like ``capture`` with ``train=False``, but also returns features and attention maps.

    Works inside ``jax.jit``. The last block computes all tokens, where the model itself may
    compute the class token alone.

    Args:
        names: any of ``feature_names``.
        valid: as for ``capture``.
        decide: as for ``capture``.

    Raises:
        UsageError: as for a call of the model; or a name is unknown.
    """
    names, known = list(names), feature_names(model)
    for name in names:
        if name not in known:
            raise UsageError(unknown("feature", name, known))
    records, features = {}, {}
    for i, (tokens, outputs) in enumerate(model.run_blocks(images, valid=valid, decide=decide)):
        place, block = f"blocks.{i}", model.blocks[i]
        if f"{place}.attention.weights" in names:
            rotation = model.rotation(images)
            weights = block.attention.weights(block.norm1(tokens), rotation=rotation)
            features[f"{place}.attention.weights"] = weights
        features[place] = outputs.tokens
        features |= {f"{place}.attention": outputs.attention, f"{place}.mlp": outputs.mlp}
        if outputs.record is not None:
            records[i] = outputs.record
    encoded = features["encoded"] = model.last_norm(outputs.tokens)
    features["pre_logits"] = model.forward_head(encoded, pre_logits=True)
    logits = model.forward_head(encoded)
    return Captured(logits, records, {name: features[name] for name in names})
