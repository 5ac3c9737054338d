"""A PyTorch module, as it is, trained with K-FAC on images of digits.

Nothing in `network` knows of K-FAC: its layers are found where they are called.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac_xp.integrations.torch import KFAC


def network():
    """A small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def main(epochs=4, batch_size=100):
    """Train on 1200 images, and print the mean loss of each epoch."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    images = images.reshape(-1, 1, 8, 8)

    module = network()
    optimizer = KFAC(
        module,
        images[:8],
        "cross_entropy",
        learning_rate=0.1,
        damping=0.1,
        norm_constraint=3e-3,
        invert_every=3,
    )
    print(optimizer.model.report, "\n")
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(1200).reshape(-1, batch_size)
        losses = [float(optimizer.step(images[i], labels[i]).loss) for i in order]
        print(f"epoch {epoch}  mean loss {np.mean(losses):.4f}")
    with torch.no_grad():
        found = module(images[1200:]).argmax(1)
    print(f"accuracy on {len(found)} others: {(found == labels[1200:]).float().mean():.3f}")


if __name__ == "__main__":
    main()
