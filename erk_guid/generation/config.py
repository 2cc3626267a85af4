"""Settings of a generation: networks, solver, noise levels, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from erk_guid._version import __version__
from erk_guid.churn import Churn
from erk_guid.common.errors import ErkGuidError
from erk_guid.edm2 import check_strength, edm_sampler, noise_levels
from erk_guid.generation.devices import choose_device
from erk_guid.generation.images import BATCH_SIZE, check_networks
from erk_guid.generation.peers import Agreeing
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance, settings_of
from erk_guid.models.checkpoints import Checkpoint, load
from erk_guid.models.checkpoints.loading import UNCONDITIONAL, check_source, locate
from erk_guid.models.encoders import (
    GENERATION_VAE_BATCH,
    PIXELS,
    Encoder,
    StabilityVAEEncoder,
    StandardRGBEncoder,
)
from erk_guid.models.networks import Unconditional
from erk_guid.schedules import RHO, SIGMA_MAX, SIGMA_MIN
from erk_guid.solvers import Heun, Modal, Solver, name_of, options_of, record_of

NEAR_NOISE = 2
"""Which rule near pure noise images were made by, see `erk_guid.quadrature.prior_response`."""
LAST_STEP = 2
"""Which rule the modal solver's last step follows, see `erk_guid.solvers.Modal`."""
NOISE = 2
"""Which weights the modal solver has with noise, see `erk_guid.solvers.modal.NOISY_ORDER`."""


def sampling_rules(*, modal: bool, parameter_free: bool, noisy: bool) -> dict[str, int]:
    """Return which rules images were made by, where earlier versions had others.

    A run goes on only by the rules that it began with.

    Args:
        modal: whether the solver is modal.
        parameter_free: whether guidance is the parameter-free form.
        noisy: whether the solver adds noise (`eta`).
    """
    return {
        **({"near_noise": NEAR_NOISE} if modal or parameter_free else {}),
        **({"last_step": LAST_STEP} if modal else {}),
        **({"noise": NOISE} if modal and noisy else {}),
    }


def _spelled(erk: Guidance) -> dict[str, Any]:
    """Return `settings_of`, or for guidance of the user's own its text in place of w_stiff."""
    try:
        return settings_of(erk)
    except ValueError:
        return {**settings_of(ERKGuidance()), "w_stiff": repr(erk)}


class Evaluations(NamedTuple):
    """Network evaluations that an image takes."""

    main: int
    guide: int
    """Of the guiding network."""

    def __str__(self) -> str:
        return f"{self.main}" + (f" and {self.guide} of the guiding network" if self.guide else "")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of how images are made: everything except the seeds and the output folder.

    Field names and defaults are those of the command lines.
    """

    net: str
    gnet: str | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    class_idx: int | None = None
    batch: int = BATCH_SIZE
    num_steps: int = 32
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO
    churn: Churn = field(default_factory=Churn)
    """Its `randn_like` is not used: noise is seeded for each image."""
    erk: Guidance = field(default_factory=ERKGuidance)
    solver: Solver = field(default_factory=Heun)
    schedule: str | tuple[float, ...] = "polynomial"
    afs: bool = False
    denoise_to_zero: bool = True
    dtype: str = "float32"
    device: str | None = None
    encoder_batch: int | None = None
    vae: str | None = None
    trust_pickle: bool = False
    precision: str | None = None
    compile: bool = False

    @property
    def sampler_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `edm_sampler`."""
        return {
            "num_steps": self.num_steps,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
            "guidance": self.guidance,
            "guidance_interval": self.guidance_interval,
            **self.churn.numbers,
            "erk": self.erk,
            "solver": self.solver,
            "schedule": self.schedule,
            "afs": self.afs,
            "denoise_to_zero": self.denoise_to_zero,
            "dtype": getattr(torch, self.dtype),
        }

    def record(self) -> dict[str, Any]:
        """Return what the images depend on, except the files, in JSON's types."""
        given = self.sampler_options
        return {
            **{name: given[name] for name in given if name not in ("erk", "solver", "dtype")},
            **_spelled(self.erk),
            **record_of(self.solver),
            "dtype": self.dtype,
            "precision": self.precision,
            # In low precision a compiled network rounds otherwise: do not mix their images.
            **({"compile": True} if self.compile else {}),
            "class": self.class_idx,
            **sampling_rules(
                modal=isinstance(self.solver, Modal),
                parameter_free=isinstance(self.erk, ParameterFreeGuidance),
                noisy=self.solver.noisy,
            ),
        }

    def describe(self) -> str:
        """Return one line that says which settings were used; every image stores it."""
        chosen = "".join(f" {name}={value}" for name, value in options_of(self.solver).items())
        spaced = "" if self.schedule == "polynomial" else f", schedule {self.schedule}"
        erk = _spelled(self.erk)
        parts = [
            f"model {self.net}", f"solver {name_of(self.solver)}{chosen}",
            f"steps {self.num_steps}{spaced}",
            f"w_stiff {erk['w_stiff']}", f"w_con {erk['w_con']:g}", f"guidance {self.guidance:g}",
        ]  # fmt: skip
        if erk["bound"] is not None:
            parts.append(f"bound {erk['bound']:g}")
        if erk["gate"] != ERKGuidance.gate:
            parts.append(f"gate {erk['gate']}")
        parts += [f"{name} {value:g}" for name, value in self.churn.numbers.items()]
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            parts.append(f"guidance where {low:g} < sigma <= {high:g}")
        if self.precision is not None:
            parts.append(f"network in {self.precision}")
        if self.gnet and self.guidance != 1:
            parts.append(f"guiding model {self.gnet}")
        return ", ".join([*parts, f"erk_guid {__version__}"])

    def evaluations(self) -> Evaluations:
        """Return how often each network is called for an image; the sampler itself is run."""
        counts = [0, 0]

        def counting(which: int) -> Callable[..., torch.Tensor]:
            def net(x: torch.Tensor, sigma: torch.Tensor, *labels: object) -> torch.Tensor:
                counts[which] += 1
                return x / (1 + sigma**2)

            return net

        main, guide = counting(0), counting(1)
        options = {**self.sampler_options, "dtype": torch.float64}
        edm_sampler(main, torch.zeros(1, 1), gnet=guide, randn_like=torch.zeros_like, **options)
        return Evaluations(*counts)

    def choose_device(self) -> torch.device:
        """Return the device asked for, or the best one present.

        Raises:
            ErkGuidError: it is not present, or cannot do what is asked.
        """
        device = choose_device(self.device)
        if self.dtype == "float64" and device.type == "mps":
            raise ErkGuidError("mps has no float64; use --dtype float32")
        return device

    def open(
        self, device: torch.device, group: Agreeing, decoding: bool = True, refresh: bool = False
    ) -> Models:
        """Load the networks and the encoder; every rank calls this.

        Args:
            device: where to load them.
            group: the processes that share the work.
            decoding: whether images will be decoded; a VAE may then have to be fetched.
            refresh: download the networks again, though they are in the cache.

        Raises:
            ErkGuidError: a file cannot be fetched or used, or the networks do not fit together.
        """
        self._check_numbers()
        # Rank 0 fetches first; the others then find the files in the cache.
        group.agree(lambda: self._fetch(refresh))
        loaded = self._load(self.net, device)
        guide = self._guide(loaded, device)
        try:
            check_networks(loaded.net, guide.net if guide else None, self.class_idx)
        except ValueError as error:
            raise ErkGuidError(str(error)) from error
        if guide is not None:
            self._refuse_same(loaded, guide)
        encoder = self._encoder(loaded)
        channels = loaded.net.img_channels
        if decoding and isinstance(encoder, StandardRGBEncoder) and channels not in (1, 3):
            raise ErkGuidError(
                f"{self.net} makes {channels} channels, and its file names no VAE that turns them "
                "into an image; images have 1 or 3"
            )
        if decoding and isinstance(encoder, StabilityVAEEncoder):
            vae = encoder
            group.agree(lambda: vae.prepare(device))
            vae.prepare(device)
        return Models(self, device, loaded, guide, encoder)

    def _check_numbers(self) -> None:
        """Refuse what the sampler would refuse, in terms of the loop's dtype, before any work."""
        dtype = getattr(torch, self.dtype)
        try:
            check_strength(self.guidance, dtype)
            noise_levels(
                self.schedule, self.num_steps, self.sigma_min, self.sigma_max, self.rho, dtype=dtype
            )
        except ValueError as error:
            raise ErkGuidError(str(error)) from error

    def _guide(self, loaded: Checkpoint, device: torch.device) -> Checkpoint | None:
        if not self.gnet or self.guidance == 1:
            return None
        if self.gnet.startswith(UNCONDITIONAL) and locate(self.gnet) == loaded.path:
            return loaded.without_classes(self.gnet)  # in memory once
        return self._load(self.gnet, device)

    def _refuse_same(self, loaded: Checkpoint, guide: Checkpoint) -> None:
        """Refuse model guidance of a network by itself, which changes nothing.

        Raises:
            ErkGuidError: naming both.
        """
        classless = not loaded.net.label_dim and guide.sha256 == loaded.sha256
        if guide.fingerprint == loaded.fingerprint or classless:
            remedy = f"--gnet={UNCONDITIONAL}{self.net} is classifier-free guidance; "
            raise ErkGuidError(
                f"--guidance {self.guidance:g} has nothing to act on: --gnet {self.gnet} is the "
                f"network itself{', which has no classes' if classless else ''}; "
                f"{'' if classless else remedy}leave both out, or name another guiding network"
            )

    def _fetch(self, refresh: bool) -> None:
        locate(self.net, refresh)
        if self.gnet is None:
            return
        if self.guidance == 1:
            check_source(self.gnet)  # it is not run, so it need not be fetched
        else:
            locate(self.gnet, refresh)

    def _load(self, source: str, device: torch.device) -> Checkpoint:
        return load(
            source, device=device, trust=self.trust_pickle, precision=self.precision,
            compile=self.compile,
        )  # fmt: skip

    def _encoder(self, loaded: Checkpoint) -> Encoder:
        """Return the file's encoder, with the config's VAE settings applied."""
        encoder = loaded.encoder
        if not isinstance(encoder, StabilityVAEEncoder):
            for option, value in (("--vae", self.vae), ("--encoder-batch", self.encoder_batch)):
                if value is not None:
                    raise ErkGuidError(f"{option} {value}: {self.net} has no VAE; leave it out")
            return encoder
        changes: dict[str, Any] = {"batch_size": self.encoder_batch or GENERATION_VAE_BATCH}
        if self.vae is not None:
            changes["vae_name"] = self.vae
        return StabilityVAEEncoder(**{**encoder.config, **changes})


@dataclass(frozen=True)
class Models:
    """A config's networks and encoder, on a device."""

    config: GenerationConfig
    device: torch.device
    loaded: Checkpoint
    guide: Checkpoint | None
    encoder: Encoder

    @property
    def generation_options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`, besides the network, the seeds and the batch size."""
        return {
            "encoder": self.encoder,
            "gnet": self.guide.net if self.guide else None,
            "class_idx": self.config.class_idx,
            "device": self.device,
            **self.config.sampler_options,
        }

    @property
    def used(self) -> GenerationConfig:
        """The config with how the network is really run, where its device lacks what was asked."""
        net = self.loaded.net
        net = net.net if isinstance(net, Unconditional) else net
        dtype = getattr(net, "precision", None)
        precision = None if dtype is None else str(dtype).removeprefix("torch.")
        compiled = getattr(net, "compiled", self.config.compile)
        return replace(self.config, precision=precision, compile=compiled)

    def record(self) -> dict[str, Any]:
        """Return what the images depend on, in JSON's types (reads the files to hash them)."""
        vae = self.encoder if isinstance(self.encoder, StabilityVAEEncoder) else None
        return {
            "net_sha256": self.loaded.fingerprint,
            "gnet_sha256": self.guide.fingerprint if self.guide else None,
            **self.used.record(),
            "trust_pickle": "trusted" in self.loaded.format,
            "encoder": {
                "class": type(self.encoder).__name__,
                **{k: v for k, v in self.encoder.config.items() if k != "batch_size"},
                # Earlier versions decoded differently: do not add to their images.
                **({"pixels": PIXELS, "vae_sha256": vae.fingerprint} if vae else {}),
            },
            "device": self.device.type,  # each kind of device has its own random numbers
        }
