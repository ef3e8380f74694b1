"""Measure an MoE layer that is split over devices; ``scripts.bench parallel`` runs this.

Eight virtual devices share this machine's cores. The total work is constant, so the times show the
overhead of the split. The script measures the time on 1, 2, 4 and 8 devices relative to one. It
reads from the compiled program the bytes that each device sends, relative to the minimum: slots x
width x bytes per number x (n - 1) / n for each all-to-all, two forward and four with the backward
pass. Then it measures ways to send rows at three skews of the load, relative to a fixed capacity:
here nobody waits for the busiest device, since all share the cores. It prints a JSON list of rows.
"""

import argparse
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from scripts.bench.measure import IMAGE_TOKENS, Program, Row, rows_of, temp_mb
from vmoe.config import MlpExpert, MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.costs.collectives import COMPILER_OPTIONS, Collective, parse_collectives
from vmoe.mesh import place
from vmoe.nn.moe import MoE
from vmoe.routing.load import choices
from vmoe.sharding import Placement

DEVICES = 8
ALL_TO_ALLS = {"forward": 2, "f+b": 4}

BY_ROWS = dict(experts=dict(implementation="auto"), router=dict(dropless=True))
SENT = {
    "fixed capacity": {},
    "no capacity": BY_ROWS,
    "no capacity, buffers of 2": BY_ROWS | dict(exchange=dict(buffer_factor=2.0)),
    "no capacity, buffers of 2, 1 hot": BY_ROWS
    | dict(exchange=dict(buffer_factor=2.0, hot_experts=1)),
    "no capacity, buffers of 2, 2 hot": BY_ROWS
    | dict(exchange=dict(buffer_factor=2.0, hot_experts=2)),
}
"""Ways to send; buffers are of so many even shares."""
SKEWS = (0.0, 1.0, 2.0)
"""The gate's bias for the i-th of the experts is -skew log(i)."""


def make(options: argparse.Namespace, placement: Placement, config: MoEConfig) -> MoE:
    """The layer on a placement."""
    sizes = options.width, options.hidden, IMAGE_TOKENS
    return MoE.from_config(config, *sizes, placement=placement, rngs=nnx.Rngs(0))


def lowered(
    options: argparse.Namespace, moe: MoE, way: str, key: jax.Array | None = None
) -> tuple[jax.stages.Lowered, dict, jax.Array]:
    """The layer's forward pass, or that with its backward pass, and its parameters and tokens.

    Args:
        way: a key of ``ALL_TO_ALLS``.
        key: for training.
    """
    placement, d, b = moe.placement, options.width, options.images
    graph, state = nnx.split(moe)
    params = nnx.to_pure_dict(state)
    tokens = jax.random.normal(jax.random.key(0), (b, IMAGE_TOKENS, d))
    shardings = placement.params(params)
    if placement.mesh is not None:
        params = jax.device_put(params, shardings)
        tokens = jax.device_put(tokens, placement.batch())

    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens, key=key)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        return (forward(params, tokens) ** 2).sum()

    to_both = None if placement.mesh is None else (shardings, placement.batch())
    both = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=to_both)
    function = jax.jit(forward) if way == "forward" else both
    return function.lower(params, tokens), params, tokens


def slots(options: argparse.Namespace, config: MoEConfig) -> int:
    """The number of slots of all experts on one device."""
    images = options.images // DEVICES
    c = config.slots(config.router.images_per_group * IMAGE_TOKENS)
    return images // config.router.images_per_group * config.num_experts * c


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("width", "hidden", "images", "experts", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    config = MoEConfig(
        num_experts=options.experts,
        experts=MlpExpert(implementation="batched"),
        router=TokenChoice(images_per_group=max(1, options.images // DEVICES)),
    )
    model = ViTConfig(sparse_blocks=(0,), moe=config)
    case = {"e": config.num_experts, "tokens": options.images * IMAGE_TOKENS, "d": options.width}
    programs, sent = {}, []
    for n in (1, 2, 4, 8):
        placement = place(model, jax.devices()[:n], mesh=f"expert={n}" if n > 1 else "")
        moe = make(options, placement, config)
        for way in ALL_TO_ALLS:
            text, *arguments = lowered(options, moe, way)
            program = text.compile()
            run = functools.partial(program, *arguments)
            programs[f"{_devices(n)}, {way}"] = Program(run, temp_mb(program))
            if n == DEVICES:
                sent.append(row_of_bytes(text, way, case, slots(options, config), options.width))
    ratios = {
        f"{_devices(n)}, {way}": [(f"{_devices(1)}, {way}", "")]
        for n in (2, 4, 8)
        for way in ALL_TO_ALLS
    }
    rows = rows_of("parallel", case, programs, options.repeats, ratios) + sent
    on_all = place(model, jax.devices(), mesh=f"expert={DEVICES}")
    rows += rows_by_way(options, on_all, config)
    print(json.dumps([row._asdict() for row in rows]))


def rows_by_way(options: argparse.Namespace, placement: Placement, config: MoEConfig) -> list[Row]:
    """The time of forward and backward pass and the bytes sent, for each skew and way to send."""
    key, e, d = jax.random.key(0), config.num_experts, options.width
    made, sent = {}, {}
    for way, fields in SENT.items():
        moe = make(options, placement, replace(config, **fields))
        moe.gate = nnx.Linear(d, e, rngs=nnx.Rngs(0))  # standard normal logits
        text, params, tokens = lowered(options, moe, "f+b", key)
        sent[way] = sum(one.bytes_sent for one in collectives(text)) / 1e6
        made[way] = text.compile(), routed(moe, key), params, tokens
    rows = []
    for skew in SKEWS:  # another bias is no other program
        bias = -skew * jnp.log(jnp.arange(1, e + 1))
        programs, dropped, hottest = {}, {}, 0.0
        for way, (program, routing, params, tokens) in made.items():
            gate = params["gate"]
            skewed = params | {"gate": gate | {"bias": jax.device_put(bias, gate["bias"].sharding)}}
            run = functools.partial(program, skewed, tokens)
            programs[way] = Program(run, temp_mb(program))
            kept, load = routing(skewed, tokens)
            dropped[way] = 1 - float(kept)
            hottest = float(load.max() / load.mean())
        case = {"e": e, "tokens": options.images * IMAGE_TOKENS, "d": d}
        case |= {"hottest": f"{hottest:.1f}"}
        ratios = {way: [("fixed capacity", "")] for way in SENT if way != "fixed capacity"}
        rows += [
            row._replace(
                what=f"{row.what}: {dropped[row.what]:.0%} dropped", sent_mb=sent[row.what]
            )
            for row in rows_of("parallel", case, programs, options.repeats, ratios)
        ]
    return rows


def routed(moe: MoE, key: jax.Array) -> Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]:
    """Compiled: the share of the choices that are kept, and the choices of each expert."""
    graph = nnx.graphdef(moe)

    @jax.jit
    def run(params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, record = nnx.merge(graph, params).forward(tokens, key=key)
        return record.routing.kept.mean(), choices(record)

    return run


def collectives(program: jax.stages.Lowered) -> list[Collective]:
    return parse_collectives(program.compile(COMPILER_OPTIONS).as_text() or "")


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"


def row_of_bytes(program: jax.stages.Lowered, way: str, case: dict, slots: int, width: int) -> Row:
    """The bytes that one device sends in all-to-alls, relative to the minimum."""
    sent = sum(one.bytes_sent for one in collectives(program) if one.kind == "all-to-all")
    minimum = ALL_TO_ALLS[way] * slots * width * 4 * (DEVICES - 1) / DEVICES
    what, to = f"all-to-all of {DEVICES} devices, {way}", "slots x width"
    ratio, mb = sent / minimum, sent / 1e6
    return Row("parallel", case, what, None, None, ratio, to, "<= 1.00", sent_mb=mb)


if __name__ == "__main__":
    main()
