"""Names of parameters in files that were written from Flax: V-MoE, ViT, AugReg and big_vision.

Shapes and axis orders are the same as in our parameters. ``_PUBLISHED`` has V-MoE's names for all
parameters; names of the other families are first replaced by these.
"""

import operator
import re
from collections.abc import Mapping

import numpy as np

from vmoe.checkpoints.family import Transform
from vmoe.checkpoints.infer import MAX_DEPTH
from vmoe.config import ViTConfig
from vmoe.errors import UsageError

PREFIXES = ("params/", "opt/target/")  # prefixes of parameters in files that also hold other arrays
BLOCK = r"encoderblock(?:_(\d+))?/"  # without a number: stacked on axis 0
LINEAR, NORM = r"/(?:kernel|bias)", r"/(?:scale|bias)"
ATTENTION = r"/(?:(?:query|key|value|out)/(?:kernel|bias)|(?:query_ln|key_ln)/scale)"

_PUBLISHED = [  # path here, V-MoE's name, suffix of both; # is the number of a block
    ("patches/embed", "embedding", LINEAR),
    ("class_token", "cls", ""),
    ("positions/embedding", "Encoder/posembed_input/pos_embedding", ""),
    ("blocks/#/norm1", "Encoder/encoderblock_#/LayerNorm_0", NORM),
    ("blocks/#/norm2", "Encoder/encoderblock_#/LayerNorm_1", NORM),
    ("blocks/#/attention", "Encoder/encoderblock_#/SelfAttention", ATTENTION),
    ("blocks/#/mlp/up", "Encoder/encoderblock_#/Mlp/Dense_0", LINEAR),
    ("blocks/#/mlp/down", "Encoder/encoderblock_#/Mlp/Dense_1", LINEAR),
    ("blocks/#/mlp/gate/kernel", "Encoder/encoderblock_#/Moe/Router/dense/kernel", ""),
    ("blocks/#/mlp/gate/scale", "Encoder/encoderblock_#/Moe/Router/scale", ""),
    ("blocks/#/mlp/experts/up", "Encoder/encoderblock_#/Moe/Mlp/Dense_0", LINEAR),
    ("blocks/#/mlp/experts/down", "Encoder/encoderblock_#/Moe/Mlp/Dense_1", LINEAR),
    ("norm", "Encoder/encoder_norm", NORM),
    ("attention_pool/probe", "MapHead/probe", ""),
    ("attention_pool/attention", "MapHead/MultiHeadDotProductAttention", ATTENTION),
    ("attention_pool/norm", "MapHead/LayerNorm", NORM),
    ("attention_pool/mlp/up", "MapHead/Mlp/Dense_0", LINEAR),
    ("attention_pool/mlp/down", "MapHead/Mlp/Dense_1", LINEAR),
    ("head/pre_logits", "pre_logits", LINEAR),
    ("head/classes", "head", LINEAR),
]
_PATHS = {name: (path, rest) for path, name, rest in _PUBLISHED}
_NAMES = {path: (name, rest) for path, name, rest in _PUBLISHED}

_OTHERS = [  # in names of other families -> in V-MoE's names
    (r"^Transformer/", "Encoder/"),
    (r"^pos_embedding$", "Encoder/posembed_input/pos_embedding"),
    (rf"({BLOCK})LayerNorm_2/", r"\1LayerNorm_1/"),
    (rf"({BLOCK})MultiHeadDotProductAttention_[01]/", r"\1SelfAttention/"),
    (rf"({BLOCK})MlpBlock_[03]/", r"\1Mlp/"),
    (r"^MAPHead_0/", "MapHead/"),
    (r"^MapHead/(MultiHeadDotProductAttention|LayerNorm)_0/", r"MapHead/\1/"),
    (r"^MapHead/MlpBlock_0/", "MapHead/Mlp/"),
]
DENSE, SOFT = "/Router/dense/kernel", "/Router/mu"  # the same parameter of two routers


def rename(name: str, shape: tuple[int, ...]) -> Mapping[str, Transform]:
    """The parameters in an array of such a file; a ``Rename``."""
    prefix = next((each for each in PREFIXES if name.startswith(each)), "")
    if not prefix and name.startswith(("opt/", "opt_state/", "step", "rng", "state/")):
        return {}
    published = name.removeprefix(prefix).replace(SOFT, DENSE)
    for theirs, ours in _OTHERS:
        published = re.sub(theirs, ours, published)
    block = re.search(BLOCK, published)
    path = _translate(re.sub(BLOCK, "encoderblock_#/", published), _PATHS)
    if path is None:
        raise KeyError(name)
    if "Router/dense" in name and len(shape) == 3:
        raise UsageError(
            f"{name} has shape {shape}: this is an E^3 ensemble (an efficient "
            "ensemble of experts), which cannot be opened"
        )
    if block is None or block[1]:
        return {path.replace("#", block[1] if block else ""): np.asarray}
    if not shape or shape[0] > MAX_DEPTH:
        raise ValueError(f"at most {MAX_DEPTH} blocks can be stacked")
    return {path.replace("#", str(i)): operator.itemgetter(i) for i in range(shape[0])}


def published_name(path: str, config: ViTConfig) -> str:
    """V-MoE's name of a parameter."""
    block = re.match(r"blocks/(\d+)/", path)
    name = _translate(re.sub(r"^blocks/\d+/", "blocks/#/", path), _NAMES)
    if name is None:
        raise UsageError(f"{path}: the published models have no such parameter")
    if block is None:
        return name
    moe = config.moe_of(int(block[1]))
    if moe is not None and moe.router.logits_per == "slot":
        name = name.replace(DENSE, SOFT)
    return name.replace("#", block[1])


def _translate(text: str, table: Mapping[str, tuple[str, str]]) -> str | None:
    """The text with its start replaced as in the table; None if no entry matches."""
    for start, (other, rest) in table.items():
        if text.startswith(start) and re.fullmatch(rest, text.removeprefix(start)):
            return other + text.removeprefix(start)
    return None
