# %% [markdown]
# # From two lines and a gate to V-MoE
#
# A mixture of experts was two regressions and a softmax in 1991, a tree in 1994, and is a layer of
# a vision transformer today. This notebook walks from one to the other with the same words at each
# step:
#
# - an **expert** is a model that is good for some inputs;
# - the **gate** gives each input a probability for each expert;
# - **combine** is the weighted mean of the experts' outputs, or the output of the best one;
# - the **responsibility** of an expert for an example is its probability after the target is known;
# - the **load** of an expert is the sum of its responsibilities or, where each input is sent to one
#   or two experts, the number of inputs that it gets; here both are shares of all.
#
# [The family](../docs/family.md) has the papers, and [classic results](../docs/results/mixtures.md)
# repeats what they report. The drawings at the end are from Noto Color Emoji ((c) Google, Apache
# License 2.0) and Twemoji ((c) Twitter, Inc and other contributors, CC-BY 4.0).
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/05_mixtures.ipynb`.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
rows = 400  # of the random problems
steps = 400  # training steps of the two networks
checkpoint = "vmoe_emoji"  # a sparse model and its data, for the last step
data = "emoji_sample"
images = 32

# %%
# %matplotlib inline
import warnings

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LinearSegmentedColormap
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import train_test_split

import vmoe
from vmoe import models
from vmoe.analysis import collect, concatenate, plots
from vmoe.analysis.colors import expert_colors
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    plot_tree,
)
from vmoe.config import AuxLossWeights, TokenChoice, ViTConfig
from vmoe.data.reading import Reading
from vmoe.data.sources import open_source, relabel, sample
from vmoe.multitask import MultiTaskClassifier, plot_expert_use
from vmoe.nn.inputs import to_float
from vmoe.passes import inputs

warnings.simplefilter("ignore", ConvergenceWarning)  # frames show EM before it has converged
random = np.random.default_rng(0)
colors = expert_colors(8)
halves = LinearSegmentedColormap.from_list("halves", colors[:2])

# %% [markdown]
# ## Two clusters and a gate
# Two clusters of inputs, each with a linear law of its own. Nobody says which row belongs to which
# cluster. EM starts from a wrong idea of the boundary.
#
# Each step of EM asks which expert is responsible for each row (the color of a point), fits the
# experts to rows weighted by these responsibilities, and fits the gate to predict them from the
# input alone (the background). The line is the gate's boundary, where both experts are equally
# probable.

# %%
cluster = np.arange(rows) % 2
x = random.normal(size=(rows, 2)) * [0.6, 1.0] + np.where(cluster, 1.2, -1.2)[:, None] * [1, 0]
y = np.where(cluster, x @ [1.0, 2.0], x @ [-1.0, -2.0]) + 0.2 * random.normal(size=rows)

wrong = np.where(x @ [0.5, 0.9] > 0, 0.9, 0.1)
model = MixtureOfExpertsRegressor(
    2, start=np.stack([wrong, 1 - wrong], axis=1), max_iter=1, tol=0.0, warm_start=True
)
plane = np.stack(np.meshgrid(np.linspace(-3, 3, 80), np.linspace(-3, 3, 80)), axis=-1)
shown = [1, 2, 3, 4, 5, 10]
figure, axes = plt.subplots(1, len(shown), figsize=(14, 2.6), sharey=True, layout="constrained")
for step in range(1, shown[-1] + 1):
    model.fit(x, y)
    if step in shown:
        ax = axes[shown.index(step)]
        gate = model.gate_proba(plane.reshape(-1, 2))[:, 1].reshape(80, 80)
        ax.imshow(
            gate, cmap=halves, vmin=0, vmax=1, alpha=0.35, extent=(-3, 3, -3, 3), origin="lower"
        )
        ax.set(xlim=(-3, 3), ylim=(-3, 3))
        ax.contour(*plane.transpose(2, 0, 1), gate, [0.5], colors="k")
        ax.scatter(*x.T, c=model.responsibilities(x, y)[:, 1], cmap=halves, vmin=0, vmax=1, s=6)
        ax.set_title(f"step {step}\nlog-likelihood {model.lower_bound_:.0f}", fontsize="small")
print("load:", model.responsibilities(x, y).mean(axis=0).round(2))
for number, expert in enumerate(model.experts_):
    print(f"expert {number}: slopes {expert.coef_[1:].round(1)}, noise {expert.std_.round(2)}")

# %% [markdown]
# The experts have found both laws, and the gate the boundary between the clusters: where the two
# colors mix, the gate is unsure.

# %% [markdown]
# ## What no single expert can do
# Left: no line fits a kink, and two lines with a gate do. Right: no line separates four sectors in
# two classes; two logistic experts do, since each is right on one side of the gate's boundary.

# %%
x = np.linspace(-1, 1, rows)[:, None]
y = np.abs(x[:, 0])
kink, line = MixtureOfExpertsRegressor(2).fit(x, y), LinearRegression().fit(x, y)
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
axes[0].plot(x, y, color="0.7", linewidth=5, label="data")
axes[0].plot(x, kink.predict(x), "k", label=f"2 experts, R² {kink.score(x, y):.3f}")
axes[0].plot(x, line.predict(x), "k:", label=f"1 line, R² {line.score(x, y):.3f}")
for number in range(2):
    gate = kink.gate_proba(x)[:, number]
    axes[0].fill_between(x[:, 0], -0.3 + 0.2 * gate, -0.3, color=colors[number], alpha=0.5)
axes[0].set(xlabel="input", ylabel="target (below: the gate)")
axes[0].legend(fontsize="small")

x = random.normal(size=(rows, 2))
y = (x[:, 0] * x[:, 1] > 0).astype(int)
mixture = MixtureOfExpertsClassifier(2, n_init=5, random_state=0).fit(x, y)
logistic = LogisticRegression().fit(x, y)
grid = plane.reshape(-1, 2)
for ax, colormap, title, values in (
    (axes[1], halves, "gate: probability of expert 1", mixture.gate_proba(grid)[:, 1]),
    (
        axes[2],
        "gray",
        f"probability of class 1: {mixture.score(x, y):.0%} right\n"
        f"(one logistic regression: {logistic.score(x, y):.0%})",
        mixture.predict_proba(grid)[:, 1],
    ),
):
    image = ax.imshow(
        values.reshape(80, 80), cmap=colormap, vmin=0, vmax=1, extent=(-3, 3, -3, 3), origin="lower"
    )
    for label, marker in ((0, "o"), (1, "^")):
        ax.scatter(*x[y == label].T, color="tab:red", marker=marker, s=8, label=f"class {label}")
    ax.set_title(title, fontsize="small")
    ax.set(xlim=(-3, 3), ylim=(-3, 3))
    figure.colorbar(image, ax=ax)
_ = axes[2].legend(fontsize="small", loc="upper left", framealpha=1)

# %% [markdown]
# ## A tree of gates
# A hierarchical mixture has gates below gates, and its experts are the leaves: a decision tree
# whose splits are soft and oblique. The curves show each gate's probabilities along its direction,
# in standard deviations from the mean wine.

# %%
wine = load_wine(as_frame=True)
x_train, x_test, y_train, y_test = train_test_split(
    wine.data, wine.target, test_size=0.5, random_state=0, stratify=wine.target
)
tree = HierarchicalMixtureClassifier((2, 2), expert_penalty=1.0, gate_penalty=0.1, max_iter=300)
tree.fit(x_train, y_train)
plot_tree(tree)
hard = tree.to_hard_tree()
print(f"right on the test half: {tree.score(x_test, y_test):.1%}")
print(f"the hard tree agrees with the soft one on {hard.agreement(x_test):.1%} of the rows")
print("load:", tree.responsibilities(x_test, y_test).mean(axis=0).round(2))
print(f"\nwhy the first wine gets its class:\n{tree.explain(x_test.iloc[[0]])}")

# %% [markdown]
# ## A gate for each task
# Several tasks may share experts. In MMoE (2018) each task has a gate of its own and a *tower*, a
# small network that maps the mixture to the task's outputs. Everything is trained by gradient
# descent. Here the tasks are to classify a digit and to say whether it is odd.

# %%
table = load_digits()
pixels = table.data[:, table.data.any(axis=0)]  # without those that are always empty
names = {"digit": table.target, "odd": table.target % 2 == 1}
train, test = train_test_split(np.arange(len(pixels)), random_state=0)
epochs = max(1, steps // 20)
model = MultiTaskClassifier(
    "mmoe", n_experts=4, max_epochs=epochs, batch_size=32, learning_rate=0.003, random_state=0
)
model.fit(pixels[train], {task: labels[train] for task, labels in names.items()})
scores = model.scores(pixels[test], {task: labels[test] for task, labels in names.items()})
print({task: f"{score:.1%}" for task, score in scores.items()})
_ = plot_expert_use(model, pixels[test])

# %% [markdown]
# ## Whole networks as experts
# So far, every expert computes every input, and EM needs the target. Inside a network no target is
# known, and a thousand experts are too many to compute. So a *router* keeps the k largest gates of
# an input, sends the input to these experts alone, and everything is trained together by gradient.
#
# `vmoe.MoE` takes any modules. Here a small ViT and a small CNN are the two experts, the gate is
# linear in the pixels of a whole image, and k = 1: each image goes to one of the two.


# %%
class Cnn(nnx.Module):
    """A small convolutional network from the pixels of digits to logits."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, pixels):
        x = nnx.relu(self.first(pixels.reshape(-1, 8, 8, 3)))
        return self.head(nnx.relu(self.second(x)).mean((1, 2)))


class Vit(nnx.Module):
    """A dense ViT from the same pixels to logits."""

    def __init__(self):
        self.vit = models.build(
            ViTConfig(
                patch_size=2,
                width=32,
                depth=2,
                mlp_dim=64,
                num_heads=2,
                image_size=8,
                num_classes=10,
                position_std=1.0,
                pooling="mean",
            )
        )
        del self.vit.rngs  # streams for noise and dropout: experts have parameters alone

    def __call__(self, pixels):
        return self.vit(pixels.reshape(-1, 8, 8, 3))


def digits(split):
    source = open_source("digits", split)
    examples = [source[i] for i in range(len(source))]
    pixels = to_float(np.stack([example.image for example in examples]))
    return np.asarray(pixels.reshape(len(pixels), -1)), source.labels[:]


rngs = nnx.Rngs(0)
gate = nnx.Linear(8 * 8 * 3, 2, use_bias=False, rngs=rngs)
router = TokenChoice(k=1, dropless=True, aux_loss=AuxLossWeights(importance=1.0))
layer = vmoe.MoE([Vit(), Cnn(rngs)], gate, router)
graph, params = nnx.split(layer)
optimizer = optax.adam(3e-3)


@jax.jit
def train_step(params, state, pixels, labels):
    def loss_of(params):
        logits, record = nnx.merge(graph, params).forward(pixels)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + record.aux_loss

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


# %% tags=["long"]
pixels, labels = digits("train")
state = optimizer.init(params)
for step in range(steps):
    batch = random.integers(len(pixels), size=64)
    params, state, loss = train_step(params, state, pixels[batch], labels[batch])
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss:.3f}")

pixels, labels = (each[:320] for each in digits("test"))
logits, record = jax.jit(nnx.merge(graph, params).forward)(pixels)
expert = np.asarray(record.routing.experts).reshape(-1)
right = np.asarray(logits.argmax(-1)) == labels
print(f"{right.mean():.1%} of {len(labels)} test images right")
figure, ax = plt.subplots(figsize=(7, 2.5), layout="constrained")
for number, name in enumerate(("ViT", "CNN")):
    own = np.bincount(labels[expert == number], minlength=10)
    label = f"{name}, load {(expert == number).mean():.0%}"
    ax.bar(np.arange(10) + 0.4 * number - 0.2, own, 0.4, color=colors[number], label=label)
ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
_ = ax.set(xlabel="digit", ylabel="test images sent", xticks=range(10))

# %% [markdown]
# The two networks share the digits: each gets some digits whole. Nothing keeps loads even by
# itself, so the loss has a term that does: the importance loss of V-MoE makes the experts' sums of
# gates even. Give it another weight (`importance` above), and run the cells again to see what it
# does.

# %% [markdown]
# ## Patches of images
# In a V-MoE the same layer stands in every second block of a ViT. An input is one *patch* of an
# image, here 64 of each drawing; an expert is an MLP; the gate is linear; k = 2. An expert has
# slots for a limited number of patches, so that all experts do equal work.
#
# The first picture shows the gate of a trained model: the probability of its busiest expert at
# every patch of six drawings. It is the background of the frames above, on an image instead of a
# plane. In the second picture, the color of a patch is the expert with the largest weight.

# %%
loaded = vmoe.load(checkpoint)
source = relabel(sample(open_source(data, "test"), images), loaded.class_names)
batches = list(inputs(loaded.model, source, loaded.preprocessing, Reading(images)))
drawings = np.concatenate([batch[valid] for batch, _, valid in batches])
collected = concatenate(collect(loaded.model, batches))
number, block = max(collected.blocks.items())
config = loaded.model.config
patches = block.gates[:, -((config.image_size // config.patch_size) ** 2) :]  # no class token
busiest = int(patches.mean((0, 1)).argmax())
figure, axes = plt.subplots(2, 6, figsize=(12, 4), layout="constrained")
for column, i in enumerate(np.linspace(0, len(drawings) - 1, 6).astype(int)):
    axes[0, column].imshow(np.clip(drawings[i] / 2 + 0.5, 0, 1))
    side = int(patches.shape[1] ** 0.5)
    gate = axes[1, column].imshow(patches[i, :, busiest].reshape(side, side), vmin=0, vmax=1)
for ax in axes.flat:
    ax.axis("off")
figure.colorbar(gate, ax=axes[1], label=f"gate of expert {busiest}")
print(f"block {number}, load of each expert over {len(drawings)} images:")
choices = block.experts[block.kept]
print((np.bincount(choices, minlength=patches.shape[-1]) / choices.size).round(2))

# %%
plots.experts_of_patches(drawings, collected, patch_size=config.patch_size)

# %% [markdown]
# ## The same words
# | word | two clusters | tree of gates | several tasks | whole networks | V-MoE |
# |---|---|---|---|---|---|
# | input | a row | a row | a row | an image | a patch |
# | expert | a line | a logistic regression | a layer | a network | an MLP |
# | gate | of the row | one at each node | one for each task | of the pixels | of the patch |
# | combine | mean of all | mean of all | mean of all | the best one | sum of the best two |
# | load: sum of | responsibilities | responsibilities | gates | images sent | patches sent |
# | learned by | EM | EM | gradient | gradient, auxiliary loss | gradient, auxiliary loss |
