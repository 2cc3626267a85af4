"""Traces: rows that are appended as batches are made, and what a file holds in the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import erk_guid
from erk_guid.cli.generate import generate_command
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.pictures import save_picture, save_png
from erk_guid.generation import images
from erk_guid.generation.trace import (
    COLUMNS,
    PART_ROW,
    ROW,
    Trace,
    part_files,
    read_parts,
    read_trace,
    recorded,
    restart_parts,
    united,
    with_checks,
    write_trace,
)

RUN = "a run"


def rows(*keys: tuple[int, int], value: float = 0.5) -> np.ndarray:
    return np.array([(seed, step, 2.0, 1.0, *[value] * 6) for seed, step in keys], ROW)


def generate(*args: object) -> Any:
    return CliRunner().invoke(
        generate_command, [f"{a}" for a in ("--preset=digits", "--device=cpu", "--steps=3", *args)]
    )


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_the_largest_seeds_keep_their_number(suffix: str, tmp_path: Path) -> None:
    # As floating-point numbers both would be 2^53.
    seeds = [2**53, 2**53 + 1]
    trace = tmp_path / f"t{suffix}"
    args = ("--seeds", f"{seeds[0]}-{seeds[1]}", "--outdir", tmp_path / "o", "--trace", trace)
    assert generate(*args).exit_code == 0
    assert read_trace(trace)["seed"].tolist() == [seeds[0]] * 3 + [seeds[1]] * 3
    assert generate(*args, "--resume").exit_code == 0
    assert len(read_trace(trace)) == 6


def test_a_trace_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    # Seeds and steps were real numbers in an .npz once.
    whole = rows((3, 0), (3, 1))
    columns: dict[str, Any] = {name: whole[name].astype(np.float64) for name in COLUMNS}
    np.savez(tmp_path / "t.npz", **columns)
    assert read_trace(tmp_path / "t.npz").tobytes() == whole.tobytes()
    columns["seed"][1] = 3.5
    np.savez(tmp_path / "t.npz", **columns)
    with pytest.raises(ErkGuidError, match="seed does not hold whole numbers"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("line", [
    "1e400,0,2,1,,,,,,", "99999999999999999999,0,2,1,,,,,,", "-1,0,2,1,,,,,,", "0,0,nan,1,,,,,,",
    "1.5,0,2,1,,,,,,", "0,0,2",
])  # fmt: skip
def test_rows_that_are_none(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(COLUMNS) + "\n" + line + "\n")
    with pytest.raises(ErkGuidError, match="cannot read the trace"):
        read_trace(tmp_path / "t.csv")


def test_half_a_row_is_left_out(tmp_path: Path) -> None:
    # A kill in the middle of a write; and the next run's rows must not follow half a row.
    whole = rows((0, 0), (0, 1), (1, 0))
    (tmp_path / ".trace.1.part").write_bytes(with_checks(whole, RUN).tobytes()[:-7])
    assert read_parts(tmp_path, RUN).tobytes() == whole[:2].tobytes()
    restart_parts(tmp_path, RUN, without=[5])
    with recorded(tmp_path, rank=1, run=RUN) as trace:
        info = erk_guid.StepInfo(
            step=4, num_steps=5, sigma=2.0, sigma_next=1.0, sigma_hat=2.0,
            x_before=torch.zeros(2, 3), x=torch.ones(2, 3), denoised=torch.zeros(2, 3),
            stiffness=None, gate=None, correction_size=None, nfe=1,
        )  # fmt: skip
        trace.callback(info)
        trace.end_batch([7, 8])
    found = read_parts(tmp_path, RUN)
    assert found[["seed", "step"]].tolist() == [(0, 0), (0, 1), (7, 4), (8, 4)]
    assert found["step_size"][2:].tolist() == pytest.approx([3**0.5] * 2)


def test_parts_are_put_together_without_what_is_made_again(tmp_path: Path) -> None:
    (tmp_path / ".trace.0.part").write_bytes(with_checks(rows((0, 0), (1, 0)), RUN).tobytes())
    (tmp_path / ".trace.3.part").write_bytes(with_checks(rows((2, 0)), RUN).tobytes())
    restart_parts(tmp_path, RUN, without=[1])
    assert [path.name for path in part_files(tmp_path)] == [".trace.0.part"]
    assert read_parts(tmp_path, RUN)["seed"].tolist() == [0, 2]


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    # A batch of a rank that was taken for dead may be made twice.
    twice = np.concatenate([rows((1, 0), (0, 1), value=1), rows((0, 0), (0, 1), value=2)])
    assert united(twice).tolist() == rows((0, 0), (0, 1), value=2).tolist() + twice[:1].tolist()
    write_trace(tmp_path / "t.csv", twice)
    assert read_trace(tmp_path / "t.csv")["stiffness"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("data", [
    b"\xff" * PART_ROW.itemsize, b"\0" * PART_ROW.itemsize,
    with_checks(rows((0, 0)), "x").tobytes(), rows(*[(0, k) for k in range(84)]).tobytes(),
], ids=["noise", "zeros", "another run's", "as once, without checksums"])  # fmt: skip
def test_rows_that_are_none_of_this_run(data: bytes, tmp_path: Path) -> None:
    # Catches: rows of another run at the same noise levels, which once were taken.
    mine = with_checks(rows((7, 0)), RUN).tobytes()
    (tmp_path / ".trace.0.part").write_bytes(data + mine)
    assert read_parts(tmp_path, RUN)["seed"].tolist() == [7]


@settings(max_examples=50, deadline=None)
@given(at=st.integers(0, 8 * PART_ROW.itemsize - 1))
def test_a_flipped_bit_is_seen(at: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("bits")
    data = bytearray(with_checks(rows((1, 0), (2, 0)), RUN).tobytes())
    data[at // 8] ^= 1 << at % 8
    (tmp_path / ".trace.0.part").write_bytes(data)
    assert read_parts(tmp_path, RUN)["seed"].tolist() == [2]


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before, rows were written at the end only: those of the first run's images were lost.
    args = ("--outdir", tmp_path / "o", "--seeds=0-5", "--batch=2", "--w_stiff=0.5")
    sample, made = images._Generation.sample, []

    def dying(*given: Any) -> images.Sampled:
        if len(made) == 2:
            raise ZeroDivisionError  # as good as a kill: nothing of ours catches it
        made.append(1)
        return sample(*given)

    with monkeypatch.context() as patch:
        patch.setattr(images._Generation, "sample", dying)
        died = generate(*args, "--trace", tmp_path / "t.csv")
    assert isinstance(died.exception, ZeroDivisionError)
    assert not (tmp_path / "t.csv").exists()
    assert generate(*args, "--trace", tmp_path / "t.csv", "--resume").exit_code == 0
    assert generate(*args, "--overwrite", "--trace", tmp_path / "u.csv").exit_code == 0
    assert (tmp_path / "t.csv").read_text() == (tmp_path / "u.csv").read_text()


def test_half_a_trace_is_removed(tmp_path: Path) -> None:
    # A kill while the trace is written leaves a temporary file beside it.
    stale = tmp_path / ".t.csv.123-abc.partial.csv"
    stale.write_text("half")
    (tmp_path / ".u.csv.123-abc.partial.csv").write_text("another's")
    assert generate("--outdir", tmp_path / "o", "--trace", tmp_path / "t.csv").exit_code == 0
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".u.csv.123-abc.partial.csv"]


def test_a_trace_and_a_sheet_may_be_there_before_the_folder(tmp_path: Path) -> None:
    # A check of outputs once looked into the folder of images, which a first run has yet to make.
    write_trace(tmp_path / "t.csv", np.zeros(0, ROW))
    save_picture(tmp_path / "g.png", Image.new("L", (4, 4)))
    outputs = ("--trace", tmp_path / "t.csv", "--grid", tmp_path / "g.png")
    assert generate("--outdir", tmp_path / "o", *outputs).exit_code == 0
    assert len(read_trace(tmp_path / "t.csv")) == 12


def test_rows_of_another_run_are_not_kept(tmp_path: Path) -> None:
    # A new run over a folder, with other settings, has rows of its own only.
    trace = tmp_path / "t.csv"
    args = ("--outdir", tmp_path / "o", "--trace", trace)
    assert generate(*args, "--seeds=0-3").exit_code == 0
    assert generate(*args, "--seeds=2-5", "--w_stiff=0.5", "--overwrite").exit_code == 0
    assert sorted(set(read_trace(trace)["seed"])) == [2, 3, 4, 5]
    # One with the same settings adds to them.
    assert generate(*args, "--seeds=0-1", "--w_stiff=0.5").exit_code == 0
    assert sorted(set(read_trace(trace)["seed"])) == [0, 1, 2, 3, 4, 5]


def test_seeds_without_rows_are_told(tmp_path: Path) -> None:
    args = ("--outdir", tmp_path / "o", "--seeds=0-3")
    assert generate(*args, "--seeds=0-1").exit_code == 0
    result = generate(*args, "--resume", "--trace", tmp_path / "t.csv")
    assert "has no rows of 2 of the 4 seeds" in result.output


def test_two_folders_with_one_trace_do_not_mix(tmp_path: Path) -> None:
    # Catches: the trace of one run replaced by that of another one without a word.
    trace = ("--trace", tmp_path / "t.csv")
    first = ("--outdir", tmp_path / "a", *trace)
    assert generate(*first, "--seeds=0-1").exit_code == 0
    before = (tmp_path / "t.csv").read_bytes()
    guided = ("--w_stiff=0.9", "--w_con=0")
    for other in (("--seeds=7",), ("--seeds=0-1", *guided), ("--seeds=0-1",)):
        for resume in ([], ["--resume"]):
            result = generate("--outdir", tmp_path / "b", *other, *trace, *resume)
            assert result.exit_code == 1
            assert "is the trace of another run: it has rows of seed 0" in result.output
    # With a folder that has images of these seeds.
    other = ("--outdir", tmp_path / "b", "--seeds=0-1", *guided)
    assert generate(*other, "--trace", tmp_path / "u.csv").exit_code == 0
    result = generate(*other, *trace, "--resume")
    assert result.exit_code == 1
    assert "it has other rows of the same seeds" in result.output
    assert (tmp_path / "t.csv").read_bytes() == before
    assert generate(*first, "--seeds=0-3", "--resume").exit_code == 0
    rows = read_trace(tmp_path / "t.csv")
    assert len(rows) == 12
    assert not rows["correction_size"][~np.isnan(rows["correction_size"])].any()
    assert generate(*other, *trace, "--overwrite").exit_code == 0
    assert len(read_trace(tmp_path / "t.csv")) == 6


def test_a_stop_while_images_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: one's own trace taken for another run's, because it has rows of images that this run
    # had yet to make again; the stop was then an error about something else.
    args = ("--outdir", tmp_path / "o", "--seeds=0-3", "--batch=2", "--trace", tmp_path / "t.csv")
    assert generate(*args).exit_code == 0
    before = (tmp_path / "t.csv").read_text()
    sample, made = images._Generation.sample, []

    def stopped(*given: Any) -> images.Sampled:
        if made:
            raise KeyboardInterrupt
        made.append(None)
        return sample(*given)

    with monkeypatch.context() as patch:
        patch.setattr(images._Generation, "sample", stopped)
        result = generate(*args)
    assert result.exit_code == 130, result.output
    assert "2 of 4 images are in" in result.output
    assert sorted(set(read_trace(tmp_path / "t.csv")["seed"])) == [0, 1]
    assert "2 images made" in generate(*args, "--resume").output
    assert (tmp_path / "t.csv").read_text() == before


def test_a_trace_that_another_job_wrote_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, sample = tmp_path / "t.csv", images._Generation.sample

    def meanwhile(*given: Any) -> images.Sampled:
        write_trace(trace, rows((7, 0)))
        return sample(*given)

    with monkeypatch.context() as patch:
        patch.setattr(images._Generation, "sample", meanwhile)
        result = generate("--outdir", tmp_path / "o", "--seeds=0-1", "--trace", trace)
    assert result.exit_code == 1
    assert "--resume with another --trace writes them" in result.output
    assert read_trace(trace)["seed"].tolist() == [7]
    args = ("--outdir", tmp_path / "o", "--seeds=0-1", "--resume", "--trace", tmp_path / "u.csv")
    assert "0 images made" in generate(*args).output
    assert len(read_trace(tmp_path / "u.csv")) == 6


def test_a_trace_that_was_cut_is_whole_again(tmp_path: Path) -> None:
    # Half a row was taken for a row once.
    args = ("--outdir", tmp_path / "o", "--seeds=0-3", "--trace", tmp_path / "t.csv")
    assert generate(*args).exit_code == 0
    whole = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(whole[:300])
    assert generate(*args, "--resume").exit_code == 0
    assert (tmp_path / "t.csv").read_text() == whole


def test_foreign_pictures_are_not_taken_for_images(tmp_path: Path) -> None:
    # A copy of another seed's image, and a picture from elsewhere, were counted as made.
    # So was the image of the same seed with other settings. And somebody's own picture under such
    # a name was replaced.
    folder, other = tmp_path / "a", tmp_path / "b"
    assert generate("--outdir", folder, "--seeds=0-3").exit_code == 0
    assert generate("--outdir", other, "--seeds=0-3", "--w_stiff=0.5").exit_code == 0
    names = [f"00000{seed}.png" for seed in range(4)]
    before = [(folder / name).read_bytes() for name in names]
    Image.new("L", (32, 32)).save(folder / names[1])
    (folder / names[2]).write_bytes(before[3])
    (folder / names[3]).write_bytes((other / names[3]).read_bytes())
    (folder / names[0]).write_bytes(before[0][:-9])  # this one is only damaged
    there = [(folder / name).read_bytes() for name in names]
    for resume in ([], ["--resume"]):
        result = generate("--outdir", folder, "--seeds=0-3", *resume)
        assert result.exit_code == 1
        assert "3 files have names of images of this run, and came from elsewhere" in result.output
        assert names[1] in result.output
        assert [(folder / name).read_bytes() for name in names] == there
    for name in names[1:]:
        (folder / name).unlink()
    assert "4 images made" in generate("--outdir", folder, "--seeds=0-3", "--resume").output
    assert [(folder / name).read_bytes() for name in names] == before
    # --overwrite deletes what is there.
    Image.new("L", (32, 32)).save(folder / names[1])
    assert generate("--outdir", folder, "--seeds=0-3", "--overwrite").exit_code == 0
    assert [(folder / name).read_bytes() for name in names] == before


def test_images_of_an_earlier_version_are_kept(tmp_path: Path) -> None:
    # They do not say which run's they are.
    assert generate("--outdir", tmp_path, "--seeds=0-1").exit_code == 0
    path = tmp_path / "000001.png"
    with Image.open(path) as image:
        text, pixels = image.info["parameters"], np.asarray(image)[None]
    save_png(path, pixels, text)
    assert "0 images made" in generate("--outdir", tmp_path, "--seeds=0-1", "--resume").output


def test_a_run_file_without_end_is_not_read(tmp_path: Path) -> None:
    # It took all memory.
    (tmp_path / "run.json").symlink_to("/dev/zero")
    result = generate("--outdir", tmp_path, "--seeds=0-1", "--resume")
    assert result.exit_code == 1
    assert "it is no file of at most 256 MiB" in result.output


def test_seeds_of_one_stream_are_refused(tmp_path: Path) -> None:
    result = generate("--outdir", tmp_path, "--seeds=0,4294967296")
    assert result.exit_code == 2
    assert "seeds 0 and 4294967296 give one image" in result.output


def test_without_a_folder_nothing_is_appended(tmp_path: Path) -> None:
    with (
        pytest.raises(ErkGuidError, match="cannot write the trace's"),
        recorded(tmp_path / "none", 0, RUN),
    ):
        pass


def test_a_trace_of_no_steps() -> None:
    found: list[np.ndarray] = []
    Trace(found.append).end_batch([1, 2])
    assert len(found[0]) == 0


def damaged(tmp_path: Path, damage: Callable[[bytearray], None]) -> tuple[list[int], str]:
    """Make 12 images with a trace, damage its part file, resume; return the seeds in the trace."""
    args = ("--outdir", tmp_path / "o", "--seeds=0-11", "--trace", tmp_path / "t.csv", "--resume")
    assert generate(*args).exit_code == 0
    before = (tmp_path / "t.csv").read_text().splitlines()
    part = tmp_path / "o" / ".trace.0.part"
    data = bytearray(part.read_bytes())
    damage(data)
    part.write_bytes(data)
    refused = generate(*args)  # the trace has what the part file has lost
    assert refused.exit_code == 1
    assert "writing it anew would lose them" in refused.output
    assert (tmp_path / "t.csv").read_text().splitlines() == before
    (tmp_path / "t.csv").unlink()
    done = generate(*args)
    assert done.exit_code == 0
    after = (tmp_path / "t.csv").read_text().splitlines()
    assert set(after) <= set(before)  # nothing invented
    return sorted({int(line.split(",")[0]) for line in after[1:]}), done.stderr


def test_a_block_of_zeros_in_the_part_file(tmp_path: Path) -> None:
    # Catches: rows of zeros in the trace, over the true first row of seed 0; seeds that have lost
    # a step and are taken for complete.
    def zero(data: bytearray) -> None:
        data[2 * PART_ROW.itemsize : 7 * PART_ROW.itemsize] = bytes(5 * PART_ROW.itemsize)

    seeds, said = damaged(tmp_path, zero)
    # The rows of one step of all seeds of the batch stand together.
    assert seeds == [0, 1, 7, 8, 9, 10, 11]
    assert "has no rows of 5 of the 12 seeds" in said


def test_a_part_file_that_ends_within_a_batch(tmp_path: Path) -> None:
    # Catches: seeds with one step of two in the trace, uncounted.
    end = slice(10 * PART_ROW.itemsize, None)
    seeds, said = damaged(tmp_path, lambda data: data.__delitem__(end))
    assert len(seeds) < 12
    assert f"has no rows of {12 - len(seeds)} of the 12 seeds" in said


def test_text_in_place_of_the_part_file(tmp_path: Path) -> None:
    # Catches: letters read as seeds and steps.
    def text(data: bytearray) -> None:
        data[:] = b'{"scores": {"fd_digits": 3.14159}}' * 40

    seeds, said = damaged(tmp_path, text)
    assert seeds == []
    assert "has no rows of 12 of the 12 seeds" in said


def test_a_row_at_another_noise_level(tmp_path: Path) -> None:
    # Catches: a part file in which rows were changed.
    def flip(data: bytearray) -> None:
        rows = np.frombuffer(data, PART_ROW).copy()
        rows["sigma"][5] *= 2
        data[:] = rows.tobytes()

    seeds, said = damaged(tmp_path, flip)
    assert len(seeds) == 11
    assert "has no rows of 1 of the 12 seeds" in said


def test_a_pipe_in_place_of_the_part_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".trace.0.part")
    with pytest.raises(ErkGuidError, match="it is no file"):
        read_parts(tmp_path, RUN)
