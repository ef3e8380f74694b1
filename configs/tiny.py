"""A smoke test: a V-MoE of two blocks on the digits.

    vmoe train --config tiny --workdir runs/tiny

It takes about 15 s on 2 cores of an AMD EPYC (2026-11-24). Its accuracy means nothing.
"""

from vmoe.config import DataConfig, MoEConfig, OptimConfig, TrainConfig, ViTConfig

config = TrainConfig(
    model=ViTConfig(
        patch_size=4,
        width=16,
        depth=2,
        mlp_dim=32,
        num_heads=2,
        image_size=8,
        num_classes=10,
        position_std=1.0,
        sparse_blocks=(1,),
        moe=MoEConfig(num_experts=4),
    ),
    data=DataConfig("digits", shift=1, rotate=5.0, mixup=0.1),
    optim=OptimConfig(lr=5e-3, end_lr=5e-5, warmup_steps=20),
    steps=200,
    batch_size=32,
    label_smoothing=0.1,
    log_every=50,
    evaluate_every=100,
    checkpoint_every=100,
)
