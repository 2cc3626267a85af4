"""DINOv2 ViT-L/14 through torch.hub: ``fd_dinov2``."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from erk_guid.metrics.detectors.base import (
    DetectorError,
    identify,
    in_colour,
    register_detector,
)
from erk_guid.metrics.detectors.weights import check_weights, fetch_weights, first_line

DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINO_COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"
"""Which code is run: the newest of DINOv2's main branch when this was written (August 2025)."""
DINO_REPOSITORY = f"facebookresearch/dinov2:{DINO_COMMIT}"
DINO_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2_input(images: Tensor) -> Tensor:
    """Return DINOv2's input for FD-DINOv2: uint8 [N, 1 or 3, H, W] to float32 [N, 3, 224, 224].

    The steps: bicubic with antialiasing to 224x224 in floating point, without rounding or
    clipping; then / 255 and ImageNet's mean and deviation. EDM2's reference statistics were made
    in the same way.
    """
    x = torch.nn.functional.interpolate(
        in_colour(images).to(torch.float32), (DINO_SIZE, DINO_SIZE), mode="bicubic", antialias=True
    )
    mean = x.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (x / 255 - mean) / std


class _DINOv2:
    """DINOv2 ViT-L/14 through torch.hub (Oquab et al. 2023)."""

    name = "fd_dinov2"
    feature_dim = 1024
    preprocessing = "bicubic with antialias to 224x224 unrounded, ImageNet mean and deviation"

    def __init__(self, device: torch.device, weights: Path | None) -> None:
        path = weights or fetch_weights(self.name, DINO_URL)
        state = check_weights(self.name, path)
        self.weights = identify(path)
        where = Path(torch.hub.get_dir()) / f"facebookresearch_dinov2_{DINO_COMMIT}"
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.filterwarnings("ignore", message="xFormers")
                # The hub would ask about trust, and look the reference up among branches, where
                # a commit is not found. The hash says more than both.
                net = torch.hub.load(
                    DINO_REPOSITORY, "dinov2_vitl14", pretrained=False, trust_repo=True,
                    skip_validation=True, verbose=False,
                )  # fmt: skip
        except Exception as error:  # the hub runs the repository's code, which may raise anything
            raise DetectorError(
                f"{self.name} needs DINOv2's code, which could not be loaded "
                f"({first_line(error)}). Put a checkout of commit {DINO_COMMIT} of "
                f"https://github.com/facebookresearch/dinov2 at {where}"
            ) from error
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise DetectorError(
                f"{path} does not hold the weights of DINOv2 ViT-L/14: {first_line(error)}"
            ) from error
        self._net = net.to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self._net(dinov2_input(images))
        return features


register_detector("fd_dinov2", _DINOv2)
