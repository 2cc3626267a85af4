"""Nodes of fitted noise levels: read from a file, or found for the connected model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.denoisers import Denoiser
from erk_guid.generation.settings import read_settings
from erk_guid.integrations.comfyui.kinds import DETECT, model_sampling_of, process_for
from erk_guid.integrations.comfyui.program import module, outputs
from erk_guid.integrations.comfyui.sampling import make_ksampler
from erk_guid.integrations.k_diffusion import as_denoiser
from erk_guid.processes import Process
from erk_guid.solvers import make_solver
from erk_guid.studies.fitting import Fitted, fit
from erk_guid.studies.fitting.fit_files import settings_of_fit
from erk_guid.studies.fitting.levels import BEST


def read_fit(file: str) -> tuple[Tensor, Any]:
    """Return SIGMAS and SAMPLER of a settings file.

    Args:
        file: its path; one that is not absolute is looked for among this package's outputs, then
            in ComfyUI's working folder.

    Raises:
        ErkGuidError: the file cannot be read, or holds no noise levels.
    """
    path = _found(file)
    settings = read_settings(path, times=True)
    levels = settings.made_for.get("schedule")
    if not isinstance(levels, tuple):
        raise ErkGuidError(
            f"{printable(path, 200)} holds no noise levels; the node 'ERK-Guid fit' and 'erk-guid "
            "fit' write such files"
        )
    last = [0.0] if settings.made_for.get("denoise_to_zero", True) else []
    guidance = settings.guidance if settings.guidance.active else None
    return _as_sigmas([*levels, *last]), make_ksampler(settings.solver(), guidance)


def fingerprint_of_fit(file: str) -> tuple[str, int, int]:
    """Return what changes when the file does."""
    path = _found(file)
    try:
        state = path.stat()
    except OSError:
        return str(path), 0, 0  # the node itself says what is wrong
    return str(path), state.st_mtime_ns, state.st_size


def _found(file: str) -> Path:
    here = outputs() / file  # an absolute path stays as it is
    return here if here.exists() else Path(file)


def _as_sigmas(levels: list[float]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)


@dataclass(frozen=True)
class _Search:
    """A fit, run where ComfyUI runs samplers: the model is loaded and its conditioning ready."""

    solver: str
    evaluations: int
    end_at_zero: bool
    noise: Tensor
    batch: int
    trials: int | None
    done: Callable[[Fitted, Process | None], None]

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: object = None,
        disable: object = None,
    ) -> Tensor:
        mixing = model_sampling_of(model)
        method = make_solver("modal" if self.solver == BEST else self.solver)
        process = process_for(method, None, model, DETECT)
        low = float(mixing.sigma_min)
        noise = self.noise.to(x)
        fitted = fit(
            _interruptible(as_denoiser(model, extra_args)),
            mixing.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True),
            evaluations=self.evaluations,
            solver=self.solver,
            sigma_min=low if process is None else process.level(low).sigma,
            sigma_max=float(sigmas[0]) if process is None else None,
            process=process,
            denoise_to_zero=self.end_at_zero,
            trials=self.trials,
            batch=self.batch,
            progress=_progress(),
        )
        self.done(fitted, process)
        return x


def _interruptible(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that ends the run when the user asks for it."""
    asked = module("comfy.model_management").throw_exception_if_processing_interrupted

    def interruptible(x: Tensor, sigma: Tensor, /) -> Tensor:
        asked()
        return denoiser(x, sigma)

    return interruptible


def _progress() -> Callable[[int, int], None]:
    bar = module("comfy.utils").ProgressBar(1)
    return lambda done, expected: bar.update_absolute(done, expected)


def fit_model(
    model: Any,
    positive: Any,
    negative: Any,
    latent_image: dict[str, Any],
    cfg: float,
    evaluations: int,
    solver: str,
    samples: int,
    batch: int,
    trials: int,
    fit_seed: int,
    end_at_zero: bool,
    name: str,
) -> tuple[Tensor, Any, str]:
    """Find noise levels for a model with its conditioning; return SIGMAS, SAMPLER and a report.

    Raises:
        ErkGuidError: a value is out of range, or the settings file cannot be written.
    """
    path = outputs() / f"{_checked_name(name)}-{evaluations}.json"
    shape = module("comfy.sample").fix_empty_latent_channels(model, latent_image["samples"]).shape
    drawn = torch.randn((samples, *shape[1:]), generator=torch.Generator().manual_seed(fit_seed))
    found: list[tuple[Fitted, Process | None]] = []
    search = _Search(
        solver, evaluations, end_at_zero, drawn, batch, trials or None,
        lambda fitted, process: found.append((fitted, process)),
    )  # fmt: skip
    samplers = module("comfy.samplers")
    guider = samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    few = drawn[:batch]
    first = float(model.get_model_object("model_sampling").sigma_max)
    try:
        guider.sample(
            few, torch.zeros_like(few), samplers.KSAMPLER(search), _as_sigmas([first, 0.0]),
            disable_pbar=True, seed=fit_seed,
        )  # fmt: skip
    except ValueError as error:
        raise ErkGuidError(str(error)) from error
    fitted, process = found[0]
    record = {
        "program": "ComfyUI", "model": type(getattr(model, "model", model)).__name__, "cfg": cfg,
        "process": None if process is None else repr(process), "seed": fit_seed,
        "shape": list(shape[1:]),
    }  # fmt: skip
    _write(path, fitted, record)
    report = f"{fitted}\nWritten to {path}"
    return _as_sigmas(fitted.sigmas.tolist()), make_ksampler(fitted.solver), report


def _write(path: Path, fitted: Fitted, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings_of_fit(fitted, record).write(path)
    except OSError as error:
        raise ErkGuidError(f"cannot write {path}: {error.strerror}") from error


def _checked_name(name: str) -> str:
    """Return a name of a file without folders: the one who types it may be another than the host.

    Raises:
        ErkGuidError: it is none.
    """
    plain = all(c.isalnum() or c in "-_ ." for c in name)
    if not plain or not name.strip(" .") or name != Path(name).name:
        raise ErkGuidError(
            f"name {printable(repr(name), 60)} is no name of a file: take letters, digits, '-', "
            "'_' and '.'"
        )
    return name
