"""Stored runs of the V-MoE authors' code as models of vmoe: settings, arrays by published name."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.routers import grouped
from vmoe import models
from vmoe.analysis import capture
from vmoe.axes import Route
from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo
from vmoe.checkpoints.assemble import assemble
from vmoe.checkpoints.family import Family
from vmoe.checkpoints.flax_names import published_name, rename
from vmoe.checkpoints.stored import Origin
from vmoe.config import (
    AnyRouter,
    ExpertChoice,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
)
from vmoe.config.preprocessing import Preprocessing
from vmoe.nn.vit import ViT
from vmoe.trees import by_name


def published_params(config: ViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, by the reader of published checkpoints."""
    infos = {name: ArrayInfo(array.shape, array.dtype) for name, array in arrays.items()}
    file = ArrayFile(Path("stored"), infos, lambda names: ((name, arrays[name]) for name in names))
    return assemble(published_family(file, config=config)).params


def published_family(file: ArrayFile, **fields: Any) -> Family:
    """The family of published checkpoints, whose arrays are in the memory."""
    origin = Origin("published", file.path)
    return Family(origin, file, rename, lambda n: (Preprocessing(n), []), **fields)


def published_router(theirs: dict[str, Any]) -> AnyRouter:
    slots = theirs.get("dispatcher", theirs)
    factor, capacity = slots["capacity_factor"] or 1.0, slots.get("num_slots")
    match theirs.get("name", "").split(".")[-1]:
        case "SoftRouter":
            return Soft(capacity_factor=factor, capacity=capacity)
        case "NoisyTopItemsPerExpertRouter":
            return ExpertChoice(
                noise_std=theirs["noise_std"], capacity_factor=factor, capacity=capacity
            )
    return TokenChoice(
        capacity_factor=factor,
        capacity=capacity,
        k=theirs["num_selected_experts"],
        priority="largest_gate" if theirs["dispatcher"]["batch_priority"] else "order",
        noise_std=theirs["noise_std"],
    )


def published_config(theirs: dict[str, Any], image_size: int) -> ViTConfig:
    encoder, moe = theirs["encoder"], theirs["encoder"]["moe"]
    patch_size = theirs["patch_size"][0]
    tokens = (image_size // patch_size) ** 2 + (theirs["classifier"] == "token")
    return ViTConfig(
        patch_size=patch_size,
        width=theirs["hidden_size"],
        depth=encoder["num_layers"],
        mlp_dim=encoder["mlp_dim"],
        num_heads=encoder["num_heads"],
        image_size=image_size,
        num_classes=theirs["num_classes"],
        pooling={"token": "class_token", "gap": "mean", "map": "attention"}[theirs["classifier"]],
        positions=encoder.get("position_emb", {"name": "learned"})["name"],
        pre_logits=theirs["representation_size"],
        head_bias=theirs["head_bias_init"],
        qk_norm=encoder.get("attention_qk_norm", False),
        sparse_blocks=tuple(moe["layers"]),
        moe=MoEConfig(
            num_experts=moe["num_experts"],
            router=grouped(published_router(moe["router"]), moe["group_size"] // tokens),
            experts=MlpExpert(shared_init=not moe["split_rngs"]),
        ),
    )


@dataclasses.dataclass
class Golden:
    """One stored run: its arrays, its config as a ``ViTConfig``, our model with its parameters."""

    name: str
    arrays: dict[str, np.ndarray]
    config: ViTConfig
    model: ViT
    train: bool  # the stored run has router noise
    compiled: Callable[..., Any]  # as jax.jit

    @classmethod
    def opened(cls, path: Path, compiled: Callable[..., Any] = jax.jit) -> "Golden":
        arrays = dict(np.load(path))
        config = published_config(json.loads(str(arrays["config"])), arrays["images"].shape[1])
        own = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
        model = models.with_params(config, jax.device_put(published_params(config, own)))
        return cls(path.stem, arrays, config, model, path.stem.startswith("noisy"), compiled)

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def float32(self, name: str) -> np.ndarray | None:
        """An array of the run, from its repetition without bfloat16 rounding if that is stored.

        The authors' Soft MoE always rounds dispatched and combined rows to bfloat16.
        """
        return self.arrays.get(f"f32/{name}", self.arrays.get(name))

    @property
    def has_gradients(self) -> bool:
        return "opt_" not in self.name

    @property
    def blocks(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        return [(i, self.below(f"moe/encoderblock_{i}/")) for i in self.config.sparse_blocks]

    @property
    def decide(self) -> dict[int, Route]:
        """By block, its router with the stored noise; empty for a run without noise."""

        def with_noise(noise: np.ndarray) -> Route:
            return lambda inputs, router, c: router(inputs._replace(noise=noise), c)

        blocks = self.config.sparse_blocks if self.train else ()
        return {i: with_noise(self.arrays[f"noise/encoderblock_{i}"]) for i in blocks}

    @functools.cached_property
    def results(self) -> tuple[dict[str, jax.Array], Any]:
        """The gradients by their published names, and our logits, records and losses."""
        graph, params, rest = nnx.split(self.model, nnx.Param, ...)

        @self.compiled
        def run(params: nnx.State, images: jax.Array) -> Any:
            def loss(params: nnx.State) -> Any:
                model = nnx.merge(graph, params, rest, copy=True)
                logits, records = capture(
                    model, images, train=self.train, key=jax.random.key(0), decide=self.decide
                )
                labels = self.arrays["labels"]
                main = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                aux = sum(record.aux_loss for record in records.values())
                losses = {"main": main, "aux": aux, "total": main + aux}
                return main + aux, (logits, records, losses)

            return jax.grad(loss, has_aux=True)(params)

        gradients, results = run(params, jnp.asarray(self.arrays["images"]))
        by_path = by_name(nnx.to_pure_dict(gradients))
        return {published_name(p, self.config): leaf for p, leaf in by_path.items()}, results


def difference(ours: Any, theirs: Any) -> float:
    """The greatest difference, relative to the greatest value of the stored run."""
    ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
