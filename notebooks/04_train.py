# %% [markdown]
# # Train a V-MoE
#
# This notebook trains a V-MoE in Python, from the data to a prediction: a config, a run folder,
# metrics, an evaluation under several routing settings. Then it resumes the run, and trains on
# other images, in the two forms that your own images can have.
# [Concepts](../docs/concepts.md) explains the words.
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/04_train.ipynb`.

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
steps = 800  # training steps on digits
own_steps = 150  # training steps on your own images
depth = 4  # blocks of the model; every second block is sparse, the last one included
folder = "runs"  # for all files; delete it to start again

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import vmoe
from vmoe.analysis.colors import expert_colors
from vmoe.config import (
    DataConfig,
    MoEConfig,
    OptimConfig,
    PreprocessingConfig,
    RoutingOverrides,
    TrainConfig,
    ViTConfig,
    WeightDecayConfig,
    replace,
)
from vmoe.data.sources import SPLITS, open_source
from vmoe.evaluate import evaluate, paired_difference
from vmoe.train import train

folder = Path(folder)
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Data
# `digits` comes with scikit-learn: handwritten digits of 8 x 8 pixels. The split never changes.

# %%
sources = {split: open_source("digits", split) for split in SPLITS}
print({split: len(source) for split, source in sources.items()}, "images")
figure, axes = plt.subplots(1, 10, figsize=(12, 1.6))
for i, ax in enumerate(axes):
    ax.imshow(sources["train"][i].image)
    ax.set_title(sources["train"].class_names[sources["train"].labels[i]])
    ax.axis("off")

# %% [markdown]
# ## Config
# One `TrainConfig` describes a whole run. The model is a ViT with eight experts instead of the MLP
# in every second block.

# %%
config = TrainConfig(
    model=ViTConfig(
        patch_size=2,
        width=64,
        depth=depth,
        mlp_dim=128,
        num_heads=4,
        image_size=8,
        num_classes=10,
        position_std=1.0,
        sparse_blocks=tuple(range(1 - depth % 2, depth, 2)),
        moe=MoEConfig(num_experts=8),
    ),
    data=DataConfig("digits", shift=1),
    optim=OptimConfig(
        lr=2e-3,
        end_lr=2e-5,
        warmup_steps=steps // 20,
        weight_decay=WeightDecayConfig(kernels=0.05),
        grad_clip_norm=1.0,
    ),
    steps=steps,
    batch_size=32,
    label_smoothing=0.1,
)

# %% [markdown]
# `replace` returns a changed config; a dict changes fields of a nested config. A wrong name or
# value raises an error at once.

# %%
config = replace(
    config,
    log_every=max(1, steps // 20),
    evaluate_every=max(1, steps // 5),
    checkpoint_every=max(1, steps // 2),
    model=dict(moe=dict(router=dict(k=2, capacity_factor=1.05))),
)

# %% [markdown]
# ## Train
# `train` writes everything into the run folder and returns the last evaluation, on the validation
# split. If you interrupt the kernel, it saves a checkpoint, and the same call resumes from it.

# %% tags=["long"]
workdir = folder / "digits"
evaluations = train(config, workdir)
print(f"validation accuracy {evaluations[0].result.accuracy:.1%}")
print("run folder:", *sorted(path.name for path in workdir.glob("[a-z]*")))

# %% [markdown]
# ## Metrics
# The run folder has the metrics as CSV files and for TensorBoard. A choice is dropped if its expert
# has no slot left. [The run folder](../docs/run_folder.md) explains each column.


# %%
def read(name):
    """A CSV file of the run as a table."""
    return np.genfromtxt(
        workdir / name, delimiter=",", names=True, deletechars="", dtype=None, encoding="utf-8"
    )


metrics, validation, experts = read("metrics.csv"), read("evaluations.csv"), read("experts.csv")
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
left.plot(metrics["step"], metrics["loss"])
left.set_ylabel("training loss")
middle.plot(metrics["step"], metrics["accuracy"], label="training batches")
middle.plot(validation["step"], validation["accuracy"], "o-", label="validation")
middle.set_ylabel("accuracy")
middle.legend()
for block in config.model.sparse_blocks:
    right.plot(metrics["step"], metrics[f"block{block}/dropped"], label=f"block {block}")
right.set_ylabel("choices dropped")
right.legend()
for ax in (left, middle, right):
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)

# %% [markdown]
# The load of an expert is its share of the choices in one batch. The dotted line marks a uniform
# load, which the auxiliary losses favor.

# %%
blocks, colors = config.model.sparse_blocks, expert_colors(config.model.moe.num_experts)
figure, (axes,) = plt.subplots(
    1, len(blocks), figsize=(12, 3), sharey=True, squeeze=False, layout="constrained"
)
for block, ax in zip(blocks, axes, strict=True):
    for e, color in enumerate(colors):
        rows = experts[(experts["block"] == block) & (experts["expert"] == e)]
        ax.plot(rows["step"], rows["load"], color=color, label=e)
    ax.axhline(1 / len(colors), color="gray", linestyle=":")
    ax.set(xlabel="step", title=f"block {block}")
    ax.grid(alpha=0.3)
axes[0].set_ylabel("load")
axes[-1].legend(title="expert", ncols=4, fontsize=8)
plt.show()

# %% [markdown]
# ## Evaluate
# The test split was not used until now. Routing can be changed without retraining: here half the
# capacity, then dropless. Differences are relative to the unmodified model, with standard errors.

# %%
loaded = vmoe.load(workdir)
trained = evaluate(loaded.model, sources["test"])
print(
    f"as trained        accuracy {trained.accuracy:.2%} ± {trained.standard_error:.2%},",
    f"dropped {trained.dropped:.1%}",
)
settings = {
    "half the capacity": RoutingOverrides(capacity_factor=0.5),
    "dropless": RoutingOverrides(dropless=True),
}
for name, routing in settings.items():
    result = evaluate(vmoe.load(workdir, routing=routing).model, sources["test"])
    change, error = paired_difference(result, trained)
    print(
        f"{name:17} accuracy {result.accuracy:.2%}, dropped {result.dropped:.1%},",
        f"difference {100 * change:+.2f} ± {100 * error:.2f} points",
    )

# %% [markdown]
# ## Predict
# `preprocess` takes pixels or paths of image files. The softmax of the logits gives probabilities.

# %%
example = sources["test"][0]
probabilities = jax.nn.softmax(jax.jit(loaded.model)(loaded.preprocess([example.image])))[0]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
left.imshow(example.image)
left.axis("off")
right.bar(loaded.class_names, probabilities)
right.set(xlabel="class", ylabel="probability", ylim=(0, 1))
print(f"predicted {loaded.class_names[probabilities.argmax()]}, labeled {example.labels[0]}")

# %% [markdown]
# ## Resume
# The same call resumes a run. This run is complete, so `train` only evaluates it, and its metrics
# do not change.

# %%
before = (workdir / "metrics.csv").read_bytes()
train(config, workdir)
print("metrics unchanged:", (workdir / "metrics.csv").read_bytes() == before)

# %% [markdown]
# ## Images of your own: arrays
# One file holds the images (uint8), the labels and the class names. The example is the packaged
# sample of Fashion-MNIST, with three classes instead of ten.

# %%
sample = open_source("fashion_mnist_sample", "test")
classes = ["bag", "clothing", "shoe"]
kinds = {"Bag": 0, "Sandal": 2, "Sneaker": 2, "Ankle boot": 2}
labels = np.array([kinds.get(sample.class_names[label], 1) for label in sample.labels])
np.savez(folder / "own.npz", images=sample.images, labels=labels, class_names=classes)

# %% [markdown]
# ## Images of your own: a folder
# The other form: image files, in one folder for each class.

# %%
for i, (pixels, label) in enumerate(zip(sample.images, labels, strict=True)):
    path = folder / "photos" / classes[label] / f"{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
print(path)

# %% [markdown]
# Arrays: 80% of each class is for training, 10% for validation and 10% for test. For files, a hash
# of the name decides, so these are the shares on average. Each image is always in the same split.
# Arrays and folders that are already split keep their splits.

# %%
names = [f"arrays:{folder / 'own.npz'}", f"folder:{folder / 'photos'}"]
for name in names:
    print({split: len(open_source(name, split)) for split in SPLITS}, name)

# %% [markdown]
# The config needs the number of classes, and an image size divisible by the patch size. Images of
# other sizes are resized; with `keep_aspect` the shorter side is, and the central square is cut
# out.

# %%
own = replace(
    config,
    model=dict(num_classes=len(classes), image_size=28, patch_size=7),
    data=DataConfig(
        names[1], preprocessing=PreprocessingConfig(keep_aspect=True), flip=True, shift=2
    ),
    optim=dict(warmup_steps=own_steps // 20),
    steps=own_steps,
)
train(own, folder / "own")
loaded, test = vmoe.load(folder / "own"), open_source(names[1], "test")
result = evaluate(loaded.model, test, preprocessing=loaded.preprocessing)
print(
    f"accuracy {result.accuracy:.1%} ± {result.standard_error:.1%} on {result.images} test images"
)

# %% [markdown]
# The first test images of each class, one class per row, with their predictions. Errors are red.

# %%
figure, axes = plt.subplots(len(loaded.class_names), 8, figsize=(12, 5), squeeze=False)
for label, row in enumerate(axes):
    for i, ax in zip(np.flatnonzero(result.per_example.labels[:, 0] == label), row, strict=False):
        prediction = result.per_example.predictions[i]
        ax.imshow((loaded.preprocess([test[i].image])[0] + 1) / 2)
        color = "black" if prediction == label else "firebrick"
        ax.set_title(loaded.class_names[prediction], color=color)
for ax in axes.flat:
    ax.axis("off")
