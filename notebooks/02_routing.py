# %% [markdown]
# # Where do the patches go?
#
# In a sparse block a router sends each patch of an image to a few of many experts. This notebook
# explores the routing of a trained model: which experts are used, which images and patches they
# process, which choices are dropped when experts are full, and how much the predictions depend on
# the routing. It follows the analyses of the V-MoE paper
# ([arXiv 2106.05974](https://arxiv.org/abs/2106.05974), section 4, appendices E and F) on a small
# model that comes with the package. [Concepts](../docs/concepts.md) explains the words.
#
# The images are drawings from Noto Color Emoji ((c) Google, Apache License 2.0) and Twemoji
# ((c) Twitter, Inc and other contributors, CC-BY 4.0).
#
# To run this notebook, install Jupyter into the environment of vmoe and open it:
# `pip install jupyterlab`, then `jupyter lab notebooks/02_routing.ipynb`.

# %% [markdown]
# ## Settings
# `checkpoint` can be any sparse model: a name from `vmoe models --pretrained`, a run folder, a file
# or a URL. `data` is a data set with the classes of the model.
#
# To explore a published V-MoE on your own photos, install vmoe with the extra `remote` and set
# ```python
# checkpoint = "vmoe_s32_last2_e8.in1k_light"  # 228 MB; not tried with the real host
# data = "folder:photos"  # photos/test/CLASS/*.jpg
# images = 64
# removals_shown = False  # True takes 32 more predictions of each image
# ```
# where CLASS is a class of ImageNet: its number in WordNet, such as n02123045, or its name in
# `loaded.class_names`.

# %% tags=["parameters"]
checkpoint = "vmoe_emoji"
data = "emoji_sample"
split = "test"
images = 128
page_images = 24  # images on the page at the end
removals_shown = True  # show on the page what is predicted without each expert
blocks_shown = None  # sparse blocks in the figures; None for some from early to late

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
from vmoe.data.reading import Reading
from vmoe.data.sources import open_source, relabel, sample
from vmoe.passes import inputs
from vmoe.studies.routing.figures import plots_of
from vmoe.studies.routing.measure import measure_routing
from vmoe.studies.routing.page import write_page

# %% [markdown]
# ## One image
# `capture` returns the logits and, for each sparse block, a record of the decisions of its router.
# `nnx.jit` compiles it; without `nnx.jit` it runs one operation at a time.

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
# `collect` records the same for batches. Images of one batch compete for slots, so the batch size
# matters.


# %%
def batches(size=64):
    return inputs(model, source, loaded.preprocessing, Reading(min(size, images)))


collected = concatenate(collect(model, batches()))
pixels = np.concatenate([batch[valid] for batch, _, valid in batches()])
accuracy = (collected.logits.argmax(-1) == collected.labels[:, 0]).mean()
print(f"accuracy on {len(pixels)} images: {accuracy:.1%}")

# %% [markdown]
# The color of a patch shows its expert: among the experts that had a slot for the patch, the one
# with the largest weight. All figures use the same color for the same expert number. Experts with
# the same number in two blocks are unrelated.

# %%
plots.experts_of_patches(pixels, collected, patch_size=config.patch_size, blocks=blocks_shown)

# %% [markdown]
# ## Is it healthy?
# As `vmoe routing` prints: expert load, drop rate, and how many predictions change when the batches
# are shuffled.

# %%
routing = measure_routing(loaded, source.name, batches, reordered=batches())
blocks = routing.blocks
for i, block in blocks.items():
    print(
        f"block {i}: load {block.load.min():.1%} to {block.load.max():.1%} (uniform: "
        f"{1 / len(block.load):.1%}), dropped {block.dropped:.1%}, "
        f"gate entropy {block.relative_entropy:.0%} of the maximum"
    )
dependent = routing.dependence.changed
print(f"predictions that depend on the other images of a batch: {dependent:.1%}")
for finding in routing.findings or ["no problem found"]:
    print(finding)

# %% [markdown]
# ## What do experts specialize in?
# The figure shows which share of the choices of each class goes to each expert. The normalized
# mutual information measures how much an expert tells about the class or about the position. The
# baseline with shuffled labels or positions shows the value expected by chance for this number of
# images.

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
# The top patches of each expert, those with the largest gates:

# %%
plots.top_patches(
    find_top_patches(batches(), collect(model, batches()), config.patch_size), blocks_shown
)

# %% [markdown]
# ## How sure are the routers?
# The gates of the first and second choices, before any choice is dropped.

# %%
plots.weight_histograms(blocks, blocks_shown)

# %% [markdown]
# Which experts do tokens choose together? For each block, this prints the most frequent pair, and
# how frequent it would be if every choice were drawn by load alone.

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
# With Batch Prioritized Routing (section 3.4 of the paper) the tokens with the largest gates get
# their slots first. The figure shows which patches keep a slot as the capacity decreases.
# `plots_of` returns the functions behind `vmoe routing --plots FOLDER`.

# %%
figures = plots_of(config)
figures["kept_patches"](routing)

# %% [markdown]
# Accuracy against the number of slots. Two baselines: random priority, and all choices dropped. In
# a model with a class token, drops of patch tokens in the last block cannot change the logits.

# %% tags=["long"]
figures["capacity_curves"](routing)

# %% [markdown]
# ## Other settings
# The first figure changes k, the number of experts per token, at inference (appendix E). The second
# one replaces one router at a time by a random router: how much accuracy is due to what the router
# has learned?

# %%
figures["k_at_inference"](routing)

# %%
figures["random_routers"](routing)

# %% [markdown]
# One expert at a time is removed, in two ways. *Ablated*: its output is zero. *Masked*: no token
# can choose it, so its tokens go to other experts. These removals change most predictions:

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
# This is the page of `vmoe routing --out report.html`, with some of the images. Click a patch and
# follow it through the blocks, drag the capacity, choose the priority, or remove an expert.

# %%
page = Path("report.html")
write_page(page, [routing], images=page_images, remove=removals_shown)
text = html.escape(page.read_text())
HTML(f'<div><iframe srcdoc="{text}" style="width: 100%; height: 60em; border: 0"></iframe></div>')

# %% [markdown]
# A picture of the page, for viewers that do not run scripts:
#
# ![Images with patches colored by expert, and the path of one patch](routing_page.png)
