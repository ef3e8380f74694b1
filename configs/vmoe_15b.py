"""V-MoE-15B, the paper's largest model: 48 blocks, 32 experts in every second one.

    vmoe plan --config configs/vmoe_15b.py --devices 128
    vmoe train --config configs/vmoe_15b.py --workdir runs/vmoe_15b --distributed

14,705,071,769 parameters, of which a token meets 1,723,322,009 (`vmoe plan`); the paper's count is
14,705.1 million. It has not been trained here: there is no accuracy to expect.

The paper's (arXiv 2106.05974): the model's shape, 32 experts of which a token gets 2, 29,593
classes, no pre-logits; of its JFT recipes the batch of 4,096, 10,000 steps of warmup, and weight
decay of 0.1 on all parameters.

Ours, since no source at hand states them: how many steps, the learning rate and its end, sigmoid
cross-entropy with the head's bias at -10, the global clip of 10 (which the paper has for H/14), the
capacity factor (the default), bfloat16 for the implementation and for rows on their way, remat.

Not the paper's: the 15B model was trained with Adafactor under a reciprocal square root schedule.
vmoe has neither yet; AdamW with a linear decay stands in, whose moments take twice the memory of
the parameters. JFT-300M is private: `folder:jft` is a folder of your own images by class.
"""

from vmoe.config import (
    DataConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    ViTConfig,
    WeightDecayConfig,
)

config = TrainConfig(
    model=ViTConfig(
        patch_size=14,
        width=1408,
        depth=48,
        mlp_dim=6400,
        num_heads=16,
        image_size=224,
        num_classes=29_593,
        head_bias=-10.0,
        sparse_blocks=tuple(range(1, 48, 2)),
        moe=MoEConfig(num_experts=32, transfer_dtype="bfloat16"),
        dtype="bfloat16",
        remat=True,
    ),
    data=DataConfig("folder:jft", flip=True),
    optim=OptimConfig(
        lr=1e-4,
        schedule="linear",
        end_lr=1e-5,
        warmup_steps=10_000,
        weight_decay=WeightDecayConfig(kernels=0.1, others=0.1),
        grad_clip_norm=10.0,
    ),
    steps=500_000,
    batch_size=4096,
    loss="sigmoid",
    log_every=100,
    evaluate_every=10_000,
    checkpoint_every=5_000,
)
