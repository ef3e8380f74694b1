# %% [markdown]
# # Where do the patches go?
# In a sparse block a router sends each patch of an image to a few of many experts. This notebook
# looks at what the routers of a trained model have learned: which experts are used, for what, what
# is dropped when they are full, and how much the predictions depend on all this. These are the
# analyses of the V-MoE paper ([arXiv 2106.05974](https://arxiv.org/abs/2106.05974), section 4,
# appendices E and F), step by step, on a small model that comes with the package. Its emoji are
# drawings of Noto Color Emoji ((c) Google, Apache License 2.0) and Twemoji ((c) Twitter, Inc and
# other contributors, CC-BY 4.0).

# %%
address = ""  # where to install vmoe from, if it is not installed; in Colab, for example
if address:
    import subprocess
    import sys

    subprocess.run([sys.executable, "-m", "pip", "install", address], check=True)

# %% [markdown]
# This has not been tried in Colab. Any trained model and data set can stand here: a run folder, a
# published checkpoint, `folder:photos`.

# %% tags=["parameters"]
checkpoint = "vmoe_emoji"
data = "emoji_sample"
split = "test"
images = 128
page_images = 24
removals_shown = True  # on the page
blocks_shown = None  # from early to late

# %%
# %matplotlib inline
import html
from pathlib import Path

import numpy as np
from flax import nnx
from IPython.display import HTML

import vmoe
from vmoe.analysis import collect, concatenate, plots
from vmoe.analysis.effects import removals, without_experts
from vmoe.analysis.patches import find_top_patches
from vmoe.data.sources import open_source, relabel, sample
from vmoe.evaluate.sample import labeled_batches
from vmoe.studies.routing.figures import plots_of
from vmoe.studies.routing.measure import measure_routing
from vmoe.studies.routing.page import write_page

# %% [markdown]
# ## One image
# `capture` returns the logits and, for each sparse block, a record of all that its router decided.
# `nnx.jit` compiles it as a whole; without, it runs operation by operation.

# %%
loaded = vmoe.load(checkpoint)
model, config = loaded.model, loaded.model.config
source = relabel(sample(open_source(data, split), images), loaded.class_names)

image = loaded.preprocess([source[0].image])
logits, records = nnx.jit(vmoe.analysis.capture)(model, image)
print(
    "class:",
    loaded.class_names[source[0].labels[0]],
    "- predicted:",
    loaded.class_names[logits[0].argmax()],
)
for block, record in records.items():
    kept = np.asarray(record.routing.kept)
    print(
        f"block {block}: {record.gates.shape[-1]} experts, {kept.shape[1]} tokens, "
        f"{kept.shape[2]} choices each, {1 - kept.mean():.1%} of the choices dropped"
    )

# %% [markdown]
# ## All images
# `collect` does the same for batches, image by image. The images of a batch compete for slots, so
# the batch size matters.


# %%
def batches(size=64):
    return labeled_batches(model, source, loaded.preprocessing, batch_size=min(size, images))


collected = concatenate(collect(model, batches()))
pixels = np.concatenate([batch[valid] for batch, _, valid in batches()])
accuracy = (collected.logits.argmax(-1) == collected.labels[:, 0]).mean()
print(f"accuracy on {len(pixels)} images: {accuracy:.1%}")

# %% [markdown]
# The expert of each patch: the one with the largest weight, of the experts that had a slot for it.
# A color means the same number in all figures, but experts with the same number in two blocks have
# nothing to do with each other.

# %%
plots.experts_of_patches(pixels, collected, patch_size=config.patch_size, blocks=blocks_shown)

# %% [markdown]
# ## Is it healthy?
# What `vmoe routing` measures: loads, drops, and how many predictions change when the images are
# put in other orders, and so into other groups.

# %%
routing = measure_routing(loaded, source.name, batches, reordered=batches())
blocks = routing.blocks
for i, block in blocks.items():
    print(
        f"block {i}: load {block.load.min():.1%} to {block.load.max():.1%} (even: "
        f"{1 / len(block.load):.1%}), dropped {block.dropped:.1%}, "
        f"gate entropy {block.relative_entropy:.0%} of even gates"
    )
dependent = routing.dependence.changed
print(f"predictions that depend on the other images of a batch: {dependent:.1%}")
for finding in routing.findings or ["nothing is wrong"]:
    print(finding)

# %% [markdown]
# ## What do experts specialize in?
# The share of each class's choices that goes to each expert. The normalized mutual information says
# how much the expert tells about the class. With shuffled classes it is what a router that ignores
# the class would show on so few images.

# %%
plots.experts_by_class(blocks, loaded.class_names, blocks_shown)

# %%
for i, block in blocks.items():
    by_class, class_chance = block.class_information(config.num_classes)
    by_position, position_chance = block.position_information
    print(
        f"block {i}: class {by_class:.3f} (chance {class_chance:.3f}), "
        f"position {by_position:.3f} (chance {position_chance:.3f})"
    )

# %% [markdown]
# The patches with the largest gates of each expert:

# %%
plots.top_patches(
    find_top_patches(batches(), collect(model, batches()), config.patch_size), blocks_shown
)

# %% [markdown]
# ## How sure are the routers?
# The gates of the first, second and further choices, before anything is dropped.

# %%
plots.weight_histograms(blocks, blocks_shown)

# %% [markdown]
# Do some experts share their tokens? For each block, the pair that tokens choose most often, and
# how often they would choose it if each choice followed the load alone.

# %%
for i, block in blocks.items():
    pairs = np.triu(block.coactivation, k=1) / block.tokens
    a, b = np.unravel_index(pairs.argmax(), pairs.shape)
    by_load = 2 * block.load[a] * block.load[b] / (1 - (block.load**2).sum())
    print(
        f"block {i}: experts {a} and {b}, {pairs[a, b]:.1%} of the tokens (by load {by_load:.1%})"
    )

# %% [markdown]
# ## When experts are full
# With Batch Prioritized Routing (section 3.4) the tokens with the largest gates get their slots
# first. Here are some images at smaller and smaller capacity. `plots_of` has the figures that run
# the model under other settings, as `vmoe routing --plots FOLDER` draws them.

# %%
figures = plots_of(config)
figures["kept_patches"](routing)

# %% [markdown]
# The accuracy against the number of slots, with two baselines: random priority, and every choice
# dropped. A drop matters only if the head can see it: with a class token, the head reads nothing
# but that token after the last block.

# %%
figures["capacity_curves"](routing)

# %% [markdown]
# ## Other settings
# First k, the number of experts per token, changes at inference (appendix E). Then one router at a
# time is replaced by a random one, to see how much the accuracy depends on what it has learned.

# %%
figures["k_at_inference"](routing)

# %%
figures["random_routers"](routing)

# %% [markdown]
# One expert at a time is taken away, in two ways: its output is zero, or it cannot be chosen, so
# that its tokens go elsewhere. The experts whose removal changes most predictions:

# %%
own = collected.logits.argmax(-1)
without = without_experts(model, batches(), removals(config))
changed = {removal: (logits.argmax(-1) != own).mean() for removal, logits in without.items()}
for removal in sorted(changed, key=changed.get, reverse=True)[:8]:
    print(
        f"block {removal.block}, expert {removal.expert}, {removal.way}: "
        f"{changed[removal]:.1%} of the predictions change"
    )

# %% [markdown]
# ## Explore it
# The page of `vmoe routing --out report.html`, with some of the images: click a patch and follow
# it through the blocks, drag the capacity, choose the priority, remove an expert.

# %%
page = Path("report.html")
write_page(page, [routing], images=page_images, remove=removals_shown)
text = html.escape(page.read_text())
HTML(f'<div><iframe srcdoc="{text}" style="width: 100%; height: 60em; border: 0"></iframe></div>')

# %% [markdown]
# A picture of it, for viewers that leave out scripts:
#
# ![Images with patches colored by expert, and the path of one patch](routing_page.png)
