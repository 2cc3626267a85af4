"""The EDM2 network: magnitude-preserving U-Net and its preconditioning.

Written from Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv 2312.02696), figure 21 and the equations named below. The
parameter names are those of the published checkpoints, so that their state dicts load.

Inference is faster than in a plain transcription. The *effective* weight of a layer (normalized,
scaled by its gain) is constant after training, so it is computed once and kept (`MPConv`).
Attention runs through `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Flavor = Literal["enc", "dec"]
Resampling = Literal["keep", "up", "down"]


def normalize(x: Tensor, dim: Sequence[int] | int | None = None, eps: float = 1e-4) -> Tensor:
    """Scale `x` to unit root-mean-square over `dim` (eq. 66): x / (eps + ||x|| / sqrt(n)).

    `dim` defaults to every dimension but the first; n is the number of elements in one norm.
    The norm is computed in at least float32. The result has the dtype of `x`.
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
    norm = eps + norm * math.sqrt(norm.numel() / x.numel())
    return x / norm.to(x.dtype)


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format in which convolutions of x are faster; one of x's own dimensions.

    On a CPU with bfloat16 that is channels last: EDM2-XS takes 0.95 to 0.98 times as long, measured
    in turn on two cores. With float32 nothing was gained.
    """
    last = x.ndim == 4 and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return torch.channels_last if last else torch.contiguous_format


SILU_SCALE = 1 / 0.596
"""Makes SiLU magnitude-preserving (eq. 81): mp_silu(x) = SILU_SCALE silu(x)."""


def mp_silu(x: Tensor) -> Tensor:
    """Apply the magnitude-preserving SiLU (eq. 81)."""
    return F.silu(x) * SILU_SCALE


def sum_weights(t: float) -> tuple[float, float]:
    """Return the weights of a and b in the magnitude-preserving sum mp_sum(a, b, t) (eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenate over channels, preserving magnitudes (eq. 103)."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], 1)


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


class _CachedWeight:
    """An effective weight together with what it was computed from."""

    __slots__ = ("key", "value")

    def __init__(self, key: tuple[Any, ...], value: Tensor) -> None:
        self.key = key
        self.value = value


class MPConv(nn.Module):
    """Magnitude-preserving convolution or linear layer (eq. 47, 66); no bias.

    The stored `weight` [cout, cin, *kernel] is used through its *effective* value,
    ``normalize(weight) * gain / sqrt(fan_in)``. In training mode the stored weight is first
    replaced by its normalized value (forced weight normalization).

    In evaluation mode, when no gradient of the weight is wanted, the effective weight is
    computed once and reused. Every call compares what it was computed from: the parameters'
    identity, storage and version counter, and the requested dtype. So loading, moving, casting
    and editing in place all lead to a new one. PyTorch does not report one kind of edit, an
    in-place write through ``weight.data``: call ``train()`` or ``eval()`` after it.
    """

    def __init__(self, cin: int, cout: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *kernel))
        self._cached: _CachedWeight | None = None

    def forward(self, x: Tensor, gain: Tensor | float = 1.0, scale: float = 1.0) -> Tensor:
        """Convolve [N, cin, H, W], or map [N, cin]; the result is multiplied by `scale`."""
        w = self.effective_weight(x.dtype, gain, scale)
        if w.ndim == 2:
            return x @ w.t()
        return F.conv2d(x, w, padding=w.shape[-1] // 2)

    def effective_weight(
        self, dtype: torch.dtype, gain: Tensor | float = 1.0, scale: float = 1.0
    ) -> Tensor:
        """Return the weight that `forward` uses, in `dtype`."""
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
            return self._compute(dtype, gain, scale)
        sources = [self.weight, gain] if isinstance(gain, Tensor) else [self.weight]
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        # Tensors made in inference mode have no version counter, so an edit would not be noticed.
        if wants_grad or any(t.is_inference() for t in sources) or torch.compiler.is_compiling():
            return self._compute(dtype, gain, scale)
        key = (
            dtype,
            scale,
            gain if not isinstance(gain, Tensor) else None,
            *((id(t), t.data_ptr(), t._version, t.dtype) for t in sources),
        )
        if self._cached is None or self._cached.key != key:
            # A normal tensor even inside inference_mode: a backward pass may use it later.
            with torch.inference_mode(False), torch.no_grad():
                self._cached = _CachedWeight(key, self._compute(dtype, gain, scale))
        return self._cached.value

    def _compute(self, dtype: torch.dtype, gain: Tensor | float, scale: float) -> Tensor:
        # The quotient is a scalar in the gain's own dtype: published files store float16
        # gains, and their programs round it to float16.
        factor = gain / math.sqrt(self.weight[0].numel())
        weight = (normalize(self.weight.float()) * (factor * scale)).to(dtype)
        return weight.contiguous(memory_format=layout(weight))

    def train(self, mode: bool = True) -> MPConv:
        self._cached = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> MPConv:
        # Moving and casting may reuse a freed address; the key would then look unchanged.
        self._cached = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # copies and pickles start without it


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Apply cosine attention over pixels (eq. 40): [N, 3 C, H, W] to [N, C, H, W].

    The channel axis factors as (head, channel in head, q|k|v); each vector is normalized
    before the product.
    """
    n, c3, height, width = qkv.shape
    # One copy to [3, N, heads, pixels, channels]: with channels last, both the norm and the
    # fused attention kernels run over contiguous memory.
    parts = qkv.reshape(n, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    q, k, v = normalize(parts, dim=-1).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(-1, -2).reshape(n, c3 // 3, height, width)


class Block(nn.Module):
    """Residual block with optional resampling and attention (figure 21)."""

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
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cout if flavor == "enc" else cin, cout, [3, 3])
        self.emb_linear = MPConv(emb, cout, [])
        self.conv_res1 = MPConv(cout, cout, [3, 3])
        self.conv_skip = MPConv(cin, cout, [1, 1]) if cin != cout else None
        self.attn_qkv = MPConv(cout, cout * 3, [1, 1]) if self.heads else None
        self.attn_proj = MPConv(cout, cout, [1, 1]) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_filter, self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        # Constant factors (of mp_silu and mp_sum) are folded into the weights that follow or
        # precede them, each of which saves a pass over the activations.
        y = self.conv_res0(F.silu(x), scale=SILU_SCALE)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = F.silu(y * c[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        keep, add = sum_weights(self.res_balance)
        y = self.conv_res1(y, scale=SILU_SCALE * add)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x, scale=keep)
            x = x + y
        else:
            x = torch.add(y, x, alpha=keep)

        if self.attn_qkv is not None and self.attn_proj is not None:
            keep, add = sum_weights(self.attn_balance)
            y = self.attn_proj(attention(self.attn_qkv(x), self.heads), scale=add)
            x = torch.add(y, x, alpha=keep)
        if self.clip_act is not None:
            x = x.clamp(-self.clip_act, self.clip_act)
        return x


class BlockOptions(TypedDict, total=False):
    """The settings that all blocks of a U-Net share."""

    resample_filter: Sequence[float]
    channels_per_head: int
    dropout: float
    res_balance: float
    attn_balance: float
    clip_act: float | None


class UNet(nn.Module):
    """The U-Net F of figure 21; `forward` maps (x, c_noise, labels) to an image like x."""

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
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, [])
        self.emb_label = MPConv(label_dim, cemb, []) if label_dim else None

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
            keep, add = sum_weights(self.label_balance)
            emb = emb * keep + self.emb_label(labels * math.sqrt(self.label_dim), scale=add)
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
        return self.out_conv(x, gain=self.out_gain)


class Precond(nn.Module):
    """The denoiser D(x; sigma) around the U-Net (Karras et al. 2022, table 1, "EDM").

    Parameters not named here are passed to `UNet` (and from there to `Block`).

    Attributes:
        config: the constructor's arguments, JSON-compatible; ``Precond(**net.config)`` has
            the same shape.
        precision: dtype that the U-Net computes in; None is what the file asks for.
    """

    precision: torch.dtype | None = None

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
            ValueError: labels of another shape, or class numbers out of range.
        """
        denoised, c_noise = preconditioned(self, self.unet, x, sigma, class_labels, force_fp32)
        if not return_logvar:
            return denoised
        return denoised, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)


def one_hot_rows(labels: Tensor, label_dim: int, count: int) -> Tensor:
    """Return class labels as a network takes them: rows, float32 [count or 1, label_dim].

    Args:
        labels: rows [count, label_dim], one row for all [1, label_dim], or class numbers: whole
            numbers [count] or a single one. For a single image a row may be [label_dim].
        label_dim: number of classes.
        count: number of images.

    Raises:
        ValueError: any other shape, or a class number out of range. The range is checked only on
            the CPU; elsewhere the check would wait for the device.
    """
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if whole and labels.ndim < 2:
        numbers = labels.reshape(-1)
        if numbers.device.type == "cpu" and not ((numbers >= 0) & (numbers < label_dim)).all():
            raise ValueError(
                f"class numbers must be from 0 to {label_dim - 1}, got {numbers.tolist()[:8]}"
            )
        labels = F.one_hot(numbers.long(), label_dim)
    if labels.ndim == 1 and count == 1:  # with more images, this might be meant as their classes
        labels = labels[None]
    if labels.ndim != 2 or labels.shape[1] != label_dim or len(labels) not in (1, count):
        raise ValueError(
            f"class labels must be one-hot rows [{count}, {label_dim}] or class numbers [{count}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return labels.to(torch.float32)


def preconditioned(
    precond: Any,
    unet: nn.Module,
    x: Tensor,
    sigma: Tensor | float,
    class_labels: Tensor | None,
    force_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """Apply EDM's preconditioning around a U-Net; return the denoised x, and c_noise [N] or [1].

    Args:
        precond: has `label_dim`, `sigma_data`, `use_fp16` and `precision`.
        unet: called as ``unet(x, c_noise, labels)``.
    """
    x = x.to(torch.float32)
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
    labels: Tensor | None = None
    if precond.label_dim:
        if class_labels is None:
            labels = torch.zeros([1, precond.label_dim], device=x.device)
        else:
            given = torch.as_tensor(class_labels)
            labels = one_hot_rows(given, precond.label_dim, len(x)).to(x.device)
    dtype = torch.float32
    if not force_fp32:
        published = precond.use_fp16 and x.device.type == "cuda"
        dtype = precond.precision or (torch.float16 if published else torch.float32)

    total = sigma**2 + precond.sigma_data**2
    c_noise = sigma.flatten().log() / 4
    x_in = (x / total.sqrt()).to(dtype)
    x_in = x_in.contiguous(memory_format=layout(x_in))
    out = unet(x_in, c_noise, labels).to(torch.float32)
    denoised = (precond.sigma_data**2 / total) * x
    return denoised + (sigma * precond.sigma_data / total.sqrt()) * out, c_noise
