"""Models as ONNX files, for runtimes without JAX such as ONNX Runtime and OpenVINO.

Each image is its own group, so an image does not depend on its batch and the number of images is
free. Everything is computed in float32. Routing is written as comparisons and matmuls
(``one_hot.py``), since the conversion supports no scatter.

jax2onnx does the conversion. It pins an older orbax-checkpoint than vmoe uses, so it is not a
dependency; ``INSTALL`` is the command that installs it without its dependencies.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, Float

from vmoe import models
from vmoe.axes import Record, Route, SoftRouting
from vmoe.checkpoints.export.matmul_form import matmul_form
from vmoe.checkpoints.export.one_hot import ROUTERS
from vmoe.checkpoints.stored import StoredModel
from vmoe.config import ViTConfig, replace, to_json
from vmoe.errors import UsageError, require, writing
from vmoe.host.signals import unfinished
from vmoe.nn.keys import MaybeKey
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT
from vmoe.routing.groups import Groups
from vmoe.routing.rows import keep_class_tokens

if TYPE_CHECKING:
    from onnx import ModelProto

VERSION = 1
INSTALL = "pip install onnx onnx-ir && pip install --no-deps jax2onnx==0.17.1"
OPSET = 18
MOST_BYTES = 2_000_000_000  # of a file; protobuf allows 2 GiB


def write(path: Path, stored: StoredModel) -> None:
    """Writes a model as ONNX: ``images`` f32[b h w 3] in [-1, 1] -> ``logits`` f32[b y].

    b is free; h and w come from the preprocessing. The file's metadata are ``format_version``, and
    as JSON ``model``, ``class_names`` and ``preprocessing``. Parameters of more than 2 GB are in a
    second file in the same folder, PATH.data.

    To write a model with other routing settings, apply them to ``stored.config`` first.

    Args:
        path: a new file.
    """
    if path.exists():
        raise UsageError(f"{path}: it exists; use another file")
    model = without_scatters(stored.config, stored.params)
    size = stored.preprocessing.image_size
    proto = convert(lambda image: model(image[None])[0], "images", (size, size, 3), ["logits"])
    metadata = {
        "format_version": str(VERSION),
        "model": to_json(stored.config),
        "class_names": json.dumps(stored.class_names),
        "preprocessing": to_json(stored.preprocessing),
    }
    import onnx

    onnx.helper.set_model_props(proto, metadata)
    large = sum(np.asarray(x).nbytes for x in jax.tree.leaves(stored.params)) > MOST_BYTES
    beside = path.with_name(f"{path.name}.data")
    with writing(path), unfinished(path, *([beside] if large else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(
            proto,
            path,
            save_as_external_data=large,
            location=beside.name if large else None,
        )


def convert(
    function: Callable[[Float[Array, "..."]], Any],
    name: str,
    shape: tuple[int, ...],
    outputs: Sequence[str],
) -> "ModelProto":
    """ONNX of a function of one float32 array, such as an image, applied to each of b.

    Args:
        name: the name of the input.
        shape: the shape of one array.
        outputs: names of the outputs.
    """
    check_installed()
    # jax2onnx replaces modules of Flax while it traces, so the model is traced before.
    one = jaxpr_as_fun(jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32)))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it reports every optional package that is missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from jax2onnx import to_onnx

            return to_onnx(
                matmul_form(jax.vmap(one)),
                [("b", *shape)],
                model_name="vmoe",
                opset=OPSET,
                input_names=[name],
                output_names=list(outputs),
            )
    finally:
        logging.disable(disabled)


def check_installed() -> None:
    """Checks that the packages of the conversion are installed."""
    for name in ("jax2onnx", "onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"writing ONNX needs {name}: {INSTALL}")


def without_scatters(config: ViTConfig, params: dict[str, Any]) -> ViT:
    """The model in float32, with ``MatmulMoE`` as its MoE layers."""
    config = config.with_layers(lambda moe: replace(moe, exchange=dict(dtype="float32")))
    config = replace(config, dtype="float32")
    model = models.with_params(config, jax.device_put(params))
    for block, moe in config.moe_blocks.items():
        require(
            type(moe.router) in ROUTERS and moe.router.overflow == "drop",
            "an ONNX file cannot have this router, which needs scatters: use another format",
            **{"model.moe.router.kind": moe.router.kind, "block": block},
        )
        asks = ", ".join(sorted(model.blocks[block].mlp.experts.asks))
        require(
            not asks,
            f"ONNX has no experts that mix tokens; these ask for {asks}: use another format",
            **{"model.moe.experts.kind": moe.experts.kind, "block": block},
        )
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp = MatmulMoE(block.mlp)
    return model


class MatmulMoE(MoE):
    """An MoE layer with one image per group, and matmuls for dispatch and combine."""

    def __init__(self, moe: MoE):
        parts = dict(shared=moe.shared, shared_gate=moe.shared_gate, routed_scale=moe.routed_scale)
        super().__init__(moe.experts, moe.gate, moe.router, **parts, placement=moe.placement)
        self.state = moe.state

    def forward(
        self,
        tokens: Float[Array, "b n d"],
        *args: Any,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Float[Array, "b x d"], Record]:
        """As ``MoE``, in evaluation, without padding and with the router's own decisions."""
        valid = jnp.ones(tokens.shape[:2], bool)
        record = self.route(tokens, valid)
        own = tokens[:, :1] if class_token_only else tokens
        routing = record.routing
        assert isinstance(routing, SoftRouting)
        if class_token_only and self.router.logits_per == "slot":
            tokens, routing = keep_class_tokens(tokens, routing, tokens.shape[1])
        elif class_token_only:  # sent to every expert, with weight 0 where it has no slot
            weights = routing.combine[:, :1].sum(axis=-1, keepdims=True)
            tokens, routing = tokens[:, :1], SoftRouting(jnp.ones_like(weights), weights)
        groups, valid = Groups(*tokens.shape[:2]), valid[:, : tokens.shape[1]]
        outputs, _ = self._through_experts(
            tokens, {}, routing, valid, groups, tokens.dtype, None, self.exchange
        )
        return self._with_shared(outputs, own, None), record

    def route(
        self,
        images: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        key: MaybeKey = None,
        decide: Route | None = None,
        **kwargs: Any,
    ) -> Record:
        """The same decisions as ``MoE.route``, as ``SoftRouting``, without losses."""
        return super().route(
            images, valid, decide=lambda inputs, router, c: ROUTERS[type(router)](router, inputs, c)
        )
