"""A small convolutional digit classifier that scores the shipped model offline."""

from __future__ import annotations

from importlib.resources import as_file, files

import torch.nn.functional as F
from torch import Tensor, nn

FILE = "digits-classifier.safetensors"


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers over 32x32 grey digits.

    `features` [N, 64] are a feature space for Frechet distances and similar scores. The forward
    pass returns the ten logits.
    """

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, self.feature_dim)
        self.logits = nn.Linear(self.feature_dim, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 [N, 1, 32, 32] to [N, 64]: the hidden layer before its nonlinearity."""
        x = images.to(self.conv0.weight.dtype) / 127.5 - 1
        for conv in (self.conv0, self.conv1, self.conv2):
            x = F.max_pool2d(F.silu(conv(x)), 2)
        return self.hidden(x.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 [N, 1, 32, 32] to logits [N, 10]."""
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        """Map features [N, 64] to logits [N, 10]."""
        return self.logits(F.dropout(F.silu(features), 0.3, self.training))


def load_digit_classifier() -> DigitClassifier:
    """Return the shipped classifier, in evaluation mode, float32."""
    from safetensors.torch import load_file

    net = DigitClassifier()
    with as_file(files("erk_guid") / "data" / FILE) as path:
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False)
