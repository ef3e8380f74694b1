"""V-MoE on the 1,797 handwritten digits of 8 x 8 pixels."""

from vmoe.config import Data, MoEConfig, Optim, Train, ViTConfig

config = Train(
    model=ViTConfig(
        patch=2,
        width=64,
        depth=4,
        mlp=128,
        heads=4,
        image_size=8,
        num_classes=10,
        position_std=1.0,  # 0.02, right for long training, starves one this short
        sparse_blocks=(1, 3),
        moe=MoEConfig(experts=8),
    ),
    data=Data("digits", shift=1),
    optim=Optim(lr=2e-3, warmup=100, weight_decay=0.05, clip=1.0),
    steps=2200,
    batch_size=32,
    label_smoothing=0.1,
    log_every=100,
    evaluate_every=550,
    checkpoint_every=550,
)
