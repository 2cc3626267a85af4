"""The EDM2 network: golden outputs, training, labels. test_freezing.py has its frozen form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import golden, network_of, relative

from erk_guid.denoisers import guided_denoiser
from erk_guid.models.networks import Unconditional
from erk_guid.models.networks.edm2 import Block, MPConv, Precond, normalize


@pytest.mark.parametrize("name", ["edm2_net_cond", "edm2_net_guide"])
def test_golden_networks(name: str) -> None:
    data, net = golden(name), network_of(name)
    labels = data["labels"] if net.label_dim else None
    denoised, logvar = net(data["x"], data["sigma"], labels, return_logvar=True)
    assert relative(denoised, data["denoised"]) < 1e-5
    assert relative(logvar, data["logvar"]) < 1e-5
    assert logvar.shape == data["logvar"].shape
    assert relative(net(data["x"], data["sigma"]), data["denoised_no_labels"]) < 1e-5
    scalar = net(data["x"], 0.7, labels)
    assert relative(scalar, data["denoised_scalar_sigma_0p7"]) < 1e-5


@pytest.mark.parametrize("name", ["edm2_seeded_wide", "edm2_seeded_plain"])
def test_golden_seeded_networks(name: str) -> None:
    # What the small files do not pin: several heads, three levels, clipping, wide filters.
    data = golden(name)
    net = Precond(**data["config"]).eval().requires_grad_(False)
    state = net.state_dict()
    for i, key in enumerate(sorted(state)):
        generator = torch.Generator().manual_seed(int(data["seed"]) + i)
        state[key] = torch.randn(state[key].shape, generator=generator)
    net.load_state_dict(state)
    labels = data["labels"] if net.label_dim else None
    assert relative(net(data["x"], data["sigma"], labels), data["denoised"]) < 1e-5
    assert relative(net(data["x"], data["sigma"]), data["denoised_no_labels"]) < 1e-5
    assert relative(net(data["x"], 0.3, labels), data["denoised_scalar_sigma_0p3"]) < 1e-5


def fresh() -> Precond:
    """A small network that does not multiply itself away (all gains start at 0)."""
    torch.manual_seed(3)
    net = Precond(
        8, 2, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
        channels_per_head=8, logvar_channels=8,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.8)
    return net.eval()


X = torch.linspace(-1, 1, 2 * 2 * 8 * 8).reshape(2, 2, 8, 8)


def test_gradients_reach_the_weights_in_both_modes() -> None:
    for mode in (True, False):
        net = fresh().train(mode)
        net(X, 0.9, torch.eye(3)[:2]).square().mean().backward()
        missing = [n for n, p in net.named_parameters() if p.grad is None]
        assert missing == ["logvar_linear.weight"]


def test_training_normalizes_the_stored_weights() -> None:
    net = fresh().train()
    net(X, 0.9, return_logvar=True)
    for module in net.modules():
        if isinstance(module, MPConv):
            rms = module.weight.detach().flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


def test_normalize_keeps_the_dtype_and_takes_the_norm_in_float32() -> None:
    x = torch.full([2, 4, 200, 200], 300.0, dtype=torch.float16)  # squares overflow float16
    y = normalize(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-2, atol=0)


def test_embeddings_stay_float32_in_a_float16_network() -> None:
    # As in the published program, by its description: no stored numbers of a float16 run exist
    # here. On a GPU a rounded embedding would change every block.
    net = fresh()
    seen = []
    for module in net.unet.modules():
        if isinstance(module, Block):
            module.emb_linear.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.no_grad():
        out = net.unet(X.half(), torch.tensor([0.1]), torch.zeros(1, 3))
    assert out.dtype == torch.float16
    assert set(seen) == {torch.float32}


def test_unconditional_ignores_labels(cond: Precond) -> None:
    x = torch.randn(2, 3, 16, 16)
    net = Unconditional(cond)
    assert net.label_dim == 0
    assert torch.equal(net(x, 0.9, torch.eye(5)[:2]), cond(x, 0.9))


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="no option clip_activation"):
        Precond(8, 2, 3, clip_activation=3)


@pytest.mark.parametrize(
    ("channels", "per_head", "heads"), [(96, 64, 1), (32, 64, 0), (160, 64, 2)]
)
def test_heads_are_counted_as_published(channels: int, per_head: int, heads: int) -> None:
    # EDM2's rule (measured there for the first two): the quotient rounded down, none where it is
    # 0. No stored outputs of such a network exist here.
    net = Precond(8, 2, 0, model_channels=channels, channel_mult=[1], channels_per_head=per_head)
    (first, *_) = [block for name, block in net.unet.dec.items() if name.endswith("_in0")]
    assert first.heads == heads
    assert ("unet.dec.8x8_in0.attn_qkv.weight" in net.state_dict()) == (heads > 0)
    with torch.no_grad():
        assert net(torch.randn(2, 2, 8, 8), 0.5).isfinite().all()


def test_heads_that_divide_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="makes 3 heads, which do not divide the 224 channels"):
        Precond(8, 2, 3, model_channels=224, channel_mult=[1], channels_per_head=64)


@pytest.mark.parametrize("label_dim", [4, 3])
def test_class_numbers_are_one_hot_rows(label_dim: int) -> None:
    # Catches: a batch of label_dim class numbers taken for one row of labels.
    torch.manual_seed(0)
    net = Precond(8, 1, label_dim, model_channels=8, channel_mult=[1], channels_per_head=8).eval()
    for parameter in net.unet.parameters():
        if parameter.ndim == 0:
            torch.nn.init.ones_(parameter)
    x = torch.randn(4, 1, 8, 8)
    numbers = torch.tensor([2, 0, 1, 2])
    rows = torch.eye(label_dim)[numbers]
    with torch.no_grad():
        expected = net(x, 0.7, rows)
        assert not torch.equal(expected, net(x, 0.7))
        for same in (numbers, numbers.int(), rows.double(), rows.long(), rows.bool()):
            assert torch.equal(net(x, 0.7, same), expected)
        one = net(x, 0.7, torch.eye(label_dim)[[1]])
        for same in (torch.tensor(1), torch.tensor([1]), 1):
            assert torch.equal(net(x, 0.7, same), one)
        assert torch.equal(net(x[:1], 0.7, torch.eye(label_dim)[1]), net(x[:1], 0.7, [1]))
        for wrong in (rows[:3], torch.ones(4, label_dim + 1), torch.ones(2), numbers[:3],
                      numbers.float(), torch.eye(label_dim)[1]):  # fmt: skip
            with pytest.raises(ValueError, match=r"class labels must be one-hot rows \[4, "):
                net(x, 0.7, wrong)
        with pytest.raises(ValueError, match=f"from 0 to {label_dim - 1}, got"):
            net(x, 0.7, torch.tensor([0, 1, label_dim, 0]))
        # Catches: class numbers taken for the values of a row, and an imaginary part left out.
        remedy = rf"; torch\.nn\.functional\.one_hot\(numbers, {label_dim}\) makes rows"
        for numbers in (torch.arange(label_dim)[None], torch.arange(label_dim).repeat(4, 1)):
            with pytest.raises(ValueError, match=rf"hold 0 and 1, got \[0, 1, 2.*{remedy}"):
                net(x, 0.7, numbers)
        with pytest.raises(ValueError, match=rf"got torch\.complex64 \[4, {label_dim}\]{remedy}"):
            net(x, 0.7, rows + 0j)
        for shape in ((4, 3, 8, 8), (4, 8, 8), (8, 8)):
            with pytest.raises(ValueError, match=r"x must be \[N, 1, H, W\], got \["):
                net(x[0, 0].expand(shape), 0.7)


@pytest.mark.slow
def test_class_numbers_do_not_break_the_graph() -> None:
    # Catches: a look at their values, for which torch.compile would leave the graph.
    torch.compiler.reset()
    net = Precond(8, 1, 4, model_channels=8, channel_mult=[1], channels_per_head=8).eval()
    whole = torch.compile(net, fullgraph=True, backend="eager")
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor(0.7)
    for labels in (torch.tensor([2, 0, 1, 3]), torch.eye(4).long(), torch.eye(4)):
        with torch.no_grad():
            assert torch.equal(whole(x, sigma, labels), net(x, sigma, labels))
    torch.compiler.reset()


@pytest.mark.gpu
def test_float16_on_a_gpu(cond: Precond) -> None:
    data = golden("edm2_net_cond")
    net = copy.deepcopy(cond).cuda()
    half = net(data["x"].cuda(), data["sigma"].cuda(), data["labels"].cuda())
    assert half.dtype == torch.float32
    assert relative(half.cpu(), data["denoised"]) < 2e-2


@pytest.mark.parametrize("strength", [0.0, 1.7])
def test_guidance_by_one_network_takes_one_call(cond: Precond, strength: float) -> None:
    # The same images as two calls make; seen to fail with the halves exchanged.
    calls: list[int] = []
    net = copy.deepcopy(cond)
    net.unet.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    for count in (2, 8):
        x, labels = torch.randn(count, 3, 16, 16), torch.eye(5)[[i % 5 for i in range(count)]]
        guide = Unconditional(net)
        for given in (labels, labels[:1]):
            both = guided_denoiser(net, guide, strength)(x, torch.tensor(0.9), given)
            assert calls == [2 * count]
            apart = guided_denoiser(net, lambda *args: guide(*args), strength)  # noqa: B023
            calls.clear()
            assert relative(both, apart(x, torch.tensor(0.9), given)) < 1e-5
            assert calls == [count, count]
            calls.clear()
    # Two calls where that is faster, without labels, and outside of the interval one.
    few = torch.randn(2, 3, 16, 16)
    many = torch.randn(100, 3, 16, 16)
    guided = guided_denoiser(net, guide, strength)
    guided(many, torch.tensor(0.9), labels[:1])
    guided(few, torch.tensor(0.9))
    guided_denoiser(net, guide, strength, (1, 2))(few, torch.tensor(0.9), labels[:2])
    assert calls == [100, 100, 2, 2, 2]


def test_another_kind_of_network_is_asked_without_labels(cond: Precond) -> None:
    # Its "no label" may be something else than a row of zeros.
    class Foreign(torch.nn.Module):
        img_resolution, img_channels, label_dim = 16, 3, 5

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> torch.Tensor:
            return x * (2.0 if labels is None else 1.0)

    net = Foreign()
    x = torch.ones(2, 3, 16, 16)
    guided = guided_denoiser(net, Unconditional(net), 2.0)  # type: ignore[arg-type]
    assert torch.equal(guided(x, torch.tensor(0.9), torch.eye(5)[:2]), torch.zeros_like(x))
    # One sigma in a list of its own, as networks take it.
    guided = guided_denoiser(cond, Unconditional(cond), 2.0)
    a = guided(x, torch.tensor([0.9]), torch.eye(5)[:2])
    assert torch.equal(a, guided(x, torch.tensor(0.9), torch.eye(5)[:2]))
