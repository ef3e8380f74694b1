"""The model card of a saved folder: its README.md, with the lines that the Hugging Face hub reads.

A card states what the files of a model tell: its shape, its classes, the run or the file that it
comes from, and whether its predictions can depend on the other images of a batch. It states data,
accuracy and license only if they are known (``Facts``), and otherwise how to measure or add them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmoe import zoo
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config import MlpExpert, MoEConfig, ViTConfig
from vmoe.errors import listed
from vmoe.health import JOINT
from vmoe.nn.patches import num_tokens

NAMED = 5  # classes in the card
CARD = """\
---
{metadata}library_name: vmoe
pipeline_tag: {task}
tags: [{tags}]
---
# {title}

{description}

| | |
|---|---|
{rows}

## Use

```python
import vmoe

loaded = vmoe.load({name})
logits = loaded.model(loaded.preprocess(["image.jpg"]))
```

## Training data

{training_data}

## Accuracy

{accuracy}

## Limits

{limits}

## License

{license}
"""
NO_SOURCE = "Not stated: where the images come from, how many there are, and their license."
NO_ACCURACY = """\
Not stated. Measure it on labeled images that were not used in training:
`vmoe evaluate --checkpoint {title} --data DATA`."""
CLASSES = "- The model knows only the classes above. It predicts one of them for any image."
COMPETE = """\
- A prediction can depend on the other images of its batch: up to {images} images compete for the
  slots of the experts. `vmoe routing --checkpoint {title} --data DATA` prints the
  share of predictions that do. `vmoe predict` routes each image on its own."""
INDEPENDENT = "- A prediction does not depend on the other images of its batch, up to rounding."
NO_LICENSE = "Not stated. To state it, add a line such as `license: mit` at the top of this file."


class Facts(NamedTuple):
    """Facts that the files of a model do not tell, as Markdown; empty if unknown.

    Attributes:
        metadata: lines of YAML for the hub, such as the license and the data sets.
        training_data: the images, their number, source and license.
        accuracy: accuracies with standard errors, and the images that they were measured on.
        limits: items of a list, in addition to those that follow from the config.
        license: license of the parameters.
    """

    metadata: str = ""
    training_data: str = ""
    accuracy: str = ""
    limits: str = ""
    license: str = ""


UNKNOWN = Facts()


def card(
    title: str, stored: StoredModel, arrays: Mapping[str, np.ndarray], facts: Facts = UNKNOWN
) -> str:
    """The text of a card.

    Args:
        title: name of the folder.
    """
    config = stored.config
    sparse, classes = bool(config.sparse_blocks), config.num_classes
    compete = COMPETE.format(images=_competing_images(config), title=title)
    limits = [
        *[CLASSES] * bool(classes),
        compete if _competing_images(config) else INDEPENDENT,
        *[facts.limits] * bool(facts.limits),
    ]
    return CARD.format(
        metadata=facts.metadata,
        task="image-classification" if classes else "image-feature-extraction",
        tags=", ".join(["vision", *["mixture-of-experts"] * sparse, "jax"]),
        title=title,
        name=json.dumps(title),
        description="A V-MoE: a vision transformer with mixture-of-experts (MoE) layers."
        if sparse
        else "A dense vision transformer (ViT).",
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(stored, arrays).items()),
        training_data=facts.training_data or _training_data(stored),
        accuracy=facts.accuracy or NO_ACCURACY.format(title=title),
        limits="\n".join(limits),
        license=facts.license or NO_LICENSE,
    )


def _rows(stored: StoredModel, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    config, origin = stored.config, stored.origin
    return {
        "parameters": f"{sum(array.size for array in arrays.values()):,}",
        "architecture": config.description,
        "experts": _by_block(config, _experts) or "none",
        **({"routers": _by_block(config, _router)} if config.sparse_blocks else {}),
        "images": f"{config.image_size} px; {stored.preprocessing}",
        "classes": f"{len(stored.class_names)}: {listed(stored.class_names, NAMED)}",
        "converted from": f"{Path(origin.path).name} ({origin.format}, {origin.weights} weights)",
        "training steps": "unknown" if stored.step is None else f"{stored.step:,}",
    }


def _by_block(config: ViTConfig, describe: Callable[[MoEConfig], str]) -> str:
    """A description of the MoE layers, with the numbers of the blocks."""
    blocks: dict[str, list[str]] = {}
    for i, moe in config.moe_blocks.items():
        blocks.setdefault(describe(moe), []).append(str(i))
    return "; ".join(
        f"{what} in block{'s' * (len(own) > 1)} {', '.join(own)}" for what, own in blocks.items()
    )


def _experts(moe: MoEConfig) -> str:
    kinds = "" if moe.experts == MlpExpert() else f" ({moe.experts.kind})"
    return f"{moe.num_experts}{kinds}{moe.shared_phrase}"


def _router(moe: MoEConfig) -> str:
    gate = moe.gate_config
    return moe.router.kind if gate is None else f"{moe.router.kind} with a {gate.kind} gate"


def _training_data(stored: StoredModel) -> str:
    """The training data as far as the files tell; the last part of a path."""
    if config := stored.train_config:
        kind, colon, path = config.data.name.partition(":")
        steps = "" if stored.step is None else f", {stored.step:,} steps"
        name, images = f"{kind}{colon}{Path(path).name}", f"batches of {config.batch_size:,} images"
        return f"The data set `{name}`{steps}, {images}.\n{NO_SOURCE}"
    if entry := _entry(stored.origin):
        return f"{entry.training} (`{entry.name}`).\n{NO_SOURCE}"
    return "Not stated."


def _entry(origin: Origin) -> zoo.Entry | None:
    """The entry of the zoo that a model was read from."""
    path = str(origin.path)
    if origin.format == "published":
        return zoo.published(Path(path).name.removesuffix(".index"))
    return None if zoo.resolve(path) == path else zoo.find(path)


def _competing_images(config: ViTConfig) -> int:
    """Largest number of images whose tokens compete for slots; 0 if none do."""
    tokens = num_tokens(config)
    return max((_compete(moe, tokens) for moe in config.moe_blocks.values()), default=0)


def _compete(moe: MoEConfig, tokens: int) -> int:
    """Images of a group that compete; 0 if there is one image, or a slot for every token."""
    images, router = moe.router.images_per_group, moe.router.in_evaluation()
    limited = router.shares and not router.dropless  # some experts have fewer slots
    limited = limited or moe.slots(images * tokens) < images * tokens
    return images if images > 1 and (limited or isinstance(router, JOINT)) else 0
