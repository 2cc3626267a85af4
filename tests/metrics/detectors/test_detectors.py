"""What detectors are fed, and where their weights come from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.utils import DEFAULT_FEATURE_EXTRACTOR
from torchvision.models import VGG16_Weights

from erk_guid.common.errors import ErkGuidError
from erk_guid.metrics.comparison import MANIFOLD_DETECTOR, SPLITS
from erk_guid.metrics.detectors import (
    Classifier,
    Detector,
    base,
    describe,
    load_detector,
    register_detector,
    weights,
)
from erk_guid.metrics.detectors.dinov2 import DINO_COMMIT, dinov2_input
from erk_guid.metrics.scores.inception import RNG_SEED
from erk_guid.metrics.scores.neighbours import NEIGHBOURS


def image(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Noise and hard edges, where kernels differ."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (1, channels, height, width), dtype=np.uint8)
    pixels[..., : height // 2, : width // 2] = 255
    pixels[..., height // 2 :, width // 2 :] = 0
    return torch.from_numpy(pixels)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel; a = -0.5 is the one of antialiased resizing, -0.75 of plain bicubic."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resized(pixels: np.ndarray, size: int, a: float = -0.5, widen: bool = True) -> np.ndarray:
    """Bicubic resizing of [H, W] in float64, each axis by an explicit matrix of weights."""

    def weights(length: int) -> np.ndarray:
        scale = length / size
        width = max(scale, 1) if widen else 1
        centres = (np.arange(size) + 0.5) * scale - 0.5
        w = cubic((np.arange(length)[None] - centres[:, None]) / width, a)
        return w / w.sum(1, keepdims=True)

    return weights(pixels.shape[0]) @ pixels.astype(np.float64) @ weights(pixels.shape[1]).T


# ImageNet's, as torchvision normalizes for its own networks.
IMAGENET = VGG16_Weights.IMAGENET1K_V1.transforms()
IMAGENET_MEAN, IMAGENET_STD = IMAGENET.mean, IMAGENET.std


def expected(images: torch.Tensor, **options: Any) -> np.ndarray:
    channels = []
    for k in range(3):
        x = resized(images[0, k].numpy(), 224, **options)
        channels.append((x / 255 - IMAGENET_MEAN[k]) / IMAGENET_STD[k])
    return np.stack(channels)


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (300, 200)])
def test_dinov2_is_fed_bicubic_antialiased_unrounded_images(size: tuple[int, int]) -> None:
    images = image(*size)
    got = dinov2_input(images)
    assert got.shape == (1, 3, 224, 224)
    assert got.dtype == torch.float32
    assert np.abs(got[0].numpy() - expected(images)).max() < 1e-4
    if size != (64, 64):  # nothing is clipped or rounded: the kernel overshoots at edges
        assert got.max() > (1 - min(IMAGENET_MEAN)) / min(IMAGENET_STD)


def test_which_mistakes_the_preprocessing_test_would_catch() -> None:
    images = image(512, 512)
    right = expected(images)
    others = {
        "no antialiasing": expected(images, widen=False),
        "the other kernel": expected(images, a=-0.75),
        "rounding to bytes": np.asarray(
            Image.fromarray(images[0, 0].numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        ),
        "bilinear": torch.nn.functional.interpolate(images.float(), (224, 224), mode="bilinear")[
            0, 0
        ].numpy(),
    }
    for name, other in others.items():
        if other.ndim == 2:
            other = (other / 255 - IMAGENET_MEAN[0]) / IMAGENET_STD[0]
        assert np.abs(other - right[0] if other.ndim == 2 else other - right).max() > 1e-3, name


def test_pillow_agrees_where_it_does_not_round() -> None:
    images = image(512, 512)
    grey = Image.fromarray(images[0, 0].numpy().astype(np.float32), "F")
    x = np.asarray(grey.resize((224, 224), Image.Resampling.BICUBIC))
    got = dinov2_input(images)[0, 0].numpy()
    assert np.abs(got - (x / 255 - IMAGENET_MEAN[0]) / IMAGENET_STD[0]).max() < 1e-4


def test_grey_images_are_repeated() -> None:
    grey = image(32, 32, channels=1)
    assert torch.equal(dinov2_input(grey), dinov2_input(grey.repeat(1, 3, 1, 1)))


# --- a stand-in for DINOv2, through the real torch.hub ---------------------------------------

HUBCONF = """
import torch

class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(3 * 16 * 16, 1024)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224) and x.dtype == torch.float32
        return self.project(torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1))

def dinov2_vitl14(pretrained=True):
    assert not pretrained, "the weights are loaded by the caller"
    return StandIn()
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of torch.hub of one's own, without a network behind it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ErkGuidError("no network")

    monkeypatch.setattr(weights, "download", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    return tmp_path / "hub"


def stand_in(hub: Path) -> torch.nn.Module:
    repository = hub / f"facebookresearch_dinov2_{DINO_COMMIT}"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(HUBCONF)
    net: torch.nn.Module = torch.hub.load(str(repository), "dinov2_vitl14", False, source="local")
    return net


def test_dinov2_through_the_hub(hub: Path) -> None:
    net = stand_in(hub)
    (hub / "checkpoints").mkdir()
    torch.save(net.state_dict(), hub / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    detector = load_detector("fd_dinov2")
    images = torch.cat([image(64, 64), image(64, 64, seed=1)])
    assert isinstance(detector, Detector)
    assert not isinstance(detector, Classifier)
    assert torch.allclose(detector(images), net(dinov2_input(images)))
    assert detector.feature_dim == 1024
    about = describe(detector)
    assert "antialias" in about["preprocessing"]
    assert len(about["weights"]["sha256"]) == 64

    elsewhere = hub.parent / "mine.pth"
    torch.save({k: 2 * v for k, v in net.state_dict().items()}, elsewhere)
    doubled = load_detector("fd_dinov2", weights=elsewhere)
    assert torch.allclose(doubled(images), 2 * detector(images), atol=1e-4)


def test_dinov2s_code_is_of_one_commit(hub: Path, tmp_path: Path) -> None:
    # Catches: code of a branch, which is another one tomorrow, run without a question.
    assert re.fullmatch("[0-9a-f]{40}", DINO_COMMIT)
    net = stand_in(hub)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    (hub / f"facebookresearch_dinov2_{DINO_COMMIT}").rename(hub / "facebookresearch_dinov2_main")
    with pytest.raises(ErkGuidError, match=f"Put a checkout of commit {DINO_COMMIT} of https"):
        load_detector("fd_dinov2", weights=tmp_path / "w.pth")


def test_weights_that_cannot_be_had_are_named(hub: Path) -> None:
    # Addresses as torch-fidelity and torchvision have them. DINOv2's follows the rule in its own
    # hub/utils.py (base URL, name, name_pretrain.pth), which nothing installed repeats.
    for name, full in (
        ("fid", URL_INCEPTION_V3),
        ("vgg16", VGG16_Weights.IMAGENET1K_V1.url),
        (
            "fd_dinov2",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        ),
    ):
        url, _, file = full.rpartition("/")
        with pytest.raises(ErkGuidError) as caught:
            load_detector(name)
        message = str(caught.value)
        assert str(hub / "checkpoints" / file) in message
        assert url in message
        assert f"--detector-weights {name}=FILE" in message
        assert "no network" in message


def test_constants_are_torch_fidelitys() -> None:
    # What its calculate_metrics takes by default for these scores.
    assert MANIFOLD_DETECTOR == "vgg16"
    assert DEFAULT_FEATURE_EXTRACTOR["prc"] == "vgg16"
    assert DEFAULT_FEATURE_EXTRACTOR["isc"] == "inception-v3-compat"
    assert DEFAULTS["isc_splits"] == SPLITS
    assert DEFAULTS["prc_neighborhood"] == NEIGHBOURS
    assert DEFAULTS["rng_seed"] == RNG_SEED


def test_dinov2s_code_that_cannot_be_had_is_named(hub: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ErkGuidError, match="needs DINOv2's code") as caught:
        load_detector("fd_dinov2", weights=tmp_path / "w.pth")
    assert str(hub / f"facebookresearch_dinov2_{DINO_COMMIT}") in str(caught.value)
    stand_in(hub)
    with pytest.raises(ErkGuidError, match="does not hold the weights of DINOv2"):
        load_detector("fd_dinov2", weights=tmp_path / "w.pth")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


def test_files_of_weights_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    torch.save({"a": Evil(marker)}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("fid", "vgg16", "fd_dinov2"):
        for file in ("evil.pth", "text.pth", "list.pth"):
            with pytest.raises(ErkGuidError, match="weights"):
                load_detector(name, weights=tmp_path / file)
    assert not marker.exists()
    with pytest.raises(ErkGuidError, match="no such file"):
        load_detector("fid", weights=tmp_path / "nowhere.pth")
    with pytest.raises(ErkGuidError, match="ships with its weights"):
        load_detector("fd_digits", weights=tmp_path / "text.pth")


# --- Inception, with random weights ----------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for the real architecture; 90 MB."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "load", lambda *a, **k: {})
    patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    torch.manual_seed(0)
    net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="x")
    patch.undo()
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
def test_fid_is_torch_fidelitys_extractor(inception_weights: Path) -> None:
    detector = load_detector("fid", weights=inception_weights)
    assert isinstance(detector, Classifier)
    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    grey = image(32, 32, channels=1)
    features, logits = detector.features_and_logits(grey)
    a, b = theirs(grey.repeat(1, 3, 1, 1))
    assert torch.equal(features, a)
    assert torch.equal(logits, b)
    assert features.shape == (1, detector.feature_dim)
    with pytest.raises(ErkGuidError, match="does not hold the weights of vgg16"):
        load_detector("vgg16", weights=inception_weights)


# --- the registry, and the shipped detector ---------------------------------------------------


def test_registering_a_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))

    class Mean:
        name, feature_dim = "mean", 2

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images.double().flatten(2).mean(2)[:, :2]

    register_detector("mean", lambda device, weights: Mean())
    assert load_detector("mean")(image(4, 4)).shape == (1, 2)
    with pytest.raises(ValueError, match="already"):
        register_detector("mean", lambda device, weights: Mean())
    with pytest.raises(ValueError, match="letters, digits"):
        register_detector("a b", lambda device, weights: Mean())
    with pytest.raises(ErkGuidError, match=r"unknown metric 'fdi'; there are fd_digits"):
        load_detector("fdi")


def test_the_digit_detector() -> None:
    detector = load_detector("fd_digits")
    assert isinstance(detector, Classifier)
    grey = image(32, 32, channels=1)
    features, logits = detector.features_and_logits(grey)
    assert features.dtype == torch.float64
    assert (features.shape, logits.shape) == ((1, 64), (1, 10))
    # Stored as RGB it is the same picture; real colours are not a digit.
    assert torch.equal(detector(grey.repeat(1, 3, 1, 1)), features)
    for wrong in (image(32, 32), image(28, 28, channels=1)):
        with pytest.raises(ErkGuidError, match="is for grey 32x32 digits, got images of"):
            detector(wrong)


def test_importing_metrics_needs_neither_torch_fidelity_nor_torchvision() -> None:
    code = (
        "import sys; sys.modules['torch_fidelity'] = sys.modules['torchvision'] = None\n"
        "import erk_guid.metrics as m; from erk_guid.common.errors import ErkGuidError\n"
        "m.load_detector('fd_digits')\n"
        "try: m.load_detector('fid', weights=__file__ if '__file__' in dir() else sys.executable)\n"
        "except ErkGuidError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'erk-guid[metrics]'" in done.stdout, done.stderr
