"""RES against ComfyUI."""

from __future__ import annotations

import torch
from conftest import golden

import erk_guid


def test_res_is_comfyuis() -> None:
    # ComfyUI 0.3.64's own sample_res_multistep was run on this denoiser.
    data = golden("res_multistep")
    for count in (2, 3, 9):
        levels = data[f"levels{count}"]
        found = erk_guid.sample(
            lambda x, s: torch.tanh(x) / (1 + s**2), levels[0] * data["x"], levels, solver="res"
        )
        torch.testing.assert_close(found, data[f"end{count}"], rtol=1e-12, atol=1e-13)
