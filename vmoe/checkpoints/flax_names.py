"""Names of parameters in files that were written from Flax: V-MoE, ViT, AugReg and big_vision.

Shapes and axis orders are those of our parameters.
"""

import re
from collections.abc import Mapping

import numpy as np

from vmoe.checkpoints.infer import MAX_DEPTH
from vmoe.errors import UsageError

PREFIXES = ("params/", "opt/target/")  # of the parameters, in files that hold other arrays, too
LINEAR, NORM = r"(kernel|bias)", r"(scale|bias)"
ATTENTION = r"((?:query|key|value|out)/(?:kernel|bias)|(?:query_ln|key_ln)/scale)"
BLOCK = r"(?:Encoder|Transformer)/encoderblock(?:_(\d+))?"  # without a number: stacked on axis 0

_RULES = [  # name in a file -> path here; all of a name must match
    (rf"embedding/{LINEAR}", r"patches/embed/\1"),
    (r"cls", "class_token"),
    (r"(?:(?:Encoder|Transformer)/posembed_input/)?pos_embedding", "positions/embedding"),
    (rf"{BLOCK}/LayerNorm_0/{NORM}", r"blocks/\1/norm1/\2"),
    (rf"{BLOCK}/LayerNorm_[12]/{NORM}", r"blocks/\1/norm2/\2"),
    (
        rf"{BLOCK}/(?:SelfAttention|MultiHeadDotProductAttention_[01])/{ATTENTION}",
        r"blocks/\1/attention/\2",
    ),
    (rf"{BLOCK}/(?:Mlp|MlpBlock_[03])/Dense_0/{LINEAR}", r"blocks/\1/mlp/up/\2"),
    (rf"{BLOCK}/(?:Mlp|MlpBlock_[03])/Dense_1/{LINEAR}", r"blocks/\1/mlp/down/\2"),
    (rf"{BLOCK}/Moe/Router/(?:dense/kernel|mu)", r"blocks/\1/mlp/router/kernel"),
    (rf"{BLOCK}/Moe/Router/scale", r"blocks/\1/mlp/router/scale"),
    (rf"{BLOCK}/Moe/Mlp/Dense_0/{LINEAR}", r"blocks/\1/mlp/experts/up/\2"),
    (rf"{BLOCK}/Moe/Mlp/Dense_1/{LINEAR}", r"blocks/\1/mlp/experts/down/\2"),
    (rf"(?:Encoder|Transformer)/encoder_norm/{NORM}", r"norm/\1"),
    (r"(?:MapHead|MAPHead_0)/probe", "attention_pool/probe"),
    (
        rf"(?:MapHead|MAPHead_0)/MultiHeadDotProductAttention(?:_0)?/{ATTENTION}",
        r"attention_pool/attention/\1",
    ),
    (rf"(?:MapHead|MAPHead_0)/LayerNorm(?:_0)?/{NORM}", r"attention_pool/norm/\1"),
    (rf"(?:MapHead|MAPHead_0)/(?:Mlp|MlpBlock_0)/Dense_0/{LINEAR}", r"attention_pool/mlp/up/\1"),
    (rf"(?:MapHead|MAPHead_0)/(?:Mlp|MlpBlock_0)/Dense_1/{LINEAR}", r"attention_pool/mlp/down/\1"),
    (rf"pre_logits/{LINEAR}", r"head/pre_logits/\1"),
    (rf"head/{LINEAR}", r"head/classes/\1"),
]


def rename(name: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
    """The parameters in an array of such a file, by path; empty for what is no parameter.

    Raises:
        KeyError: the name is unknown.
        UsageError: the array belongs to an ensemble.
    """
    prefix = next((each for each in PREFIXES if name.startswith(each)), "")
    if not prefix and name.startswith(("opt/", "opt_state/", "step", "rng", "state/")):
        return {}
    for theirs, ours in _RULES:
        if found := re.fullmatch(theirs, name.removeprefix(prefix)):
            if "Router/dense" in name and array.ndim == 3:
                raise UsageError(
                    f"{name} has shape {array.shape}: this is an E^3 ensemble (an efficient "
                    "ensemble of experts), which cannot be opened"
                )
            groups = found.groups()
            if theirs.startswith(BLOCK) and groups[0] is None:
                if not array.ndim or len(array) > MAX_DEPTH:
                    raise ValueError(f"at most {MAX_DEPTH} blocks can be stacked")
                return {_path(ours, str(i), *groups[1:]): part for i, part in enumerate(array)}
            return {_path(ours, *groups): array}
    raise KeyError(name)


def _path(template: str, *groups: str) -> str:
    """A path here; much faster than ``Match.expand``, which parses the template each time."""
    for i, group in enumerate(groups):
        template = template.replace(f"\\{i + 1}", group)
    return template
