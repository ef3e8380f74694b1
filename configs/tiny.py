"""The smallest whole run: a V-MoE of two blocks on the digits, to see that all works.

vmoe train --config configs/tiny.py --workdir runs/tiny
"""

from vmoe.config import Data, MoEConfig, Optim, Train, ViTConfig

config = Train(
    model=ViTConfig(
        patch=4,
        width=16,
        depth=2,
        mlp=32,
        heads=2,
        image_size=8,
        num_classes=10,
        position_std=1.0,
        sparse_blocks=(1,),
        moe=MoEConfig(experts=4),
    ),
    data=Data("digits", shift=1, rotate=5.0, mixup=0.1),
    optim=Optim(lr=5e-3, warmup=20),
    steps=200,
    batch_size=32,
    label_smoothing=0.1,
    log_every=50,
    evaluate_every=100,
    checkpoint_every=100,
)
