"""What sparsity costs on this machine: routing, the layer, whole models, the start, many devices.

    python scripts/bench.py                       # all of it, at most five minutes on 2 cores
    python scripts/bench.py layer --tokens 12544 --experts 8 128 --repeats 9
    python scripts/bench.py layer --peer          # and a PyTorch one, where torch is installed

Floors are measured in the same process, all variants in turn, again and again: medians and the
spread (from the first to the third quartile). A ratio is of two medians of one run. Memory is what
XLA's own analysis says a program needs beside its inputs and outputs. Writes a JSON file and,
where the layer or routing were measured, a plot.

    dense floor    one dense MLP on as many rows as all choices times the capacity factor
    matmul floor   the experts alone, as one batched product over all slots
    experts alone  the experts alone, as the layer computes them: what it adds is the layer's own
    plain          a model with every token through every block
"""

import argparse
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from vmoe import models
from vmoe.analysis import capture
from vmoe.config import DataConfig, MoEConfig, TrainConfig, replace
from vmoe.data.pipeline import Batch
from vmoe.nn import implementations
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE, choose
from vmoe.routing import token_choice
from vmoe.routing.groups import group, ungroup
from vmoe.routing.priority import priority_order
from vmoe.routing.rows import block_size, sort_rows
from vmoe.routing.top_k import top_k
from vmoe.train.step import compile_program

IMAGE_TOKENS = 196
LAYERS = ("dense floor", "matmul floor", "experts alone", "layer", "einsum dispatch")
BY_TOKENS = ("dense floor", "matmul floor", "layer")


class Row(NamedTuple):
    """One measurement: what of which case, and its ratio to a reference of the same run."""

    section: str
    case: dict[str, Any]
    what: str
    ms: float | None
    spread_ms: float | None
    ratio: float | None = None
    to: str = ""
    target: str = ""
    temp_mb: float | None = None
    sent_mb: float | None = None


class Program(NamedTuple):
    """A compiled function with its arguments, and what compiling it took."""

    run: Callable[[], Any]
    temp_mb: float
    compile_s: float


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes / 1e6 if memory else float("nan")
    return Program(functools.partial(program, *arguments), temp, seconds)


def measured(
    programs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median and spread of the milliseconds of each, all in turn, the first turn not counted."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    quartiles = {name: np.quantile(found, [0.25, 0.5, 0.75]) for name, found in times.items()}
    return {name: (float(q[1]), float(q[2] - q[0])) for name, q in quartiles.items()}


def rows_of(
    section: str,
    case: dict[str, Any],
    programs: dict[str, Program],
    repeats: int,
    ratios: dict[str, list[tuple[str, str]]],
) -> list[Row]:
    """A row per program and reference; ``ratios`` names references and targets by program."""
    times = measured({name: program.run for name, program in programs.items()}, repeats)
    rows = []
    for name, (median, spread) in times.items():
        for to, target in ratios.get(name, [("", "")]):
            ratio = median / times[to][0] if to else None
            temp = programs[name].temp_mb
            rows.append(Row(section, case, name, median, spread, ratio, to, target, temp))
    return rows


def both_ways(function: Callable[..., jax.Array], *arguments: Any) -> dict[str, Program]:
    """The function, and the gradient of a scalar of it with respect to all arguments."""

    def loss(*arguments: Any) -> jax.Array:
        return (function(*arguments) ** 2).sum()

    gradient = jax.grad(loss, argnums=tuple(range(len(arguments))))
    return {"forward": compiled(function, *arguments), "f+b": compiled(gradient, *arguments)}


def plan_by_cumulative_sum(
    gates: jax.Array, k: int, c: int, bpr: bool, top_k: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """The experts and positions of one group's choices the usual way: one-hot cumulative sums."""
    top, experts = top_k(gates, k)
    order = jnp.argsort(-top[:, 0], stable=True) if bpr else jnp.arange(len(gates))
    hot = jax.nn.one_hot(experts[order].T.reshape(-1), gates.shape[1], dtype=jnp.int32)
    position = ((jnp.cumsum(hot, axis=0) - 1) * hot).sum(-1).reshape(k, -1).T
    position = jnp.zeros_like(position).at[order].set(position)
    return experts, jnp.where(position < c, position, -1)


def routing(options: argparse.Namespace) -> list[Row]:
    rows = []
    for e in options.experts:
        s = options.tokens
        gates = jax.nn.softmax(jax.random.normal(jax.random.key(e), (1, s, e)), axis=-1)
        config = MoEConfig(num_experts=e)
        c = token_choice.capacity(config, s)
        plan = functools.partial(token_choice.plan, k=2, c=c, priority="largest_gate")
        ours = compiled(plan, gates, jnp.ones((1, s), bool))
        alone = compiled(lambda gates: top_k(gates, 2), gates)
        after = compiled(functools.partial(_queued, e=e, c=c), *top_k(gates, 2))
        usual, better = (
            compiled(
                functools.partial(plan_by_cumulative_sum, k=2, c=c, bpr=True, top_k=f), gates[0]
            )
            for f in (jax.lax.top_k, top_k)
        )
        found, (experts, position) = ours.run(), usual.run()
        slots = jnp.where(position >= 0, experts * c + position, e * c)
        assert (found.slots[0] == slots).all(), "the plans differ"
        programs = {
            "top-k alone": alone,
            "plan by sorts": ours,
            "plan after top-k": after,
            "by cumulative sum": usual,
            "by cumulative sum, our top-k": better,
        }
        target = {32: "6", 128: "20", 512: "50"}.get(e, "")
        ratios = {
            "by cumulative sum": [("plan by sorts", target and f">= {target}")],
            "by cumulative sum, our top-k": [("plan by sorts", "")],
        }
        rows += rows_of("routing", {"e": e, "tokens": s}, programs, options.repeats, ratios)
    return rows


def _queued(top_gates: jax.Array, experts: jax.Array, *, e: int, c: int) -> Any:
    order = priority_order(top_gates, "largest_gate", None)
    return token_choice.queue(experts, order, e=e, c=c)


def layer(options: argparse.Namespace) -> list[Row]:
    d, f = options.width, options.hidden
    b = max(1, options.tokens // IMAGE_TOKENS)
    tokens = jax.random.normal(jax.random.key(0), (b, IMAGE_TOKENS, d), options.dtype)
    rows = []
    for e in options.experts:
        config = MoEConfig(num_experts=e, implementation=options.implementation)
        programs, (g, c) = _layer_programs(tokens, f, config, einsum=e <= 32)
        case = {"e": e, "tokens": b * IMAGE_TOKENS, "slots": g * c, "d": d, "f": f}
        case |= {"implementation": options.implementation, "dtype": options.dtype}
        dense = "<= 1.00" if g * c >= 200 else ""
        ratios = {
            f"layer, {way}": [(f"matmul floor, {way}", target), (f"dense floor, {way}", floor)]
            for way, target, floor in [("forward", "<= 1.05", dense), ("f+b", "<= 1.10", "")]
        }
        for way in ("forward", "f+b"):
            ratios[f"einsum dispatch, {way}"] = [(f"dense floor, {way}", "")]
            if f"experts alone, {way}" in programs:
                ratios[f"layer, {way}"].append((f"experts alone, {way}", ""))
        rows += rows_of("layer", case, programs, options.repeats, ratios)
    e = options.experts[0]
    rows += _tokens(
        b, d, f, MoEConfig(num_experts=e, implementation=options.implementation), options
    )
    rows += _capacities(
        tokens, f, MoEConfig(num_experts=e, implementation=options.implementation), options
    )
    if options.peer:
        rows += _peer(tokens, f, e, options.repeats)
    return rows


def _layer_programs(
    tokens: jax.Array, f: int, config: MoEConfig, *, einsum: bool
) -> tuple[dict[str, Program], tuple[int, int]]:
    b, n, d = tokens.shape
    valid = jnp.ones(b, bool)
    graph, state = nnx.split(MoE(d, f, n, config, rngs=nnx.Rngs(0)))
    _, record = nnx.merge(graph, state)(tokens, valid)
    g, e, c = record.routing.choices.shape
    dense_graph, dense = nnx.split(Mlp(d, f, dtype=tokens.dtype, rngs=nnx.Rngs(0)))
    slots = jax.random.normal(jax.random.key(1), (1, e, g * c, d), tokens.dtype)
    experts = nnx.merge(graph, state).experts
    linears = experts.up.linears(), experts.down.linears()

    def by_einsum(state: nnx.State, tokens: jax.Array) -> jax.Array:
        moe = nnx.merge(graph, state)
        groups, real = group(tokens, valid, config.images_per_group)
        routing = moe.router(groups, real).routing
        hot = jax.nn.one_hot(routing.slots, e * c).reshape(*routing.slots.shape, e, c)
        slots = jnp.einsum("gsd,gsec->gecd", groups, hot.sum(2))
        weights = jnp.einsum("gskec,gsk->gsec", hot, routing.weights)
        return ungroup(jnp.einsum("gecd,gsec->gsd", moe.experts(slots), weights), b, n)

    variants: dict[str, tuple[Callable[..., jax.Array], tuple]] = {
        "dense floor": (
            lambda state, rows: nnx.merge(dense_graph, state)(rows),
            (dense, slots[0].reshape(-1, d)[: math.ceil(2 * b * n * config.capacity_factor)]),
        ),
        "matmul floor": (
            lambda linears, slots: implementations.batched(*linears, slots, 0.0, None),
            (linears, slots),
        ),
        "layer": (lambda state, tokens: nnx.merge(graph, state)(tokens, valid)[0], (state, tokens)),
    }
    if (chosen := choose(config, record.routing)) != "batched":
        block = None if chosen == "ragged" else block_size(record.routing)
        routing, sizes = sort_rows(record.routing, block=block or 1)
        rows = jax.random.normal(jax.random.key(1), (routing.choices.size, d), tokens.dtype)
        variants["experts alone"] = (
            lambda state, rows: nnx.merge(graph, state).experts.on_rows(rows, sizes, block=block),
            (state, rows),
        )
    if einsum:
        variants["einsum dispatch"] = (by_einsum, (state, tokens))
    programs = {
        f"{name}, {way}": program
        for name, (function, arguments) in variants.items()
        for way, program in both_ways(function, *arguments).items()
    }
    return programs, (g, c)


def _tokens(b: int, d: int, f: int, config: MoEConfig, options: argparse.Namespace) -> list[Row]:
    """The layer, forward, on a quarter, a half, all and twice as many images."""
    rows = []
    for images in sorted({max(1, b // 4), max(1, b // 2), b, 2 * b}):
        tokens = jax.random.normal(jax.random.key(0), (images, IMAGE_TOKENS, d), options.dtype)
        programs, (g, c) = _layer_programs(tokens, f, config, einsum=False)
        case = {"e": config.num_experts, "tokens": images * IMAGE_TOKENS, "slots": g * c}
        programs = {f"{name} by tokens": programs[f"{name}, forward"] for name in BY_TOKENS}
        ratios = {"layer by tokens": [("dense floor by tokens", "")]}
        rows += rows_of("layer", case, programs, options.repeats, ratios)
    return rows


def _capacities(
    tokens: jax.Array, f: int, config: MoEConfig, options: argparse.Namespace
) -> list[Row]:
    """Evaluation of one set of weights at several capacities, and without any."""
    b, n, d = tokens.shape
    valid = jnp.ones(b, bool)
    trained = replace(config, router=dict(priority="largest_gate"))
    state = nnx.split(MoE(d, f, n, trained, rngs=nnx.Rngs(0)))[1]
    programs = {}
    for name, changes in {
        "capacity 1.05": {},
        "capacity 0.5": dict(capacity_factor=0.5),
        "capacity 2.0": dict(capacity_factor=2.0),
        "dropless": dict(dropless=True),
    }.items():
        graph = nnx.split(MoE(d, f, n, replace(trained, **changes), rngs=nnx.Rngs(0)))[0]
        programs[name] = compiled(
            lambda state, graph=graph: nnx.merge(graph, state)(tokens, valid)[0], state
        )
    most = 1 - 0.85 * (1 - 0.5 / 1.05)
    ratios = {name: [("capacity 1.05", "")] for name in ("capacity 2.0", "dropless")}
    ratios["capacity 0.5"] = [("capacity 1.05", f"<= {most:.2f}")]
    case = {"e": config.num_experts, "tokens": b * n, "d": d, "f": f}
    return rows_of("layer", case, programs, options.repeats, ratios)


def _peer(tokens: jax.Array, f: int, e: int, repeats: int) -> list[Row]:
    """Hugging Face's Mixtral block and its own dense floor, its gated MLP on as many rows."""
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
        for name, module, given in (("dense floor", dense, rows), ("Mixtral block", sparse, x)):
            run_it = functools.partial(run, module, given)
            programs[f"PyTorch {name}, {way}"] = Program(run_it, float("nan"), 0.0)
        ratios[f"PyTorch Mixtral block, {way}"] = [(f"PyTorch dense floor, {way}", "")]
    return rows_of("layer", {"e": e, "tokens": b * n, "d": d, "f": f}, programs, repeats, ratios)


def model(options: argparse.Namespace) -> list[Row]:
    name, batch = options.model, options.batch
    sparse = models.model_config(name, dtype=options.dtype, remat=options.remat)
    dense = replace(sparse, sparse_blocks=())
    variants = {
        "dense, plain": replace(dense, full_last_block=True),
        "dense": dense,
        "sparse, plain": replace(sparse, full_last_block=True),
        "sparse": sparse,
    }
    side = sparse.image_size
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    labels = jax.nn.one_hot(jnp.arange(batch), sparse.num_classes)
    rows = []
    forward = {k: _forward(config, images) for k, config in variants.items()}
    plain = "dense, plain"
    targets = {"sparse": "<= 1.03", "sparse, plain": "<= 1.20"}
    case = {"model": name, "batch": batch, "dtype": options.dtype, "remat": options.remat}
    case["pass"] = "forward"
    others = [k for k in variants if k != plain]
    ratios = {k: [(plain, targets.get(k, ""))] for k in others}
    ratios["sparse"].append(("dense", ""))
    rows += rows_of("model", case, forward, options.repeats, ratios)
    del forward
    steps = {k: _training_step(config, images, labels) for k, config in variants.items()}
    ratios = {k: [(plain, "<= 1.05" if k == "sparse" else "")] for k in others}
    ratios["sparse"].append(("dense", ""))
    case = case | {"pass": "training step"}
    rows += rows_of("model", case, steps, options.repeats, ratios)
    for k, target in {"sparse": "<= 1.10", "sparse, plain": ""}.items():
        temp = steps[k].temp_mb
        of_memory = temp / steps[plain].temp_mb
        rows.append(Row("model", case, f"memory: {k}", None, None, of_memory, plain, target, temp))
    for k, program in steps.items():
        rows.append(Row("model", case, f"compiling: {k}", 1e3 * program.compile_s, 0.0))
    for deep in options.compile:
        case = {"model": deep, "blocks": models.model_config(deep).depth, "pass": "gradient"}
        rows.append(Row("model", case, "compiling", 1e3 * _compile_seconds(deep), 0.0))
    return rows


def _forward(config: Any, images: jax.Array) -> Program:
    params = nnx.to_pure_dict(nnx.state(models.build(config), nnx.Param))
    return compiled(lambda p, x: models.with_params(config, p).forward(x)[0], params, images)


def _training_step(config: Any, images: jax.Array, labels: jax.Array) -> Program:
    """The step of the trainer, its state handed on."""
    train = TrainConfig(model=config, data=DataConfig("digits"), batch_size=len(images))
    program, batch = compile_program(train), Batch(images, labels, np.ones(len(images), bool))
    start = time.perf_counter()
    step = program.step.lower(program.like, batch).compile()
    seconds = time.perf_counter() - start
    state = [program.init()]

    def run() -> Any:
        state[0], metrics = step(state[0], batch)
        return metrics

    return Program(run, step.memory_analysis().temp_size_in_bytes / 1e6, seconds)


def _compile_seconds(name: str) -> float:
    """To compile loss and gradient of a named model, on shapes alone."""
    config = models.model_config(name)

    def loss(params: dict, images: jax.Array) -> jax.Array:
        model = models.with_params(config, params)
        logits, records = capture(model, images, train=True, key=jax.random.key(0))
        return logits.sum() + sum(record.aux_loss for record in records.values())

    params = nnx.to_pure_dict(nnx.state(models.build_abstract(config), nnx.Param))
    side = config.image_size
    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).lower(params, images).compile()
    return time.perf_counter() - start


def start(options: argparse.Namespace) -> list[Row]:
    """Milliseconds from the command to its end, above those of Python itself; the spread is that of
    the whole."""
    commands = {
        "python": [sys.executable, "-c", ""],
        "import vmoe": [sys.executable, "-c", "import vmoe"],
        "vmoe --help": [sys.executable, "-m", "vmoe", "--help"],
        "vmoe evaluate --help": [sys.executable, "-m", "vmoe", "evaluate", "--help"],
        "vmoe train --help": [sys.executable, "-m", "vmoe", "train", "--help"],
    }
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    runs = {name: functools.partial(run, command) for name, command in commands.items()}
    times = measured(runs, options.repeats)
    python, _ = times.pop("python")
    targets = {"import vmoe": "<= 300 ms", "vmoe --help": "<= 600 ms"}
    return [
        Row("start", {}, name, median - python, spread, target=targets.get(name, "<= 800 ms"))
        for name, (median, spread) in times.items()
    ]


def parallel(options: argparse.Namespace) -> list[Row]:
    """The layer over fake devices, of which a process has to know before it starts."""
    words = {
        "width": options.width,
        "hidden": options.hidden,
        "images": max(8, options.tokens // IMAGE_TOKENS // 8 * 8),
        "experts": max(8, options.experts[0] // 8 * 8),
        "repeats": options.repeats,
    }
    script = str(Path(__file__).with_name("bench_devices.py"))
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in words.items())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Row(**row) for row in json.loads(done.stdout)]


SECTIONS = {
    "routing": routing,
    "layer": layer,
    "model": model,
    "start": start,
    "parallel": parallel,
}


def table(rows: list[Row]) -> Table:
    columns = ("case", "what", "ms", "spread", "ratio", "to", "target", "temp MB", "sent MB")
    shown = Table(*columns, title=f"{rows[0].section}, {machine()['device']}")
    for i in (2, 3, 4, 7, 8):
        shown.columns[i].justify = "right"
    case = None
    for row in rows:
        if case is not None and row.case != case:
            shown.add_section()
        first, case = row.case != case, row.case
        shown.add_row(
            ", ".join(f"{k} {v}" for k, v in row.case.items()) if first else "",
            row.what,
            _figure(row.ms, 1),
            _figure(row.spread_ms, 1),
            _figure(row.ratio, 2),
            row.to,
            row.target,
            _figure(row.temp_mb, 0),
            _figure(row.sent_mb, 1),
        )
    return shown


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None or np.isnan(value) else f"{value:,.{digits}f}"


def plot(rows: list[Row], path: Path) -> None:
    """Cost against the number of experts, of tokens, and against the capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (
            "routing",
            "ms",
            [
                "top-k alone",
                "plan by sorts",
                "plan after top-k",
                "by cumulative sum",
                "by cumulative sum, our top-k",
            ],
        ),
        *(("layer", way, LAYERS) for way in ("forward", "f+b")),
    ]
    panels = [panel for panel in panels if any(row.section == panel[0] for row in rows)]
    capacities = {r.what: r.ms for r in rows if r.what.startswith(("capacity", "dropless"))}
    count = len(panels) + 2 * bool(capacities)
    figure, axes = pyplot.subplots(
        1, count, figsize=(4.2 * count, 3.6), layout="constrained", squeeze=False
    )
    if capacities:
        _plot_tokens(rows, axes[0, -2])
        axes[0, -1].bar(list(capacities), list(capacities.values()))
        axes[0, -1].set_title("layer, forward, by capacity", fontsize=10)
        axes[0, -1].set_ylabel("ms")
        axes[0, -1].tick_params(axis="x", labelsize=8)
    for ax, (section, way, names) in zip(axes[0], panels, strict=False):
        for name in names:
            what = name if section == "routing" else f"{name}, {way}"
            found = {r.case["e"]: r.ms for r in rows if r.section == section and r.what == what}
            ax.plot(list(found), list(found.values()), marker="o", label=name)
        tokens = next(row.case["tokens"] for row in rows if row.section == section)
        title = (
            "routing"
            if section == "routing"
            else f"layer, {way.replace('f+b', 'forward + backward')}"
        )
        ax.set(xscale="log", yscale="log", xlabel="experts", ylabel="ms")
        ax.set_title(f"{title}: {tokens:,} tokens", fontsize=10)
        ticks = sorted({row.case["e"] for row in rows if "e" in row.case})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_tokens(rows: list[Row], ax: Any) -> None:
    for name in BY_TOKENS:
        found = {r.case["tokens"]: r.ms for r in rows if r.what == f"{name} by tokens"}
        ax.plot(list(found), list(found.values()), marker="o", label=name)
    e = next(row.case["e"] for row in rows if row.what == "layer by tokens")
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    ax.set_title(f"layer, forward: {e} experts", fontsize=10)
    ax.set_xticks(list(found), [f"{tokens:,}" for tokens in found])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def machine() -> dict[str, str]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--tokens", type=int, default=3136, help="of a batch")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536, help="width of an expert")
    parser.add_argument(
        "--implementation", default="auto", choices=("auto", "batched", "blocked", "ragged")
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", action="store_true", help="in models: activations again")
    parser.add_argument("--model", default="vmoe_s32_last2_e8")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument(
        "--compile",
        nargs="*",
        default=["vmoe_b16_every2_e8", "vmoe_l16_every2_e32"],
        help="models of 12 and 24 blocks whose compile time is measured",
    )
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--peer", action="store_true", help="a PyTorch layer beside ours")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="of .json, .png")
    options = parser.parse_args()
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}: there are {', '.join(SECTIONS)}")
    if options.peer and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        parser.error("--peer: pip install torch transformers")
    rows: list[Row] = []
    console = Console(width=None if sys.stdout.isatty() else 150)
    for section in options.sections or SECTIONS:
        print(f"measuring: {section}", file=sys.stderr, flush=True)
        found = SECTIONS[section](options)
        console.print(table(found))
        rows += found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    result = {"machine": machine(), "peak_rss_mb": peak, "rows": [row._asdict() for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    written = [options.out.with_suffix(".json")]
    if any(row.section in ("routing", "layer") for row in rows):
        plot(rows, options.out.with_suffix(".png"))
        written.append(options.out.with_suffix(".png"))
    print(f"peak memory of the process {peak:,.0f} MB; written:", *written)


if __name__ == "__main__":
    main()
