"""From seeds to batches: golden values, and independence of how the work is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DATA, golden
from torch import Tensor

import erk_guid
from erk_guid.models.checkpoints import Checkpoint

GUIDED = {"num_steps": 6, "guidance": 1.4, "w_stiff": 0.75, "w_con": 0.3}
PLAIN = {"num_steps": 6}


@pytest.fixture(scope="module")
def main_net() -> Checkpoint:
    return erk_guid.load(DATA / "edm2_cond.pkl")


@pytest.fixture(scope="module")
def guiding_net() -> Checkpoint:
    return erk_guid.load(DATA / "edm2_guide.pkl")


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("which", ["guided", "plain"])
def test_golden_generation(
    main_net: Checkpoint, guiding_net: Checkpoint, which: str, batch_size: int
) -> None:
    # Catches: a shared generator, the class drawn before the noise, a wrong rounding of pixels.
    data = golden("edm2_generate")
    seeds = data["seeds"].tolist()
    options: dict[str, Any] = GUIDED if which == "guided" else PLAIN
    batches = list(
        erk_guid.generate(
            main_net.net, seeds, encoder=main_net.encoder, gnet=guiding_net.net,
            batch_size=batch_size, **options,
        )
    )  # fmt: skip
    assert [s for b in batches for s in b.seeds] == seeds
    assert [i for b in batches for i in b.indices] == list(range(len(seeds)))
    assert torch.equal(torch.cat([b.noise for b in batches]), data["noise"])
    labels = torch.cat([b.labels for b in batches if b.labels is not None])
    assert torch.equal(labels.argmax(1), data["labels"])
    latents = torch.cat([b.latents for b in batches])
    expected = data[f"latents_{which}"]
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    images = torch.cat([b.images for b in batches]).int()
    difference = (images - data[f"images_{which}"].int()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.995


def test_seeds_wrap_around_at_2_to_the_32(main_net: Checkpoint) -> None:
    # EDM2's rule; no stored numbers have such seeds.
    for seed, stream in ((2**32 + 5, 5), (2**31 + 5, 2**31 + 5), (-1, 2**32 - 1)):
        (batch,) = erk_guid.generate(main_net.net, [seed], num_steps=1)
        generator = torch.Generator().manual_seed(stream)
        shape = list(batch.noise.shape[1:])
        assert torch.equal(batch.noise[0], torch.randn(shape, generator=generator))
    # Catches: two equal images without a word.
    for seeds in ([5, 2**32 + 5], [-1, 2**32 - 1]):
        with pytest.raises(ValueError, match=f"seeds {seeds[0]} and {seeds[1]} give one image"):
            erk_guid.generate(main_net.net, seeds)


@pytest.mark.parametrize(("count", "world_size"), [(7, 1), (7, 2), (7, 3), (2, 5), (0, 2)])
def test_shares_cover_every_seed_once(main_net: Checkpoint, count: int, world_size: int) -> None:
    shares = [
        erk_guid.generate(main_net.net, range(count), batch_size=2, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    indices = sorted(i for g in shares for part in g.shares for i in part)
    assert indices == list(range(count))
    assert all(0 < len(part) <= 2 for g in shares for part in g.shares)
    sizes = [sum(map(len, g.shares)) for g in shares]
    assert max(sizes) - min(sizes) <= max(1, -(-count // (2 * world_size)))


def test_len_and_batch_numbers(main_net: Checkpoint) -> None:
    batches = erk_guid.generate(main_net.net, [5, 6, 7], batch_size=2, num_steps=1)
    assert len(batches) == 2
    assert [(b.batch_idx, b.num_batches) for b in batches] == [(0, 2), (1, 2)]
    assert len(list(batches)) == 2  # it can be gone through again


def test_any_sampler_of_edm2s_signature(main_net: Checkpoint) -> None:
    seen: dict[str, Any] = {}

    def sampler(net: Any, noise: Tensor, labels: Any = None, gnet: Any = None,
                randn_like: Any = torch.randn_like, colour: str = "") -> Tensor:  # fmt: skip
        seen.update(labels=labels, colour=colour, fresh=randn_like(noise))
        return noise

    batch = next(iter(erk_guid.generate(main_net.net, [1, 2], sampler_fn=sampler, colour="red")))
    assert seen["colour"] == "red"
    assert torch.equal(batch.latents, batch.noise)
    # randn_like goes on where the seed's own stream is: other values, none shared.
    assert not torch.equal(seen["fresh"][0], batch.noise[0])
    assert not torch.equal(seen["fresh"][0], seen["fresh"][1])


def test_a_misspelt_sampler_option_is_an_error(main_net: Checkpoint) -> None:
    with pytest.raises(TypeError, match="w_stif"):
        list(erk_guid.generate(main_net.net, [1], w_stif=0.5))


def test_a_class_of_ones_own_leaves_the_noise_alone(main_net: Checkpoint) -> None:
    (free,) = erk_guid.generate(main_net.net, [3, 4], num_steps=1)
    (fixed,) = erk_guid.generate(main_net.net, [3, 4], num_steps=1, class_idx=2)
    assert torch.equal(free.noise, fixed.noise)
    assert fixed.labels is not None
    assert fixed.labels.argmax(1).tolist() == [2, 2]


def test_what_does_not_fit_is_named(main_net: Checkpoint, guiding_net: Checkpoint) -> None:
    digits = erk_guid.load("digits").net
    with pytest.raises(ValueError, match="class 5 is outside 0 to 4"):
        erk_guid.generate(main_net.net, [1], class_idx=5)
    with pytest.raises(ValueError, match="class 0 asked of an unconditional network"):
        erk_guid.generate(guiding_net.net, [1], class_idx=0)
    with pytest.raises(ValueError, match="guiding network has img_channels 1, the main one 3"):
        erk_guid.generate(main_net.net, [1], gnet=digits)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        erk_guid.generate(main_net.net, [1], batch_size=0)
    with pytest.raises(ValueError, match=r"class must be a whole number, got 2\.5"):
        erk_guid.generate(main_net.net, [1], class_idx=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got -1"):
        erk_guid.generate(main_net.net, [1], rank=-1, world_size=2)
    with pytest.raises(TypeError, match="float"):
        erk_guid.generate(main_net.net, [1.5])  # type: ignore[list-item]
    half = erk_guid.generate(main_net.net, [1, 2], sampler_fn=lambda net, noise, **more: noise[:1])
    with pytest.raises(ValueError, match="sampler_fn must return samples shaped like the noise"):
        list(half)
    nothing: Any = erk_guid.generate(main_net.net, [1], sampler_fn=lambda net, noise, **more: None)
    with pytest.raises(ValueError, match=r"shaped like the noise.*got NoneType"):
        list(nothing)


def test_no_gradient_is_recorded(cond: Any) -> None:
    (batch,) = erk_guid.generate(cond.requires_grad_(True), [1], num_steps=2)
    cond.requires_grad_(False)
    assert not batch.latents.requires_grad
