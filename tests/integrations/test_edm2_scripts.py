"""What EDM2's users script against: names, signatures and behaviour of the root scripts."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA, ROOT, golden
from PIL import Image

import erk_guid
from erk_guid.cli import main
from erk_guid.common.errors import ErkGuidError
from erk_guid.metrics import load_detector
from erk_guid.models.flops import count
from erk_guid.models.networks.edm2 import Precond


def script(name: str) -> Any:
    """A root script, imported as a user's own script imports it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_names_are_there() -> None:
    # From the description of what EDM2's users import; the order of arguments counts, too.
    ours = script("generate_images")
    assert list(inspect.signature(ours.generate_images).parameters) == [
        "net", "gnet", "encoder", "outdir", "subdirs", "seeds", "class_idx", "max_batch_size",
        "encoder_batch_size", "verbose", "device", "sampler_fn", "sampler_kwargs",
    ]  # fmt: skip
    defaults = {
        name: p.default
        for name, p in inspect.signature(ours.generate_images).parameters.items()
        if name in ("gnet", "encoder", "outdir", "subdirs", "class_idx", "max_batch_size",
                    "encoder_batch_size", "verbose", "sampler_fn")
    }  # fmt: skip
    assert defaults == {
        "gnet": None, "encoder": None, "outdir": None, "subdirs": False, "class_idx": None,
        "max_batch_size": 32, "encoder_batch_size": 4, "verbose": True,
        "sampler_fn": erk_guid.edm_sampler,
    }  # fmt: skip
    assert ours.edm_sampler is erk_guid.edm_sampler
    scores = script("calculate_metrics")
    for name in ("calculate_stats_for_iterable", "calculate_stats_for_files",
                 "calculate_metrics_from_stats", "load_stats", "save_stats"):  # fmt: skip
        assert callable(getattr(scores, name))
    assert ours.config_presets["edm2-img512-s-guid-fid"].guidance == 1.4
    assert ours.parse_int_list("1,2,5-7,1") == [1, 2, 5, 6, 7, 1]
    assert ours.parse_int_list([3, 1]) == [3, 1]
    with pytest.raises(ValueError, match="runs backwards"):
        ours.parse_int_list("5-2")


@pytest.mark.parametrize("guided", [False, True])
def test_golden_images_through_the_function(guided: bool, tmp_path: Path) -> None:
    data = golden("edm2_generate")
    options: dict[str, Any] = {}
    if guided:
        options = {"gnet": str(DATA / "edm2_guide.pkl"), "guidance": 1.4, "w_stiff": 0.75,
                   "w_con": 0.3}  # fmt: skip
    found = script("generate_images").generate_images(
        net=str(DATA / "edm2_cond.pkl"), seeds=data["seeds"].tolist(), max_batch_size=3,
        outdir=str(tmp_path), device="cpu", verbose=False, num_steps=6, **options,
    )  # fmt: skip
    items = list(found)
    assert len(found) == len(items) == -(-len(data["seeds"]) // 3)
    key = "guided" if guided else "plain"
    assert torch.equal(torch.cat([r["noise"] for r in items]), data["noise"])
    assert torch.equal(torch.cat([r.labels for r in items]).argmax(1), data["labels"])
    images = torch.cat([r.images for r in items])
    assert (images.int() - data[f"images_{key}"].int()).abs().max() <= 1
    assert [s for r in items for s in r["seeds"]] == data["seeds"].tolist()
    assert [i for r in items for i in r.indices] == list(range(len(data["seeds"])))
    assert [(r.batch_idx, r.num_batches) for r in items] == [
        (i, len(items)) for i in range(len(items))
    ]
    for seed, image in zip(data["seeds"].tolist(), images, strict=True):
        with Image.open(tmp_path / f"{seed:06d}.png") as written:
            assert np.array_equal(np.asarray(written).transpose(2, 0, 1), image.numpy())


def test_an_empty_share_has_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = script("generate_images").generate_images
    net = erk_guid.load("digits").net
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        items = list(generate(net, seeds=range(4), max_batch_size=1, device="cpu", num_steps=2))
        assert len(items) == 2
        shares.append(items)
    images = [[r.images is not None for r in items] for items in shares]
    assert sum(map(sum, images)) == 4
    seeds = sorted(s for items in shares for r in items for s in r.seeds)
    assert seeds == [0, 1, 2, 3]
    assert images[2] == [True, False]


def test_a_network_guides_itself_without_gnet() -> None:
    # The published function's rule (it changes nothing, and costs an evaluation).
    generate = script("generate_images").generate_images
    net = erk_guid.load("digits").net
    with pytest.warns(UserWarning, match="the network guides itself"):
        (guided,) = generate(net, seeds=[1], device="cpu", num_steps=3, guidance=2.0)
    (plain,) = generate(net, seeds=[1], device="cpu", num_steps=3)
    torch.testing.assert_close(guided.latents, plain.latents, rtol=1e-5, atol=1e-5)


def test_other_samplers_and_random_streams() -> None:
    ours = script("generate_images")
    net = erk_guid.load("digits").net
    seen: dict[str, Any] = {}

    def sampler(net: Any, noise: Any, labels: Any = None, gnet: Any = None, randn_like: Any = None,
                scale: float = 1) -> Any:  # fmt: skip
        seen.update(labels=labels, gnet=gnet, drawn=randn_like(noise))
        return noise * scale

    seeds = [5, 6 + (1 << 32), 7]
    (found,) = ours.generate_images(net, seeds=seeds, device="cpu", sampler_fn=sampler, scale=0.5)
    assert torch.equal(found.latents, found.noise * 0.5)
    random = ours.StackedRandomGenerator("cpu", seeds)
    assert torch.equal(random.randn([3, 1, 32, 32], device="cpu"), found.noise)
    classes = random.randint(net.label_dim, size=[3])
    assert torch.equal(torch.eye(10)[classes], seen["labels"])
    assert torch.equal(random.randn_like(found.noise), seen["drawn"])
    # Torch's own generator, seeded as EDM2's (modulo 2^32): noise, class, then churn's noise.
    for k, seed in enumerate([5, 6, 7]):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(found.noise[k], torch.randn([1, 32, 32], generator=generator))
        assert classes[k] == torch.randint(10, size=[], generator=generator)
        assert torch.equal(seen["drawn"][k], torch.randn([1, 32, 32], generator=generator))
    with pytest.raises(ValueError, match="size must begin with the 3 seeds"):
        random.randn([2, 1, 32, 32])


def test_statistics_and_metrics(tmp_path: Path) -> None:
    ours, scores = script("generate_images"), script("calculate_metrics")
    made = ours.generate_images(
        "digits", seeds=range(50), max_batch_size=20, device="cpu", verbose=False, num_steps=2,
        outdir=tmp_path / "images",
    )  # fmt: skip
    quiet: dict[str, Any] = {"metrics": ["fd_digits"], "verbose": False, "device": "cpu"}
    items = list(
        scores.calculate_stats_for_iterable(made, dest_path=tmp_path / "stats.pkl", **quiet)
    )
    assert [r.stats is None for r in items] == [True, True, False]
    images = torch.cat([r.images for r in items])
    rows = load_detector("fd_digits")(images).double().numpy()
    stats = items[-1].stats
    assert stats["num_images"] == 50
    np.testing.assert_allclose(stats["fd_digits"]["mu"], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["fd_digits"]["sigma"], np.cov(rows.T), rtol=1e-6, atol=1e-9)
    with open(tmp_path / "stats.pkl", "rb") as file:
        np.testing.assert_equal(pickle.load(file), stats)
    np.testing.assert_equal(scores.load_stats(tmp_path / "stats.pkl", verbose=False), stats)
    *_, last = scores.calculate_stats_for_files(str(tmp_path / "images"), max_batch_size=7, **quiet)
    np.testing.assert_allclose(last.stats["fd_digits"]["mu"], rows.mean(0), rtol=1e-6)
    *_, part = scores.calculate_stats_for_files(
        str(tmp_path / "images"), num_images=20, seed=3, max_batch_size=7, **quiet
    )
    order = np.arange(50)
    np.random.RandomState(3).shuffle(order)  # as EDM2 draws: tests/data/edm2_subset.json
    np.testing.assert_allclose(
        part.stats["fd_digits"]["mu"], rows[np.sort(order[:20])].mean(0), rtol=1e-6
    )
    found = scores.calculate_metrics_from_stats(stats, "digits", metrics=["fd_digits", "fid"])
    assert list(found) == ["fd_digits"]
    again = scores.calculate_metrics_from_stats(str(tmp_path / "stats.pkl"), stats, ["fd_digits"])
    assert abs(again["fd_digits"]) < 1e-6
    published = scores.load_stats(DATA / "edm2_ref.pkl")
    assert list(published) == ["num_images", "fid", "fd_dinov2"]
    scores.save_stats(published, tmp_path / "again.pkl")
    np.testing.assert_equal(scores.load_stats(tmp_path / "again.pkl"), published)


def test_statistics_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = script("calculate_metrics")
    quiet: dict[str, Any] = {"metrics": "fd_digits", "verbose": False, "device": "cpu"}
    batch = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)

    class Wrong(list):
        claimed = 0

        def __len__(self) -> int:
            return self.claimed

    for claimed, match in ((5, "a len\\(\\) of 5, and yielded 3"), (2, "yielded more")):
        batches = Wrong([batch + k for k in range(3)])
        batches.claimed = claimed
        with pytest.raises(ValueError, match=match):
            list(scores.calculate_stats_for_iterable(batches, **quiet))
    with pytest.raises(TypeError, match="must have a len"):
        scores.calculate_stats_for_iterable(iter([batch]), **quiet)
    with pytest.raises(ErkGuidError, match="there are no statistics"):
        scores.save_stats({"num_images": 3}, tmp_path / "e.pkl")
    with pytest.raises(ErkGuidError, match="statistics of fid: they lack mu or sigma"):
        scores.save_stats({"fid": {"mu": np.zeros(3)}}, tmp_path / "e.pkl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ErkGuidError, match="share none of fid"):
        scores.calculate_metrics_from_stats("digits", "digits", "fid", verbose=False)
    net = Precond(16, 4, 0, model_channels=8, channel_mult=[1])
    with pytest.raises(ValueError, match="makes 4 channels, which are no pixels; pass encoder="):
        script("generate_images").generate_images(net, device="cpu")
    (one,) = script("generate_images").generate_images(
        erk_guid.load("digits"), seeds=[0], device="cpu", num_steps=2
    )
    assert one.images.shape == (1, 1, 32, 32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ErkGuidError, match=r"call torch\.distributed\.init_process_group first"):
        list(scores.calculate_stats_for_iterable([batch], **quiet))


@pytest.mark.parametrize(
    ("channels", "million", "billion"), [(128, 124.7, 45.5), (192, 280.2, 102.2)]
)
def test_costs_are_the_papers(channels: int, million: float, billion: float) -> None:
    # Karras et al. 2024 (arXiv 2312.02696) on EDM2-XS and -S for ImageNet-512: parameters, and
    # "gigaflops", which agree with multiply-adds; they also count what is not a product (1.4 %).
    # The four figures are quoted from memory of the paper, which was not at hand.
    with torch.device("meta"):
        net = Precond(64, 4, 1000, model_channels=channels)
    cost = count(net)
    assert cost.parameters / 1e6 == pytest.approx(million, abs=0.05)
    assert 0.98 * billion < cost.multiply_adds / 1e9 < billion


def test_multiply_adds_of_one_layer() -> None:
    class Layer(torch.nn.Module):
        img_channels, img_resolution, label_dim = 3, 8, 0
        config = "another program's, not the constructor's arguments"

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)

        def forward(self, x: Any, sigma: Any, labels: Any = None) -> Any:
            return self.conv(x)

    assert count(Layer())[:2] == (3 * 5 * 9, 3 * 5 * 9 * 64)


def test_flops_on_the_command_line() -> None:
    done = CliRunner().invoke(main, ["flops", "--net=digits"])
    assert done.exit_code == 0, done.output
    assert "1.202 million" in done.output
    assert "name a network" in CliRunner().invoke(main, ["flops"]).output
