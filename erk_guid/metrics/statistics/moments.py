"""Mean and covariance of features, accumulated batch by batch and over processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from erk_guid.generation.process_groups import ProcessGroup


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and unbiased covariance [d, d] of features, float64.

    `count` is the number of images they come from, None where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None


@dataclass
class Moments:
    """Running mean and scatter of rows of features, in float64.

    Batches are merged by their own means (Chan, Golub and LeVeque 1983), so no large sums of
    squares are subtracted from each other. Memory: one [d, d] matrix, however many rows.
    """

    dim: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.device.type == "mps":  # mps has no float64
            self.device = torch.device("cpu")
        self.count = 0
        self._mean = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)

    def add(self, features: Tensor) -> None:
        """Add rows of features, [n, d]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be [n, {self.dim}], got {list(features.shape)}")
        if not len(features):
            return
        rows = features.detach().to(self.device).to(torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        self._scatter.addmm_(centred.mT, centred)
        self._merge(len(rows), mean)

    def _merge(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        apart = mean - self._mean
        self._scatter.addr_(apart, apart, alpha=self.count * count / total)
        self._mean += apart * (count / total)
        self.count = total

    def statistics(self, group: ProcessGroup | None = None) -> Statistics:
        """Return mean and covariance of the rows of all processes. Every rank calls this once.

        Raises:
            ValueError: there are fewer than two rows.
        """
        group = group or ProcessGroup()
        count = int(group.sum(torch.tensor(self.count)))
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {count}")
        own = self._mean.cpu()
        mean = group.sum(own * (self.count / count))
        scatter = self._scatter.cpu()
        scatter.addr_(own - mean, own - mean, alpha=self.count)
        sigma = group.sum(scatter).div_(count - 1)
        return Statistics(mean.numpy(), sigma.numpy(), count)
