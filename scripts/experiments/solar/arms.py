"""What is trained on the tokens before the last block.

All arms start from the features of the same last block, pooled over the patches, and from the
logistic regression of these that is best on validation. The head of a block starts as that
regression, so the start that is a regression and those that keep the block's outputs predict the
same. A step reads some patches of an image, drawn anew, of those whose mean are its features; each
attends to all tokens. The best epoch on validation counts, the start included.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from flax import nnx
from jaxtyping import Array, Float, Int
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scripts.experiments.solar.data import Split
from vmoe import surgery
from vmoe.classic import MixtureOfExpertsClassifier
from vmoe.costs.flops import count_flops
from vmoe.multitask import MultiTaskClassifier
from vmoe.nn.block import Block
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT
from vmoe.surgery.starts import UpcyclingStart

EXPERTS, K = 4, 2
BATCH, PATCHES = 32, 32  # images of a step, and patches of each
RATES = (1e-4, 3e-4, 1e-3)
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of the logistic regression
UNSEEN = 3.0  # how much lower the bias of a class is that no training image has
COMPONENTS = 16  # of the features, for the classic mixture
MIXED = (2, 3, 4)  # experts of the classic mixture that are tried


class Last(nnx.Module):
    """The last block of a ViT, and a head on the mean of its patches."""

    def __init__(self, model: ViT, block: Block, classes: int):
        width = model.config.width
        self.block, self.norm = block, model.norm
        self.head = nnx.Linear(width, classes, rngs=nnx.Rngs(0))

    def features(
        self, tokens: Float[Array, "b n d"], patches: Int[Array, "b q"], key: Any = None
    ) -> tuple[Float[Array, "b d"], Float[Array, ""]]:
        """The mean of some patches after the block, and the auxiliary loss."""
        normed = self.block.norm1(tokens)
        own, queries = (jnp.take_along_axis(x, patches[..., None], 1) for x in (tokens, normed))
        own += self.block.attention(queries, normed)
        change, loss = self.block.norm2(own), jnp.zeros(())
        if isinstance(self.block.mlp, MoE):
            change, record = self.block.mlp.forward(change, key=key)
            loss = record.aux_loss
        else:
            change = self.block.mlp(change, key)
        return self.norm(own + change).mean(1), loss

    def __call__(
        self, tokens: Float[Array, "b n d"], patches: Int[Array, "b q"], key: Any = None
    ) -> tuple[Float[Array, "b y"], Float[Array, ""]]:
        """Logits, and the auxiliary loss."""
        pooled, loss = self.features(tokens, patches, key)
        return self.head(pooled), loss


Start = Callable[[ViT, int, str], Block]
"""The last block for a trunk, a seed and an implementation of the experts."""


def dense(times: int) -> Start:
    """The block with an MLP of that many times the hidden units; the new ones start as no change.

    Their inputs are random, as in a new layer, and their outputs zero.
    """

    def start(model: ViT, seed: int, _: str) -> Block:
        block: Block = nnx.merge(*nnx.split(model.blocks[-1]))
        width, hidden, old = model.config.width, model.config.mlp_dim, block.mlp
        if times > 1:
            wide = Mlp(width, times * hidden, hidden=old.hidden, rngs=nnx.Rngs(seed))
            wide.up.kernel[...] = wide.up.kernel[...].at[:, :hidden].set(old.up.kernel[...])
            wide.up.bias[...] = jnp.zeros(times * hidden).at[:hidden].set(old.up.bias[...])
            down = jnp.zeros((times * hidden, width))
            wide.down.kernel[...] = down.at[:hidden].set(old.down.kernel[...])
            wide.down.bias[...] = old.down.bias[...]
            block.mlp = wide
        return block

    return start


def moe(how: UpcyclingStart) -> Start:
    """The block with experts, of which each token uses ``K``, by ``surgery.upcycle``."""

    def make(model: ViT, seed: int, implementation: str) -> Block:
        last = model.config.depth - 1
        fields = dict(router=dict(k=K), experts=dict(implementation=implementation))
        sparse = surgery.upcycle(
            model, blocks=(last,), num_experts=EXPERTS, start=how, seed=seed, **fields
        )
        return sparse.blocks[last]

    return make


BLOCKS: Mapping[str, Start] = {
    "dense": dense(1),
    "dense_active": dense(K),
    "dense_total": dense(EXPERTS),
    "moe_copies": moe(surgery.Copies()),
    "moe_noise": moe(surgery.Noise(0.1)),
    "moe_drop": moe(surgery.Drop(0.5)),
    "moe_split": moe(surgery.Split()),
}
"""The last block of each arm."""
ON_FEATURES = ("probe", "mixture", "shared_bottom", "mmoe")
"""Arms on the features of the frozen block; the last two learn defect and crystal."""


DEFECTIVE = 2  # the first of the levels above an even chance of a defect


class Data(NamedTuple):
    """A split of images.

    Attributes:
        tokens: before the last block.
        crystals: a second task; empty if there is none.
    """

    tokens: Float[np.ndarray, "b n d"]
    labels: Int[np.ndarray, "b"]
    crystals: np.ndarray
    split: Split

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def measure(
    model: ViT, arm: str, data: Data, *, rate: float, epochs: int, seed: int
) -> dict[str, Any]:
    """What an arm predicts for the images of the test.

    Returns:
        "right", whether the likeliest class is the image's, 0 or 1 for each image of the test;
        "defect", the same of whether the classes of more than an even chance of a defect are
        together likelier than the others; "validation", the mean log loss; "parameters", "gflops"
        and "ms" for the last block of an image, "ms" on the cores of this process.
    """
    first = Last(model, BLOCKS["dense"](model, seed, "auto"), data.classes)
    every = np.arange(len(data.labels))
    features = outputs(first, data.tokens, every, pooled=True)
    regression = probe(features, data)
    block = first
    if arm in BLOCKS:
        block = Last(model, BLOCKS[arm](model, seed, "auto"), data.classes)
        with_head(block, regression)
        block, validation, epoch = trained(block, data, rate, epochs, seed)
        probabilities = softmax(outputs(block, data.tokens, data.split.test))
        found = {"epoch": epoch, "rate": rate}
    else:
        fitted = regression if arm == "probe" else on_features(arm, features, data, seed)
        probabilities = fitted(features[data.split.test])
        validation, found = log_loss(fitted(features[data.split.validation]), data), {}
    labels = data.labels[data.split.test]
    likely = probabilities[:, DEFECTIVE:].sum(1) > 0.5
    return found | {
        "right": bits(probabilities.argmax(1) == labels),
        "defect": bits(likely == (labels >= DEFECTIVE)) if len(data.crystals) else "",
        "validation": float(validation),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(block, nnx.Param))),
        "gflops": gflops(model, arm if arm in BLOCKS else "dense", data),
        "ms": milliseconds(block, data.tokens),
    }


def search(model: ViT, arm: str, data: Data, *, epochs: int) -> dict[str, Any]:
    """The rate with the least log loss on validation, and that of all rates."""
    losses = {}
    for rate in RATES:
        block = Last(model, BLOCKS[arm](model, 0, "auto"), data.classes)
        features = outputs(block, data.tokens, np.arange(len(data.labels)), pooled=True)
        with_head(block, probe(features, data))
        losses[rate] = trained(block, data, rate, epochs, 0)[1]
    return {"rate": min(losses, key=losses.__getitem__), "losses": list(losses.values())}


Predict = Callable[[np.ndarray], np.ndarray]  # features (b, d) -> probabilities (b, y)


class Regression(NamedTuple):
    """A linear layer on features."""

    kernel: Float[np.ndarray, "d y"]
    bias: Float[np.ndarray, "y"]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return softmax(features @ self.kernel + self.bias)


def probe(features: np.ndarray, data: Data) -> Regression:
    """The logistic regression whose penalty is best on validation; a class not seen is unlikely."""
    x, y = features[data.split.train], data.labels[data.split.train]
    mean, std = x.mean(0), x.std(0) + 1e-6
    found = []
    for penalty in PENALTIES:
        fitted = LogisticRegression(C=penalty, max_iter=2000).fit((x - mean) / std, y)
        rows, bias = fitted.coef_, fitted.intercept_
        if len(rows) == 1:  # two classes
            rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
        kernel = np.zeros((len(mean), data.classes))
        every = np.full(data.classes, bias.min() - UNSEEN)
        kernel[:, fitted.classes_] = rows.T / std[:, None]
        every[fitted.classes_] = bias - rows @ (mean / std)
        found.append(Regression(kernel, every))
    held = features[data.split.validation]
    return min(found, key=lambda each: log_loss(each(held), data))


def with_head(last: Last, regression: Regression) -> None:
    """Makes a regression the head."""
    last.head.kernel[...] = jnp.asarray(regression.kernel, jnp.float32)
    last.head.bias[...] = jnp.asarray(regression.bias, jnp.float32)


def on_features(arm: str, features: np.ndarray, data: Data, seed: int) -> Predict:
    """An arm of ``ON_FEATURES`` but the probe, with the number of experts best on validation."""
    train, held = data.split.train, data.split.validation
    scale = StandardScaler().fit(features[train])
    x, y = scale.transform(features[train]), data.labels[train]
    found: list[Predict] = []
    if arm == "mixture":
        parts = PCA(min(COMPONENTS, len(train) - 1), random_state=0).fit(x)
        for experts in MIXED:
            mixture = MixtureOfExpertsClassifier(experts, gate_penalty=1.0, expert_penalty=1.0)
            mixture.fit(parts.transform(x), y)
            found.append(lambda f, m=mixture: spread(m, parts.transform(scale.transform(f)), data))
    else:
        tasks = {"label": y, "crystal": data.crystals[train]}
        for experts in MIXED if arm == "mmoe" else MIXED[:1]:
            both = MultiTaskClassifier(arm, n_experts=experts, random_state=seed)
            both.fit(x, tasks)
            found.append(lambda f, m=both: spread(m, scale.transform(f), data))
    return min(found, key=lambda each: log_loss(each(features[held]), data))


def spread(fitted: Any, x: np.ndarray, data: Data) -> np.ndarray:
    """Probabilities of all classes, also of those that the training images lack."""
    given = fitted.predict_proba(x)
    if isinstance(given, dict):
        given, classes = given["label"], fitted.tasks_["label"].classes
    else:
        classes = fitted.classes_
    every = np.full((len(x), data.classes), 1e-3)
    every[:, np.asarray(classes, int)] = given
    return every / every.sum(1, keepdims=True)


def trained(last: Last, data: Data, rate: float, epochs: int, seed: int) -> tuple[Last, float, int]:
    """The block after its best epoch, its mean log loss on validation, and the number of epochs."""
    train, random = data.split.train, np.random.default_rng(seed)
    steps = -(-len(train) // BATCH)
    warm = min(10, steps)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, warm, max(steps * epochs, warm + 1))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )
    graph, params, rest = nnx.split(last, nnx.Param, ...)
    moments = optimizer.init(params)

    @jax.jit
    def step(params: Any, moments: Any, tokens: Array, labels: Array, patches: Array, key: Array):
        def loss(params: Any) -> Array:
            logits, aux = nnx.merge(graph, params, rest)(tokens, patches, key)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return each.mean() + aux

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    def validation(params: Any) -> float:
        logits = outputs(nnx.merge(graph, params, rest), data.tokens, data.split.validation)
        return log_loss(softmax(logits), data)

    best, least, epoch = params, validation(params), 0
    for number in range(epochs):
        order = np.resize(random.permutation(train), steps * BATCH).reshape(steps, BATCH)
        for rows in order:
            n = data.tokens.shape[1]
            patches = np.stack([1 + random.permutation(n - 1)[: min(PATCHES, n - 1)] for _ in rows])
            key = jax.random.key(int(random.integers(1 << 31)))
            given = jnp.asarray(data.tokens[rows], jnp.float32), jnp.asarray(data.labels[rows])
            params, moments = step(params, moments, *given, jnp.asarray(patches), key)
        if (loss := validation(params)) < least:
            best, least, epoch = params, loss, number + 1
    return nnx.merge(graph, best, rest), least, epoch


@functools.partial(jax.jit, static_argnames=("graph", "pooled"))
def _outputs(graph: Any, state: Any, tokens: Array, pooled: bool) -> Array:
    last: Last = nnx.merge(graph, state)
    patches = jnp.tile(jnp.arange(1, tokens.shape[1]), (len(tokens), 1))
    return (last.features if pooled else last)(tokens.astype(jnp.float32), patches)[0]


def outputs(last: Last, tokens: Any, rows: np.ndarray, *, pooled: bool = False) -> np.ndarray:
    """The logits, or the features, of some images from all their patches."""
    graph, state = nnx.split(last)
    found = []
    for start in range(0, len(rows), BATCH):
        own = np.resize(rows[start : start + BATCH], BATCH)
        made = _outputs(graph, state, jnp.asarray(tokens[own]), pooled)
        found.append(np.asarray(made[: len(rows) - start]))
    return np.concatenate(found)


def gflops(model: ViT, arm: str, data: Data) -> float:
    """Matmuls of the last block and the head for an image; a multiply-add counts as 2."""
    last = Last(model, BLOCKS[arm](model, 0, "ragged"), data.classes)
    graph, state = nnx.split(last)
    shape = jax.ShapeDtypeStruct((BATCH, *data.tokens.shape[1:]), jnp.float32)
    traced = jax.make_jaxpr(lambda state, x: _outputs(graph, state, x, False))(state, shape)
    return count_flops(traced.jaxpr) / BATCH / 1e9


def milliseconds(last: Last, tokens: Any) -> float:
    """The time of the last block and the head for an image of a batch; the median of seven."""
    rows = np.arange(min(BATCH, len(tokens)))
    outputs(last, tokens, rows)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        outputs(last, tokens, rows)
        times.append(time.perf_counter() - start)
    return float(1000 * np.median(times) / BATCH)


def bits(values: np.ndarray) -> str:
    return "".join("01"[int(value)] for value in values)


def softmax(logits: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(logits, axis=-1)


def log_loss(probabilities: np.ndarray, data: Data) -> float:
    """The mean log loss on validation."""
    labels = data.labels[data.split.validation]
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, 1e-6)).mean())
