"""Starts of upcycling: the experts and the router that a trained MLP becomes, before any training.

A start is a class with its settings, its rule and its cost. In the costs, d is the width of the
tokens, f the hidden width of the MLP, and e and k the experts and the experts per token; a linear
router adds d e parameters. docs/upcycling.md compares the starts, and names those that are left
out.
"""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from vmoe.config import LinearGate, MoEConfig, ViTConfig, replace
from vmoe.config.experts import AnyMlpExpert
from vmoe.errors import UsageError, require
from vmoe.fields import Checked, Count, Positive, at_most, more_than
from vmoe.health import weights_are_gates
from vmoe.nn.patches import num_tokens
from vmoe.surgery.clusters import balanced_k_means, spherical_k_means, unit
from vmoe.surgery.params import Params, is_mlp_of, with_noise

UNITS = {"up": 1, "down": 0}
"""The axis of the hidden units in the kernels of an MLP."""


@dataclasses.dataclass(frozen=True)
class UpcyclingStart(Checked):
    """The interface of every start.

    Attributes:
        reads_tokens: whether it needs inputs of the MLP.
        takes: the kinds of dense MLPs that it makes experts of; see ``ViTConfig.mlp``.
    """

    reads_tokens = False
    takes: ClassVar[tuple[str, ...]] = ("plain",)

    def fields(self, dense: ViTConfig, moe: MoEConfig) -> dict[str, Any]:
        """The fields of the layer's config that this start needs to differ from the defaults.

        Args:
            moe: the layer as far as ``num_experts`` and ``router`` say.
        """
        return {}

    def check_mlps(self, dense: ViTConfig) -> None:
        """Checks that this start takes the MLPs of a model."""
        others = [name for name, each in STARTS.items() if dense.mlp in each.takes]
        kinds = f"{type(self).__name__} makes experts of MLPs that are {' or '.join(self.takes)}"
        remedy = f"use the start {' or '.join(others)}" if others else "use vmoe.moefy"
        require(dense.mlp in self.takes, f"{kinds}; {remedy}", **{"model.mlp": dense.mlp})

    def check_layer(self, dense: ViTConfig, moe: MoEConfig) -> None:
        """Checks that a layer fits this start, whose ``takes`` has the MLPs of the model."""
        kind = "mlp" if dense.mlp == "plain" else "gated_mlp"
        require(
            is_mlp_of(dense, moe.experts),
            f"the experts start as copies of MLPs: use {kind}, with the hidden width and the "
            "activation of the model",
            **{"experts.kind": moe.experts.kind},
        )

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        """The parameters of the layer, without those that are as in a new layer.

        Args:
            mlp: the parameters of the MLP: ``up`` kernel (d, f), bias (f); ``down`` kernel (f, d),
                bias (d). In a gated MLP ``up`` has 2 f outputs, see ``Hidden.gated``.
            tokens: inputs of the MLP, if the start reads them.
        """
        raise NotImplementedError

    def logit_changes(self, dense: ViTConfig, moe: MoEConfig) -> list[str]:
        """Reasons why the logits differ from the dense model's; see ``upcycle.logit_changes``.

        These are the reasons for experts that all equal the MLP.
        """
        reasons, router = [], moe.router
        if router.logits_per == "slot":
            reasons.append(f"with router {router.kind} the experts get mixtures of tokens")
        elif not router.can_drop:
            reasons.append(
                f"with router {router.kind} the combine weights of a token do not sum to 1"
            )
        else:
            of_all = router.k == moe.num_experts and weights_are_gates(router)
            if not router.normalized and not of_all:
                reasons.append("the combine weights of a token are not normalized")
            if not _has_room(moe, router.k, num_tokens(dense)):
                reasons.append("choices beyond the capacity are dropped")
        if moe.routed_scale != 1:
            reasons.append(
                f"the outputs of the experts are scaled (routed_scale={moe.routed_scale})"
            )
        if moe.shared_experts:
            reasons.append("a shared expert is added, whose parameters are new")
        if moe.exchange.dtype == "bfloat16" and dense.dtype != "bfloat16":
            reasons.append("rows are rounded to bfloat16 (exchange.dtype)")
        return reasons


@dataclasses.dataclass(frozen=True)
class Copies(UpcyclingStart):
    """Every expert is a copy of the MLP.

    If the combine weights are normalized over a token's experts and no choice is dropped, the
    logits stay the same.

    Cost: e times the parameters and k times the FLOPs of the MLP.

    Source: "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv
    2212.05055).
    """

    takes = ("plain", "gated")

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        return {"experts": _repeated(mlp, moe.num_experts)}


COPIES = Copies()


@dataclasses.dataclass(frozen=True)
class Noise(Copies):
    """Copies of the MLP whose kernels get noise, independent for each expert; costs as copies."""

    noise_std: Positive = 0.1
    """Standard deviation of the noise that is added to each expert's kernels, relative to the
    kernel's standard deviation."""

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        experts = _repeated(mlp, moe.num_experts)
        for each, name in zip(jax.random.split(key), UNITS, strict=True):
            kernel = experts[name]["kernel"]
            experts[name]["kernel"] = with_noise(kernel, self.noise_std, each)
        return {"experts": experts}

    def logit_changes(self, dense: ViTConfig, moe: MoEConfig) -> list[str]:
        noise = f"noise is added to the experts (noise_std={self.noise_std})"
        return [noise, *super().logit_changes(dense, moe)]


@dataclasses.dataclass(frozen=True)
class Drop(Copies):
    """Copies of the MLP in which the weights of some hidden units are re-initialized.

    In each kernel of each expert, random hidden units are chosen, and their weights replaced by
    normal numbers with the mean and the standard deviation of the weights that they replace. The
    rule has no biases, which stay. Costs as copies.

    Source: Drop-Upcycling (arXiv 2502.19261), by the authors' code (``drop_upcycling.py``), which
    chooses units for each kernel separately: for ``down`` and, in their gated MLPs, for each half
    of ``up``.
    """

    drop_ratio: Annotated[float, more_than(0), at_most(1)] = 0.5
    """Share of the hidden units whose weights are re-initialized, rounded down to whole units."""

    def check_layer(self, dense: ViTConfig, moe: MoEConfig) -> None:
        super().check_layer(dense, moe)
        f = dense.mlp_dim
        least = f"no hidden unit of {f} is re-initialized, use at least 1/{f}"
        self.require(int(self.drop_ratio * f) > 0, least, "drop_ratio")

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        e, experts = moe.num_experts, _repeated(mlp, moe.num_experts)
        halves = {"up": _halves(mlp), "down": 1}
        for each, (name, axis) in zip(jax.random.split(key), UNITS.items(), strict=True):
            new = jax.vmap(functools.partial(_reinitialized, axis=axis, ratio=self.drop_ratio))
            kernels = jnp.split(experts[name]["kernel"], halves[name], axis=-1)
            keys = jax.random.split(each, (halves[name], e))
            experts[name]["kernel"] = jnp.concatenate(list(map(new, kernels, keys)), axis=-1)
        return {"experts": experts}

    def logit_changes(self, dense: ViTConfig, moe: MoEConfig) -> list[str]:
        drop = f"hidden units of the experts are re-initialized (drop_ratio={self.drop_ratio})"
        return [drop, *super().logit_changes(dense, moe)]


@dataclasses.dataclass(frozen=True)
class Split(UpcyclingStart):
    """The hidden units of the MLP are divided among the experts: groups of f / e similar units.

    Units are similar if their weights in ``up`` point in the same direction (balanced k-means of
    rows of length 1, one start of k-means++). In a gated MLP these are the weights of the half that
    gates. The router's column of an expert is the mean direction of its units, of length 1. The
    outputs are added (routed_scale is k), the bias of ``down`` once. If k is e, all columns are
    zeros, so that all weights are equal, and the logits are those of the dense model.

    Cost: the parameters of the MLP and (e - 1) d of biases; k / e of its FLOPs. Each round of
    k-means solves an assignment of f units to f places: f^2 numbers, in time at most f^3. For
    f=3072 a block took about ten seconds and 0.6 GB on one core.

    Source: MoEfication (arXiv 2110.01786), by the authors' code (``ParamSplit`` and
    ``ParamCenter``), with two differences. There a token of length 1 goes to the k experts with the
    smallest Euclidean distance to their means, which are not scaled to length 1. This is no linear
    function of the token, as a gate needs; the chosen experts are the same if the means are equally
    long. And there the k outputs are added with equal weights, here with the normalized
    gates, so that the router can be trained. The groups of gated MLPs are those of LLaMA-MoE's
    scripts (arXiv 2406.16554, ``proj_type=gate_proj``).
    """

    takes = ("plain", "gated")

    def fields(self, dense: ViTConfig, moe: MoEConfig) -> dict[str, Any]:
        return dict(
            experts=dict(mlp_dim=max(1, dense.mlp_dim // moe.num_experts)),
            routed_scale=float(moe.router.k),
        )

    def check_layer(self, dense: ViTConfig, moe: MoEConfig) -> None:
        f, e, k = dense.mlp_dim, moe.num_experts, moe.router.k
        require(f % e == 0, f"use a divisor of the hidden width {f}", num_experts=e)
        _check_mlps(dense, moe, f // e, "the experts are groups of hidden units of the MLP")
        require(moe.routed_scale == k, "use k", routed_scale=moe.routed_scale)
        _check_linear(moe)

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        e, k = moe.num_experts, moe.router.k
        arrays = jax.tree.map(jnp.asarray, mlp)
        (up, c), (down, b) = ((arrays[name]["kernel"], arrays[name]["bias"]) for name in UNITS)
        up, c = (rearrange(x, "... (h f) -> h f ...", h=_halves(mlp)) for x in (up, c))
        units = np.asarray(up[0])
        groups = np.argsort(balanced_k_means(units, e, _seed(key)), kind="stable").reshape(e, -1)
        columns = unit(unit(units)[groups].mean(1)).T if k < e else np.zeros((units.shape[1], e))
        experts = {
            "up": {
                "kernel": rearrange(up[:, groups], "h e f d -> e d (h f)"),
                "bias": rearrange(c[:, groups], "h e f -> e (h f)"),
            },
            "down": {"kernel": down[groups], "bias": jnp.repeat(b[None] / k, e, axis=0)},
        }
        return {"experts": experts, "gate": {"kernel": jnp.asarray(columns, up.dtype)}}

    def logit_changes(self, dense: ViTConfig, moe: MoEConfig) -> list[str]:
        k, e = moe.router.k, moe.num_experts
        left_out = [f"a token uses {k} of the {e} groups of hidden units"] if k < e else []
        return left_out + super().logit_changes(dense, replace(moe, routed_scale=1.0))


@dataclasses.dataclass(frozen=True)
class Clusters(Copies):
    """Copies of the MLP, and a router that starts at clusters of the tokens.

    Inputs of the MLP are divided into e clusters by spherical k-means. The router's column of an
    expert is the center of a cluster, of length 1, so that similar tokens go to the same expert
    from the first step on. The logits stay the same as with copies.

    Costs as copies, and a pass over the images.

    Source: Cluster-aware Upcycling (arXiv 2604.13508), its router. Its experts are not copies but
    truncated SVDs by cluster, which are left out.
    """

    reads_tokens = True

    def check_layer(self, dense: ViTConfig, moe: MoEConfig) -> None:
        super().check_layer(dense, moe)
        _check_linear(moe)

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        if tokens is None:
            raise UsageError("start clusters reads tokens: give images")
        e, rows = moe.num_experts, np.asarray(tokens, np.float32)
        require(len(rows) >= e, f"{len(rows)} tokens cannot make {e} clusters: give more images")
        centers = spherical_k_means(rows, e, _seed(key))
        return super().params(mlp, moe, key, None) | {"gate": {"kernel": jnp.asarray(centers.T)}}


@dataclasses.dataclass(frozen=True)
class LowRank(UpcyclingStart):
    """The MLP stays, as a shared expert, and small MLPs beside it are routed.

    The small MLPs have a few hidden units; their ``down`` is zeros, so that the logits stay the
    same, and their ``up`` is uniform in +- 1 / sqrt(d), the same for all experts. To train them on
    a frozen MLP, set the learning rate factor ``shared_experts`` to 0.

    Cost: e (2 d rank + rank + d) more parameters; k rank / f more FLOPs, relative to the MLP.

    Source: the adapters of MoSA (arXiv 2312.02923), by the authors' code (``vit_mosa.py``, style
    AdaptFormer). There one ``up`` and one ``down`` are drawn at random for each training batch, and
    all are merged in the end; here a router chooses whole experts. There the adapters have a
    LayerNorm of their own, which is trained, exact GELU, and a scale of their output; here they
    read the inputs of the MLP, after the norm of the block, and have the activation of the model.

    Gated MLPs are not taken: the rule has plain adapters, and shared experts are plain MLPs.
    """

    rank: Count = 8
    """Hidden width of the routed experts."""

    def fields(self, dense: ViTConfig, moe: MoEConfig) -> dict[str, Any]:
        return dict(experts=dict(mlp_dim=self.rank), shared_experts=1)

    def check_layer(self, dense: ViTConfig, moe: MoEConfig) -> None:
        _check_mlps(dense, moe, self.rank, "the experts are MLPs of the rank")
        the_mlp = "the shared expert is the MLP, use 1"
        require(moe.shared_experts == 1, the_mlp, shared_experts=moe.shared_experts)

    def params(
        self, mlp: Params, moe: MoEConfig, key: jax.Array, tokens: Float[np.ndarray, "r d"] | None
    ) -> Params:
        d, bound = len(mlp["up"]["kernel"]), len(mlp["up"]["kernel"]) ** -0.5
        expert = {
            "up": {
                "kernel": jax.random.uniform(key, (d, self.rank), minval=-bound, maxval=bound),
                "bias": jnp.zeros(self.rank),
            },
            "down": {"kernel": jnp.zeros((self.rank, d)), "bias": jnp.zeros(d)},
        }
        return {"experts": _repeated(expert, moe.num_experts), "shared": _repeated(mlp, 1)}

    def logit_changes(self, dense: ViTConfig, moe: MoEConfig) -> list[str]:
        return ["the MLP is multiplied by a new gate (shared_gate)"] if moe.shared_gate else []


STARTS: dict[str, type[UpcyclingStart]] = {
    "copies": Copies,
    "noise": Noise,
    "drop": Drop,
    "split": Split,
    "clusters": Clusters,
    "low_rank": LowRank,
}
"""The starts by the names that ``vmoe upcycle --start`` has for them."""


def _repeated(tree: Params, e: int) -> Params:
    """Each array e times, along a new first axis."""
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], e, axis=0), tree)


def _halves(mlp: Params) -> int:
    """2 for a gated MLP, whose ``up`` has two outputs for each hidden unit; else 1."""
    return mlp["up"]["kernel"].shape[1] // mlp["down"]["kernel"].shape[0]


def _reinitialized(
    kernel: Float[Array, "x y"], key: jax.Array, *, axis: int, ratio: float
) -> Float[Array, "x y"]:
    """A kernel in which the weights of some hidden units, which are along an axis, are new."""
    which, values = jax.random.split(key)
    units = jnp.moveaxis(kernel, axis, 0)
    chosen = jax.random.permutation(which, len(units))[: int(ratio * len(units))]
    old = units[chosen]
    new = old.mean() + old.std() * jax.random.normal(values, old.shape, old.dtype)
    return jnp.moveaxis(units.at[chosen].set(new), 0, axis)


def _seed(key: jax.Array) -> int:
    """A seed for numpy."""
    return int(jax.random.bits(key))


def _has_room(moe: MoEConfig, k: int, tokens: int) -> bool:
    """Whether an expert has a slot for every token of a group, for groups of any size."""
    if moe.router.capacity is not None:
        return moe.router.capacity >= moe.router.images_per_group * tokens
    factor = min(moe.router.capacity_factor, moe.router.in_evaluation().capacity_factor)
    return moe.router.dropless or (not moe.router.shares and factor * k >= moe.num_experts)


def _check_mlps(dense: ViTConfig, moe: MoEConfig, f: int, what: str) -> None:
    """Checks that the experts are MLPs of a hidden width, with the activation of the model."""
    kind = "mlp" if dense.mlp == "plain" else "gated_mlp"
    remedy = f"{what}: use {kind}, with hidden width {f} and the activation of the model"
    own = moe.experts
    fits = isinstance(own, AnyMlpExpert) and own.mlp_dim == f
    fits = fits and is_mlp_of(replace(dense, mlp_dim=f), own)
    require(fits, remedy, experts=own)


def _check_linear(moe: MoEConfig) -> None:
    gate = moe.gate_config
    remedy = "this start sets the columns of a linear gate: use one, with a router that reads it"
    linear = isinstance(gate, LinearGate)
    require(linear, remedy, **{"gate.kind": gate.kind if gate else None})
