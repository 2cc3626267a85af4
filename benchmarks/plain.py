"""EDM2's network in its plain form: one line of code for each equation, nothing made fast.

Weights are normalized at every call, the softmax of attention is written out, tensors are NCHW and
float32. It computes from the weights of our own `Precond`; what that does faster is timed against
this. Equations: Karras et al. 2024, arXiv 2312.02696.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erk_guid.models.networks.edm2 import Block, Precond, UNet


def normalize(x: Tensor, dim: Any = None, eps: float = 1e-4) -> Tensor:
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    norm = torch.add(eps, norm, alpha=math.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    na, nb = a.shape[1], b.shape[1]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([c / math.sqrt(na) * (1 - t) * a, c / math.sqrt(nb) * t * b], dim=1)


def mp_conv(layer: Any, x: Tensor, gain: Any = 1.0) -> Tensor:
    weight = normalize(layer.weight.float())
    weight = (weight * (gain / math.sqrt(layer.weight[0].numel()))).to(x.dtype)
    if weight.ndim == 2:
        return x @ weight.t()
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def resample(x: Tensor, taps: Any, mode: str) -> Tensor:
    if mode == "keep":
        return x
    f = torch.tensor(taps, dtype=torch.float32)
    f = (torch.outer(f, f) / f.sum() ** 2)[None, None].to(x.dtype).tile([x.shape[1], 1, 1, 1])
    pad, groups = (len(taps) - 1) // 2, x.shape[1]
    if mode == "down":
        return F.conv2d(x, f, groups=groups, stride=2, padding=pad)
    return F.conv_transpose2d(x, f * 4, groups=groups, stride=2, padding=pad)


def attention(qkv: Tensor, heads: int) -> Tensor:
    n, c3, height, width = qkv.shape
    y = qkv.reshape(n, heads, -1, 3, height * width)
    q, k, v = normalize(y, dim=2).unbind(3)
    w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("nhqk,nhck->nhcq", w, v).reshape(n, c3 // 3, height, width)


def block(b: Block, x: Tensor, emb: Tensor) -> Tensor:
    x = resample(x, b.resample_filter, b.resample_mode)
    if b.flavor == "enc":
        if b.conv_skip is not None:
            x = mp_conv(b.conv_skip, x)
        x = normalize(x, dim=1)
    y = mp_conv(b.conv_res0, mp_silu(x))
    c = mp_conv(b.emb_linear, emb, b.emb_gain) + 1
    y = mp_conv(b.conv_res1, mp_silu(y * c[:, :, None, None].to(y.dtype)))
    if b.flavor == "dec" and b.conv_skip is not None:
        x = mp_conv(b.conv_skip, x)
    x = mp_sum(x, y, b.res_balance)
    if b.heads:
        y = mp_conv(b.attn_proj, attention(mp_conv(b.attn_qkv, x), b.heads))
        x = mp_sum(x, y, b.attn_balance)
    return x if b.clip_act is None else x.clip(-b.clip_act, b.clip_act)


def unet(net: UNet, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
    fourier = net.emb_fourier
    emb = (torch.outer(c_noise, fourier.freqs) + fourier.phases).cos() * math.sqrt(2)
    emb = mp_conv(net.emb_noise, emb)
    if net.emb_label is not None and labels is not None:
        given = mp_conv(net.emb_label, labels * math.sqrt(labels.shape[1]))
        emb = mp_sum(emb, given, net.label_balance)
    emb = mp_silu(emb)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    skips = []
    for layer in net.enc.values():
        x = block(layer, x, emb) if isinstance(layer, Block) else mp_conv(layer, x)
        skips.append(x)
    for name, layer in net.dec.items():
        assert isinstance(layer, Block)
        if "block" in name:
            x = mp_cat(x, skips.pop(), net.concat_balance)
        x = block(layer, x, emb)
    return mp_conv(net.out_conv, x, net.out_gain)


class Plain(nn.Module):
    """The denoiser, called as `Precond` is; it holds the same weights."""

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net
        self.img_resolution, self.img_channels = net.img_resolution, net.img_channels
        self.label_dim = net.label_dim

    def forward(self, x: Tensor, sigma: Any, class_labels: Tensor | None = None) -> Tensor:
        """Denoise x [N, C, H, W] at sigma (a scalar or [N]); float32."""
        data = self.net.sigma_data
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels = class_labels
        if self.label_dim and labels is None:
            labels = torch.zeros([1, self.label_dim], device=x.device)
        c_in = 1 / (data**2 + sigma**2).sqrt()
        out = unet(self.net.unet, c_in * x, sigma.flatten().log() / 4, labels)
        c_skip = data**2 / (sigma**2 + data**2)
        return c_skip * x + sigma * data * c_in * out
