"""calculate_metrics.py and calculate_precision_recall_is.py, as users run them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from click.testing import CliRunner, Result
from conftest import DATA, ROOT
from PIL import Image

import erk_guid
from erk_guid.cli.metrics import metrics_command
from erk_guid.cli.precision_recall import precision_recall_command
from erk_guid.common.files import sha256_of
from erk_guid.metrics import (
    KernelDistance,
    Statistics,
    fidelity,
    frechet_distance,
    load_detector,
    read_reference,
    register_score,
    write_reference,
)
from erk_guid.metrics.scores import base as scores_base
from erk_guid.metrics.scoring import _short, subset
from erk_guid.metrics.statistics.references import locate_reference


def run(*args: Any) -> Result:
    return CliRunner().invoke(metrics_command, list(map(str, args)))


def prc(*args: Any) -> Result:
    return CliRunner().invoke(precision_recall_command, list(map(str, args)))


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Sixty digits of the shipped model, uint8 [60, 1, 32, 32]."""
    net = erk_guid.load("digits").net
    batches = erk_guid.generate(net, range(60), num_steps=4, batch_size=30)
    return torch.cat([batch.images for batch in batches]).numpy()


@pytest.fixture(scope="module")
def folder(digits: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("digits") / "set", digits)


def save(folder: Path, digits: np.ndarray) -> Path:
    for k, image in enumerate(digits):
        path = folder / f"{k // 40:02d}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    return folder


COMMON = ("--ref", "digits", "--metrics", "fd_digits", "--device", "cpu")


def features(digits: np.ndarray) -> np.ndarray:
    return load_detector("fd_digits")(torch.from_numpy(digits)).numpy()


# --- calc -----------------------------------------------------------------------------------


def test_calc_is_the_distance_of_the_features(
    folder: Path, digits: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "scores" / "s.json"
    done = run("calc", "--images", folder, "--num", 60, "--json", out, "--bootstrap", 20, *COMMON)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    rows, reference = features(digits), read_reference("digits").of("fd_digits")
    expected = frechet_distance(
        rows.mean(0), np.cov(rows, rowvar=False), reference.mu, reference.sigma
    )
    assert result["scores"]["fd_digits"] == pytest.approx(expected, rel=1e-10)
    assert f"fd_digits  {expected:.6g}" in done.output  # the printed form is our own
    assert 0 < result["standard_errors"]["fd_digits"] < expected
    # All that is needed to repeat it.
    assert result["reference"]["sha256"] == sha256_of(locate_reference("digits"))
    assert result["num"] == 60
    names = result["images"]["names"]
    assert (names["first"], names["last"]) == ("00/000.png", "01/059.png")
    assert len(names["sha256"]) == 64
    assert result["detectors"][0]["name"] == "fd_digits"
    assert {"torch", "erk_guid", "Pillow"} <= set(result["versions"])


def test_the_batch_and_the_container_do_not_matter(
    folder: Path, digits: np.ndarray, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
        archive.writestr("__MACOSX/._000.png", b"resource fork")
    np.savez(tmp_path / "set.npz", images=digits)
    scores = []
    for source, batch, workers in (
        (folder, 64, 2), (folder, 7, 0), (tmp_path / "set.zip", 1, 3), (tmp_path / "set.npz", 13, 1)
    ):  # fmt: skip
        out = tmp_path / "s.json"
        done = run("calc", "--images", source, "--num", 60, "--batch", batch,
                   "--workers", workers, "--json", out, *COMMON)  # fmt: skip
        assert done.exit_code == 0, done.output
        scores.append(json.loads(out.read_text())["scores"]["fd_digits"])
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-10)


def test_of_more_images_a_seeded_choice_is_taken(folder: Path, tmp_path: Path) -> None:
    def score(seed: int) -> float:
        out = tmp_path / "s.json"
        done = run("calc", "--images", folder, "--num", 30, "--seed", seed, "--json", out, *COMMON)
        assert done.exit_code == 0, done.output
        return float(json.loads(out.read_text())["scores"]["fd_digits"])

    # Which choice: test_the_subset_is_the_one_that_edm2_draws. Here: that the option reaches it.
    assert score(0) == score(0)
    assert score(0) != score(1)


def test_features_can_be_kept(folder: Path, digits: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    done = run("calc", "--images", folder, "--num", 60, "--features", out, *COMMON)
    assert done.exit_code == 0, done.output
    kept = read_reference(out)
    np.testing.assert_allclose(kept.features["fd_digits"], features(digits), rtol=1e-5)
    assert kept.of("fd_digits").count == 60


# --- gen and ref ----------------------------------------------------------------------------


@pytest.mark.slow
def test_gen_scores_what_generate_makes(digits: np.ndarray, tmp_path: Path) -> None:
    out, kept = tmp_path / "g.json", tmp_path / "g.npz"
    done = run("gen", "--preset", "digits", "--num", 60, "--batch", 30, "--steps", 4, "--seed", 0,
               "--json", out, "--features", kept, *COMMON)  # fmt: skip
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(
        read_reference(kept).features["fd_digits"], features(digits), rtol=1e-5, atol=1e-5
    )
    recipe = json.loads(out.read_text())["images"]["recipe"]
    assert recipe["num_steps"] == 4
    assert len(recipe["net_sha256"]) == 64


def strict(path: Path) -> Any:
    """Read JSON as programs do that know no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_is_infinite_is_text_in_a_result(folder: Path, tmp_path: Path) -> None:
    # Before: --S_churn, whose S_max has no limit, ended in a traceback after the scoring.
    out, kept = tmp_path / "g.json", tmp_path / "g.npz"
    done = run("gen", "--preset", "digits", "--num", 30, "--batch", 30, "--steps", 2, "--seed", 0,
               "--S_churn", 1, "--json", out, "--features", kept, *COMMON)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert strict(out)["images"]["recipe"]["S_max"] == "Infinity"
    # And what a reference says of itself: such features, or a text of anybody's.
    arrays = {**np.load(kept)}
    for about in (arrays["about"], np.array('{"a": [NaN, 1e999, -Infinity]}')):
        np.savez(kept, **{**arrays, "about": about})
        done = run("calc", "--images", folder, "--ref", kept, "--num", 30, "--json", out,
                   "--metrics", "fd_digits", "--device", "cpu")  # fmt: skip
        assert done.exit_code == 0, done.output
        found = strict(out)["reference"]["about"]
    assert found == {"a": ["NaN", "Infinity", "-Infinity"]}


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_references_of_ones_own(
    suffix: str, folder: Path, digits: np.ndarray, tmp_path: Path
) -> None:
    dest = tmp_path / f"mine{suffix}"
    done = run("ref", "--data", folder, "--dest", dest, "--metrics", "fd_digits",
               "--device", "cpu", "--first", 10)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "fd_digits of 50 images" in done.output
    rows = features(digits)[10:]
    found = read_reference(dest).of("fd_digits")
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=1e-9)
    assert read_reference(dest).of("fd_digits").count == 50


def test_references_with_features_serve_precision_and_recall(folder: Path, tmp_path: Path) -> None:
    dest = tmp_path / "mine.npz"
    done = run("ref", "--data", folder, "--dest", dest, "--metrics", "fd_digits",
               "--device", "cpu", "--keep-features", 1000)  # fmt: skip
    assert done.exit_code == 0, done.output
    done = prc(folder, "--real", dest, "--detector", "fd_digits", "--device", "cpu",
               "--metrics", "precision,recall")  # fmt: skip
    assert "precision: 1.000\nrecall: 1.000\n" in done.output
    assert "--keep-features needs a .npz" in run(
        "ref", "--data", folder, "--dest", tmp_path / "m.pkl", "--keep-features", 2
    ).output  # fmt: skip


def layout(value: Any) -> Any:
    """Keys in order, types and dtypes of a pickled dict; numbers of features left out."""
    if isinstance(value, dict):
        return [(key, layout(entry)) for key, entry in value.items()]
    return (type(value), value.dtype, value.ndim) if isinstance(value, np.ndarray) else type(value)


def test_references_in_edm2s_layout(tmp_path: Path) -> None:
    # Catches: num_images taken for a metric, or left out of what is written.
    pytest.importorskip("numpy", minversion="2", reason="the plain file names numpy._core")
    published = DATA / "edm2_ref.pkl"
    with open(published, "rb") as file:
        plain = pickle.load(file)
    found = read_reference(published)
    assert list(found.statistics) == ["fid", "fd_dinov2"]
    for metric, one in found.statistics.items():
        assert one.count == plain["num_images"] == 400
        np.testing.assert_array_equal(one.mu, plain[metric]["mu"])
        np.testing.assert_array_equal(one.sigma, plain[metric]["sigma"])
    write_reference(tmp_path / "ours.pkl", found.statistics)
    with open(tmp_path / "ours.pkl", "rb") as file:
        ours = pickle.load(file)
    assert layout(ours) == layout(plain)
    np.testing.assert_equal(ours, plain)


def test_fid_of_an_npz_lies_where_edm_has_it(tmp_path: Path) -> None:
    # EDM (2022) keeps mu and sigma at the top level, for fid; no file of its own was at hand.
    mu, sigma = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma.astype(np.float32))
    found = read_reference(tmp_path / "edm.npz")
    assert list(found.statistics) == ["fid"]
    assert found.of("fid").sigma.dtype == np.float64
    both = {"fid": Statistics(mu, sigma, 7), "fd_digits": Statistics(2 * mu, sigma, 7)}
    write_reference(tmp_path / "ours.npz", both, {"fid": np.ones([2, 3])})
    with np.load(tmp_path / "ours.npz") as arrays:
        np.testing.assert_array_equal(arrays["mu"], mu)
        np.testing.assert_array_equal(arrays["sigma"], sigma)
    back = read_reference(tmp_path / "ours.npz")
    assert {name: one.count for name, one in back.statistics.items()} == {"fid": 7, "fd_digits": 7}
    np.testing.assert_array_equal(back.of("fd_digits").mu, 2 * mu)
    assert back.features["fid"].shape == (2, 3)


def test_the_subset_is_the_one_that_edm2_draws() -> None:
    # Catches: any other generator or order, the seed's modulus (the third case's is large).
    for key, indices in json.loads((DATA / "edm2_subset.json").read_text()).items():
        total, num, seed = map(int, key.split("/"))
        assert subset(total, num, seed) == indices, key
        assert subset(total, num, seed + (1 << 31)) == indices, key
    assert subset(5, 5, 3) == [0, 1, 2, 3, 4]
    # Seeds are taken modulo 2^31 there, and by nothing less.
    assert subset(100, 10, (1 << 30) + 5) != subset(100, 10, 5)


def test_the_two_copies_of_the_shipped_reference_are_one() -> None:
    assert sha256_of(ROOT / "dataset-refs" / "digits.npz") == sha256_of(locate_reference("digits"))
    shipped = read_reference("digits")
    assert shipped.of("fd_digits").count == 8000
    assert shipped.features["fd_digits"].shape == (2000, 64)
    assert shipped.features["fd_digits"].dtype == np.float16
    # Held-out digits are as near to the training digits as 2,000 of them can be; the shipped
    # model's, in few steps, are farther.
    rows = shipped.features["fd_digits"].astype(np.float64)
    reference = shipped.of("fd_digits")
    apart = frechet_distance(
        rows.mean(0), np.cov(rows, rowvar=False), reference.mu, reference.sigma
    )
    assert apart < 1


# --- precision, recall, inception score -------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_torch_fidelity_itself_finds_the_same(
    digits: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    # Through both programs' whole pipelines, with the shipped detector registered there.
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 60, digits.shape)
    noise[::2] += 100  # half of the real ones are quite different
    noisy = np.clip(digits + noise, 0, 255).astype(np.uint8)
    real = save(tmp_path / "real", noisy)
    out = tmp_path / "q.json"
    done = prc(folder, "--real", real, "--detector", "fd_digits", "--device", "cpu", "--json", out)
    assert done.exit_code == 0, done.output
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder), input2=str(real), samples_find_deep=True, cuda=False, cache=False,
        isc=True, prc=True, feature_extractor=fidelity.register(), verbose=False,
    )  # fmt: skip
    ours = json.loads(out.read_text())
    for name in ("precision", "recall", "inception_score_mean", "inception_score_std"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert 0 < ours["precision"] < 1
    assert f"precision: {theirs['precision']:.3f}" in done.output
    assert "rng_seed 2020" in done.output


KID_PLUGIN = """
from erk_guid.metrics import KernelDistance, register_score

register_score("kid50", KernelDistance(subsets=20, subset_size=50))
"""


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_torch_fidelitys_kernel_distance_is_the_same(
    digits: np.ndarray, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Through both programs' whole pipelines; and all four scores of one run over the images.
    monkeypatch.setattr(scores_base, "_SCORES", dict(scores_base._SCORES))
    real = save(tmp_path / "real", 255 - digits)
    (tmp_path / "plugin.py").write_text(KID_PLUGIN)
    ref, out = tmp_path / "ref.npz", tmp_path / "s.json"
    made = run("ref", "--data", real, "--dest", ref, "--metrics", "fd_digits", "--device", "cpu",
               "--keep-features", 10_000)  # fmt: skip
    assert made.exit_code == 0, made.output
    metrics = "fd_digits,kid50:fd_digits,pr:fd_digits,is:fd_digits"
    done = run("calc", "--images", folder, "--ref", ref, "--num", len(digits), "--device", "cpu",
               "--metrics", metrics, "--plugin", tmp_path / "plugin.py", "--json", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder), input2=str(real), samples_find_deep=True, cuda=False, cache=False,
        kid=True, prc=True, isc=True, kid_subsets=20, kid_subset_size=50,
        feature_extractor=fidelity.register(), verbose=False,
    )  # fmt: skip
    found = json.loads(out.read_text())
    for ours, name, tolerance in (
        # The reference keeps features as float16.
        ("kid50:fd_digits/mean", "kernel_inception_distance_mean", 1e-3),
        ("kid50:fd_digits/std", "kernel_inception_distance_std", 1e-2),
        ("pr:fd_digits/precision", "precision", 0.02),
        ("pr:fd_digits/recall", "recall", 0.02),
        ("is:fd_digits/mean", "inception_score_mean", 1e-6),
    ):
        assert found["scores"][ours] == pytest.approx(theirs[name], rel=tolerance), ours
        assert ours in done.output
    assert found["metrics"]["kid50:fd_digits"] == {
        "score": "kid50", "detector": "fd_digits", "subsets": 20, "subset_size": 50,
        "rng_seed": 2020,
    }  # fmt: skip
    assert found["scores"]["fd_digits"] > 0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("fd_digits,kid:fd_digits", "kid:fd_digits needs at least 1000 generated images, got 60"),
        ("pr:fd_digits,kids", "unknown metric 'kids'; there are fd_digits"),
        ("kidd:fd_digits", "unknown score 'kidd'; there are frechet, is, kid, pr"),
        ("kid:digits", "unknown metric 'digits'"),
        ("kid:", "name a detector behind the colon"),
    ],
)
def test_metrics_that_cannot_be_had(folder: Path, metric: str, message: str) -> None:
    done = run("calc", "--images", folder, "--ref", "digits", "--num", 60, "--device", "cpu",
               "--metrics", metric)  # fmt: skip
    assert done.exit_code == 1
    assert message in done.output


def test_a_reference_without_features_has_no_kernel_distance(folder: Path, tmp_path: Path) -> None:
    ref = tmp_path / "r.npz"
    run("ref", "--data", folder, "--dest", ref, "--metrics", "fd_digits", "--device", "cpu")
    done = run("calc", "--images", folder, "--ref", ref, "--num", 60, "--device", "cpu",
               "--metrics", "pr:fd_digits")  # fmt: skip
    assert done.exit_code == 1
    assert "make a reference with 'ref --keep-features'" in done.output
    made = run("ref", "--data", folder, "--dest", ref, "--metrics", "pr:fd_digits", "--device",
               "cpu")  # fmt: skip
    assert made.exit_code == 1
    assert "pr:fd_digits needs every image's features: give --keep-features" in made.output


def test_a_standard_error_is_for_frechet_distances_and_that_is_said(folder: Path) -> None:
    done = run("calc", "--images", folder, "--ref", "digits", "--num", 60, "--device", "cpu",
               "--metrics", "is:fd_digits", "--bootstrap", 10)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "--bootstrap gives no standard error for is:fd_digits" in done.output


def test_a_score_that_cannot_be_recorded_is_refused_when_it_is_registered() -> None:
    class NoDataclass(KernelDistance.__mro__[1]):  # type: ignore[misc]
        detector, needs = "fid", ("features",)

        def __call__(self, generated: Any, reference: Any, device: Any) -> dict[str, float]:
            return {}

    with pytest.raises(TypeError, match="must be a dataclass"):
        register_score("none", NoDataclass())


def test_the_published_call_names_the_folder_it_misses(folder: Path) -> None:
    done = prc(folder, "--device", "cpu")
    assert done.exit_code == 1
    assert "ILSVRC2012_img_val_resize_centercrop" in done.output
    assert "--real" in done.output


def test_the_shipped_reference_serves_offline(folder: Path) -> None:
    done = prc(folder, "--real", "digits", "--detector", "fd_digits", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "precision: 0." in done.output
    assert "compare among equal ones only" in done.output


def test_a_folder_named_as_the_shipped_reference_is_not_taken_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: images in a folder "digits" compared with themselves, with precision 1.
    right = prc(folder, "--real", "digits", "--detector", "fd_digits", "--device", "cpu")
    shutil.copytree(folder, tmp_path / "digits")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "digits").write_bytes(b"no reference")
    monkeypatch.chdir(tmp_path)
    done = prc("digits", "--real", "digits", "--detector", "fd_digits", "--device", "cpu",
               "--json", "found.json")  # fmt: skip
    scores = [one.output[one.output.index("precision: ") :].split()[:4] for one in (right, done)]
    assert scores[0] == scores[1]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["num_generated"], found["num_real"]) == (60, 2000)
    assert found["real"]["sha256"] == sha256_of(locate_reference("digits"))
    same = prc("digits", "--real", "./digits", "--detector", "fd_digits", "--device", "cpu")
    assert "precision: 1.000" in same.output
    monkeypatch.chdir(tmp_path / "here")
    assert locate_reference("digits").suffix == ".npz"
    assert locate_reference("./digits") == Path("digits")


# --- the user's mistakes ----------------------------------------------------------------------


def spoiled(folder: Path, dest: Path, name: str) -> Path:
    """A copy of the folder with one image replaced."""
    shutil.copytree(folder, dest)
    target = dest / "00" / "005.png"
    if name == "text":
        target.write_text("this is no image")
    elif name == "truncated":
        target.write_bytes(target.read_bytes()[:60])
    elif name == "size":
        Image.new("L", (16, 32)).save(target)
    elif name == "16-bit":
        Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(target)
    elif name == "bilevel":
        Image.new("1", (32, 32)).save(target)
    else:
        Image.new(name, (32, 32)).save(target)
    return dest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "cannot read the image 00/005.png: it is no image"),
        ("truncated", "cannot read the image 00/005.png"),
        ("size", "00/005.png is 16x32, 00/000.png is 32x32; all images must have one size"),
        ("RGBA", "00/005.png has an alpha channel; convert it to 8-bit RGB or greyscale"),
        ("LA", "00/005.png has an alpha channel"),
        ("P", "00/005.png has a colour palette"),
        ("16-bit", "00/005.png has more than 8 bits a channel"),
        ("bilevel", "00/005.png has one bit a pixel"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(
    name: str, message: str, folder: Path, tmp_path: Path
) -> None:
    bad = spoiled(folder, tmp_path / "bad", name)
    for done in (
        run("calc", "--images", bad, "--num", 60, *COMMON),
        prc(bad, "--real", "digits", "--detector", "fd_digits", "--device", "cpu"),
    ):
        fails_with(done, message)


def fails_with(done: Result, message: str) -> None:
    assert done.exit_code in (1, 2), done.output
    lines = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.output
    assert message in lines[0], lines[0]
    assert "Traceback" not in done.output


def test_sixteen_bit_colour_is_not_silently_cut(tmp_path: Path) -> None:
    # Pillow opens such a file as 8-bit RGB, dropping the lower bytes.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes(32 * 6) for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )  # fmt: skip
    fails_with(
        run("calc", "--images", tmp_path, "--num", 2, *COMMON), "0.png has other than 8 bits"
    )


def test_images_that_would_be_taken_for_what_they_are_not(tmp_path: Path) -> None:
    frames = [Image.new("L", (32, 32), k) for k in (1, 200)]
    for k in range(2):
        frames[0].save(tmp_path / f"{k}.png", save_all=True, append_images=frames[1:])
    fails_with(run("calc", "--images", tmp_path, "--num", 2, *COMMON), "more than one frame")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", b"x")
    fails_with(
        run("calc", "--images", tmp_path / "twice.zip", "--num", 2, *COMMON),
        "holds a.png more than once",
    )


def test_a_small_file_does_not_take_much_memory(folder: Path, tmp_path: Path) -> None:
    # 34 bytes of lossless WebP decode to 200 MB; another size than the first's is not decoded.
    big = tmp_path / "big"
    shutil.copytree(folder, big)
    Image.new("RGB", (8192, 8192)).save(big / "00" / "z.webp", lossless=True)
    fails_with(run("calc", "--images", big, "--num", 61, *COMMON), "z.webp has 8192x8192 pixels")
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((100_000, 32, 32), np.uint8))
    fails_with(run("calc", "--images", tmp_path / "zeros.npz", "--num", 2, *COMMON), "would unpack")


def test_outputs_are_not_written_over_inputs_or_devices(folder: Path, tmp_path: Path) -> None:
    from erk_guid.common.files import write_bytes

    mine = tmp_path / "mine.npz"
    shutil.copy(locate_reference("digits"), mine)
    before = mine.read_bytes()
    calc = ("calc", "--images", folder, "--num", 60, "--ref", mine, "--metrics", "fd_digits")
    fails_with(run(*calc, "--json", mine), "is an input; write to another file")
    fails_with(run(*calc, "--features", mine), "is an input; write to another file")
    assert mine.read_bytes() == before
    # A link is followed; what is no file is written to, and stays what it is.
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(tmp_path / "pipe", b"y")
    assert os.read(reader, 9) == b"y"
    os.close(reader)
    fails_with(run("calc", "--images", tmp_path / "pipe", *COMMON), "neither a folder nor a file")


def test_grey_among_colours_is_repeated(tmp_path: Path) -> None:
    from erk_guid.common.datasets import open_images

    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "b.png")
    (batch,) = open_images(tmp_path).batches([[0, 1]])
    assert batch.shape == (2, 3, 8, 8)
    assert batch[0].tolist() == np.full((3, 8, 8), 7).tolist()
    assert batch[1, :, 0, 0].tolist() == [1, 2, 3]


def test_folders_and_zips_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("x")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 this is no zip")
    with zipfile.ZipFile(tmp_path / "crc.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png"))[:3]:
            archive.write(path, path.name)
    data = bytearray((tmp_path / "crc.zip").read_bytes())
    data[60] ^= 255
    (tmp_path / "crc.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 29))
        archive.writestr("b.png", b"")
    np.savez(tmp_path / "floats.npz", images=np.zeros((4, 3, 8, 8)))
    np.savez(tmp_path / "nhwc.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "text.npz").write_text("hello")
    for source, message in (
        ("nowhere", "no such folder, zip or .npz"),
        ("empty", "no images in"),
        ("notes", "no images in"),
        ("bad.zip", "is a damaged zip, or none"),
        ("crc.zip", "cannot read the image"),
        ("bomb.zip", "a.png would unpack to 536,870,912 bytes"),
        ("floats.npz", "images must be uint8"),
        ("nhwc.npz", "with C of 1 or 3, got uint8 [4, 8, 8, 3]"),
        ("text.npz", "damaged, or no .npz"),
    ):
        fails_with(run("calc", "--images", tmp_path / source, "--num", 2, *COMMON), message)


def test_other_files_among_the_images_are_mentioned(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / "notes.txt").write_text("hello")
    (mixed / "run.json").write_text("{}")
    (mixed / ".hidden.png").write_text("half written")
    done = run("calc", "--images", mixed, "--num", 60, *COMMON)
    assert done.exit_code == 0, done.output
    assert "passed over notes.txt, not an image" in done.output
    assert "run.json" not in done.output


def test_counts_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    done = run("calc", "--images", folder, *COMMON)
    fails_with(done, "has 60 images, --num asks for 50000")
    assert "--num 60" in done.output
    done = run("calc", "--images", folder, "--num", 1, *COMMON)
    assert done.exit_code == 2
    assert "--num" in done.output
    # Before: nothing, and a number that is of the resizing, too.
    (tmp_path / "large").mkdir()
    for path in sorted(folder.rglob("*.png"))[:8]:
        Image.open(path).resize((32, 48)).save(tmp_path / "large" / path.name)
    for real, said in ((tmp_path / "large", True), (folder, False)):
        done = prc(folder, "--real", real, "--detector", "fd_digits", "--device", "cpu",
                   "--metrics", "precision")  # fmt: skip
        assert done.exit_code == said, done.output  # this detector takes 32x32 alone
        assert ("what resizing does to them is compared" in done.output) == said
    few = prc(folder, "--real", "digits", "--detector", "fd_digits", "--k", 60)
    fails_with(few, "has 60 images; --k 60 needs at least 61")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemError('it ran')",))


def test_references_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    def pickled(name: str, value: Any) -> str:
        (tmp_path / name).write_bytes(pickle.dumps(value, protocol=4))
        return name

    def saved(name: str, **arrays: np.ndarray) -> str:
        np.savez(tmp_path / name, **arrays)
        return name

    (tmp_path / "text.npz").write_text("hello")
    good = {"mu": np.zeros(64), "sigma": np.eye(64)}
    lying = saved("lying.npz", **{"fd_digits/mu": np.zeros(64), "fd_digits/sigma": np.eye(64)})
    with zipfile.ZipFile(tmp_path / lying) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(tmp_path / lying, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"(64, 64), }  ", b"(1099511627776, 64), }")[:])
    for file, message in (
        ("nowhere.npz", "is no reference: give a .npz or .pkl file, a URL, or one of digits"),
        ("text.npz", "text.npz: "),
        (pickled("evil.pkl", {"fd_digits": Evil()}), "which a snapshot does not need"),
        (pickled("evil2.pkl", Evil()), "which a snapshot does not need"),
        (pickled("list.pkl", [1, 2]), "no dict of metric names"),
        (pickled("empty.pkl", {"fid": {"mu": np.zeros(3)}}), "has no arrays mu and sigma"),
        (pickled("fid.pkl", {"fid": good}), "has no statistics for fd_digits; it has fid"),
        (
            pickled("small.pkl", {"fd_digits": {"mu": np.zeros(3), "sigma": np.eye(3)}}),
            "its statistics for fd_digits are of 3 features, the detector has 64",
        ),
        (
            pickled("odd.pkl", {"fd_digits": {"mu": np.zeros(64), "sigma": np.eye(3)}}),
            "mu must be [d] and sigma [d, d]",
        ),
        (
            pickled("ints.pkl", {"fd_digits": {"mu": np.zeros(64, int), "sigma": np.eye(64)}}),
            "floating-point",
        ),
        (
            pickled("nan.pkl", {"fd_digits": {"mu": np.zeros(64), "sigma": np.nan * np.eye(64)}}),
            "not finite",
        ),
        (saved("other.npz", x=np.zeros(3)), "no arrays mu and sigma"),
        (
            saved("far.npz", **{"fd_digits/mu": np.full(64, 1e200), "fd_digits/sigma": np.eye(64)}),
            "beyond the numbers",
        ),
        (
            saved(
                "odd2.npz",
                **{
                    "fd_digits/mu": np.zeros(64),
                    "fd_digits/sigma": np.eye(64),
                    "fd_digits/count": np.zeros(3),
                },
            ),
            "not what belongs there",
        ),
        (
            saved(
                "indefinite.npz",
                **{
                    "fd_digits/mu": np.zeros(64),
                    "fd_digits/sigma": np.eye(64) + 2 * (np.eye(64, k=1) + np.eye(64, k=-1)),
                },
            ),
            "negative eigenvalue",
        ),
        (saved("object.npz", mu=np.array([{}]), sigma=np.array([{}])), "object.npz: "),
        (lying, "declares more than it holds"),
    ):
        done = run("calc", "--images", folder, "--num", 60, "--ref", tmp_path / file,
                   "--metrics", "fd_digits", "--device", "cpu")  # fmt: skip
        fails_with(done, message)


def test_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    calc = ("calc", "--images", folder, "--num", 60, "--ref", "digits", "--device", "cpu")
    fails_with(run(*calc, "--metrics", "fdi"), "unknown metric 'fdi'; there are fd_digits")
    fails_with(
        run(*calc, "--metrics", "fd_digits", "--detector-weights", "fid=x"),
        "fid is not among fd_digits",
    )
    fails_with(
        run(*calc, "--metrics", "fd_digits", "--features", tmp_path / "f.pt"),
        "end its name in .npz",
    )
    done = run(*calc, "--metrics", "fd_digits", "--detector-weights", "fid")
    assert "'fid' is not NAME=FILE" in done.output
    done = run(*calc, "--detector-weights", "fid=x", "--detector-weights", "fid=y")
    assert "fid has two files, x and y" in done.output
    assert "single commas" in run(*calc, "--metrics", "fid,,fd_digits").output
    done = prc(folder, "--metrics", "precision,f1")
    assert "choose from precision, recall, is" in done.output
    fails_with(
        run("ref", "--data", folder, "--dest", tmp_path / "x.txt", "--metrics", "fd_digits"),
        "end its name in .npz or .pkl",
    )
    (tmp_path / "file").write_text("")
    # Found out before the work, not after it.
    done = run(*calc, "--metrics", "fd_digits", "--json", tmp_path / "file" / "s.json")
    fails_with(done, "cannot write")
    assert "image/s" not in done.output
    done = run(*calc, "--metrics", "fd_digits", "--json", "")
    assert done.exit_code == 2
    assert "it is empty; name a file or a folder" in done.output
    fails_with(run(*calc, "--metrics", "fd_digits", "--bootstrap", 1), "at least 2 resamples")
    assert "it is empty; name" in run("calc", "--images", "", *COMMON).output
    fails_with(run("calc", "--images", "~nobody-here/x", *COMMON), "home")
    done = prc(folder, "--real", "digits")  # whose features are not those of the default
    fails_with(done, "digits holds no features of vgg16; it has fd_digits (see --detector)")


@pytest.mark.parametrize(("scale", "offset", "dtype"), [
    (1, 0, np.float16), (0.3, 0.5, np.float16), (1e-3, 0.5, np.float32), (1e-9, 0, np.float32),
    (1e6, 0, np.float32), (0.1, 2000, np.float32),
])  # fmt: skip
def test_kept_features_are_rounded_where_that_keeps_them_apart(
    scale: float, offset: float, dtype: type
) -> None:
    # Before: always to float16, where small ones are 0, large ones infinite, and those of a common
    # offset equal. All with exit code 0.
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32) * scale + offset
    kept = _short(rows)
    assert kept.dtype == dtype
    scatter = np.linalg.norm(rows - rows.mean(0))
    assert np.linalg.norm(kept.astype(np.float64) - rows) < 0.005 * scatter


PLUGIN = """
import torch
from erk_guid.metrics import register_detector

class Mean:
    name, feature_dim = "{name}", 2

    def __call__(self, images):
        return images.double().flatten(1)[:, :2]

register_detector("{name}", lambda device, weights: Mean())
"""


CLASS_ELSEWHERE = """
from my_net import Pooled
from erk_guid.metrics import register_detector

register_detector("corner", lambda device, weights: Pooled(SCALE))
SCALE = 1
"""
OF_TORCH = """
import torch
from erk_guid.metrics import register_detector

def made(device, weights):
    net = torch.nn.Sequential(Scaled())
    net.name, net.feature_dim = "corner", 2
    return net

class Scaled(torch.nn.Module):
    def forward(self, images):
        return images.double().flatten(1)[:, :2] * SCALE

SCALE = 1
register_detector("corner", made)
"""
A_FUNCTION = """
from my_helper import SCALE
from erk_guid.metrics import register_detector

def corner(images):
    return images.double().flatten(1)[:, :2] * SCALE

corner.name, corner.feature_dim = "corner", 2
register_detector("corner", lambda device, weights: corner)
"""
MY_NET = """
class Pooled:
    name, feature_dim = "corner", 2

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, images):
        return images.double().flatten(1)[:, :2] * self.scale
"""


@pytest.mark.parametrize(("plugin", "changed"), [
    (CLASS_ELSEWHERE, "my_plugin.py"), (CLASS_ELSEWHERE, "my_net.py"),
    (OF_TORCH, "my_plugin.py"), (A_FUNCTION, "my_plugin.py"), (A_FUNCTION, "my_helper.py"),
])  # fmt: skip
def test_a_reference_of_a_plugin_that_has_changed_is_refused(
    plugin: str, changed: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: only the file of the detector's class was looked at, so that another network's
    # distance came out without a word when anything else had changed.
    from erk_guid.metrics.detectors import base

    texts = {"my_plugin.py": plugin, "my_net.py": MY_NET, "my_helper.py": "SCALE = 1\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["--plugin", tmp_path / "my_plugin.py", "--metrics", "corner", "--device", "cpu"]
    calc = ["calc", "--images", folder, "--ref", tmp_path / "r.npz", "--num", 60, *common]
    for command in (["ref", "--data", folder, "--dest", tmp_path / "r.npz", *common], calc):
        for module in ("my_net", "my_helper"):
            sys.modules.pop(module, None)
        monkeypatch.setattr(base, "_FACTORIES", {})
        done = run(*command)
        assert done.exit_code == 0, done.output
    (tmp_path / changed).write_text(texts[changed] + "# other\n")
    monkeypatch.setattr(base, "_FACTORIES", {})
    fails_with(run(*calc), "its features of corner were made by another program (my_plugin.py")


def test_a_detector_of_ones_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erk_guid.metrics.detectors import base

    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))
    (tmp_path / "plugin.py").write_text(PLUGIN.format(name="corner"))
    dest = tmp_path / "r.npz"
    done = run("ref", "--data", folder, "--dest", dest, "--plugin", tmp_path / "plugin.py",
               "--metrics", "corner", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert read_reference(dest).of("corner").mu.shape == (2,)
    # Before: a traceback for an array, and a distance of 0 for complex numbers.
    for end, what in ((".numpy()", "ndarray of float64"), (".cfloat()", "of torch.complex64"),
                      (".round().long()", "Tensor of torch.int64")):  # fmt: skip
        odd = tmp_path / "odd.py"
        odd.write_text(PLUGIN.format(name="corner").replace("[:, :2]", f"[:, :2]{end}"))
        monkeypatch.setattr(base, "_FACTORIES", {})
        done = run("ref", "--data", folder, "--dest", tmp_path / "odd.npz", "--plugin", odd,
                   "--metrics", "corner", "--device", "cpu")  # fmt: skip
        fails_with(done, "corner must return a floating-point tensor, got")
        assert what in done.output
    # Which weights and which program made a reference is in it, and others are refused. Before:
    # another network's distance, without a word.
    first, second, out = tmp_path / "w1", tmp_path / "w2", tmp_path / "s.json"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    common = ["--plugin", tmp_path / "plugin.py", "--metrics", "corner", "--device", "cpu"]
    monkeypatch.setattr(base, "_FACTORIES", {})
    done = run("ref", "--data", folder, "--dest", dest, *common, "--keep-features", 60,
               "--detector-weights", f"corner={first}")  # fmt: skip
    assert done.exit_code == 0, done.output
    (made,) = read_reference(dest).about["detectors"]
    assert made["weights"] == {"file": "w1", "sha256": sha256_of(first)}
    assert made["program"] == {"file": "plugin.py", "sha256": sha256_of(tmp_path / "plugin.py")}
    renamed = tmp_path / "w3"  # the same under another name
    renamed.write_bytes(first.read_bytes())
    for weights, fits in ((first, True), (renamed, True), (second, False)):
        given = ["--detector-weights", f"corner={weights}"]
        monkeypatch.setattr(base, "_FACTORIES", {})
        done = run("calc", "--images", folder, "--ref", dest, "--num", 60, *common, *given,
                   "--json", out)  # fmt: skip
        monkeypatch.setattr(base, "_FACTORIES", {})
        compared = prc(folder, "--real", dest, *common[:2], "--detector", "corner", *given,
                       "--metrics", "precision", "--device", "cpu")  # fmt: skip
        for one in (done, compared):
            if fits:
                assert one.exit_code == 0, one.output
            else:
                fails_with(one, "its features of corner were made with other weights (w1, sha256")
    # Weights that are named on one side only, and another program of the same name.
    given = ["--detector-weights", f"corner={first}"]
    program = (tmp_path / "plugin.py").read_text()
    for options, text, said in (
        ([], program, "with other weights (w1, sha256"),
        (given, program + "# mended\n", "by another program (plugin.py, sha256"),
    ):
        (tmp_path / "plugin.py").write_text(text)
        monkeypatch.setattr(base, "_FACTORIES", {})
        done = run("calc", "--images", folder, "--ref", dest, "--num", 60, *common, *options)
        fails_with(done, f"its features of corner were made {said}")
    (tmp_path / "plugin.py").write_text(program)
    # Where a file names no weights, nothing is compared.
    arrays = {**np.load(dest)}
    for about in ("{}", '{"detectors": 3}', '{"detectors": [3, {"name": "corner"}]}', "[]"):
        np.savez(dest, **{**arrays, "about": np.array(about)})
        monkeypatch.setattr(base, "_FACTORIES", {})
        done = run("calc", "--images", folder, "--ref", dest, "--num", 60, *common,
                   "--detector-weights", f"corner={second}")  # fmt: skip
        assert done.exit_code == 0, done.output
    done = run("ref", "--data", folder, "--dest", dest, "--plugin", tmp_path / "nowhere.py")
    assert "cannot import" in done.output
