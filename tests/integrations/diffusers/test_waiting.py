"""Nothing in a step makes the CPU wait for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from erk_guid.integrations import diffusers as ours
from erk_guid.integrations.diffusers.configs import CLASSES

KINDS = [(family, solver) for family, names in CLASSES.items() for solver in names]


@pytest.mark.parametrize("settings", [{}, {"w_stiff": 0.5, "w_con": 0.1, "bound": 0.2}])
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(("family", "solver"), KINDS)
def test_no_step_reads_values_of_the_samples(
    family: str, solver: str, edited: bool, settings: dict[str, Any]
) -> None:
    # The samples have shapes and no values: whatever asks for one on the host
    # raises. Before: torch.equal at each call.
    if solver == "modal" and settings:
        settings = {"eta": 0.5} if not edited else {"modal_order": 2}
    scheduler: Any = getattr(ours, CLASSES[family][solver])(**settings)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.empty(2, 4, 8, 8, dtype=torch.float16)
        output = torch.empty_like(x)
    with pytest.raises(DataDependentOutputException):  # the instrument works
        bool(torch.equal(x, output))
    for time in scheduler.timesteps:
        if family != "flow":
            scheduler.scale_model_input(x, time)
        x = scheduler.step(output, time, x).prev_sample
        if edited:
            x = x + 1
    assert (x.dtype, x.shape) == (torch.float16, (2, 4, 8, 8))
