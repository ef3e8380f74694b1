"""A run, described: frozen dataclasses of plain Python that import neither jax nor flax.

A recipe under ``configs/`` builds one ``Train``; a variant is ``dataclasses.replace`` of another.
The command line gets its options from the same fields. What cannot work together is refused
when a config is built, by name.
"""

import dataclasses
import re
import runpy
import traceback
from pathlib import Path
from typing import Any, Literal, TypeVar

from vmoe.checked import Checked, require
from vmoe.errors import UsageError, unknown

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Balance(Checked):
    """Weights of the auxiliary losses of one sparse block (``vmoe/routing/balance.py``)."""

    importance: float = 0.005
    """Squared coefficient of variation of the experts' summed gates (V-MoE, appendix A)."""
    load: float = 0.005
    """The same of the experts' smoothed loads; exists in training with noise alone."""
    gshard: float = 0.0
    """GShard's product of first-choice shares and mean gates (arXiv 2006.16668)."""
    z: float = 0.0
    """ST-MoE's mean squared log-partition of the router logits (arXiv 2202.08906)."""


@dataclasses.dataclass(frozen=True)
class TokensChoose(Checked):
    """Each token chooses its k experts: the router of V-MoE (arXiv 2106.05974)."""

    kind: Literal["tokens_choose"] = "tokens_choose"
    k: int = 2
    """Experts per token."""
    priority: Literal["order", "largest_gate", "sum_of_gates", "random"] = "order"
    """Whose choices get the slots first: place in the group; largest gate (Batch Prioritized
    Routing); sum of the k gates; a random order (a baseline)."""
    noise_std: float = 1.0
    """The noise on the logits in training has standard deviation noise_std / e."""
    normalize_weights: bool = False
    """Divide a token's combine weights by their sum, before any choice is dropped."""
    balance: Balance = Balance()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k >= 1, f"router.k={self.k}: a token needs at least one expert")
        require(self.noise_std >= 0, f"router.noise_std={self.noise_std}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class ExpertsChoose(Checked):
    """Each expert chooses the tokens of its largest gates (Expert Choice, arXiv 2202.09368)."""

    kind: Literal["experts_choose"] = "experts_choose"
    noise_std: float = 1.0
    """The noise on the logits in training has standard deviation noise_std / e."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_std >= 0, f"router.noise_std={self.noise_std}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class Soft(Checked):
    """Each slot is a mixture of all tokens of an image (Soft MoE, arXiv 2308.00951).

    An expert has round(s * capacity_factor / e) slots, at least one, in no multiple.
    """

    kind: Literal["soft"] = "soft"


Router = TokensChoose | ExpertsChoose | Soft


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
    """One sparse layer: its experts, its router and how many slots there are."""

    experts: int = 8
    router: Router = TokensChoose()
    capacity_factor: float = 1.05
    """Slots per token and choice; slots of an expert = s * k * capacity_factor / e, rounded."""
    capacity: int | None = None
    """Slots per expert and group, outright; overrides the factor and its rounding."""
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    """How the factor becomes an integer; round is half to even."""
    capacity_multiple: int = 4
    """The capacity is rounded up to a multiple of this."""
    dropless: bool = False
    """No capacity: every choice is computed, none dropped; for routers in which tokens choose."""
    images_per_group: int = 8
    """Most images whose tokens compete for the same slots; 1 makes images independent."""
    expert_dropout: float = 0.0
    """Dropout rate inside the experts."""
    shared_init: bool = True
    """Whether all experts of a layer start from the same values."""
    transfer_dtype: Literal["float32", "bfloat16"] = "float32"
    """To what the rows are rounded on their way to the experts and back."""
    computation: Literal["auto", "batched", "blocks", "ragged"] = "auto"
    """How the experts compute (``vmoe/nn/computation.py``): by platform and shape; one batched
    product over slots; one block of rows after the other; a ragged product over sorted rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.experts >= 1, f"moe.experts={self.experts}: use at least one")
        k = getattr(self.router, "k", 1)
        require(
            k <= self.experts,
            f"moe.router.k={k} is more than moe.experts={self.experts}: lower k or add experts",
        )
        require(
            self.capacity is None or self.capacity >= 1,
            f"moe.capacity={self.capacity}: an expert needs at least one slot",
        )
        require(
            self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor}: use more than 0"
        )
        require(self.capacity_multiple >= 1, "moe.capacity_multiple: use at least 1")
        require(self.images_per_group >= 1, "moe.images_per_group: use at least 1")
        require(
            not self.dropless or self.capacity is None,
            f"moe.dropless with moe.capacity={self.capacity}: give one of the two",
        )
        require(
            not self.dropless or isinstance(self.router, TokensChoose),
            f"moe.dropless with router {self.router.kind}: it drops no choice, use False",
        )
        require(
            not isinstance(self.router, Soft) or self.images_per_group == 1,
            f"moe.images_per_group={self.images_per_group}: a soft router mixes the tokens of one "
            "image, set it to 1",
        )
        require(
            not isinstance(self.router, Soft) or self.computation in ("auto", "batched"),
            f"moe.computation={self.computation}: a soft router fills every slot, use batched",
        )
        _require_rate("moe.expert_dropout", self.expert_dropout)


def _require_rate(name: str, value: float) -> None:
    require(0 <= value < 1, f"{name}={value}: a dropout rate lies in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ViTConfig(Checked):
    """A vision transformer, some of whose blocks are sparse. The defaults are V-MoE's S/32."""

    patch: int = 32
    """Side of a patch in pixels."""
    width: int = 512
    """Of the tokens."""
    depth: int = 8
    """Number of blocks."""
    mlp: int = 2048
    """Hidden width of an MLP, and of an expert."""
    heads: int = 8
    """Of the attention."""
    image_size: int = 224
    """Side of the images in pixels for which learned positions are made; others are resampled."""
    num_classes: int = 1000
    """Width of the logits."""
    pooling: Literal["class_token", "mean", "attention"] = "class_token"
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    position_std: float = 0.02
    """Standard deviation of learned positions at the start; 1.0 suits short training."""
    pre_logits: int | None = None
    """Width of a dense layer with tanh before the head; None for none."""
    head_std: float = 0.0
    """Standard deviation of the head's kernel at the start."""
    head_bias: float = 0.0
    """The head's bias at the start."""
    qk_norm: bool = False
    """Normalise queries and keys (arXiv 2302.05442)."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention outputs and dense MLPs."""
    attention_dropout: float = 0.0
    """Dropout rate of attention weights."""
    sparse_blocks: tuple[int, ...] = ()
    """Which blocks have experts in place of their MLP, counted from 0."""
    moe: MoEConfig | tuple[MoEConfig, ...] = MoEConfig()
    """One for all sparse blocks, or one each, in their order."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and routers are always float32."""
    whole_last_block: bool = False
    """Compute the last block for all tokens even where the class token alone is read of it. The
    logits, losses and gradients are the same, up to what dropout draws."""
    remat: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "width", "depth", "mlp", "heads", "image_size", "num_classes"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value}: use at least 1")
        require(
            self.width % self.heads == 0,
            f"model.heads={self.heads} does not divide model.width={self.width}",
        )
        require(
            self.image_size % self.patch == 0,
            f"model.patch={self.patch} does not divide model.image_size={self.image_size}",
        )
        require(
            self.positions != "sincos2d" or self.width % 4 == 0,
            f"model.positions=sincos2d needs a width in fours, model.width={self.width} is not",
        )
        blocks = self.sparse_blocks
        require(
            list(blocks) == sorted(set(blocks)) and all(0 <= i < self.depth for i in blocks),
            f"model.sparse_blocks={blocks}: ascending block numbers below depth={self.depth}",
        )
        require(
            isinstance(self.moe, MoEConfig) or len(self.moe) == len(blocks),
            f"model.moe: one config, or one for each of the {len(blocks)} sparse blocks",
        )
        require(
            self.pre_logits is None or self.pre_logits >= 1,
            f"model.pre_logits={self.pre_logits}: a width of at least 1, or None",
        )
        _require_rate("model.dropout", self.dropout)
        _require_rate("model.attention_dropout", self.attention_dropout)

    def moe_of(self, block: int) -> MoEConfig | None:
        """The sparse-layer config of a block; None if the block is dense."""
        if block not in self.sparse_blocks:
            return None
        if isinstance(self.moe, MoEConfig):
            return self.moe
        return self.moe[self.sparse_blocks.index(block)]


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """Where images come from and what happens to them in training."""

    name: str = "digits"
    """Data set: digits, fashion_mnist, fashion_mnist:FOLDER, folder:PATH or arrays:FILE.npz."""
    flip: bool = False
    """Mirror a training image, left to right, with a chance of one half."""
    shift: int = 0
    """Largest shift of a training image, in pixels, in either direction."""
    rotate: float = 0.0
    """Largest rotation of a training image, in degrees, in either direction."""
    cutout: int = 0
    """Side of a square of a training image that is painted grey, in pixels (arXiv 1708.04552)."""
    mixup: float = 0.0
    """Concentration of the Dirichlet that weights an image and its partner; 0 is no mixup."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shift", "rotate", "cutout", "mixup"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class Decay(Checked):
    """Decoupled weight decay by kind of parameter; each is multiplied by the learning rate."""

    kernels: float = 0.05
    """Of every kernel that has no other rate."""
    experts: float | None = None
    """Of the experts' kernels; as other kernels if None."""
    routers: float | None = None
    """Of the routers' kernels; as other kernels if None."""
    head: float | None = None
    """Of the head's kernels; as other kernels if None."""
    others: float = 0.0
    """Of biases, norms, positions and the class token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rate in dataclasses.asdict(self).items():
            require(rate is None or rate >= 0, f"optim.decay.{name}={rate}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class Optim(Checked):
    """The optimiser: clip, Adam or momentum, decoupled decay, learning rate, in this order."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warmup."""
    final_lr: float = 0.01
    """Learning rate at the end, as a share of the peak; a constant one stays at the peak."""
    warmup: int = 100
    """Steps from 0 to the peak, linearly."""
    b1: float = 0.9
    """Decay rate of Adam's mean of gradients."""
    b2: float = 0.999
    """Decay rate of Adam's mean of squared gradients."""
    momentum: float = 0.9
    """Of SGD."""
    decay: Decay = Decay()
    clip: float | None = 1.0
    """Largest global norm of the gradient; None for any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, f"optim.lr={self.lr}: use more than 0")
        require(self.warmup >= 0, f"optim.warmup={self.warmup}: use 0 or more")
        require(
            self.clip is None or self.clip > 0, f"optim.clip={self.clip}: use more than 0, or None"
        )
        require(self.final_lr >= 0, f"optim.final_lr={self.final_lr}: use 0 or more")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value}: a decay rate lies in [0, 1)")


@dataclasses.dataclass(frozen=True)
class EvalSet(Checked):
    """What a run is evaluated on while it trains; where a setting is None, the model's own."""

    name: str = "validation"
    """Under which it is reported."""
    data: str = "validation"
    """A split of the data set trained on, or NAME:SPLIT of another (see ``Data.name``)."""
    batch_size: int = 256
    image_size: int | None = None
    """Side in pixels to which the images are resized."""
    k: int | None = None
    """Experts per token, where tokens choose."""
    capacity_factor: float | None = None
    """Of all sparse blocks; the paper evaluates at 4.0."""
    dropless: bool | None = None
    """No capacity, where tokens choose: results do not depend on what shares a batch."""
    priority: Literal["order", "largest_gate", "sum_of_gates", "random"] | None = None
    """Whose choices get the slots first, where tokens choose."""
    images_per_group: int | None = None
    """Most images whose tokens compete for the same slots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "evaluations: each needs a name")
        require(
            not self.dropless or self.capacity_factor is None,
            f"evaluations.dropless with capacity_factor={self.capacity_factor}: give one of them",
        )
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluations.{name}={value}: use at least 1")

    def model(self, trained: ViTConfig) -> ViTConfig:
        """The config of a trained model under these settings."""
        size = self.image_size or trained.image_size
        require(
            size % trained.patch == 0,
            f"evaluations.image_size={size}: model.patch={trained.patch} does not divide it",
        )
        if not trained.sparse_blocks:
            return trained
        router = _given(k=self.k, priority=self.priority)
        layer = _given(capacity_factor=self.capacity_factor, images_per_group=self.images_per_group)
        if self.capacity_factor is not None:
            layer |= {"capacity": None, "dropless": False}

        def changed(moe: MoEConfig) -> MoEConfig:
            require(
                not isinstance(moe.router, Soft) or self.capacity_factor is None,
                f"evaluations.capacity_factor={self.capacity_factor}: the slots of a soft router "
                "are parameters, leave it out",
            )
            if not isinstance(moe.router, TokensChoose):
                return replace(moe, **layer)
            changes = layer | _given(dropless=self.dropless)
            if self.dropless:
                changes["capacity"] = None
            return replace(moe, **changes, router=router)

        return replace(
            trained, moe=tuple(changed(trained.moe_of(block)) for block in trained.sparse_blocks)
        )


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """A training run, whole: the same Train gives the same parameters."""

    model: ViTConfig = ViTConfig()
    data: Data = Data()
    optim: Optim = Optim()
    steps: int = 1000
    batch_size: int = 32
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy: of one class among all, or of each class by itself, summed over classes."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, evaluated beside them; 0 for none. Over step t
    it is at most (1 + t) / (10 + t), so that the start is soon forgotten."""
    seed: int = 0
    """Decides initialisation, order of the data, augmentation, noise and dropout."""
    evaluations: tuple[EvalSet, ...] = (EvalSet(),)
    """What the model is evaluated on; the accuracy on the first decides which step is best."""
    log_every: int = 50
    """Steps between rows of metrics."""
    evaluate_every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the checkpoints due are kept, the newest; beside them the best of those
    evaluated, and the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**32, f"seed={self.seed}: use 0 to 4294967295")
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "keep")
        for name in counts:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: use at least 1")
        require(
            self.optim.warmup < self.steps,
            f"optim.warmup={self.optim.warmup} leaves no step of steps={self.steps}",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing}: a share in [0, 1)",
        )
        require(0 <= self.ema < 1, f"ema={self.ema}: a decay rate lies in [0, 1)")
        for name in ("shift", "cutout"):
            value, size = getattr(self.data, name), self.model.image_size
            require(
                value < size,
                f"data.{name}={value} leaves nothing of an image of model.image_size={size}",
            )
        names = [evaluation.name for evaluation in self.evaluations]
        require(bool(names), "evaluations: name at least one set")
        require(len(names) == len(set(names)), f"evaluations: two have one name in {names}")
        for evaluation in self.evaluations:  # what cannot work together is refused here
            evaluation.model(self.model)


def replace(config: Config, **changes: Any) -> Config:
    """``dataclasses.replace``, with a dict for the fields of a nested config.

    >>> replace(ViTConfig(), moe=dict(router=dict(k=1))).moe.router.k
    1
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name, value in changes.items():
        if name not in known:
            raise UsageError(unknown(f"{type(config).__name__} has no field", name, known))
        if isinstance(value, dict):
            nested = getattr(config, name)
            if not dataclasses.is_dataclass(nested):
                raise UsageError(f"{name} of {type(config).__name__} has no fields to change")
            changes[name] = replace(nested, **value)
    return dataclasses.replace(config, **changes)


def load(path: str | Path) -> Train:
    """The ``config`` of a recipe: a Python file that is trusted, and run; or a run's config.json.

    Raises:
        UsageError: there is no such file, or it defines no ``config`` of type Train.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    if path.suffix == ".json":
        try:
            return from_json(Train, path.read_text())
        except (UsageError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"--config {path}: {error}") from None
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:  # whatever it does wrong, its author gets the line
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == str(path) else line
        what = _unknown_field(str(error)) or " ".join(str(error).split()) or type(error).__name__
        place = f"--config {path}" + (f", line {line}" if line else "")
        raise UsageError(f"{place}: {what}") from error
    if not isinstance(config, Train):
        raise UsageError(f"--config {path}: the file must define `config = Train(...)`")
    return config


def _unknown_field(error: str) -> str:
    """What Python says of a field that a config has not, with the nearest that it has."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", error)
    kind = globals().get(found[1]) if found else None
    if not dataclasses.is_dataclass(kind):
        return ""
    known = [field.name for field in dataclasses.fields(kind)]
    return unknown(f"{found[1]} has no field", found[2], known)


def to_json(config: Any) -> str:
    """Any config as JSON text, enough to build it again."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_json(config, indent=2).decode()


def from_json(kind: type[Config], text: str) -> Config:
    """The config of a given type that ``to_json`` wrote; every field and type is checked.

    Raises:
        UsageError: the text is not such a config; names the first field that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{kind.__name__} {place}: {first['msg']}") from None
