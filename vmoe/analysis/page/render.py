"""Renders the page: a template, its style, its scripts, and one record of all data."""

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image

from vmoe.analysis.collect import BlockRouting
from vmoe.analysis.colors import COLORS, text_color
from vmoe.analysis.page.observe import ModelOnImages, Slots
from vmoe.analysis.statistics import BlockStatistics
from vmoe.axes import Images
from vmoe.config import MoEConfig
from vmoe.config.routing_file import is_comparable
from vmoe.health import about_unprocessed, weights_are_gates
from vmoe.nn.inputs import has_label
from vmoe.nn.losses import likeliest
from vmoe.routing import AnyRouter, ExpertRace, Transport
from vmoe.routing.priority import priority_scores

HERE = Path(__file__).parent
SHOWN = 5  # classes of a prediction
LARGEST_PNG = 96  # px; larger images are JPEG
LARGEST_SIDE = 224  # px
SMALL_PATCH = 16  # px; mosaics of larger patches are JPEG
MOST_CLASSES = 40  # in a table
NOT_BY_RANK = ExpertRace, Transport
"""Routers of whose choices an expert takes the largest, of any rank."""


def render(
    title: str,
    summary: str,
    images: Images,
    labels: Int[np.ndarray, "b l"],
    class_names: Sequence[str],
    models: Sequence[ModelOnImages],
) -> str:
    """The page, one HTML document that needs no other file.

    Args:
        title: the title of the page.
        summary: a sentence below the title.
        images: the images on which every model was observed.
        labels: the classes of each image; padded with -1.
        class_names: the classes, the same for all models.
        models: one model, or several to compare.
    """
    record = {
        "summary": summary,
        "classes": list(class_names),
        "mostClasses": MOST_CLASSES,
        "palette": COLORS,
        "inks": [text_color(color) for color in COLORS],
        "images": [
            {"source": _thumbnail(image), "labels": _known(own)}
            for image, own in zip(_pixels(images), labels, strict=True)
        ],
        "models": [_model(model, images.shape[1:3], len(class_names)) for model in models],
    }
    text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":  # so that no text of the record ends the script element
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    parts = {
        "title": html.escape(title),
        "style": _read("page.css"),
        "script": _read("rule.js") + _read("page.js"),
        "record": text,
    }
    before, *pieces = _read("page.html").split("{{")
    named = (piece.split("}}", 1) for piece in pieces)
    return before + "".join(parts[name] + rest for name, rest in named)


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _model(model: ModelOnImages, size: tuple[int, ...], y: int) -> dict[str, Any]:
    config, routing = model.config, model.routing
    prefix = config.prefix_tokens
    rows, columns = (side // config.patch_size for side in size)
    grid = removed = None
    if model.capacities:
        slots, priorities = map(list, map(dict.fromkeys, zip(*model.capacities, strict=True)))
        logits = [[model.capacities[each, priority] for priority in priorities] for each in slots]
        grid = dict(slots=slots, priorities=priorities)
        grid |= _predictions(np.array(logits), model.sigmoid)
    if model.removed:
        logits = np.array(list(model.removed.values()))
        removed = {"which": list(model.removed), **_predictions(logits, model.sigmoid)}
    return {
        "name": model.name,
        "sigmoid": model.sigmoid,
        "rows": rows,
        "columns": columns,
        "prefix": prefix,
        "classToken": config.has_class_token,
        "tokens": rows * columns + prefix,
        "predictions": _predictions(routing.logits, model.sigmoid),
        "blocks": [
            _block(i, moe, routing.blocks[i], model.statistics[i], y) | _pictures(model, i)
            for i, moe in config.moe_blocks.items()
        ],
        "grid": grid,
        "removed": removed,
    }


def _pictures(model: ModelOnImages, block: int) -> dict[str, Any]:
    """The attention maps and the top patches of a sparse block."""
    pictures: dict[str, Any] = {"attention": _array(model.attention[block], "u1")}
    if block not in model.top_patches:
        return pictures | {"topPatches": None}
    best, labels = model.top_patches[block], model.statistics[block].labels
    sprite = rearrange(best.patches, "e x p q c -> 1 (e p) (x q) c")
    items = [
        [
            {"gate": round(float(gate), 4), "labels": _known(labels[i])}
            for gate, i in zip(gates, images, strict=True)
        ]
        for gates, images in zip(best.gates, best.images, strict=True)
    ]
    side = model.config.patch_size
    return pictures | {
        "topPatches": {
            "source": _data_url(next(_pixels(sprite)), png=side <= SMALL_PATCH),
            "side": side,
            "items": items,
        },
    }


def _block(
    number: int, config: MoEConfig, block: BlockRouting, statistics: BlockStatistics, y: int
) -> dict[str, Any]:
    router = config.router
    by_rank = router.can_drop and not isinstance(router, NOT_BY_RANK)
    by_rank = by_rank and router.overflow == "drop" and not router.shares
    chosen, own, kept, weights = _choices(block, by_gate=not by_rank)
    record = {
        "number": number,
        "experts": config.num_experts,
        "drops": False,  # whether choices are dropped if there are not enough slots
        "groups": _array(block.groups, "u2"),
        "chosen": _array(chosen, "u2"),
        "gates": _array(own, "f4"),
        "kept": _array(kept, "u1"),
        "weights": _array(_before_dropping(weights, own, kept, router), "f4"),
        "all": _array(np.round(255 * np.nan_to_num(block.gates)), "u1"),
        "about": "; ".join(about_unprocessed(config)),
        **_sums(statistics, y),
    }
    if is_comparable(router):
        slots = Slots.of(config, block)
        draws = priority_scores(jnp.zeros((1, slots.tokens, 1)), "random", None)
        record |= {
            "drops": True,
            "dropless": config.router.dropless,
            **slots._asdict(),
            "priority": router.priority,
            "sums": _array(priority_scores(jnp.asarray(own), "sum_of_gates", None), "f4"),
            "draws": _array(draws[0], "f4"),
        }
    return record


def _choices(block: BlockRouting, *, by_gate: bool) -> tuple[np.ndarray, ...]:
    """The experts of each token, best first, their gates, whether each got a slot, its weight.

    Expert choice lists choices by expert; here they are sorted by gate, without empty columns.
    Routers whose tokens choose list them in the order in which they get slots.
    """
    e = block.gates.shape[-1]
    experts = block.experts
    own = np.take_along_axis(block.gates, np.minimum(experts, e - 1), axis=-1)
    own = np.where(experts < e, own, 0)
    best = np.argsort(-own * by_gate, axis=-1, kind="stable")
    used = int((experts < e).sum(-1).max(initial=0))

    def of_best(field: np.ndarray) -> np.ndarray:
        return np.take_along_axis(field, best, axis=-1)[..., :used]

    return of_best(experts), of_best(own), of_best(block.kept), of_best(block.weights)


def _before_dropping(
    weights: Float[np.ndarray, "b n k"],
    gates: Float[np.ndarray, "b n k"],
    kept: Bool[np.ndarray, "b n k"],
    router: AnyRouter,
) -> Float[np.ndarray, "b n k"]:
    """The weights that the choices of a token had before any was dropped, proportional to gates.

    NaN for a token without any slot, if neither the gates nor their sum gives its weights.
    """
    held = np.where(kept, gates, 0).sum(axis=-1, keepdims=True)
    total = np.where(kept, weights, 0).sum(axis=-1, keepdims=True)
    if router.normalized:
        unknown = 1 / np.maximum(gates.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    else:
        unknown = 1.0 if weights_are_gates(router) else np.nan
    scale = np.broadcast_to(unknown, held.shape).copy()
    return gates * np.divide(total, held, out=scale, where=held > 0)


def _sums(statistics: BlockStatistics, y: int) -> dict[str, Any]:
    classes = positions = information = chance = None
    position, position_chance = statistics.position_information
    if has_label(statistics.labels).any() and statistics.choices.any():
        information, chance = statistics.class_information(y)
        if y <= MOST_CLASSES:
            table = statistics.class_table(y)
            classes = table / np.maximum(1, table.sum(axis=0))
    if statistics.choices.any():
        positions = statistics.by_position.reshape(len(statistics.gates), -1)
    return {
        "images": len(statistics.labels),
        "load": _numbers(statistics.load),
        "importance": _numbers(statistics.importance),
        "dropped": statistics.dropped,
        "classes": None if classes is None else _numbers(classes),
        "information": information,
        "chance": chance,
        "positions": None if positions is None else _numbers(positions),
        "position": position,
        "positionChance": position_chance,
    }


def _predictions(logits: Float[np.ndarray, "*x b y"], sigmoid: bool) -> dict[str, Any]:
    """The likeliest classes, and their probabilities in units of 1/255."""
    top, probabilities = likeliest(logits, SHOWN, sigmoid=sigmoid)
    return {
        "top": _array(top, "u2"),
        "probabilities": _array(np.round(255 * np.nan_to_num(probabilities)), "u1"),
    }


def _array(array: Any, kind: str) -> dict[str, Any]:
    """An array as ``rule.js`` reads it."""
    array = np.asarray(array).astype(f"<{kind}")
    data = base64.b64encode(array.tobytes()).decode()
    return {"type": kind, "shape": array.shape, "data": data}


def _known(labels: Int[np.ndarray, "l"]) -> list[int]:
    return labels[labels >= 0].tolist()


def _numbers(array: np.ndarray) -> list[Any]:
    return np.round(np.nan_to_num(array.astype(float)), 5).tolist()


def _pixels(images: Images) -> Iterator[Image.Image]:
    for image in np.asarray(images):
        yield Image.fromarray(np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8))


def _thumbnail(image: Image.Image) -> str:
    small = max(image.size) <= LARGEST_PNG
    if not small:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return _data_url(image, png=small)


def _data_url(image: Image.Image, *, png: bool) -> str:
    """The image as a data URL, PNG or JPEG."""
    buffer, kind = io.BytesIO(), "png" if png else "jpeg"
    image.save(buffer, kind, **(dict(optimize=True) if png else dict(quality=85)))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
