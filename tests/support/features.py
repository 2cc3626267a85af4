"""What tests of scores share."""

from __future__ import annotations

import sys

import numpy as np
import pytest


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


# Not ru_maxrss: a child begins with the peak of the process that started it, here pytest's own.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
