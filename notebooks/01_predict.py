# %% [markdown]
# # Predict with a trained model
#
# This notebook opens a trained V-MoE, classifies images, and finds similar images by their
# features. Then it predicts at other image sizes, shows which experts an image used, and changes
# the routing. Nothing is trained.
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/01_predict.ipynb`.

# %% [markdown]
# ## Settings
# `checkpoint` is anything that `vmoe.load` opens: a name from `vmoe models --pretrained`, a run
# folder, a file or a URL. `data` is a data set with the classes of the model. The last two sections
# need a sparse model.
#
# To use a published V-MoE and your own photos, install vmoe with the extra `remote` and set
# ```python
# checkpoint = "vmoe_s32_last2_e8.in1k_light"  # 228 MB; not tried with the real host
# data = "folder:photos"  # photos/test/CLASS/*.jpg
# count = 64
# image_sizes = (160, 192, 224, 256)
# ```
# where CLASS is a class of ImageNet: its number in WordNet, such as n02123045, or its name in
# `loaded.class_names`.

# %% tags=["parameters"]
checkpoint = "vmoe_fashion_mnist"
data = "fashion_mnist_sample"
count = 512  # images, which are predicted in one batch
image_sizes = (14, 21, 28, 35, 42)  # in pixels, multiples of the patch size

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import vmoe
from vmoe.analysis.colors import expert_colors
from vmoe.config import RoutingOverrides
from vmoe.data.sources import open_source, relabel, sample
from vmoe.evaluate import evaluate, paired_difference

# %% [markdown]
# ## Open the model
# `vmoe.load` returns the model with its class names and its preprocessing.

# %%
loaded = vmoe.load(checkpoint)
names, config = loaded.class_names, loaded.model.config
print("classes:       ", ", ".join(names))
print("preprocessing: ", loaded.preprocessing)
print("sparse blocks: ", config.sparse_blocks, "of", config.depth, "blocks")

# %% [markdown]
# ## Prepare images
# Each example of a data set has an image and a label. `preprocess` takes pixels, paths of image
# files or their bytes. It resizes, crops and scales images as for evaluation.

# %%
source = relabel(sample(open_source(data, "test"), count), names)
examples = [source[i] for i in range(len(source))]
labels = np.array([example.labels[0] for example in examples])
images = loaded.preprocess([example.image for example in examples])
print(images.shape, images.dtype, "from", images.min(), "to", images.max())

# %% [markdown]
# ## Predict
# The model returns logits; their softmax gives probabilities. `jax.jit` compiles the model once for
# each shape of its input. The table shows the three most probable classes of the first images.

# %%
logits = jax.jit(loaded.model)(images)
probabilities = np.asarray(jax.nn.softmax(logits))
predictions = probabilities.argmax(1)
print(f"{'label':>11} | predictions")
for label, row in zip(labels[:8], probabilities[:8], strict=False):
    best = np.argsort(-row)[:3]
    print(f"{names[label]:>11} |", *(f"{names[y]:>11} {row[y]:6.1%}" for y in best))

# %% [markdown]
# The first images, each with its predicted class. Errors are red, with the correct class below.


# %%
def show(indices):
    """Shows images with their predictions."""
    rows = max(1, -(-len(indices) // 8))
    figure, axes = plt.subplots(rows, 8, figsize=(12, 1.8 * rows), squeeze=False)
    for i, ax in zip(indices, axes.flat, strict=False):
        y, label = predictions[i], labels[i]
        title = f"{names[y]} {probabilities[i, y]:.0%}"
        ax.imshow((images[i] + 1) / 2)
        ax.set_title(title if y == label else f"{title}\nnot {names[label]}", fontsize=9)
        ax.title.set_color("black" if y == label else "firebrick")
    for ax in axes.flat:
        ax.axis("off")


show(np.arange(len(images))[:16])

# %% [markdown]
# The most confident errors:

# %%
errors = np.flatnonzero(predictions != labels)
show(errors[np.argsort(-probabilities[errors].max(1))][:16])

# %% [markdown]
# `evaluate` computes the accuracy on a data set. The standard error is the sampling uncertainty of
# the accuracy.

# %%
trained = evaluate(loaded.model, source, preprocessing=loaded.preprocessing)
print(f"accuracy {trained.accuracy:.1%} ± {trained.standard_error:.1%} on {trained.images} images")

# %% [markdown]
# ## Similar images
# As in timm, `forward_features` returns one vector for each token, and `forward_head` pools them.
# With `pre_logits=True` it stops before the last layer and returns one vector for each image.

# %%
tokens = jax.jit(loaded.model.forward_features)(images)
features = np.asarray(loaded.model.forward_head(tokens, pre_logits=True))
print("tokens", tokens.shape, "features", features.shape)

# %% [markdown]
# Each row starts with an image, its label in bold. The nearest images by cosine similarity follow;
# their labels are red if they differ. The last two rows start with the two images on which the
# model is least confident.


# %%
def neighbors(vectors):
    """For each image, the other images by decreasing cosine similarity."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :-1]


nearest = neighbors(features)
queries = [0, 1, *np.argsort(probabilities.max(1))[:2]]
figure, axes = plt.subplots(len(queries), 8, figsize=(12, 7))
for query, row in zip(queries, axes, strict=True):
    for i, ax in zip([query, *nearest[query]], row, strict=False):
        ax.imshow((images[i] + 1) / 2)
        ax.set_title(names[labels[i]], fontsize=9)
        ax.title.set_color("black" if labels[i] == labels[query] else "firebrick")
        ax.axis("off")
    row[0].title.set_fontweight("bold")

# %% [markdown]
# `capture_features` returns intermediate features by name; `vmoe.analysis.feature_names(model)`
# lists the names. Here the tokens after each block are averaged over each image. How often does the
# nearest neighbor have the same label? The bars are standard errors.

# %%
blocks = [f"blocks.{i}" for i in range(config.depth)]
capture = jax.jit(lambda images: vmoe.analysis.capture_features(loaded.model, images, blocks))
vectors = {"pixels": images.reshape(len(images), -1)}
for name, tokens in capture(images).features.items():
    vectors[name] = np.asarray(tokens.mean(axis=1))
vectors["pre_logits"] = features
same = np.array([(labels[neighbors(x)[:, 0]] == labels).mean() for x in vectors.values()])
figure, ax = plt.subplots(figsize=(8, 3))
ax.errorbar(list(vectors), same, np.sqrt(same * (1 - same) / len(images)), marker="o", capsize=3)
ax.set_ylabel("nearest neighbor\nhas the same label")
ax.grid(alpha=0.3)

# %% [markdown]
# ## Other image sizes
# A model takes images of any size divisible by its patch size. Learned positions are resampled. The
# dotted line marks the image size of training; the bars are standard errors.

# %% tags=["long"]
results = [
    evaluate(loaded.model, source, preprocessing=loaded.preprocessing.scaled(size))
    for size in image_sizes
]
figure, ax = plt.subplots(figsize=(8, 3))
accuracies, bars = zip(*((each.accuracy, each.standard_error) for each in results), strict=True)
ax.errorbar(image_sizes, accuracies, bars, marker="o", capsize=3)
ax.axvline(loaded.preprocessing.image_size, color="gray", linestyle=":")
ax.set(xlabel="side of the images, px", ylabel="accuracy", xticks=image_sizes)
ax.grid(alpha=0.3)

# %% [markdown]
# ## Experts
# In a sparse block a router sends each token to k of the experts. `collect` records these choices.
# `statistics` counts them; `uses` has the counts for each image.
#
# [Concepts](../docs/concepts.md) explains the words. [02_routing](02_routing.ipynb) explores the
# routing further.

# %%
batches = vmoe.analysis.in_batches(images, labels[:, None])
statistics = vmoe.analysis.statistics(vmoe.analysis.collect(loaded.model, batches))
for block, counts in statistics.items():
    print(f"block {block}: choices of each expert for the first image: {counts.uses[0]}")

# %% [markdown]
# How often the tokens of the first images choose each expert:

# %%
width_ratios = [1] + [3] * len(statistics)
figure, axes = plt.subplots(
    4, 1 + len(statistics), figsize=(12, 6), width_ratios=width_ratios, sharex="col"
)
for i, row in enumerate(axes):
    row[0].imshow((images[i] + 1) / 2)
    row[0].axis("off")
    for ax, counts in zip(row[1:], statistics.values(), strict=True):
        e = len(counts.uses[i])
        ax.bar(range(e), counts.uses[i], color=expert_colors(e))
        ax.set(ylim=(0, max(x.uses[:4].max() for x in statistics.values())), xticks=range(e))
for ax, block in zip(axes[-1, 1:], statistics, strict=True):
    ax.set_xlabel(f"experts of block {block}")

# %% [markdown]
# ## Other routing
# `vmoe.load(..., routing=...)` changes the routing and keeps the parameters. With a capacity factor
# below 1 there are fewer slots than choices, so some choices are dropped; the priority decides
# which. Differences are relative to the model as trained, with standard errors.

# %%
settings = {
    "dropless": RoutingOverrides(dropless=True),
    "one expert per token": RoutingOverrides(k=1),
    "capacity 0.3, by order": RoutingOverrides(capacity_factor=0.3, priority="order"),
    "capacity 0.3, by gate": RoutingOverrides(capacity_factor=0.3, priority="largest_gate"),
}
print(f"{'as trained':22} accuracy {trained.accuracy:.1%}, dropped {trained.dropped:5.1%}")
for name, routing in settings.items():
    model = vmoe.load(checkpoint, routing=routing).model
    result = evaluate(model, source, preprocessing=loaded.preprocessing)
    change, error = paired_difference(result, trained)
    print(
        f"{name:22} accuracy {result.accuracy:.1%}, dropped {result.dropped:5.1%},",
        f"difference {100 * change:+.1f} ± {100 * error:.1f} points",
    )
