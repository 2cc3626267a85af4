"""The EDM (2022) networks: DDPM++, NCSN++ and ADM, and their preconditioning.

Architectures of Song et al. 2021 (arXiv 2011.13456) and Dhariwal and Nichol 2021 (arXiv
2105.05233), as trained by Karras et al. 2022 (arXiv 2206.00364). The parameter names are those
of the published checkpoints, so that their state dicts load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erk_guid.models.networks.frozen import Freezable, FrozenConv, constant, copied
from erk_guid.models.networks.precond import Preconditioned


class Linear(Freezable):
    """Linear layer. The weight may be stored in one dtype and used in another."""

    def __init__(self, cin: int, cout: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin) / math.sqrt(cin))
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)

    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> FrozenConv:
        bias = None if self.bias is None else copied(self.bias, torch.float32)
        return FrozenConv(copied(self.weight, torch.float32), bias)


class Conv2d(Freezable):
    """Convolution that may also halve or double the resolution.

    Args:
        kernel: 1 or 3; with 0 the layer only resamples and has no weight.
        up, down: resample with `resample_filter`, before the convolution (a fused `down`: after).
        fused: combine the padding of both steps, so that together they keep the size.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = cout
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            scale = 1 / math.sqrt(cin * kernel**2)
            self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel) * scale)
            self.bias = nn.Parameter(torch.zeros(cout))
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        outer = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("resample_filter", outer[None, None] if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        weight_pad = self.weight.shape[-1] // 2 if self.weight is not None else 0
        taps = self.resample_filter
        taps_pad = (taps.shape[-1] - 1) // 2 if taps is not None else 0
        fused = self.fused and self.weight is not None
        if taps is not None and self.up:
            pad = max(taps_pad - weight_pad, 0) if fused else taps_pad
            x = self._depthwise(F.conv_transpose2d, x, 4 * taps, pad)
            weight_pad = max(weight_pad - taps_pad, 0) if fused else weight_pad
        elif taps is not None and self.down and fused:
            x = self._convolved(x, weight_pad + taps_pad)
            x = self._depthwise(F.conv2d, x, taps, 0)
            return self._biased(x)
        elif taps is not None:
            x = self._depthwise(F.conv2d, x, taps, taps_pad)
        return self._biased(self._convolved(x, weight_pad))

    @staticmethod
    def _depthwise(function: Any, x: Tensor, taps: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        weight = taps.to(x.dtype).expand(channels, 1, -1, -1)
        found: Tensor = function(x, weight, stride=2, padding=padding, groups=channels)
        return found

    def _convolved(self, x: Tensor, padding: int) -> Tensor:
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), padding=padding)

    def _biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]

    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> Freezable:
        if self.weight is not None and self.resample_filter is None:
            bias = None if self.bias is None else copied(self.bias, dtype)
            return FrozenConv(copied(self.weight, dtype), bias)
        if self.weight is not None and self.bias is not None:
            self.weight = constant(copied(self.weight, dtype))
            self.bias = constant(copied(self.bias, dtype))
        return self


class GroupNorm(Freezable):
    """Group normalization with at least four channels a group, at most 32 groups."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def frozen(self, dtype: torch.dtype, gain: Tensor | None) -> GroupNorm:
        self.weight = constant(copied(self.weight, dtype))
        self.bias = constant(copied(self.bias, dtype))
        return self


class Block(nn.Module):
    """Residual block with embedding and optional self-attention.

    Args:
        heads: attention heads; 0 for no attention.
        adaptive_scale: if true, the embedding scales and shifts; else it only shifts.
        resample_proj: give the skip connection of a resampling block its own weights.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = cin, cout
        self.heads, self.dropout, self.skip_scale = heads, dropout, skip_scale
        self.adaptive_scale = adaptive_scale
        resampling: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(cin, eps)
        self.conv0 = Conv2d(cin, cout, 3, **resampling)
        self.affine = Linear(emb_channels, cout * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(cout, eps)
        self.conv1 = Conv2d(cout, cout, 3)
        self.skip: Conv2d | None = None
        if cin != cout or up or down:
            kernel = 1 if resample_proj or cin != cout else 0
            self.skip = Conv2d(cin, cout, kernel, **resampling)
        if heads:
            self.norm2 = GroupNorm(cout, eps)
            self.qkv = Conv2d(cout, 3 * cout, 1)
            self.proj = Conv2d(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            y = F.silu(torch.addcmul(shift, self.norm1(y), scale + 1))
        else:
            y = F.silu(self.norm1(y + params))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        x = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            x = (self._attend(x) + x) * self.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        # Channels are stored with q, k, v varying fastest.
        qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, channels // self.heads, 3, -1)
        q, k, v = (t.mT for t in qkv.unbind(3))
        found = F.scaled_dot_product_attention(q, k, v).mT
        return self.proj(found.reshape(x.shape))


class PositionalEmbedding(nn.Module):
    """Cosines and sines at frequencies from 1 down to (about) 1/10000."""

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=x.device)
        angles = torch.outer(x, (1 / 10000) ** (steps / (half - self.endpoint)))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines at random frequencies."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x, 2 * math.pi * self.freqs.to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class SongUNet(nn.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier, residual)."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        _one_of("embedding_type", embedding_type, "positional", "fourier")
        _one_of("encoder_type", encoder_type, "standard", "skip", "residual")
        _one_of("decoder_type", decoder_type, "standard", "skip")
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        self.label_dim, self.label_dropout = label_dim, label_dropout
        common: dict[str, Any] = {
            "emb_channels": emb_channels, "dropout": dropout, "skip_scale": math.sqrt(0.5),
            "eps": 1e-6, "resample_filter": resample_filter, "resample_proj": True,
            "adaptive_scale": False,
        }  # fmt: skip

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        self.enc = nn.ModuleDict()
        width, aux = in_channels, in_channels
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, model_channels, 3)
                width = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = Block(width, width, down=True, **common)
                taps = resample_filter
                if encoder_type == "skip":
                    down = Conv2d(aux, aux, 0, down=True, resample_filter=taps)
                    self.enc[f"{res}x{res}_aux_down"] = down
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(aux, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        aux, width, 3, down=True, resample_filter=taps, fused=True
                    )
                    aux = width
            skips.append(width)
            for index in range(num_blocks):
                heads = int(res in attn_resolutions)
                self.enc[f"{res}x{res}_block{index}"] = Block(
                    width, model_channels * mult, heads=heads, **common
                )
                width = model_channels * mult
                skips.append(width)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == last:
                self.dec[f"{res}x{res}_in0"] = Block(width, width, heads=1, **common)
                self.dec[f"{res}x{res}_in1"] = Block(width, width, **common)
            else:
                self.dec[f"{res}x{res}_up"] = Block(width, width, up=True, **common)
            for index in range(num_blocks + 1):
                heads = int(index == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{index}"] = Block(
                    width + skips.pop(), model_channels * mult, heads=heads, **common
                )
                width = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(width, 1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(width, out_channels, 3)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(c_noise)
        emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # sines first, as trained
        if self.map_label is not None and labels is not None:
            labels = _drop(labels, self.label_dropout, self.training)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_down"):
                aux = layer(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)

        out: Tensor | None = None
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                out = layer(out)
            elif name.endswith("_aux_norm"):
                normed = layer(x)
            elif name.endswith("_aux_conv"):
                more = layer(F.silu(normed))
                out = more if out is None else out + more
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        assert out is not None  # level 0 always has its output
        return out


class DhariwalUNet(nn.Module):
    """The ADM U-Net."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        emb_channels = model_channels * channel_mult_emb
        self.label_dropout = label_dropout
        common: dict[str, Any] = {"emb_channels": emb_channels, "dropout": dropout}

        def heads(width: int, attention: bool) -> int:
            return width // 64 if attention else 0

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None

        self.enc = nn.ModuleDict()
        width = in_channels
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, model_channels * mult, 3)
                width = model_channels * mult
            else:
                self.enc[f"{res}x{res}_down"] = Block(width, width, down=True, **common)
            skips.append(width)
            for index in range(num_blocks):
                cout = model_channels * mult
                attention = heads(cout, res in attn_resolutions)
                self.enc[f"{res}x{res}_block{index}"] = Block(
                    width, cout, heads=attention, **common
                )
                width = cout
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(
                    width, width, heads=heads(width, True), **common
                )
                self.dec[f"{res}x{res}_in1"] = Block(width, width, **common)
            else:
                self.dec[f"{res}x{res}_up"] = Block(width, width, up=True, **common)
            for index in range(num_blocks + 1):
                cout = model_channels * mult
                self.dec[f"{res}x{res}_block{index}"] = Block(
                    width + skips.pop(), cout,
                    heads=heads(cout, res in attn_resolutions), **common,
                )  # fmt: skip
                width = cout
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(_drop(labels, self.label_dropout, self.training))
        emb = F.silu(emb)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


def _one_of(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _drop(labels: Tensor, share: float, training: bool) -> Tensor:
    if not training or not share:
        return labels
    return labels * (torch.rand(len(labels), 1, device=labels.device) >= share).to(labels.dtype)


MODELS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class EDMPrecond(Preconditioned):
    """The denoiser D(x; sigma) around one of the U-Nets (Karras et al. 2022, table 1, "EDM").

    Parameters not named here are passed to the U-Net of type `model_type`.

    Attributes:
        sigma_min, sigma_max: range of sigma the network was made for, as far as its file says.
            For the others see `Preconditioned`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_options: Any,
    ) -> None:
        super().__init__()
        _one_of("model_type", model_type, *MODELS)
        bounds = {"sigma_min": sigma_min} if sigma_min else {}
        bounds |= {"sigma_max": sigma_max} if math.isfinite(sigma_max) else {}
        self.config: dict[str, Any] = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "use_fp16": use_fp16,
            "sigma_data": sigma_data,
            "model_type": model_type,
            **bounds,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in model_options.items()},
        }
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.model = MODELS[model_type](
            img_resolution, img_channels, img_channels, label_dim, **model_options
        )

    @property
    def inner(self) -> nn.Module:
        return self.model

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Tensor:
        """Denoise `x` [N, C, H, W] at noise level `sigma` (a scalar or [N]); see `Precond`."""
        denoised, _ = self.denoised(x, sigma, class_labels, force_fp32)
        return denoised
