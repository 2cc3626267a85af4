"""The EDM2 network: magnitude-preserving U-Net and its preconditioning.

Written from Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv 2312.02696), figure 21 and the equations named below. The
parameter names are those of the published checkpoints, so that their state dicts load.

The *effective* weight of a layer (normalized, scaled by its gain) is constant after training; a
frozen network holds it (`freeze`). Attention runs through `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erk_guid.models.networks.frozen import (
    Freezable,
    FrozenConv,
    HasGains,
    laid_out,
    layout,
    may_overwrite,
)
from erk_guid.models.networks.precond import Preconditioned

Flavor = Literal["enc", "dec"]
Resampling = Literal["keep", "up", "down"]


def magnitude(x: Tensor, dim: Sequence[int] | int | None = None, eps: float = 1e-4) -> Tensor:
    """Return what `normalize` divides `x` by, in the dtype of `x`, with the dimensions of x.

    The norm is computed in at least float32.
    """
    if dim is None:
        dim = tuple(range(1, x.ndim))
    if dim == 1 and x.dtype == torch.float32 and not x.requires_grad:
        # The same norm; PyTorch's own is several times slower on the CPU over a strided axis
        # (but has a gradient at 0).
        norm = x.square().sum(1, keepdim=True).sqrt()
    else:
        norm = torch.linalg.vector_norm(
            x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
    # sqrt(norms / elements) turns the Euclidean norm into a root mean square.
    norm = eps + norm * math.sqrt(norm.numel() / max(x.numel(), 1))
    return norm.to(x.dtype)


def normalize(x: Tensor, dim: Sequence[int] | int | None = None, eps: float = 1e-4) -> Tensor:
    """Scale `x` to unit root-mean-square over `dim` (eq. 66): x / (eps + ||x|| / sqrt(n)).

    `dim` defaults to every dimension but the first; n is the number of elements in one norm.
    The result has the dtype of `x`.
    """
    return x / magnitude(x, dim, eps)


SILU_SCALE = 1 / 0.596
"""Makes SiLU magnitude-preserving (eq. 81): mp_silu(x) = SILU_SCALE silu(x)."""


def mp_silu(x: Tensor) -> Tensor:
    """Apply the magnitude-preserving SiLU (eq. 81)."""
    return F.silu(x) * SILU_SCALE


def sum_weights(t: float) -> tuple[float, float]:
    """Return the weights of a and b in the magnitude-preserving sum mp_sum(a, b, t) (eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def scaled_silu(y: Tensor, scale: Tensor) -> Tensor:
    """Return silu(y scale); y may be overwritten."""
    if may_overwrite(y) and may_overwrite(scale):
        return F.silu(y.mul_(scale), inplace=True)
    return F.silu(y * scale)


def added(y: Tensor, x: Tensor, weight: float) -> Tensor:
    """Return y + weight x; y may be overwritten."""
    return y.add_(x, alpha=weight) if may_overwrite(y) else torch.add(y, x, alpha=weight)


def clipped(x: Tensor, limit: float) -> Tensor:
    """Return x, limited to [-limit, limit]; x may be overwritten."""
    return x.clamp_(-limit, limit) if may_overwrite(x) else x.clamp(-limit, limit)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenate over channels, preserving magnitudes (eq. 103)."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    weights = scale * (1 - t) / math.sqrt(na), scale * t / math.sqrt(nb)
    # Equal widths are not weighted: the factors are 1 then, up to rounding.
    parts = [x if math.isclose(w, 1) else x * w for x, w in zip((a, b), weights, strict=True)]
    return torch.cat(parts, 1)


@functools.lru_cache(maxsize=64)
def _resampling_kernel(
    f: tuple[float, ...], total: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the outer product of `f` with itself, scaled to sum to `total`.

    It is cached, so that no call waits for a copy to the device.
    """
    with torch.inference_mode(False), torch.no_grad():
        taps = torch.tensor(f, dtype=torch.float32, device="cpu")
        kernel = torch.outer(taps, taps)
        return (kernel / kernel.sum() * total).to(device=device, dtype=dtype)


def resample(x: Tensor, f: Sequence[float] = (1, 1), mode: Resampling = "keep") -> Tensor:
    """Halve or double the resolution of `x` [N, C, H, W] with the separable filter `f`."""
    if mode == "keep":
        return x
    if tuple(f) == (1, 1):  # as in all published networks: the same, by kernels of their own
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0)
    # Doubling spreads each pixel over four, so the kernel must sum to four to keep magnitudes.
    kernel = _resampling_kernel(tuple(f), 4.0 if mode == "up" else 1.0, x.dtype, x.device)
    channels, pad = x.shape[1], (len(f) - 1) // 2
    weight = kernel.expand(channels, 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, weight, stride=2, padding=pad, groups=channels)
    return F.conv_transpose2d(x, weight, stride=2, padding=pad, groups=channels)


class MPFourier(nn.Module):
    """Fourier features of a scalar, sqrt(2) cos(x freqs + phases) (eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N] to [N, channels] in float32."""
        angles = torch.outer(x.float(), self.freqs.float()) + self.phases.float()
        return angles.cos() * math.sqrt(2)


class MPConv(Freezable):
    """Magnitude-preserving convolution or linear layer (eq. 47, 66); no bias.

    The stored `weight` [cout, cin, *kernel] is used through its *effective* value,
    ``normalize(weight) * gain * scale / sqrt(fan_in)``, computed at every call. In training mode
    the stored weight is first replaced by its normalized value (forced weight normalization).
    Its frozen form holds the effective value.

    Args:
        scale: a constant factor of the result, such as that of the activation before it.
    """

    def __init__(self, cin: int, cout: int, kernel: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *kernel))
        self.scale = scale

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Convolve [N, cin, H, W], or map [N, cin]; the result is multiplied by `gain`."""
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
        w = self.effective_weight(gain).to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        return F.conv2d(x, laid_out(w), padding=w.shape[-1] // 2)

    def effective_weight(self, gain: Tensor | None = None) -> Tensor:
        """Return the weight that `forward` applies, in float32."""
        return normalize(self.weight.float()) * self._factor(gain)

    def _factor(self, gain: Tensor | None) -> Tensor | float:
        # The quotient is a scalar in the gain's own dtype: published files store float16
        # gains, and their programs round it to float16.
        return (1 if gain is None else gain) / math.sqrt(self.weight[0].numel()) * self.scale

    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> FrozenConv:
        # Where it will be: without copies of its size, loading takes little more memory.
        weight = self.weight.detach().float()
        effective = torch.empty_like(weight, memory_format=layout(weight)).copy_(weight)
        effective.div_(magnitude(weight)).mul_(self._factor(gain))
        return FrozenConv(effective.to(dtype) if weight.ndim == 4 else effective)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Apply cosine attention over pixels (eq. 40): [N, 3 C, H, W] to [N, C, H, W].

    The channel axis factors as (head, channel in head, q|k|v); each vector is normalized
    before the product.
    """
    n, c3, height, width = qkv.shape
    # One copy to [3, N, heads, pixels, channels]: with channels last, both the norm and the
    # fused attention kernels run over contiguous memory.
    parts = qkv.reshape(n, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    size = magnitude(parts, dim=-1)
    q, k, v = (parts.div_(size) if may_overwrite(parts) else parts / size).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    if layout(qkv) == torch.channels_last:
        return y.transpose(1, 2).reshape(n, height, width, c3 // 3).permute(0, 3, 1, 2)
    return y.transpose(-1, -2).reshape(n, c3 // 3, height, width)


class Block(HasGains):
    """Residual block with optional resampling and attention (figure 21)."""

    GAINS: ClassVar[dict[str, str]] = {"emb_linear": "emb_gain"}

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        flavor: Flavor = "enc",
        resample_mode: Resampling = "keep",
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        self.flavor = flavor
        self.resample_mode: Resampling = resample_mode
        self.resample_filter = tuple(resample_filter)
        # As published: the quotient rounded down, and no attention where that is 0.
        self.heads = cout // channels_per_head if attention else 0
        if self.heads and cout % self.heads:
            raise ValueError(
                f"channels_per_head {channels_per_head} makes {self.heads} heads, which do not "
                f"divide the {cout} channels of an attention block"
            )
        self.dropout = dropout
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.clip_act = clip_act
        # Constant factors (of mp_silu and mp_sum) are folded into the weights that follow or
        # precede them, each of which saves a pass over the activations.
        keep, add = sum_weights(res_balance)
        folded = flavor == "dec" and cin != cout
        self.keep_res = 1.0 if folded else keep
        self.keep_attn, add_attn = sum_weights(attn_balance)
        self.emb_gain: nn.Parameter | None = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cout if flavor == "enc" else cin, cout, [3, 3], SILU_SCALE)
        self.emb_linear = MPConv(emb, cout, [])
        self.conv_res1 = MPConv(cout, cout, [3, 3], SILU_SCALE * add)
        self.conv_skip = MPConv(cin, cout, [1, 1], keep if folded else 1.0) if cin != cout else None
        self.attn_qkv = MPConv(cout, cout * 3, [1, 1]) if self.heads else None
        self.attn_proj = MPConv(cout, cout, [1, 1], add_attn) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_filter, self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        y = self.conv_res0(F.silu(x))
        c = self.emb_linear(emb, self.emb_gain) + 1
        y = scaled_silu(y, c[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = added(y, x, self.keep_res)

        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_proj(attention(self.attn_qkv(x), self.heads))
            x = added(y, x, self.keep_attn)
        if self.clip_act is not None:
            x = clipped(x, self.clip_act)
        return x


class BlockOptions(TypedDict, total=False):
    """The settings that all blocks of a U-Net share."""

    resample_filter: Sequence[float]
    channels_per_head: int
    dropout: float
    res_balance: float
    attn_balance: float
    clip_act: float | None


class UNet(HasGains):
    """The U-Net F of figure 21; `forward` maps (x, c_noise, labels) to an image like x."""

    GAINS: ClassVar[dict[str, str]] = {"out_conv": "out_gain"}

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_options: Any,
    ) -> None:
        super().__init__()
        unknown = set(block_options) - set(BlockOptions.__annotations__)
        if unknown:
            raise TypeError(f"EDM2 network has no option {', '.join(sorted(unknown))}")
        widths = [model_channels * mult for mult in channel_mult]
        cnoise = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        cemb = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        self.label_dim = label_dim
        self.concat_balance = concat_balance
        self.out_gain: nn.Parameter | None = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, [])
        self.label_balance = label_balance
        self.keep_emb, add_label = sum_weights(label_balance)
        self.emb_label: nn.Module | None = None
        if label_dim:
            self.emb_label = MPConv(label_dim, cemb, [], add_label * math.sqrt(label_dim))

        def block(cin: int, cout: int, flavor: Flavor, **special: Any) -> Block:
            return Block(cin, cout, cemb, flavor, **special, **block_options)

        # Encoder. `skips` lists the width of each output; the decoder takes them in reverse order.
        self.enc = nn.ModuleDict()
        width = img_channels + 1
        skips: list[int] = []
        for level, cout in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(width, cout, [3, 3])
                width = cout
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, "enc", resample_mode="down")
            skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(
                    width, cout, "enc", attention=res in attn_resolutions
                )
                width = cout
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            res, cout = img_resolution >> level, widths[level]
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, "dec", resample_mode="up")
            for index in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{index}"] = block(
                    width + skips.pop(), cout, "dec", attention=res in attn_resolutions
                )
                width = cout
        self.out_conv = MPConv(width, img_channels, [3, 3])

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = emb * self.keep_emb + self.emb_label(labels)
        emb = mp_silu(emb)  # float32 whatever the dtype of x, as in the published program

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = layer(x, emb)
        return self.out_conv(x, self.out_gain)


class Precond(Preconditioned):
    """The denoiser D(x; sigma) around the U-Net (Karras et al. 2022, table 1, "EDM").

    Parameters not named here are passed to `UNet` (and from there to `Block`).

    ``Precond(**net.config)`` has the same shape. See `Preconditioned` for the attributes.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_options: Any,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "use_fp16": use_fp16,
            "sigma_data": sigma_data,
            "logvar_channels": logvar_channels,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in unet_options.items()},
        }
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_options)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, [])

    @property
    def inner(self) -> UNet:
        return self.unet

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
    ) -> Any:
        """Denoise `x` [N, C, H, W] at noise level `sigma` (a scalar or [N]).

        `class_labels` are one-hot rows [N, label_dim], or whole class numbers [N]; None means
        unconditional (a zero vector for a conditional network). Computes in float32; the U-Net
        computes in `precision`, or if that is None in float16 on CUDA if `use_fp16` is set, and in
        float32 if `force_fp32` is. Returns float32
        shaped like x; with `return_logvar` also u(sigma) (arXiv 2312.02696, eq. 21), shaped
        [N, 1, 1, 1] or [1, 1, 1, 1].

        Raises:
            ValueError: x or labels of another shape, or class numbers out of range.
        """
        denoised, c_noise = self.denoised(x, sigma, class_labels, force_fp32)
        if not return_logvar:
            return denoised
        return denoised, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
