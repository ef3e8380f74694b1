"""Named model configs, and models built from configs.

A name encodes the architecture: ``vmoe_b16_every2_e8`` is a ViT-B with patches of 16 pixels and 8
experts in every second block. Sizes follow the V-MoE paper (table 7 and appendix B). Names that
end in ``_std`` have the standard ViT sizes, whose S differs from the paper's; ``of_timm`` finds the
shape of a name of timm. The models of ``configs/fashion_mnist.py``, ``configs/emoji.py`` and their
dense counterparts have the names of their data. ``vit_test`` and ``vmoe_test_last2_e4`` are tiny
models to try code with.
"""

import fnmatch
import functools
import math
import os
import re
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from vmoe.config import Exchange, MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.errors import UsageError, choice

if TYPE_CHECKING:
    from flax import nnx
    from jax.stages import Wrapped

    from vmoe.nn.vit import ViT
    from vmoe.sharding import Placement

_SHAPES = {  # depth, width, mlp_dim, num_heads
    "s": (8, 512, 2048, 8),
    "b": (12, 768, 3072, 12),
    "l": (24, 1024, 4096, 16),
    "h": (32, 1280, 5120, 16),
    "15b": (48, 1408, 6400, 16),
    "ti_std": (12, 192, 768, 3),
    "s_std": (12, 384, 1536, 6),
    "test": (4, 16, 32, 2),
    "small": (6, 64, 128, 2),
}


TIMM_SIZES = {"tiny": "ti*_std", "small": "s*_std", "base": "b*", "large": "l*", "huge": "h*"}
"""Sizes of timm, and the names that they have here; a star is the side of a patch."""


def _config(shape: str, patch_size: int, **fields: Any) -> ViTConfig:
    depth, width, mlp_dim, num_heads = _SHAPES[shape]
    return ViTConfig(
        patch_size=patch_size,
        depth=depth,
        width=width,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        **fields,
    )


def block_numbers(where: str, depth: int) -> tuple[int, ...]:
    """Block numbers by name: every second block ("every2"), or the last n of these ("last2").

    Raises:
        UsageError: no such name, or too few blocks for it.

    >>> block_numbers("every2", 8), block_numbers("last2", 8)
    ((1, 3, 5, 7), (5, 7))
    """
    every2 = tuple(range(1, depth, 2))
    if where == "every2":
        return every2
    last = where.removeprefix("last")
    if last == where or not last.isdecimal() or not 1 <= int(last) <= len(every2):
        names = f"use every2, or last1 to last{len(every2)} in a model of {depth} blocks"
        raise UsageError(names if every2 else "the only block is block 0: use 0", blocks=where)
    return every2[-int(last) :]


def _sparse(dense: ViTConfig, where: str, num_experts: int, **moe: Any) -> ViTConfig:
    """The dense model with experts in the named blocks."""
    blocks = block_numbers(where, dense.depth)
    return replace(dense, sparse_blocks=blocks, moe=MoEConfig(num_experts=num_experts, **moe))


def _registry() -> dict[str, ViTConfig]:
    models = {}
    for size, patches in {"s": [32], "b": [32, 16], "l": [32, 16], "h": [14]}.items():
        for patch in patches:
            width = _SHAPES[size][1]
            models[f"vit_{size}{patch}"] = _config(size, patch, pre_logits=width)
    for name, places in {
        "s32": ["last2", "every2"],
        "b32": ["last2", "every2"],
        "b16": ["last2", "every2"],
        "l32": ["last2", "every2"],
        "l16": ["last2", "every2"],
        "h14": ["last5", "every2"],
    }.items():
        for place in places:
            models[f"vmoe_{name}_{place}_e32"] = _sparse(models[f"vit_{name}"], place, 32)
    models["vmoe_15b_every2_e32"] = _sparse(_config("15b", 14), "every2", 32)

    published = {"exchange": Exchange("bfloat16")}
    models["vmoe_s32_last2_e8"] = _sparse(models["vit_s32"], "last2", 8, **published)
    models["vmoe_b16_every2_e8"] = _sparse(
        _config("b", 16, head_bias=-10.0), "every2", 8, **published
    )

    for size, patch in [("ti_std", 16), ("s_std", 16), ("s_std", 32)]:
        models[f"vit_{size.replace('_', f'{patch}_')}"] = _config(size, patch)

    models["vit_test"] = _config("test", 8, image_size=32, num_classes=10)
    models["vmoe_test_last2_e4"] = _sparse(
        models["vit_test"], "last2", 4, router=TokenChoice(images_per_group=2)
    )
    small = functools.partial(
        _config,
        "small",
        pooling="mean",
        position_std=1.0,  # 0.02 suits long training and is too small for a short one
    )
    models["vit_fashion_mnist"] = small(7, image_size=28, num_classes=10)
    models["vit_emoji"] = small(8, image_size=64, num_classes=9, dropout=0.1)
    for data in ("fashion_mnist", "emoji"):
        models[f"vmoe_{data}"] = _sparse(models[f"vit_{data}"], "every2", 8)
    return models


MODELS = _registry()


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a pattern with wildcards, sorted.

    >>> list_models("vmoe_s32_*")
    ['vmoe_s32_every2_e32', 'vmoe_s32_last2_e32', 'vmoe_s32_last2_e8']
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def of_timm(name: str) -> str | None:
    """The named model with the shape of a model of timm; None if there is none.

    The weights decide what differs apart from the shape, such as the GELU.

    >>> of_timm("vit_tiny_patch16_224.augreg_in21k"), of_timm("vit_giant_patch14_dinov2")
    ('vit_ti16_std', None)
    """
    if not (found := re.match(r"(?:vit|deit|deit3)_([a-z]+)_patch(\d+)(?![a-z0-9])", name)):
        return None
    own = f"vit_{TIMM_SIZES.get(found[1], '')}".replace("*", found[2])
    return own if own in MODELS else None


def hub_remedy(name: str) -> str:
    """How to open a model of the Hugging Face hub; empty if the name does not look like one.

    >>> hub_remedy("google/vit")
    'for a model of the Hugging Face hub give hf://google/vit; `vmoe models` lists all names'
    """
    timm = name.removeprefix("timm/")
    if re.fullmatch(r"[a-z0-9_]+_patch\d+[\w.]*", timm):
        own = of_timm(timm)
        shape = f" (its shape is that of {own})" if own else ""
        remedy = f"for timm's weights give hf://timm/{timm}{shape}"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name.partition("/")[0]):
        remedy = f"for a model of the Hugging Face hub give hf://{name}"
    else:
        return ""
    return f"{remedy}; `vmoe models` lists all names"


def unknown_model(name: str, known: list[str]) -> UsageError:
    """The error of a name that is not among the known ones."""
    return UsageError(f"no model {name!r}: {hub_remedy(name) or choice(name, known)}")


def model_config(name: str, **overrides: Any) -> ViTConfig:
    """The config of a named model, with some of its fields changed.

    Args:
        name: one of ``list_models()``.
        overrides: fields of ViTConfig; a dict changes fields of a nested config, as in
            ``moe=dict(router=dict(capacity_factor=4.0))``.

    Raises:
        UsageError: no such model or field, or incompatible values.

    >>> model_config("vmoe_s32_last2_e8", moe=dict(router=dict(k=1))).moe.router.k
    1
    """
    if name not in MODELS:
        raise unknown_model(name, list(MODELS))
    config = replace(MODELS[name], **overrides)
    if name == "vmoe_s32_last2_e8" and "head_bias" not in overrides and config.num_classes:
        config = replace(config, head_bias=-math.log(config.num_classes))
    return config


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> "ViT":
    """A newly initialized model by name; ``overrides`` as for ``model_config``."""
    return build(model_config(name, **overrides), seed=seed)


def build(config: ViTConfig, *, seed: int = 0, placement: "Placement | None" = None) -> "ViT":
    """The model of a config, with initial parameters from the seed.

    Args:
        placement: the devices over which images and experts are sharded; None for one device.
    """
    from vmoe.nn.keys import InitKeys
    from vmoe.nn.vit import ViT
    from vmoe.sharding import ONE_DEVICE

    return ViT(config, placement=placement or ONE_DEVICE, rngs=InitKeys(seed))


def params_of(model: "nnx.Module") -> dict[Any, Any]:
    """The parameters of a model as nested dicts, and the state of its routers."""
    from flax import nnx

    from vmoe.nn.router_state import RouterState

    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, RouterState)))


def with_params(
    config: ViTConfig, params: dict[str, Any], *, placement: "Placement | None" = None
) -> "ViT":
    """The model of a config, with given parameters as nested dicts.

    Initializes nothing, so it is cheap and works inside ``jax.jit``.
    """
    from flax import nnx

    from vmoe.nn.router_state import RouterState

    graph, state = _abstract(config, placement)
    _, rest = nnx.split_state(state, (nnx.Param, RouterState), ...)
    model = nnx.merge(graph, params, rest)
    model.rngs = nnx.Rngs(train=0)
    return model


def build_abstract(config: ViTConfig, *, placement: "Placement | None" = None) -> "ViT":
    """Like ``build``, with a ``jax.ShapeDtypeStruct`` instead of every array."""
    from flax import nnx

    return nnx.merge(*_abstract(config, placement), copy=True)


@functools.lru_cache(maxsize=16)
def _abstract(config: ViTConfig, placement: "Placement | None") -> tuple[Any, Any]:
    """A model's graph definition and abstract state.

    Cached: tracing the initialization takes a second, and a run evaluates many times.
    """
    from flax import nnx

    return nnx.split(nnx.eval_shape(lambda: build(config, placement=placement)))


def check_described(model: "ViT") -> None:
    """Checks that the config of a model describes all of its layers, so that it can be rebuilt.

    Raises:
        UsageError: a layer was replaced; the message names the first one.
    """
    from flax import nnx

    from vmoe.trees import path_name

    described = dict(nnx.iter_modules(build_abstract(model.config, placement=model.placement)))
    modules = dict(nnx.iter_modules(model))
    paths = sorted({*described, *modules}, key=_in_order)  # a layer precedes its parts
    for path in paths:
        there, expected = modules.get(path), described.get(path)
        if _settings(there) != _settings(expected):
            raise UsageError(
                f"{path_name(path)} is not the {type(expected).__name__} that the model's config "
                "describes: such a model cannot be written or changed by its config, only used in "
                "Python; keep its parameters with vmoe.models.params_of"
                if expected is not None
                else f"{path_name(path)} is not in the model's config"
            )


def _in_order(path: tuple[str | int, ...]) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in path]


def _settings(module: Any) -> tuple[Any, ...]:
    """The type of a module, its settings, and the shapes of its parameters."""
    from flax import nnx

    settings, shapes = {}, {}
    for name, value in vars(module).items() if module is not None else ():
        if isinstance(value, nnx.Variable):
            shapes[name] = value.shape
        elif not (name.startswith("_") or isinstance(value, FunctionType | nnx.Pytree)):
            settings[name] = value
    return type(module), settings, shapes


def distinct_blocks(config: ViTConfig) -> tuple[ViTConfig, list[int]]:
    """The config with one block of each kind, and the last block, which may skip work.

    Blocks of a kind have equal parameters and programs, so only one of them needs to be traced.

    Returns:
        the smaller config, and for each block of the given one the number of its like there.

    >>> distinct_blocks(model_config("vmoe_s32_every2_e32"))[1]
    [0, 1, 0, 1, 0, 1, 0, 2]
    """
    layers = [config.moe_blocks.get(i) for i in range(config.depth)]  # None: dense
    kinds = list(dict.fromkeys(layers[:-1]))
    kept = [*kinds, layers[-1]]
    small = replace(
        config,
        depth=len(kept),
        sparse_blocks=tuple(i for i, layer in enumerate(kept) if layer),
        moe=tuple(layer for layer in kept if layer),
    )
    return small, [*map(kinds.index, layers[:-1]), len(kinds)]


@functools.lru_cache(maxsize=32)
def abstract_params(config: ViTConfig) -> dict[str, Any]:
    """The shapes of the parameters of a config's model, by path; cached, not to be changed.

    It traces one block of each kind, which takes 0.05 s each.
    """
    from vmoe.trees import by_name

    small, like = distinct_blocks(config)
    traced = by_name(params_of(build_abstract(small)))
    found = {path: leaf for path, leaf in traced.items() if not path.startswith("blocks/")}
    for i, j in enumerate(like):
        start = f"blocks/{j}/"
        found |= {
            f"blocks/{i}/{path.removeprefix(start)}": leaf
            for path, leaf in traced.items()
            if path.startswith(start)
        }
    return found


def compiled(function: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Compiles a function whose first argument is a model and whose last arguments are arrays.

    ``compiled(f)(model, *fixed)`` is ``lambda *arrays: f(model, *fixed, *arrays)`` as one program.
    Models that differ only in their parameters share it, if the fixed arguments are equal. The
    model is split once, which takes longer than a small step. The function gets a copy of the
    model, which it cannot change.

    Args:
        function: its arguments between the model and the arrays must be hashable.
    """
    import jax
    from flax import nnx

    def run(graph: nnx.GraphDef, fixed: tuple[Any, ...], state: nnx.State, *arrays: Any) -> Any:
        return function(nnx.merge(graph, state, copy=True), *fixed, *arrays)

    run.__name__ = function.__name__  # which profiles show
    jitted = jax.jit(run, static_argnums=(0, 1))

    def of(model: nnx.Module, *fixed: Any) -> Callable[..., Any]:
        graph, state = nnx.split(model, graph=True)
        return functools.partial(jitted, graph, fixed, state)

    return of


def shapes_of(program: Callable[..., Any], *arrays: Any) -> Any:
    """The shapes that a program of ``compiled`` returns; running it later needs no second trace.

    Args:
        program: its parameters may be ``jax.ShapeDtypeStruct``.
        arrays: the arrays, or their shapes.
    """
    assert isinstance(program, functools.partial)
    return cast("Wrapped", program.func).trace(*program.args, *arrays).out_info
