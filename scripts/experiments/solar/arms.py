"""What is trained on the tokens of the last block, after its attention.

An arm is the MLP of the last block, or experts in its place, with a head on the mean of the
patches; or a model of the features, which are that mean with the MLP of the trunk. All arms start
from the same trunk. Its attention stays as it is, in all arms; the MLP or the experts, both norms
and the head are trained. The head starts as the logistic regression of the arm's own features that
is best on validation, so a start that keeps the MLP's outputs predicts what the linear probe does.

A step reads some patches of an image, drawn anew. Training runs once with each of two rates, and
the one whose last step has the least calibrated log loss on validation counts.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.special
from flax import nnx
from jaxtyping import Array, Float, Int
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.experiments.solar.data import SplitIndices
from vmoe import models, surgery
from vmoe.classic import MixtureOfExpertsClassifier
from vmoe.config import replace
from vmoe.costs.flops import count_flops
from vmoe.multitask import MultiTaskClassifier
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT
from vmoe.surgery.starts import UpcyclingStart
from vmoe.surgery.upcycle import upcycle_params, upcycled_layer

EXPERTS, K = 4, 2
RANK = 8  # hidden units of a low-rank expert
BATCH, PATCHES = 32, 16  # images of a step, and patches of each
WARMUP = 0.1  # of the steps
PILOT = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # the peak learning rates that ``pilot`` tries
INVERSE_REGULARIZATION = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)  # C of the logistic regression
UNSEEN = 3.0  # how much lower the bias of a class is that no training image has
COMPONENTS = 16  # of the features, for the classic mixture
MIXTURES: list[dict[str, Any]] = [
    dict(n_experts=n, expert_penalty=c) for n in (1, 2, 3, 4) for c in (0.1, 1.0, 10.0)
]
TWO_TASKS: dict[str, list[dict[str, Any]]] = {
    "shared_bottom": [dict(learning_rate=rate) for rate in (1e-3, 1e-2)],
    "mmoe": [dict(learning_rate=r, n_experts=n) for r in (1e-3, 1e-2) for n in (2, 3, 4)],
}
"""The settings that models of two tasks try."""
TRAINING: dict[str, Any] = dict(batch_size=32, max_epochs=400, patience=50)
"""How models of two tasks are trained."""
CLUSTERED = 256  # training images at most whose tokens make clusters
DEFECTIVE = 2  # the first of the levels above an even chance of a defect


class TokenDataset(NamedTuple):
    """Images as tokens, and which of them train, validate and test.

    Attributes:
        tokens: of the last block, after its attention.
        crystals: a second task; empty if there is none.
    """

    tokens: Float[np.ndarray, "b n d"]
    labels: Int[np.ndarray, "b"]
    crystals: np.ndarray
    split: SplitIndices

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


class Tail(nnx.Module):
    """What follows the attention of the last block, with a head on the mean of the patches."""

    def __init__(self, trunk: ViT, mlp: Mlp | MoE, classes: int):
        self.norm2, self.mlp, self.norm = trunk.blocks[-1].norm2, mlp, trunk.norm
        self.head = nnx.Linear(trunk.config.width, classes, rngs=nnx.Rngs(0))

    def features(
        self, tokens: Float[Array, "b n d"], key: Array | None = None
    ) -> tuple[Float[Array, "b d"], Float[Array, ""]]:
        """The mean of the patches, and the auxiliary loss."""
        change, loss = _changed(self.mlp, self.norm2(tokens), key)
        return self.norm(tokens + change).mean(1), loss


def _changed(mlp: Mlp | MoE, x: Array, key: Array | None = None) -> tuple[Array, Array]:
    """The outputs of an MLP or of experts, and the auxiliary loss."""
    if isinstance(mlp, MoE):
        outputs, record = mlp.forward(x, key=key)
        return outputs, record.aux_loss
    return mlp(x, key), jnp.zeros(())


Start = Callable[[ViT, Float[np.ndarray, "r d"], int, str], Mlp | MoE]
"""The MLP or the experts for a trunk, inputs of its last MLP, a seed, and an implementation."""


def dense(share: float) -> Start:
    """The MLP with that many times its hidden units.

    If these are fewer, the ones with the largest weights stay: the product of the norms of those
    that go in and out. New units have random inputs, as in a new layer, and no outputs.
    """

    def start(trunk: ViT, _: np.ndarray, seed: int, __: str) -> Mlp:
        old = trunk.blocks[-1].mlp
        (up, bias), down = (old.up.kernel[...], old.up.bias[...]), old.down.kernel[...]
        number = int(share * len(bias))
        largest = jnp.argsort(-jnp.linalg.norm(up, axis=0) * jnp.linalg.norm(down, axis=1))
        kept = jnp.sort(largest[:number])
        mlp = Mlp(len(up), number, hidden=old.hidden, rngs=nnx.Rngs(seed))
        mlp.up.kernel[...] = mlp.up.kernel[...].at[:, : len(kept)].set(up[:, kept])
        mlp.up.bias[...] = jnp.zeros(number).at[: len(kept)].set(bias[kept])
        mlp.down.kernel[...] = jnp.zeros((number, len(up))).at[: len(kept)].set(down[kept])
        mlp.down.bias[...] = old.down.bias[...]
        return mlp

    return start


def upcycled(how: UpcyclingStart, experts: int = EXPERTS, k: int = K) -> Start:
    """Experts, of which each token uses ``k``, as ``surgery.upcycle`` makes them."""

    def start(trunk: ViT, inputs: np.ndarray, seed: int, implementation: str) -> MoE:
        params, config = models.params_of(trunk), replace(trunk.config, depth=1)
        params["blocks"] = {0: params["blocks"][trunk.config.depth - 1]}
        fields = dict(router=dict(k=k), experts=dict(implementation=implementation))
        layer = upcycled_layer(config, how, num_experts=experts, **fields)
        tokens = {0: inputs} if how.reads_tokens else None
        made = upcycle_params(
            config, params, blocks=(0,), moe=layer, start=how, tokens=tokens, seed=seed
        )
        return models.with_params(*made).blocks[0].mlp

    return start


MLPS: Mapping[str, Start] = {
    "dense_half": dense(K / EXPERTS),
    "dense": dense(1),
    "dense_active": dense(K),
    "dense_total": dense(EXPERTS),
    "adapter": upcycled(surgery.LowRank(K * RANK), experts=1, k=1),
    "moe_copies": upcycled(surgery.Copies()),
    "moe_noise": upcycled(surgery.Noise(0.1)),
    "moe_drop": upcycled(surgery.Drop(0.5)),
    "moe_clusters": upcycled(surgery.Clusters()),
    "moe_split": upcycled(surgery.Split()),
    "low_rank": upcycled(surgery.LowRank(RANK)),
}
"""The MLP or the experts of each arm."""
ON_FEATURES = ("probe", "mixture", *TWO_TASKS)
"""Arms on the features of the trunk; the last two learn defect and crystal."""
COPIES = ("moe_copies", "moe_noise", "moe_drop", "moe_clusters")
"""Arms whose experts start as copies of the MLP, or nearly so."""
BASES = {
    "probe": "dense",
    "mixture": "probe",
    "shared_bottom": "probe",
    "mmoe": "shared_bottom",
    **dict.fromkeys(COPIES, "dense_active"),
    "moe_split": "dense_half",
    "low_rank": "adapter",
}
"""The plainer arm that has the FLOPs of each other arm."""
SETTINGS: dict[str, Any] = dict(
    experts=EXPERTS,
    k=K,
    rank=RANK,
    batch=BATCH,
    patches=PATCHES,
    warmup=WARMUP,
    c=[*INVERSE_REGULARIZATION],
    unseen=UNSEEN,
    components=COMPONENTS,
    mixtures=MIXTURES,
    two_tasks=TWO_TASKS,
    training=TRAINING,
    clustered=CLUSTERED,
)
"""What all rows are made with but the rates, as JSON has it."""


def measure(
    trunk: ViT,
    arm: str,
    data: TokenDataset,
    *,
    steps: int,
    seed: int,
    rates: Sequence[float],
) -> dict[str, Any]:
    """What an arm predicts for the images of the test.

    Args:
        rates: the peak learning rates that it tries.

    Returns:
        "right", whether the likeliest class is the image's, 0 or 1 for each image of the test;
        "defect", the same of whether the classes of more than an even chance of a defect are
        together likelier than the others, with the scale of the ``calibration`` on validation;
        "validation", the loss of that calibration; "c" of the regression, for the probe and for an
        arm that is trained, which also has "rate" and "losses", the validation of each rate; and
        for the others the settings that are best on validation.
    """
    _, held, test = data.split
    start, c = started(trunk, arm if arm in MLPS else "dense", data, seed)
    found: dict[str, Any]
    if arm in MLPS:
        runs = {rate: trained(start, data, rate, steps, seed) for rate in rates}
        rate = min(runs, key=lambda each: runs[each].validation.loss)
        tail, validation = runs[rate]
        probabilities = predicted(tail, features(tail, data.tokens[test]))
        found = {"c": c, "rate": rate, "losses": [run.validation.loss for run in runs.values()]}
    else:
        every = {
            name: features(start, data.tokens[own]) for name, own in data.split._asdict().items()
        }
        found, predict = (
            ({"c": c}, lambda x: predicted(start, x))
            if arm == "probe"
            else on_features(arm, every, data, seed)
        )
        probabilities = predict(every["test"])
        validation = calibration(predict(every["validation"]), data.labels[held])
    labels = data.labels[test]
    likely = calibrated(probabilities, validation.scale)[:, DEFECTIVE:].sum(1) > 0.5
    return found | {
        "right": bits(probabilities.argmax(1) == labels),
        "defect": bits(likely == (labels >= DEFECTIVE)) if len(data.crystals) else "",
        "validation": validation.loss,
    }


def pilot(
    trunk: ViT, arm: str, data: TokenDataset, *, steps: int, seed: int
) -> list[dict[str, float]]:
    """The "validation" of each "rate" of ``PILOT``, and of the start as rate 0.

    It reads no test image of its fold.
    """
    start, _ = started(trunk, arm, data, seed)
    tried = [(0.0, 0), *((rate, steps) for rate in PILOT)]
    return [
        {"rate": rate, "validation": trained(start, data, rate, number, seed).validation.loss}
        for rate, number in tried
    ]


def started(trunk: ViT, arm: str, data: TokenDataset, seed: int) -> tuple[Tail, float]:
    """An arm before its training, whose head is the regression of its own features, and its C."""
    train, held, _ = data.split
    norm = trunk.blocks[-1].norm2
    some = train[:: -(-len(train) // CLUSTERED)]  # of all parts of the data set
    inputs = np.asarray(norm(jnp.asarray(data.tokens[some], jnp.float32)))
    mlp = MLPS[arm](trunk, inputs.reshape(-1, inputs.shape[-1]), seed, "auto")
    tail = Tail(trunk, mlp, data.classes)
    x, y = features(tail, data.tokens[train]), data.labels[train]
    mean, std = x.mean(0), x.std(0) + 1e-6
    held_features, least, best = features(tail, data.tokens[held]), np.inf, np.nan
    for c in INVERSE_REGULARIZATION:
        fitted = LogisticRegression(C=c, max_iter=2000).fit((x - mean) / std, y)
        rows, bias = fitted.coef_, fitted.intercept_
        if len(rows) == 1:  # two classes
            rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
        kernel = np.zeros((len(mean), data.classes))
        every = np.full(data.classes, bias.min() - UNSEEN)
        kernel[:, fitted.classes_] = rows.T / std[:, None]
        every[fitted.classes_] = bias - rows @ (mean / std)
        probabilities = scipy.special.softmax(held_features @ kernel + every, axis=-1)
        loss = calibration(probabilities, data.labels[held]).loss
        if loss < least:
            least, best = loss, c
            tail.head.kernel[...] = jnp.asarray(kernel, jnp.float32)
            tail.head.bias[...] = jnp.asarray(every, jnp.float32)
    return tail, best


Predict = Callable[[np.ndarray], np.ndarray]  # features (b, d) -> probabilities (b, y)


def on_features(
    arm: str, features: Mapping[str, np.ndarray], data: TokenDataset, seed: int
) -> tuple[dict[str, Any], Predict]:
    """An arm of ``ON_FEATURES`` but the probe, with the settings that are best on validation."""
    train, held, _ = data.split
    parts = [PCA(min(COMPONENTS, len(train) - 1), random_state=0)] if arm == "mixture" else []
    scale = make_pipeline(StandardScaler(), *parts).fit(features["train"])
    x, y = scale.transform(features["train"]), data.labels[train]
    found: list[tuple[dict[str, Any], Any]] = []
    if arm == "mixture":
        for settings in MIXTURES:
            mixture = MixtureOfExpertsClassifier(gate_penalty=1.0, random_state=seed, **settings)
            found.append((settings, mixture.fit(x, y)))
    else:
        known = np.isin(data.labels[held], y) & np.isin(data.crystals[held], data.crystals[train])
        both = ((train, x), (held[known], scale.transform(features["validation"])[known]))
        (x, y), validation = (
            (each, {"label": data.labels[rows], "crystal": data.crystals[rows]})
            for rows, each in both
        )
        for settings in TWO_TASKS[arm]:
            tasks = MultiTaskClassifier(arm, random_state=seed, **TRAINING, **settings)
            found.append((settings, tasks.fit(x, y, validation=validation)))

    def predict(fitted: Any, rows: np.ndarray) -> np.ndarray:
        return spread(fitted, scale.transform(rows), data)

    def loss(fitted: Any) -> float:
        return calibration(predict(fitted, features["validation"]), data.labels[held]).loss

    settings, best = min(found, key=lambda each: loss(each[1]))
    return settings, functools.partial(predict, best)


def spread(fitted: Any, x: np.ndarray, data: TokenDataset) -> np.ndarray:
    """Probabilities of all classes, also of those that the training images lack."""
    given = fitted.predict_proba(x)
    if isinstance(given, dict):
        given, classes = given["label"], fitted.tasks_["label"].classes
    else:
        classes = fitted.classes_
    every = np.full((len(x), data.classes), 1e-3)
    every[:, np.asarray(classes, int)] = given
    return every / every.sum(1, keepdims=True)


class Calibration(NamedTuple):
    """The least mean log loss, and the scale of the log probabilities that has it."""

    loss: float
    scale: float


class Trained(NamedTuple):
    """An arm after its last step, and its calibration on validation."""

    tail: Tail
    validation: Calibration


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01)
)


def is_trained(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a variable is trained: a parameter, but of the MLP that low-rank experts share."""
    return isinstance(value, nnx.Param) and "shared" not in path


def trained(start: Tail, data: TokenDataset, rate: float, steps: int, seed: int) -> Trained:
    """An arm that is trained with a peak learning rate, which warms up and falls as a cosine."""
    train, held, _ = data.split
    random, number = np.random.default_rng(seed), np.arange(steps)
    passes = [random.permutation(train) for _ in range(-(-steps * BATCH // len(train)))]
    images = np.concatenate([train[:0], *passes])[: steps * BATCH].reshape(steps, BATCH)
    warm = np.minimum(1, (number + 1) / (WARMUP * steps + 1))
    rates = rate * warm * (1 + np.cos(np.pi * number / max(1, steps))) / 2
    graph, params, rest = nnx.split(start, is_trained, ...)
    moments = OPTIMIZER.init(params)
    for rows, now in zip(images, rates, strict=True):
        patches = random.random((BATCH, data.tokens.shape[1])).argsort(1)[:, :PATCHES]
        key = jax.random.key(int(random.integers(1 << 31)))
        given = data.tokens[rows[:, None], patches], data.labels[rows], np.float32(now), key
        params, moments = _step(graph, params, rest, moments, *given)
    tail = nnx.merge(graph, params, rest)
    probabilities = predicted(tail, features(tail, data.tokens[held]))
    return Trained(tail, calibration(probabilities, data.labels[held]))


@functools.partial(jax.jit, static_argnames="graph")
def _step(
    graph: Any,
    params: Any,
    rest: Any,
    moments: Any,
    tokens: Array,
    labels: Array,
    rate: Array,
    key: Array,
) -> tuple[Any, Any]:
    def loss(params: Any) -> Array:
        tail = nnx.merge(graph, params, rest)
        pooled, auxiliary = tail.features(tokens.astype(jnp.float32), key)
        each = optax.softmax_cross_entropy_with_integer_labels(tail.head(pooled), labels)
        return each.mean() + auxiliary

    updates, moments = OPTIMIZER.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, updates)), moments


@functools.partial(jax.jit, static_argnames="graph")
def _features(graph: Any, state: Any, tokens: Array) -> Array:
    return nnx.merge(graph, state).features(tokens.astype(jnp.float32))[0]


def features(tail: Tail, tokens: np.ndarray) -> Float[np.ndarray, "b d"]:
    """The mean of all patches of each image, after the MLP or the experts."""
    (graph, state), batch = nnx.split(tail), min(BATCH, len(tokens))
    found = [
        np.asarray(_features(graph, state, np.resize(part, (batch, *part.shape[1:]))))[: len(part)]
        for part in (tokens[i : i + batch] for i in range(0, len(tokens), batch))
    ]
    return np.concatenate(found)


def predicted(tail: Tail, pooled: np.ndarray) -> Float[np.ndarray, "b y"]:
    """The probabilities of the classes."""
    return scipy.special.softmax(np.asarray(tail.head(jnp.asarray(pooled))), axis=-1)


def gflops(trunk: ViT, arm: str) -> float:
    """Matmuls of the MLP or the experts for all patches of an image; a multiply-add counts as 2."""
    run, state, x = _program(trunk, arm, "ragged")
    return count_flops(jax.make_jaxpr(run)(state, x).jaxpr) / BATCH / 1e9


def costs(trunk: ViT, arm: str) -> dict[str, float]:
    """What the MLP or the experts of an arm cost.

    Returns:
        "parameters"; "trained", how many of these are trained; "gflops"; and "ms", on the cores of
        this process: the median time of fifteen batches, divided by the images of a batch.
    """
    run, state, x = _program(trunk, arm, "auto")
    times = []
    for _ in range(16):
        begin = time.perf_counter()
        run(state, x).block_until_ready()
        times.append(time.perf_counter() - begin)
    kinds = {"parameters": nnx.Param, "trained": is_trained}
    return {
        **{
            name: sum(each.size for each in jax.tree.leaves(nnx.filter_state(state, kind)))
            for name, kind in kinds.items()
        },
        "gflops": gflops(trunk, arm),
        "ms": 1000 * float(np.median(times[1:])) / BATCH,
    }


def _program(trunk: ViT, arm: str, implementation: str) -> tuple[Any, Any, Array]:
    """The MLP or the experts for random inputs: all patches of a batch."""
    config = trunk.config
    n = (config.image_size // config.patch_size) ** 2
    x = jax.random.normal(jax.random.key(0), (BATCH, n, config.width))
    mlp = MLPS[arm if arm in MLPS else "dense"](trunk, np.asarray(x[0]), 0, implementation)
    graph, state = nnx.split(mlp)
    return jax.jit(lambda state, x: _changed(nnx.merge(graph, state), x)[0]), state, x


def bits(values: np.ndarray) -> str:
    return "".join("01"[int(value)] for value in values)


def calibration(
    probabilities: Float[np.ndarray, "b y"], labels: Int[np.ndarray, "b"]
) -> Calibration:
    """The best scale, an inverse temperature: sharper predictions are not worse by that."""
    rows = np.arange(len(labels))

    def loss(log_scale: float) -> float:
        return -_scaled(probabilities, np.exp(log_scale))[rows, labels].mean()

    found = scipy.optimize.minimize_scalar(loss, bounds=(-4, 3), method="bounded")
    return Calibration(float(found.fun), float(np.exp(found.x)))


def calibrated(probabilities: Float[np.ndarray, "b y"], scale: float) -> Float[np.ndarray, "b y"]:
    """The probabilities whose logarithms are scaled.

    The likeliest class stays. Whether several classes are together likelier than the others
    depends on the scale.
    """
    return np.exp(_scaled(probabilities, scale))


def _scaled(probabilities: np.ndarray, scale: float) -> np.ndarray:
    """Log probabilities."""
    return scipy.special.log_softmax(scale * np.log(np.maximum(probabilities, 1e-12)), axis=-1)
