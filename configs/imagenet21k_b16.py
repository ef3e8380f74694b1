"""Pre-training of V-MoE B/16 on ImageNet-21k, as published.

    vmoe train --config imagenet21k_b16 --workdir runs/imagenet21k_b16

Needs ImageNet-21k (21,841 classes; the published head has 21,843 logits) as a folder per class.
`python -m scripts.prepare.folder --whole FOLDER data/imagenet21k` makes the data set from it, in
one split. The config holds 102,400 images out, as published. A batch of 4,096 images needs several
devices, or `--accumulate`. Neither the training time nor the accuracy on ImageNet-21k is published;
fine-tuned, see imagenet1k_b16_384.py and cifar10_b16.py. It has not been trained here.

All numbers are published, except the batch size of evaluations, the number of workers, and how
often metrics, evaluations and checkpoints are written.
"""

from pathlib import Path

from vmoe.config import RoutingOverrides, load, replace
from vmoe.models import model_config

small = load(Path(__file__).with_name("imagenet1k_s32_light.py"))
config = replace(
    small,
    model=model_config("vmoe_b16_every2_e8", num_classes=21_843),
    data=dict(
        name="tfds:./data/imagenet21k:train[102400:]",
        rand_augment=dict(magnitude=20.0),
        mixup=0.5,
    ),
    optim=dict(lr=8e-4),
    batch_size=4096,
    evaluations=(
        replace(
            small.evaluations[0],
            data="tfds:./data/imagenet21k:train[:102400]",
            routing=RoutingOverrides(),
        ),
    ),
)
