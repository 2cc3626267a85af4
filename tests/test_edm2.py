"""EDM2's front to the loop."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden, relative
from support.problems import gaussian
from torch import Tensor

import erk_guid
from erk_guid.models.networks.edm2 import Precond


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_golden_sampler(cond: Precond, guide: Precond, case: int, precision: str) -> None:
    # Catches: the order of guidance and step, the pair of the wrong step, a gated last step,
    # model guidance that blends the wrong way, a wrong default.
    data = golden("edm2_sampler")
    expected = data[f"case{case}_{precision}"]
    ours = erk_guid.edm_sampler(
        cond, data["noise"], data["labels"], guide, dtype=expected.dtype, **data["cases"][case]
    )
    assert ours.dtype == expected.dtype
    assert relative(ours, expected) < 1e-4


def test_guidance_one_does_not_run_the_guiding_network(cond: Precond) -> None:
    def forbidden(*args: Any) -> Tensor:
        raise AssertionError("the guiding network was run")

    noise = torch.randn(1, 3, 16, 16)
    erk_guid.edm_sampler(cond, noise, None, forbidden, num_steps=2, guidance=1)


def test_edm_sampler_refuses_what_the_method_does_not_support() -> None:
    noise = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="S_churn must be 0 with ERK guidance, got 40"):
        erk_guid.edm_sampler(gaussian, noise, S_churn=40, w_stiff=0.5)
    auto = erk_guid.ParameterFreeGuidance()
    with pytest.raises(ValueError, match="S_churn must be 0 with ERK guidance, got 40"):
        erk_guid.edm_sampler(gaussian, noise, S_churn=40, erk=auto)
    with pytest.raises(ValueError, match="both say how to guide"):
        erk_guid.edm_sampler(gaussian, noise, w_stiff=0.5, erk=auto)
    # The published function would call None; its script guides by the main network itself.
    with pytest.raises(ValueError, match="guidance of 2 needs a guiding network"):
        erk_guid.edm_sampler(gaussian, noise, guidance=2)


def test_a_sign_of_w_changes_nothing_in_edm_sampler() -> None:
    # As in the published function, where w_stiff is squared and rho never lies below 0.
    noise = torch.randn(3, 4)
    options: dict[str, Any] = {"num_steps": 6}

    def net(x: Tensor, sigma: Tensor, labels: None) -> Tensor:
        return gaussian(x, sigma)

    plain = erk_guid.edm_sampler(net, noise, **options)
    found = erk_guid.edm_sampler(net, noise, w_stiff=-0.5, w_con=-1, **options)
    assert torch.equal(found, erk_guid.edm_sampler(net, noise, w_stiff=0.5, w_con=0, **options))
    assert torch.equal(found, erk_guid.edm_sampler(net, noise, w_stiff=0.5, **options))
    assert not torch.equal(found, plain)
    # Noise levels of one's own may come as a list, an array or a tensor.
    levels = [40.0, 3.0, 0.1]
    ends = [
        erk_guid.edm_sampler(net, noise, schedule=given)
        for given in (levels, np.array(levels), torch.tensor(levels))
    ]
    assert torch.allclose(ends[0], ends[1])
    assert torch.allclose(ends[0], ends[2])


def test_edm_samplers_signature_is_edm2s() -> None:
    # A promise to everyone who passes it as sampler_fn; the order counts, too.
    parameters = inspect.signature(erk_guid.edm_sampler).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        ("net", inspect.Parameter.empty),
        ("noise", inspect.Parameter.empty),
        ("labels", None),
        ("gnet", None),
        ("num_steps", 32),
        ("sigma_min", 0.002),
        ("sigma_max", 80),
        ("rho", 7),
        ("guidance", 1),
        ("S_churn", 0),
        ("S_min", 0),
        ("S_max", float("inf")),
        ("S_noise", 1),
        ("dtype", torch.float32),
        ("randn_like", torch.randn_like),
        ("w_stiff", 0.0),
        # The published function's; its command line, and ours, have 0.5.
        ("w_con", 0.0),
    ]


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(cond: Precond) -> None:
    import copy

    noise = torch.randn(2, 3, 16, 16)
    on_cpu = erk_guid.edm_sampler(cond, noise, num_steps=6, w_stiff=0.5, w_con=0.1)
    net = copy.deepcopy(cond).cuda()
    net.use_fp16 = False
    on_gpu = erk_guid.edm_sampler(net, noise.cuda(), num_steps=6, w_stiff=0.5, w_con=0.1)
    assert relative(on_gpu.cpu(), on_cpu) < 1e-3
