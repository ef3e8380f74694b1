"""V-MoE on Fashion-MNIST: 55,000 images of clothing, 28 x 28 pixels, ten classes.

    vmoe train --config fashion_mnist --workdir runs/fashion_mnist
    vmoe evaluate --checkpoint runs/fashion_mnist

Test accuracy of seeds 0, 1, 2 (--seed): 89.61, 90.21, 90.28, mean 90.03; validation 90.20, 90.38,
90.74. The dense counterpart gets 89.74 (89.09, 90.19, 89.95); an MLP 88.90 and gradient-boosted
trees 89.45 (scripts/experiments/baselines.py --data fashion_mnist). Each run had one core of an
Intel Xeon (2026-11-29, jax 0.10.2). A run takes 14 minutes of CPU time on an AMD EPYC.

Machines order float sums differently: on an AMD EPYC (2026-11-26, evaluated in the order of the
files) the same seeds gave 89.83, 90.40, 90.16 with one core, 90.16, 90.55, 90.28 with two, and
89.83, 90.44, 90.38 with --model.moe.experts.implementation batched. The packaged model is seed 2 of
the first of these: 90.15 in today's shuffled order, and 90.48 on validation.

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
