"""EDM's preconditioning, which is the same around all our U-Nets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erk_guid.models.networks.frozen import Net, freeze_layers, laid_out, shallow

if TYPE_CHECKING:
    from typing_extensions import Self


class Preconditioned(nn.Module, ABC):
    """A denoiser D(x; sigma) made of a U-Net (Karras et al. 2022, table 1, "EDM").

    Attributes:
        img_resolution, img_channels, label_dim: shapes of images and labels.
        config: the constructor's arguments, JSON-compatible.
        precision: dtype that the U-Net computes in; None is what the file asks for, float16 on
            CUDA with `use_fp16`, and float32 elsewhere.
        frozen_in: dtype of the weights of a frozen network, see `freeze`; None for others.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    use_fp16: bool
    sigma_data: float
    config: dict[str, Any]
    precision: torch.dtype | None = None
    frozen_in: torch.dtype | None = None

    @property
    @abstractmethod
    def inner(self) -> nn.Module:
        """The U-Net, called as ``inner(x, c_noise, labels)``."""

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self.inner._compiled_call_impl is not None

    def computes_in(self, device: torch.device, force_fp32: bool = False) -> torch.dtype:
        """Return the dtype that the U-Net computes in on `device`.

        Raises:
            ValueError: the network was frozen in a dtype that is not the one asked for.
        """
        published = torch.float16 if self.use_fp16 and device.type == "cuda" else torch.float32
        asked = torch.float32 if force_fp32 else self.precision
        if self.frozen_in is None:
            return asked or published
        if asked not in (None, self.frozen_in):
            raise ValueError(
                f"this network's weights were frozen in {self.frozen_in}, so it cannot compute in "
                f"{asked}; load it with that precision, or with freeze=False"
            )
        return self.frozen_in

    def train(self, mode: bool = True) -> Self:
        if mode and self.frozen_in is not None:
            raise RuntimeError("a frozen network cannot be trained; load it with freeze=False")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.frozen_in is not None:
            self._settle()
        return self

    def _settle(self) -> None:
        """Put the weights into what is fast where they are now."""
        device = next(self.parameters()).device
        if self.precision is None and self.frozen_in == torch.float32:
            self.frozen_in = None  # a network moved to CUDA
            self.frozen_in = self.computes_in(device)
        assert self.frozen_in is not None
        freeze_layers(self, self.frozen_in)

    def compile(self, **options: Any) -> None:
        """Compile the U-Net with `torch.compile`, when it is first called.

        The preconditioning stays as it is, so that no number given as sigma leads to another
        compilation. `options` are those of `torch.compile`; breaks in the graph are errors.
        """
        self.inner.compile(**{"fullgraph": True, **options})

    def denoised(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None,
        force_fp32: bool,
    ) -> tuple[Tensor, Tensor]:
        """Apply U-Net and preconditioning; return the denoised x, and c_noise [N] or [1]."""
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            raise ValueError(f"x must be [N, {self.img_channels}, H, W], got {list(x.shape)}")
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels: Tensor | None = None
        if self.label_dim:
            if class_labels is None:
                labels = torch.zeros([1, self.label_dim], device=x.device)
            else:
                given = torch.as_tensor(class_labels)
                labels = one_hot_rows(given, self.label_dim, len(x)).to(x.device)
        dtype = self.computes_in(x.device, force_fp32)

        total = sigma**2 + self.sigma_data**2
        c_noise = sigma.flatten().log() / 4
        out = self.inner(laid_out((x / total.sqrt()).to(dtype)), c_noise, labels)
        out = out.to(torch.float32)
        denoised = (self.sigma_data**2 / total) * x
        return denoised + (sigma * self.sigma_data / total.sqrt()) * out, c_noise


def freeze(net: Net, precision: torch.dtype | None = None, *, inplace: bool = False) -> Net:
    """Return the inference form of a network: the same outputs, from weights made ready once.

    Its layers hold what they apply, in the dtype and memory format that they run in. It is on the
    device of `net`, cannot be trained, and its state dict has other names. Moved to another device
    it follows (a network whose file asks for float16 on CUDA becomes float16 there), but
    it does not become more precise again.

    Args:
        net: a `Precond` or `EDMPrecond`.
        precision: dtype that the U-Net computes in; by default `net`'s own choice.
        inplace: change `net` itself and return it; each weight is freed when it is replaced.

    Raises:
        TypeError: another network.
        ValueError: it is frozen already.
    """
    if not isinstance(net, Preconditioned):
        raise TypeError(f"a {type(net).__name__} is not a network that can be frozen")
    if net.frozen_in is not None:
        raise ValueError("the network is frozen already")
    made = net if inplace else shallow(net)
    made.eval()
    if precision is not None:
        made.precision = precision
    dtype: torch.dtype = made.computes_in(next(made.parameters()).device)
    with torch.no_grad():
        freeze_layers(made, dtype)
        for module in made.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())  # not shared with `net`, or with its file
    made.frozen_in = dtype
    return made


def one_hot_rows(labels: Tensor, label_dim: int, count: int) -> Tensor:
    """Return class labels as a network takes them: rows, float32 [count or 1, label_dim].

    Args:
        labels: rows [count, label_dim], one row for all [1, label_dim], or class numbers: whole
            numbers [count] or a single one. For a single image a row may be [label_dim]. Rows of
            whole numbers hold 0 and 1.
        label_dim: number of classes.
        count: number of images.

    Raises:
        ValueError: any other shape, a class number out of range, class numbers in rows, or complex
            labels. Values are checked only on the CPU and outside of a compiled graph; elsewhere
            the check would wait for the device, or break the graph.
    """
    seen = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    whole = not labels.is_floating_point() and not labels.is_complex()
    whole = whole and labels.dtype != torch.bool
    remedy = f"torch.nn.functional.one_hot(numbers, {label_dim}) makes rows of class numbers"
    if whole and labels.ndim < 2:
        numbers = labels.reshape(-1)
        if seen and not ((numbers >= 0) & (numbers < label_dim)).all():
            raise ValueError(
                f"class numbers must be from 0 to {label_dim - 1}, got {numbers.tolist()[:8]}"
            )
        labels = F.one_hot(numbers.long(), label_dim)
    elif whole and seen and not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"rows of class labels hold 0 and 1, got {labels.flatten().tolist()[:8]}; {remedy}"
        )
    if labels.ndim == 1 and count == 1:  # with more images, this might be meant as their classes
        labels = labels[None]
    fits = labels.ndim == 2 and labels.shape[1] == label_dim and len(labels) in (1, count)
    if not fits or labels.is_complex():
        raise ValueError(
            f"class labels must be one-hot rows [{count}, {label_dim}] or class numbers [{count}], "
            f"got {labels.dtype} {list(labels.shape)}; {remedy}"
        )
    return labels.to(torch.float32)
