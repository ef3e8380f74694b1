"""V-MoE on Fashion-MNIST: 55,000 images of clothing, 28 x 28 pixels, ten classes.

    vmoe train --config fashion_mnist --workdir runs/fashion_mnist
    vmoe evaluate --checkpoint runs/fashion_mnist

Test accuracy of seeds 0, 1, 2 (--seed): 89.83, 90.40, 90.16, mean 90.13; validation 90.18, 90.26,
90.58. The dense counterpart gets 89.54 (89.57, 89.52, 89.54), below every seed of the sparse model;
an MLP 88.90 and gradient-boosted trees 89.45 (scripts/baselines.py --data fashion_mnist). Each run
had one core of an AMD EPYC and takes 14 minutes of CPU time (2026-11-26, jax 0.10.2). On two cores
float sums are ordered differently: 90.16, 90.55, 90.28, and with --model.moe.implementation batched
89.83, 90.44, 90.38.

To be measured again: all were evaluated in the order of the files. In today's shuffled order seed 2
gets 90.15 on test and 90.48 on validation.

Settings were chosen on the validation split with one seed and 3,000 steps. Shifts of one pixel gave
88.4 there, no shifts 87.1. Other changes mattered less than the standard error, 0.45 points.
"""

from vmoe.config import DataConfig, OptimConfig, TrainConfig, WeightDecayConfig
from vmoe.models import model_config

config = TrainConfig(
    model=model_config("vmoe_fashion_mnist"),
    data=DataConfig("fashion_mnist", flip=True, shift=1),
    optim=OptimConfig(
        lr=2e-3, end_lr=2e-5, warmup_steps=200, weight_decay=WeightDecayConfig(kernels=0.05)
    ),
    steps=8_000,
    batch_size=128,
    label_smoothing=0.1,
    log_every=100,
    evaluate_every=1000,
    checkpoint_every=1000,
)
