"""Pre-training on the words of emoji at 32 px: 1,540 drawings by one vendor, several labels each.

    python -m scripts.prepare.emoji data/emoji
    vmoe train --config emoji_pretrain --workdir runs/emoji_pretrain

A label is a word of the emoji's name or sub-category; 99 words are frequent enough. The loss is a
sigmoid per word. scripts/experiments/miniature.py trains it with three seeds, probes it and
fine-tunes it (emoji_finetune.py); docs/results/transfer.md has the results.

The other settings are as in emoji.py, except for the learning rate. It was chosen on the validation
split, with seed 0 and 900 steps. Cross-entropy after 300 steps and at the end: 3.60 and stopped
with 0.001, 3.42 and 3.09 with 0.002, 3.52 and 2.92 with 0.004, 3.48 and 3.10 with 0.008, where one
expert died.
"""

import math
from pathlib import Path

from vmoe.config import load, replace

NUM_WORDS = 99

emoji = load(Path(__file__).with_name("emoji.py"))
config = replace(
    emoji,
    model=dict(image_size=32, num_classes=NUM_WORDS, head_bias=-math.log(NUM_WORDS)),
    data=dict(name="manifest:data/emoji/google_words.csv", shift=3),
    optim=dict(lr=4e-3, end_lr=4e-5),
    steps=1_600,
    loss="sigmoid",
    label_smoothing=0.0,
)
