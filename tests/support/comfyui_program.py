"""A stand-in for the parts of ComfyUI that the nodes use, with the call shapes of 0.3.64.

It is not the program itself: `scripts/check_programs.py --comfyui` runs that.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch


class KSAMPLER:
    """Holder of a sampler function and its options."""

    def __init__(self, sampler_function: Any, extra_options: Any = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self, model: Any, noise: torch.Tensor, sigmas: torch.Tensor, **extra: Any
    ) -> torch.Tensor:
        found: torch.Tensor = self.sampler_function(
            model, noise, sigmas, extra_args=extra, callback=None, disable=True,
            **self.extra_options,
        )  # fmt: skip
        return found


class KSampler:
    SAMPLERS: list[str]
    DISCARD_PENULTIMATE_SIGMA_SAMPLERS: set[str]


class EPS:
    """x is data plus sigma noise."""

    sigma_min, sigma_max = 0.03, 14.6

    def noise_scaling(
        self, sigma: Any, noise: torch.Tensor, data: torch.Tensor, full: bool = False
    ) -> torch.Tensor:
        return noise * ((1 + sigma**2) ** 0.5 if full else sigma) + data


class CONST(EPS):
    """A flow."""

    sigma_min, sigma_max = 0.003, 1.0

    def noise_scaling(
        self, sigma: Any, noise: torch.Tensor, data: torch.Tensor, full: bool = False
    ) -> torch.Tensor:
        return sigma * noise + (1 - sigma) * data


class FromPicture(CONST):
    """Image to image: it begins at the latent."""

    def noise_scaling(
        self, sigma: Any, noise: torch.Tensor, data: torch.Tensor, full: bool = False
    ) -> torch.Tensor:
        return data


class Unlike(EPS):
    """Neither."""

    def noise_scaling(
        self, sigma: Any, noise: torch.Tensor, data: torch.Tensor, full: bool = False
    ) -> torch.Tensor:
        return (sigma / (1 + sigma)) * noise + data


class Patcher:
    """ModelPatcher: the model, and its parts by name."""

    def __init__(self, mixing: Any) -> None:
        self.mixing = mixing

    def get_model_object(self, name: str) -> Any:
        return {"model_sampling": self.mixing}[name]


class Wrapped:
    """A model of Gaussian data, wrapped as deep as ComfyUI wraps them: mask, guider, model."""

    spread = torch.tensor([4.0, 1.0, 0.3, 0.05])

    def __init__(self, mixing: Any) -> None:
        network = types.SimpleNamespace(model_sampling=mixing)
        self.inner_model = types.SimpleNamespace(inner_model=network)
        self.flow = isinstance(mixing, CONST)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        share = 1 - s if self.flow else torch.ones_like(s)
        size = self.spread.to(x).reshape(1, -1, *[1] * (x.ndim - 2)) ** 2
        return share * size * x / (share**2 * size + s**2)


class CFGGuider:
    """Loads the model, and calls the sampler with it."""

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.conds = (positive, negative)

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def sample(
        self, noise: torch.Tensor, latent: torch.Tensor, sampler: KSAMPLER, sigmas: torch.Tensor,
        disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        x = self.patcher.mixing.noise_scaling(sigmas[0], noise, latent, True)
        return sampler.sample(Wrapped(self.patcher.mixing), x, sigmas, seed=seed)


class SamplerCustomAdvanced:
    """The stock node."""

    CATEGORY = "sampling/advanced"
    FUNCTION = "sample"

    def sample(
        self, noise: Any, guider: Any, sampler: Any, sigmas: torch.Tensor, latent_image: Any
    ) -> tuple[Any, Any]:
        end = guider.sample(noise, latent_image["samples"], sampler, sigmas)
        return {**latent_image, "samples": end}, latent_image


class Described:
    """Any class of the present API that keeps what it is given."""

    def __init__(self, *values: Any, **options: Any) -> None:
        self.values, self.options = values, options


def installed(monkeypatch: pytest.MonkeyPatch, outputs: Path) -> Any:
    """Put the stand-in in place of the program; return its `comfy.samplers`."""

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    KSampler.SAMPLERS = ["euler", "heun"]
    KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS = {"dpm_2"}
    samplers = module("comfy.samplers", KSAMPLER=KSAMPLER, KSampler=KSampler, CFGGuider=CFGGuider)
    functions = module("comfy.k_diffusion.sampling")
    package = module("comfy.k_diffusion", sampling=functions)
    progress: list[tuple[int, int]] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            pass

        def update_absolute(self, done: int, total: int) -> None:
            progress.append((done, total))

    module("comfy", samplers=samplers, k_diffusion=package)
    module("comfy.utils", ProgressBar=ProgressBar, progress=progress)
    module(
        "comfy.model_management", throw_exception_if_processing_interrupted=lambda: None
    )  # fmt: skip
    module("comfy.sample", fix_empty_latent_channels=lambda model, latent: latent)
    module("folder_paths", get_output_directory=lambda: str(outputs))
    module("nodes", NODE_CLASS_MAPPINGS={"SamplerCustomAdvanced": SamplerCustomAdvanced})
    kinds = (
        "Boolean", "Combo", "Conditioning", "Float", "Guider", "Image", "Int", "Latent", "Model",
        "Noise", "Sampler", "Sigmas", "String",
    )  # fmt: skip
    types_ = {
        kind: types.SimpleNamespace(
            Input=type(f"{kind}Input", (Described,), {}),
            Output=type(f"{kind}Output", (Described,), {}),
        )
        for kind in kinds
    }
    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Schema=Described, NodeOutput=Described, **types_
    )
    latest = module("comfy_api.latest", io=io, ComfyExtension=type("ComfyExtension", (), {}))
    for name in ("comfy_api", "comfy_api.latest"):
        found = sys.modules.get(name) or module(name, latest=latest)
        found.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        found.__path__ = []
    return samplers
