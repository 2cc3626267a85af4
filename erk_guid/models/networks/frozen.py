"""Networks for inference: their weights are made ready once, and nothing is computed twice.

A trainable network derives what its layers apply (normalized, scaled, cast) from its parameters at
every call. A frozen one holds the result, as plain tensors in the dtype and memory format that it
runs in, and nothing else. There is no cache that copies, `.to()`, threads or `torch.compile` could
find stale.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format in which convolutions of x are faster; one of x's own dimensions.

    On a CPU that is channels last: oneDNN's kernels read it as it is, and reorder other layouts
    before and after every convolution.
    """
    last = x.ndim == 4 and x.device.type == "cpu"
    return torch.channels_last if last else torch.contiguous_format


def laid_out(x: Tensor) -> Tensor:
    """Return x in its `layout`."""
    return x.contiguous(memory_format=layout(x))


def may_overwrite(x: Tensor) -> bool:
    """Return whether a tensor just computed may be changed in place, as no gradient needs it."""
    return not x.requires_grad


def constant(value: Tensor) -> nn.Parameter:
    """Return a parameter without gradient, in its `layout`; it may share the memory of `value`."""
    return nn.Parameter(laid_out(value.detach()), requires_grad=False)


def copied(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a parameter's value in a dtype."""
    return value.detach().to(dtype, copy=True)


class Freezable(nn.Module, ABC):
    """A layer that has a frozen form."""

    @abstractmethod
    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> nn.Module:
        """Return a layer that applies the same; it may be this one, changed.

        Args:
            dtype: of activations. What the layer applies to embeddings stays float32.
            gain: the factor that `forward` would be given.
        """


class HasGains(nn.Module):
    """A module that has the gains of some of its layers as parameters of its own."""

    GAINS: ClassVar[dict[str, str]] = {}
    """Name of a layer, and of its gain."""


class FrozenConv(Freezable):
    """A convolution or linear layer that applies the weight it is given.

    The parameter is called `effective`, so that neither kind of state dict loads into the other.
    """

    def __init__(self, effective: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.effective = constant(effective)
        self.bias = None if bias is None else constant(bias)

    def forward(self, x: Tensor, gain: None = None) -> Tensor:
        """Convolve [N, cin, H, W], or map [N, cin]; a gain would be in the weight already."""
        weight = self.effective.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> FrozenConv:
        if self.effective.ndim == 4:
            self.effective = constant(self.effective.to(dtype))
            self.bias = None if self.bias is None else constant(self.bias.to(dtype))
        return self


def freeze_layers(net: nn.Module, dtype: torch.dtype) -> None:
    """Replace layers by their frozen forms, one by one, so that the memory of each is reused."""
    gains = net.GAINS if isinstance(net, HasGains) else {}
    for name in list(net._modules):
        layer = net._modules[name]
        if isinstance(layer, Freezable):
            gain = getattr(net, gains[name]) if name in gains else None
            setattr(net, name, layer.frozen(dtype, gain).train(False))
        elif layer is not None:
            freeze_layers(layer, dtype)
    for name in gains.values():
        setattr(net, name, None)


def shallow(module: Net) -> Net:
    """Return a copy with modules of its own, and the same parameters and buffers."""
    twin = module.__new__(type(module))
    own: dict[str, Any] = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own[kind] = dict(own[kind])
    for name, value in own.items():
        if "hooks" in name or name == "_non_persistent_buffers_set":
            own[name] = copy.copy(value)
    own["_compiled_call_impl"] = None  # of the original
    own["_modules"] = {
        name: None if child is None else shallow(child) for name, child in own["_modules"].items()
    }
    twin.__dict__.update(own)
    return twin
