"""Names and layouts of parameters in ViT files of timm and Hugging Face, which use PyTorch.

A linear layer's weight is (out, in) there and (in, out) here; attention heads are an axis of their
own here.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from einops import EinopsError, rearrange

from vmoe.checkpoints.assemble import SCALE, Rename
from vmoe.errors import UsageError

NORM = {"weight": "scale", "bias": "bias"}
UNUSED = ("mask_token", "position_ids")  # used in pre-training only

Parts = Iterator[tuple[str, np.ndarray]]
Convert = Callable[[re.Match[str], np.ndarray, int], Parts]


def linear(path: str) -> Convert:
    """A linear layer at a path; the last group of the match is "weight" or "bias"."""

    def convert(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
        weight = found[found.re.groups] == "weight"
        kind, array = ("kernel", rearrange(array, "y x -> x y")) if weight else ("bias", array)
        yield f"{found.expand(path)}/{kind}", array

    return convert


def norm(path: str) -> Convert:
    """A layer norm."""

    def convert(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
        yield f"{found.expand(path)}/{NORM[found[found.re.groups]]}", rearrange(array, "d -> d")

    return convert


def inputs(path: str, *names: str) -> Convert:
    """The layers that make queries, keys or values, concatenated along the outputs."""

    def convert(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
        sizes = {"t": len(names), "a": heads}
        weight = found[found.re.groups] == "weight"
        if weight:
            parts = rearrange(array, "(t a z) d -> t d a z", **sizes)
        else:
            parts = rearrange(array, "(t a z) -> t a z", **sizes)
        for name, part in zip(names, parts, strict=True):
            yield f"{found.expand(path)}/{name}/{'kernel' if weight else 'bias'}", part

    return convert


def output(path: str) -> Convert:
    """The layer after the heads."""

    def convert(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
        if found[found.re.groups] == "weight":
            yield f"{found.expand(path)}/out/kernel", rearrange(array, "d (a z) -> a z d", a=heads)
        else:
            yield f"{found.expand(path)}/out/bias", array

    return convert


def patches(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
    """The patch embedding."""
    if found[1] == "weight":
        yield "patches/embed/kernel", rearrange(array, "d c p q -> p q c d")
    else:
        yield "patches/embed/bias", array


def same(path: str) -> Convert:
    """An array with the same layout."""

    def convert(found: re.Match[str], array: np.ndarray, heads: int) -> Parts:
        yield found.expand(path), array

    return convert


PARAM = r"(weight|bias)"
_TIMM_BLOCK = r"blocks\.(\d+)"
TIMM: dict[str, Convert] = {
    rf"patch_embed\.proj\.{PARAM}": patches,
    r"cls_token": same("class_token"),
    r"pos_embed": same("positions/embedding"),
    rf"norm_pre\.{PARAM}": norm("pre_norm"),
    rf"{_TIMM_BLOCK}\.norm([12])\.{PARAM}": norm(r"blocks/\1/norm\2"),
    rf"{_TIMM_BLOCK}\.attn\.qkv\.{PARAM}": inputs(r"blocks/\1/attention", "query", "key", "value"),
    rf"{_TIMM_BLOCK}\.attn\.proj\.{PARAM}": output(r"blocks/\1/attention"),
    rf"{_TIMM_BLOCK}\.ls1\.gamma": same(rf"{SCALE}blocks/\1/attention/out"),
    rf"{_TIMM_BLOCK}\.mlp\.fc1\.{PARAM}": linear(r"blocks/\1/mlp/up"),
    rf"{_TIMM_BLOCK}\.mlp\.fc2\.{PARAM}": linear(r"blocks/\1/mlp/down"),
    rf"{_TIMM_BLOCK}\.ls2\.gamma": same(rf"{SCALE}blocks/\1/mlp/down"),
    rf"(?:fc_)?norm\.{PARAM}": norm("norm"),
    r"attn_pool\.latent": same("attention_pool/probe"),
    rf"attn_pool\.q\.{PARAM}": inputs("attention_pool/attention", "query"),
    rf"attn_pool\.kv\.{PARAM}": inputs("attention_pool/attention", "key", "value"),
    rf"attn_pool\.proj\.{PARAM}": output("attention_pool/attention"),
    rf"attn_pool\.norm\.{PARAM}": norm("attention_pool/norm"),
    rf"attn_pool\.mlp\.fc1\.{PARAM}": linear("attention_pool/mlp/up"),
    rf"attn_pool\.mlp\.fc2\.{PARAM}": linear("attention_pool/mlp/down"),
    rf"head\.{PARAM}": linear("head/classes"),
}

_HF_MODEL = r"(?:(?:vit|deit|dinov2)\.)?"
_HF_BLOCK = rf"{_HF_MODEL}(?:encoder\.layer|layers)\.(\d+)"
HUGGING_FACE: dict[str, Convert] = {
    rf"{_HF_MODEL}embeddings\.patch_embeddings\.projection\.{PARAM}": patches,
    rf"{_HF_MODEL}embeddings\.cls_token": same("class_token"),
    rf"{_HF_MODEL}embeddings\.position_embeddings": same("positions/embedding"),
    rf"{_HF_BLOCK}\.(?:layernorm_before|norm1)\.{PARAM}": norm(r"blocks/\1/norm1"),
    rf"{_HF_BLOCK}\.(?:layernorm_after|norm2)\.{PARAM}": norm(r"blocks/\1/norm2"),
    **{
        rf"{_HF_BLOCK}\.attention\.(?:attention\.{name}|{name[0]}_proj)\.{PARAM}": inputs(
            r"blocks/\1/attention", name
        )
        for name in ("query", "key", "value")
    },
    rf"{_HF_BLOCK}\.attention\.(?:output\.dense|o_proj)\.{PARAM}": output(r"blocks/\1/attention"),
    rf"{_HF_BLOCK}\.layer_scale1\.lambda1": same(rf"{SCALE}blocks/\1/attention/out"),
    rf"{_HF_BLOCK}\.(?:intermediate\.dense|mlp\.fc1)\.{PARAM}": linear(r"blocks/\1/mlp/up"),
    rf"{_HF_BLOCK}\.(?:output\.dense|mlp\.fc2)\.{PARAM}": linear(r"blocks/\1/mlp/down"),
    rf"{_HF_BLOCK}\.layer_scale2\.lambda1": same(rf"{SCALE}blocks/\1/mlp/down"),
    rf"{_HF_MODEL}layernorm\.{PARAM}": norm("norm"),
    rf"{_HF_MODEL}pooler\.dense\.{PARAM}": linear("head/pre_logits"),
    rf"classifier\.{PARAM}": linear("head/classes"),
}


def renaming(rules: Mapping[str, Convert], heads: int) -> Rename:
    """A function from the names of a file to our parameters.

    Args:
        rules: ``TIMM`` or ``HUGGING_FACE``; all of a name must match.
        heads: number of attention heads.

    Raises:
        UsageError: there is less than one.
    """
    if heads < 1:
        raise UsageError(f"{heads} attention heads: a model has at least one")

    def rename(name: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
        if name.rpartition(".")[2] in UNUSED:
            return {}
        for pattern, convert in rules.items():
            if found := re.fullmatch(pattern, name):
                try:
                    return dict(convert(found, array, heads))
                except EinopsError:
                    raise ValueError(f"it does not fit its layer, or {heads} heads") from None
        raise KeyError(name)

    return rename
