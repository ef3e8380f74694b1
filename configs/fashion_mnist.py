"""V-MoE on Fashion-MNIST: 55,000 images of clothing, 28 x 28 pixels, ten classes.

vmoe train --config configs/fashion_mnist.py --workdir runs/fashion_mnist
vmoe evaluate --checkpoint runs/fashion_mnist
"""

from vmoe.config import Data, Decay, MoEConfig, Optim, Train, ViTConfig

config = Train(
    model=ViTConfig(
        patch=7,
        width=64,
        depth=6,
        mlp=128,
        heads=2,
        image_size=28,
        num_classes=10,
        pooling="mean",
        position_std=1.0,  # 0.02, right for long training, starves one this short
        sparse_blocks=(1, 3, 5),
        moe=MoEConfig(experts=8),
    ),
    data=Data("fashion_mnist", flip=True, shift=1),
    optim=Optim(lr=2e-3, warmup=200, decay=Decay(kernels=0.05)),
    steps=8_000,
    batch_size=128,
    label_smoothing=0.1,
    log_every=100,
    evaluate_every=1000,
    checkpoint_every=1000,
)
