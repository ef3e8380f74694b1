# %% [markdown]
# # Fine-tune: dense to sparse
#
# Sparse upcycling ([arXiv 2212.05055](https://arxiv.org/abs/2212.05055)) turns a trained dense ViT
# into a V-MoE: copies of its MLPs become experts, and its logits stay the same. This notebook takes
# a ViT trained on clothing, upcycles it, fine-tunes both models on handwritten digits for the same
# number of steps, and compares them. [Concepts](../docs/concepts.md) explains the words.
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/03_finetune.ipynb`.

# %% [markdown]
# ## Settings
# The learning rate was chosen among 0.001, 0.002 and 0.004, by the mean accuracy of both models on
# the validation split with two seeds. `parent` can be any dense model that `vmoe.load` opens, and
# that knows the classes of `fashion_mnist_sample`.

# %% tags=["parameters"]
parent = "vit_fashion_mnist"  # a trained dense model
steps = 600  # of fine-tuning, for each model
learning_rate = 0.002
folder = "runs"  # for all files; delete it to start again

# %%
import dataclasses
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import vmoe
from vmoe.analysis.colors import expert_colors
from vmoe.config import DataConfig, OptimConfig, TrainConfig, replace
from vmoe.costs.flops import cost
from vmoe.data.sources import open_source
from vmoe.evaluate import evaluate, paired_difference
from vmoe.train import InitFrom, train

folder = Path(folder)
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## From dense to sparse
# `upcycle` replaces the MLP of every second block by eight copies of it, the experts, and adds a
# new gate. The router sends each token to two experts, whose combine weights add up to 1.

# %%
dense = vmoe.load(parent)
upcycled = dataclasses.replace(dense, model=vmoe.upcycle(dense.model, num_experts=8))
parents = {"dense": dense, "upcycled": upcycled}
for name, parent in parents.items():
    config = parent.model.config
    costs = cost(config)
    print(
        f"{name:8} sparse blocks {config.sparse_blocks}: {costs.parameters:,} parameters,",
        f"{costs.flops_per_image / 1e6:.2f} MFLOPs per image",
    )

# %% [markdown]
# Before fine-tuning, both models compute the same function up to rounding: all experts of a block
# are equal, so it does not matter which of them process a token.

# %%
clothing = open_source("fashion_mnist_sample", "test")
images = dense.preprocess(clothing.images)
logits = {name: jax.jit(parent.model)(images) for name, parent in parents.items()}
for name in parents:
    right = logits[name].argmax(1) == clothing.labels
    print(f"{name:8} {right.sum()} of {len(right)} images of clothing correct")
print(f"largest difference of logits: {abs(logits['dense'] - logits['upcycled']).max():.1e}")

# %% [markdown]
# ## Another task
# The digits have 8 x 8 pixels. The pipeline resizes them to the image size of the model.

# %%
digits = open_source("digits", "train")
figure, axes = plt.subplots(1, 10, figsize=(12, 1.6))
for i, ax in enumerate(axes):
    ax.imshow((dense.preprocess([digits[i].image])[0] + 1) / 2)
    ax.set_title(digits.class_names[digits.labels[i]])
    ax.axis("off")

# %% [markdown]
# ## Fine-tune
# Both runs have the same config except for the model. Labels are smoothed as in the training of the
# parent.

# %%
config = TrainConfig(
    model=dense.model.config,
    data=DataConfig("digits", shift=2),
    optim=OptimConfig(lr=learning_rate, end_lr=learning_rate / 100, warmup_steps=steps // 12),
    steps=steps,
    batch_size=32,
    label_smoothing=0.1,
    log_every=max(1, steps // 12),
    evaluate_every=max(1, steps // 4),
    checkpoint_every=steps,
)

# %% [markdown]
# A run can start from any trained model that `vmoe.load` opens. Both data sets have ten classes, so
# the head would be kept; `new_head=True` replaces it.

# %% tags=["long"]
for name, parent in parents.items():
    start = folder / "parents" / name
    if not start.exists():  # it exists if the notebook is run again
        parent.save(start)
    init = InitFrom(str(start), new_head=True)
    train(replace(config, model=parent.model.config), folder / name, init=init)

# %% [markdown]
# ## Compare
# Training loss, and accuracy on the 180 images of the validation split, with standard errors.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3), layout="constrained")
for name in parents:
    tables = [
        np.genfromtxt(
            folder / name / table, delimiter=",", names=True, dtype=None, encoding="utf-8"
        )
        for table in ("metrics.csv", "evaluations.csv")
    ]
    metrics, validation = map(np.atleast_1d, tables)
    accuracy = validation["accuracy"]
    errors = np.sqrt(accuracy * (1 - accuracy) / validation["images"])
    left.plot(metrics["step"], metrics["loss"], label=name)
    right.errorbar(validation["step"], accuracy, errors, marker="o", capsize=3, label=name)
left.set(xlabel="step", ylabel="training loss")
right.set(xlabel="step", ylabel="validation accuracy")
for ax in (left, right):
    ax.grid(alpha=0.3)
    ax.legend()

# %% [markdown]
# No setting was chosen on the test split, so its accuracy is an unbiased estimate. The standard
# error of the difference covers the sampling of test images. It does not cover the spread between
# training seeds.

# %%
tuned = {name: vmoe.load(folder / name).model for name in parents}
results = {name: evaluate(tuned[name], open_source("digits", "test")) for name in parents}
for name, result in results.items():
    print(
        f"{name:8} test accuracy {result.accuracy:.2%} ± {result.standard_error:.2%}"
        f" on {result.images} images"
    )
difference, error = paired_difference(results["upcycled"], results["dense"])
verdict = "within" if abs(difference) <= 2 * error else "beyond"
print(
    f"upcycled minus dense: {100 * difference:+.2f} ± {100 * error:.2f} points,",
    f"{verdict} two standard errors of zero",
)

# %% [markdown]
# ## How the experts changed
# The experts of a block start equal. This prints the mean distance between the first kernel of an
# expert and the mean of these kernels over the experts, relative to the norm of the mean.

# %%
for stage, model in {"before": upcycled.model, "after": tuned["upcycled"]}.items():
    for i in model.config.sparse_blocks:
        kernels = np.asarray(model.blocks[i].mlp.experts.up.kernel[...])
        mean = kernels.mean(axis=0)
        distances = [np.linalg.norm(kernel - mean) / np.linalg.norm(mean) for kernel in kernels]
        print(f"block {i} {stage} fine-tuning: {np.mean(distances):.1%} on average")

# %% [markdown]
# The load of an expert is its share of all choices, here on the test split. The dotted line marks a
# uniform load.

# %%
totals = results["upcycled"].totals
figure, (axes,) = plt.subplots(
    1, len(totals), figsize=(12, 2.5), sharey=True, squeeze=False, layout="constrained"
)
for ax, (block, total) in zip(axes, totals.items(), strict=True):
    e = len(total.load)
    ax.bar(range(e), total.load, color=expert_colors(e))
    ax.axhline(1 / e, color="gray", linestyle=":")
    ax.set(title=f"block {block}", xlabel="expert", xticks=range(e))
axes[0].set_ylabel("load")
plt.show()
