"""V-MoE-15B, the paper's largest model: 48 blocks, 32 experts in every second one.

    vmoe plan --config configs/vmoe_15b.py --devices 128
    vmoe train --config configs/vmoe_15b.py --workdir runs/vmoe_15b --distributed

14,705,071,769 parameters, of which 1,723,322,009 are active per token (`vmoe plan`); the paper's
count is 14,705.1 million. It has not been trained here, so no accuracy is known.

From the paper (arXiv 2106.05974): the model's shape, 32 experts with k = 2, 29,593 classes, no
pre-logits layer; from its JFT recipes the batch size of 4,096, 10,000 warmup steps, and weight
decay of 0.1 on all parameters.

Our choice, where we found no source: the number of steps, the learning rate and its final value,
sigmoid cross-entropy with a head bias of -10, gradient clipping to a global norm of 10 (the paper's
value for H/14), the default capacity factor, bfloat16 for the model and for dispatched rows, remat.

Different from the paper: it trains the 15B model with Adafactor and a reciprocal square root
schedule. vmoe has neither yet; this config uses AdamW, whose moments take twice the memory of the
parameters, and a linear schedule. JFT-300M is private: replace `folder:jft` by a folder of your own
images, one subfolder per class.
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
