"""Measure the MoE layer, dense MLPs and the experts alone."""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scripts.bench.measure import (
    BY_TOKENS,
    IMAGE_TOKENS,
    Program,
    Row,
    both_ways,
    compiled,
    rows_of,
)
from vmoe.config import MlpExpert, MoEConfig, replace
from vmoe.config.experts import Implementation
from vmoe.nn import implementations
from vmoe.nn.mlp import Hidden, Mlp
from vmoe.nn.moe import MoE
from vmoe.routing.groups import Groups
from vmoe.routing.rows import block_size, sort_rows


def layer(options: argparse.Namespace) -> list[Row]:
    d, f = options.width, options.hidden
    b = max(1, options.tokens // IMAGE_TOKENS)
    tokens = jax.random.normal(jax.random.key(0), (b, IMAGE_TOKENS, d), options.dtype)
    rows = []
    for e in options.experts:
        config = MoEConfig(num_experts=e, experts=MlpExpert(implementation=options.implementation))
        variants, (g, c) = _variants(tokens, f, config, einsum=e <= 32)
        programs = {
            f"{name}, {way}": program
            for name, (function, arguments) in variants.items()
            for way, program in both_ways(function, *arguments).items()
        }
        case = {"e": e, "tokens": b * IMAGE_TOKENS, "slots": g * c, "d": d, "f": f}
        case |= {"implementation": options.implementation, "dtype": options.dtype}
        ratios = {}
        for way, limit, dense_limit in (
            ("forward", "<= 1.05", "<= 1.00" if g * c >= 200 else ""),
            ("f+b", "<= 1.10", ""),
        ):
            to = [(f"batched experts, {way}", limit), (f"dense MLP, {way}", dense_limit)]
            if f"experts alone, {way}" in programs:
                to.append((f"experts alone, {way}", ""))
            ratios |= {
                f"layer, {way}": to,
                f"einsum dispatch, {way}": [(f"dense MLP, {way}", "")],
            }
        rows += rows_of("layer", case, programs, options.repeats, ratios)
    config = MoEConfig(
        num_experts=options.experts[0], experts=MlpExpert(implementation=options.implementation)
    )
    rows += _tokens(b, d, f, config, options)
    rows += _capacities(tokens, f, config, options)
    if options.implementation == "auto":
        rows += _choices(options)
    if options.peer:
        rows += _peer(tokens, f, config.num_experts, options.repeats)
    return rows


def _variants(
    tokens: jax.Array, f: int, config: MoEConfig, *, einsum: bool
) -> tuple[dict[str, tuple[Callable[..., jax.Array], tuple]], tuple[int, int]]:
    """Functions with their arguments by name, and the number of groups and of slots per expert."""
    b, n, d = tokens.shape
    graph, state = nnx.split(MoE.from_config(config, d, f, n, rngs=nnx.Rngs(0)))
    record = jax.jit(lambda state, x: nnx.merge(graph, state).forward(x)[1])(state, tokens)
    g, e, c = record.routing.choices.shape
    dense_graph, dense = nnx.split(Mlp(d, f, dtype=tokens.dtype, rngs=nnx.Rngs(0)))
    slots = jax.random.normal(jax.random.key(1), (1, e, g * c, d), tokens.dtype)
    moe = nnx.merge(graph, state)
    experts = moe.experts
    params = experts.up.params(), experts.down.params()

    def by_einsum(state: nnx.State, tokens: jax.Array) -> jax.Array:
        moe = nnx.merge(graph, state)
        groups = Groups.of(b, n, config.router.images_per_group * n)
        rows = groups.split(tokens)
        routing = moe.route(rows, jnp.ones(rows.shape[:2], bool)).routing
        hot = jax.nn.one_hot(routing.slots, e * c).reshape(*routing.slots.shape, e, c)
        slots = jnp.einsum("gsd,gsec->gecd", rows, hot.sum(2))
        weights = jnp.einsum("gskec,gsk->gsec", hot, routing.weights)
        return groups.join(jnp.einsum("gecd,gsec->gsd", moe.experts(slots), weights))

    variants: dict[str, tuple[Callable[..., jax.Array], tuple]] = {
        "dense MLP": (
            lambda state, rows: nnx.merge(dense_graph, state)(rows),
            (
                dense,
                slots[0].reshape(-1, d)[: math.ceil(2 * b * n * config.router.capacity_factor)],
            ),
        ),
        "batched experts": (
            lambda up, down, slots: implementations.batched(up, down, slots, Hidden(), None),
            (*params, slots),
        ),
        "layer": (lambda state, tokens: nnx.merge(graph, state)(tokens), (state, tokens)),
    }
    if (chosen := moe.implementation_for(record.routing)) != "batched":
        block = block_size(record.routing, chosen, moe.placement.platform)
        routing, sizes = sort_rows(record.routing, block=block)
        rows = jax.random.normal(jax.random.key(1), (routing.choices.size, d), tokens.dtype)
        variants["experts alone"] = (
            lambda state, rows: nnx.merge(graph, state).experts.on_rows(chosen, block, rows, sizes),
            (state, rows),
        )
    if einsum:
        variants["einsum dispatch"] = (by_einsum, (state, tokens))
    return variants, (g, c)


def _tokens(b: int, d: int, f: int, config: MoEConfig, options: argparse.Namespace) -> list[Row]:
    """The layer, forward, on a quarter, a half, all and twice as many images."""
    rows = []
    for images in sorted({max(1, b // 4), max(1, b // 2), b, 2 * b}):
        tokens = jax.random.normal(jax.random.key(0), (images, IMAGE_TOKENS, d), options.dtype)
        variants, (g, c) = _variants(tokens, f, config, einsum=False)
        case = {"e": config.num_experts, "tokens": images * IMAGE_TOKENS, "slots": g * c}
        programs = {}
        for name in BY_TOKENS:
            function, arguments = variants[name]
            programs[f"{name} by tokens"] = compiled(function, *arguments)
        ratios = {"layer by tokens": [("dense MLP by tokens", "")]}
        rows += rows_of("layer", case, programs, options.repeats, ratios)
    return rows


def _capacities(
    tokens: jax.Array, f: int, config: MoEConfig, options: argparse.Namespace
) -> list[Row]:
    """The same weights evaluated at several capacities, and dropless."""
    b, n, d = tokens.shape
    trained = replace(config, router=dict(priority="largest_gate"))
    state = nnx.split(MoE.from_config(trained, d, f, n, rngs=nnx.Rngs(0)))[1]
    programs = {}
    for name, changes in {
        "capacity 1.05": {},
        "capacity 0.5": dict(router=dict(capacity_factor=0.5)),
        "capacity 2.0": dict(router=dict(capacity_factor=2.0)),
        "dropless": dict(router=dict(dropless=True)),
    }.items():
        moe = MoE.from_config(replace(trained, **changes), d, f, n, rngs=nnx.Rngs(0))
        graph = nnx.graphdef(moe)
        programs[name] = compiled(lambda state, graph=graph: nnx.merge(graph, state)(tokens), state)
    limit = 1 - 0.85 * (1 - 0.5 / 1.05)
    ratios = {name: [("capacity 1.05", "")] for name in ("capacity 2.0", "dropless")}
    ratios["capacity 0.5"] = [("capacity 1.05", f"<= {limit:.2f}")]
    case = {"e": config.num_experts, "tokens": b * n, "d": d, "f": f}
    return rows_of("layer", case, programs, options.repeats, ratios)


def _choices(options: argparse.Namespace) -> list[Row]:
    """The implementation that "auto" chooses beside each of them, for few and for many rows."""
    b, n, d, f = 8, 64, 128, 512
    tokens = jax.random.normal(jax.random.key(0), (b, n, d), options.dtype)
    rows = []
    for e in (8, 64):
        programs, ratios = {}, {}
        for name in ("auto", *get_args(Implementation)):
            config = MoEConfig(num_experts=e, experts=MlpExpert(implementation=name))
            moe = MoE.from_config(config, d, f, n, rngs=nnx.Rngs(0))
            programs |= {f"{name}, {way}": each for way, each in of_module(moe, tokens).items()}
        for way in ("forward", "f+b"):
            others = [f"{name}, {way}" for name in get_args(Implementation)]
            ratios[f"auto, {way}"] = [(other, "<= 1.05") for other in others]
        case = {"e": e, "tokens": b * n, "d": d, "f": f, "dtype": options.dtype}
        rows += rows_of("layer", case, programs, options.repeats, ratios)
    return rows


def of_module(module: nnx.Module, tokens: jax.Array) -> dict[str, Program]:
    """A module's forward pass, and its gradients by its parameters and the tokens."""
    graph, state = nnx.split(module)
    return both_ways(lambda state, tokens: nnx.merge(graph, state)(tokens), state, tokens)


def _peer(tokens: jax.Array, f: int, e: int, repeats: int) -> list[Row]:
    """Hugging Face's Mixtral block, and its gated MLP on as many rows."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    b, n, d = tokens.shape
    config = MixtralConfig(
        hidden_size=d, intermediate_size=f, num_local_experts=e, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.tensor(np.asarray(tokens))
    rows = torch.randn(2 * b * n, d)
    gate, up, down = torch.nn.Linear(d, f), torch.nn.Linear(d, f), torch.nn.Linear(f, d)

    def dense(rows: Any) -> Any:
        return down(torch.nn.functional.silu(gate(rows)) * up(rows))

    def sparse(x: Any) -> Any:
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    def forward(module: Callable[[Any], Any], x: Any) -> None:
        with torch.no_grad():
            module(x)

    def both(module: Callable[[Any], Any], x: Any) -> None:
        parameters = [p for m in (block, gate, up, down) for p in m.parameters()]
        loss = (module(x.requires_grad_()) ** 2).sum()
        torch.autograd.grad(loss, [x, *parameters], allow_unused=True)

    programs, ratios = {}, {}
    for way, run in (("forward", forward), ("f+b", both)):
        for name, module, inputs in (("dense MLP", dense, rows), ("Mixtral block", sparse, x)):
            programs[f"PyTorch {name}, {way}"] = Program(functools.partial(run, module, inputs))
        ratios[f"PyTorch Mixtral block, {way}"] = [(f"PyTorch dense MLP, {way}", "")]
    return rows_of("layer", {"e": e, "tokens": b * n, "d": d, "f": f}, programs, repeats, ratios)
