"""Models of timm and transformers; these libraries save them and compute their outputs."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import timm
import timm.layers
import torch
from timm.models import save_for_hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from scripts.maintain.oracles.parameters import CLASSES, LABELS, Arrays, draw

Triple = tuple[float, float, float]

HALF: Triple = (0.5, 0.5, 0.5)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
GELUS: dict[str, Callable[[], torch.nn.Module]] = {
    "gelu": torch.nn.GELU,
    "gelu_tanh": partial(torch.nn.GELU, approximate="tanh"),
    "quick_gelu": timm.layers.QuickGELU,
    "silu": torch.nn.SiLU,
}
HF_SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16)
HF_VIT_SIZES = HF_SIZES | dict(patch_size=4, intermediate_size=32)
HF_LABELS = dict(id2label=dict(enumerate(LABELS)), label2id={k: i for i, k in enumerate(LABELS)})


@dataclass
class TorchModel:
    """A module, with functions that compute its outputs from normalized pixels and that save it."""

    module: torch.nn.Module
    size: int
    mean: Triple
    std: Triple
    run: Callable[[torch.nn.Module, torch.Tensor], dict[str, torch.Tensor]]
    write: Callable[[str], None]

    def outputs(
        self,
        images: np.ndarray,
        dtype: str = "float64",
        gelu: str | None = None,
        epsilon: float | None = None,
    ) -> Arrays:
        module = changed(self.module, gelu, epsilon).to(getattr(torch, dtype))
        pixels = ((images.astype(np.float64) + 1) / 2 - self.mean) / self.std
        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(dtype))
        # The eager attention of transformers has a float32 softmax; this one keeps float64.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return {key: value.numpy() for key, value in self.run(module, pixels).items()}


def changed(module: torch.nn.Module, gelu: str | None, epsilon: float | None) -> torch.nn.Module:
    """A copy with another GELU or epsilon."""
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        if epsilon is not None and isinstance(part, torch.nn.LayerNorm | timm.layers.RmsNorm):
            part.eps = epsilon
        for name, child in list(part.named_children()):
            if gelu is not None and re.search("GELU|SiLU", type(child).__name__):
                setattr(part, name, GELUS[gelu]())
    return module


def randomize(module: torch.nn.Module, seed: int, small: bool = False) -> None:
    parameters = dict(module.named_parameters())
    values = draw({key: tuple(p.shape) for key, p in parameters.items()}, seed, small)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(values[key]))
    module.eval()


def timm_model(
    seed: int,
    architecture: str,
    small: bool = False,
    labels: tuple[str, ...] = (),
    **changes: object,
) -> TorchModel:
    """A small model of timm's ``architecture``; ``changes`` are arguments of its constructor."""
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, mlp_ratio=2, num_classes=CLASSES)
    module = timm.create_model(architecture, **sizes | changes)
    randomize(module, seed, small)
    config = {"label_names": list(labels)} if labels else None
    write = partial(save_for_hf, module, safe_serialization=True, model_config=config)
    size = module.patch_embed.img_size[0]
    mean, std = (module.pretrained_cfg[key] for key in ("mean", "std"))
    return TorchModel(module, size, mean, std, run_timm, write)


def run_timm(module: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sets the size of the module's images to that of these; its positions are resampled."""
    module.set_input_size(tuple(pixels.shape[2:]))
    tokens = module.forward_features(pixels)
    features = module.forward_head(tokens, pre_logits=True)
    outputs = {"features": features, "tokens": tokens}
    return outputs | ({"logits": module(pixels)} if module.num_classes else {})


def hf_vit(
    seed: int, small: bool = False, mean: Triple = HALF, std: Triple = HALF, **saving: object
) -> TorchModel:
    module = ViTForImageClassification(ViTConfig(**HF_VIT_SIZES, **HF_LABELS))
    size = {"height": 16, "width": 16}
    processor = ViTImageProcessor(size=size, image_mean=list(mean), image_std=list(std))
    return hf_model(seed, module, processor, small, **saving)


def hf_pooler(seed: int) -> TorchModel:
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    return hf_model(seed, ViTModel(ViTConfig(**HF_VIT_SIZES)), processor)


def hf_dinov2(
    seed: int, registers: int = 0, save_original_format: bool = True, **changes: object
) -> TorchModel:
    saving = {} if save_original_format else {"save_original_format": False}
    processor = BitImageProcessor(
        size={"shortest_edge": 18},
        crop_size={"height": 16, "width": 16},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    sizes = HF_SIZES | dict(patch_size=4, mlp_ratio=2) | changes
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return hf_model(seed, Dinov2WithRegistersModel(config), processor)
    return hf_model(seed, Dinov2Model(Dinov2Config(**sizes)), processor, **saving)


def hf_dinov3(seed: int, **changes: object) -> TorchModel:
    sizes = HF_SIZES | dict(patch_size=4, intermediate_size=32, num_register_tokens=4) | changes
    processor = BitImageProcessor(
        size={"height": 16, "width": 16},
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return hf_model(seed, DINOv3ViTModel(DINOv3ViTConfig(**sizes)), processor)


def hf_model(
    seed: int,
    module: torch.nn.Module,
    processor: ViTImageProcessor | BitImageProcessor,
    small: bool = False,
    **saving: object,
) -> TorchModel:
    randomize(module, seed, small)

    def write(folder: str) -> None:
        module.save_pretrained(folder, **saving)
        processor.save_pretrained(folder)

    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return TorchModel(module, 16, mean, std, run_hf, write)


def run_hf(module: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Without a classifier the features are the pooler's output, or the class token's."""
    any_size = isinstance(module, ViTForImageClassification | ViTModel)
    options = {"interpolate_pos_encoding": True} if any_size else {}
    outputs = getattr(module, "vit", module)(pixels, **options)
    tokens = outputs.last_hidden_state
    if outputs.pooler_output is not None:
        return {"features": outputs.pooler_output, "tokens": tokens}
    return {"features": tokens[:, 0], "tokens": tokens, "logits": module(pixels, **options).logits}
