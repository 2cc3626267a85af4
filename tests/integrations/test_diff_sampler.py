"""The diff-sampler front: its names and signatures, its driver's options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from conftest import golden
from support.problems import Mixture

import erk_guid
from erk_guid.integrations import diff_sampler

NAMES = {
    "euler": "euler_sampler", "heun": "heun_sampler", "dpm": "dpm_2_sampler",
    "deis": "deis_sampler", "ipndm": "ipndm_sampler", "ipndm_v": "ipndm_v_sampler",
    "dpmpp": "dpm_pp_sampler", "unipc": "unipc_sampler",
}  # fmt: skip


class Net:
    """A network in the toolbox's style."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.labels: list[Any] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, class_labels: Any = None) -> torch.Tensor:
        self.labels.append(class_labels)
        found: torch.Tensor = self.denoiser(x, t)
        return found


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    return golden("diff_sampler_solvers")


@pytest.mark.parametrize("number", range(19))
def test_golden_end_points_through_the_front(problem: dict[str, Any], number: int) -> None:
    case = dict(problem["cases"][number])
    function = getattr(diff_sampler, NAMES[case.pop("solver")])
    levels = erk_guid.karras_sigmas(case["num_steps"])[:-1].float()
    found = function(Net(Mixture(problem)), problem["latents"], t_steps=levels, **case)
    key = f"case{number}"
    apart = (found - problem[key]).abs().max() / problem[key].abs().max()
    assert apart < (2e-3 if case.get("deis_mode") == "tab" else 1e-5)


def cases_of(name: str) -> list[Any]:
    return [pytest.param(i, id=str(case)) for i, case in enumerate(golden(name)["cases"])]


@pytest.mark.parametrize("number", cases_of("diff_sampler_more"))
def test_end_points_of_the_toolboxs_own_functions(problem: dict[str, Any], number: int) -> None:
    # Catches: no dynamic thresholding in data prediction, an order that is lowered while it still
    # rises, no corrector on the last step of UniPC's first few, other defaults, another AFS.
    data = golden("diff_sampler_more")
    case = dict(data["cases"][number])
    function = getattr(diff_sampler, NAMES[case.pop("solver")])
    small = Mixture(problem)
    # In float64 throughout: what is left is the rounding of the toolbox's float32.
    found = function(Net(lambda x, t: 3 * small(x / 3, t / 3)), problem["latents"], **case)
    expected = data[f"case{number}"]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_published_coefficients_give_the_published_end_point(problem: dict[str, Any]) -> None:
    # With them in place of exact integrals, 'tab' agrees as closely as the others.
    case = dict(problem["cases"][9])
    del case["solver"]
    levels = erk_guid.karras_sigmas(case["num_steps"])[:-1].float()
    found = diff_sampler.deis_sampler(
        Net(Mixture(problem)), problem["latents"], t_steps=levels,
        coeff_list=problem["deis_coeffs_9"], **case,
    )  # fmt: skip
    assert (found - problem["case9"]).abs().max() / problem["case9"].abs().max() < 1e-5
    with pytest.raises(ValueError, match="coeff_list has 1 entries for 6 steps"):
        diff_sampler.deis_sampler(
            Net(Mixture(problem)), problem["latents"], num_steps=7, coeff_list=[[]]
        )


# What the toolbox's driver passes to every sampler, concern it or not, with t_steps given (from
# its sample.py at commit 68d5ce4; scripts/check_programs.py runs the driver itself). w_stiff,
# w_con and r are those of the fork that the paper used.
DRIVER: dict[str, Any] = {
    "w_stiff": 0, "w_con": 0, "r": 0.5, "solver": "x", "num_steps": 5, "afs": False,
    "guidance_type": None, "guidance_rate": None, "denoise_to_zero": False,
    "return_inters": False, "use_fp16": False, "max_order": 3, "predict_x0": True,
    "lower_order_final": True, "variant": "bh2", "deis_mode": "tab", "sigma_min": 0.002,
    "sigma_max": 80.0, "schedule_type": None, "schedule_rho": None, "model_path": None,
    "t_steps": torch.tensor([80.0, 20.0, 5.0, 1.0, 0.002]), "nfe": 8, "model_source": "edm",
    "prompt": None, "coeff_list": None,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_the_driver_may_pass_all_its_options_and_no_other(name: str) -> None:
    assert set(DRIVER) == diff_sampler.DRIVER_OPTIONS
    function = getattr(diff_sampler, name)
    net = Net(lambda x, t: x / (1 + t * t))
    latents = torch.randn(2, 3, 4, 4)
    labels = torch.eye(2)
    found = function(net, latents, class_labels=labels, **DRIVER)
    assert found.shape == latents.shape
    assert all(given is labels for given in net.labels)
    with pytest.raises(TypeError, match=rf"{name}\(\) has no option 'max_ordr'"):
        function(net, latents, num_steps=5, max_ordr=2)
    with pytest.raises(ValueError, match="give num_steps"):
        function(net, latents)
    names = list(inspect.signature(function).parameters)
    assert names[:15] == [
        "net", "latents", "class_labels", "condition", "unconditional_condition", "num_steps",
        "sigma_min", "sigma_max", "schedule_type", "schedule_rho", "afs", "denoise_to_zero",
        "return_inters", "return_eps", "t_steps",
    ]  # fmt: skip
    guided = name in ("heun_sampler", "dpm_2_sampler", "deis_sampler")
    if guided:
        guided_options = {**DRIVER, "w_stiff": 0.3}
        assert not torch.equal(function(net, latents, **guided_options), found)
    else:
        with pytest.raises(ValueError, match="no embedded pair"):
            function(net, latents, num_steps=5, w_stiff=0.3)


def test_conditions_trajectories_and_drifts() -> None:
    class Guided:
        guidance_type = "cfg"

        def sigma(self, t: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(t) ** 2

        def sigma_inv(self, sigma: float) -> torch.Tensor:
            return torch.as_tensor(sigma) ** 0.5

        def __call__(
            self, x: torch.Tensor, t: torch.Tensor, condition: Any, unconditional_condition: Any
        ) -> torch.Tensor:
            assert (condition, unconditional_condition) == ("a cat", "")
            return x / (1 + t * t)

    net, latents = Guided(), torch.randn(2, 3, dtype=torch.float64)
    more: dict[str, Any] = {"condition": "a cat", "unconditional_condition": ""}
    points, drifts = diff_sampler.euler_sampler(
        net, latents, num_steps=4, schedule_type="discrete", schedule_rho=1, sigma_min=1,
        sigma_max=16, return_inters=True, return_eps=True, **more,
    )  # fmt: skip
    assert points.shape == (4, 2, 3)
    assert drifts.shape == (3, 2, 3)
    levels = [16, 9, 4, 1]  # equal steps in the root, the network's own time
    assert torch.equal(points[0], 16 * latents)
    for i in range(3):
        step = points[i] + (levels[i + 1] - levels[i]) * drifts[i]
        torch.testing.assert_close(points[i + 1], step)
    inters = diff_sampler.euler_sampler(
        net, latents, num_steps=4, denoise_to_zero=True, return_inters=True, **more
    )
    assert inters.shape == (5, 2, 3)  # one more call of the network, and one more point
    # What the toolbox returns for each combination (run; its UniPC gives no drifts).
    for name, function in NAMES.items():
        sampler = getattr(diff_sampler, function)
        end = sampler(net, latents, num_steps=4, denoise_to_zero=True, return_eps=True, **more)
        assert end.shape == latents.shape
        both = sampler(
            net, latents, num_steps=4, denoise_to_zero=True, return_inters=True, return_eps=True,
            **more,
        )  # fmt: skip
        if name == "unipc":
            assert both.shape == (5, 2, 3)
        else:
            assert [len(part) for part in both] == [5, 3]
