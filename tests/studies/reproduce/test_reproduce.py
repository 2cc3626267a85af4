"""reproduce.sh: the rows, the commands, a killed run, the report."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import DATA, ROOT
from PIL import Image

import erk_guid
from erk_guid.cli import command_named, main
from erk_guid.cli.generate import generate_command
from erk_guid.cli.reproduce import reproduce_command
from erk_guid.cli.sampler import config_fields
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.config import GenerationConfig
from erk_guid.studies.reproduce import TABLES, Reproduction, choose_rows, plan, runner, write_report
from erk_guid.studies.reproduce.report import Findings
from erk_guid.studies.reproduce.runner import _append, _hash_of_real, _mend, read_results, result_of
from erk_guid.studies.reproduce.tables import Row, settings_row

SCRIPT = ROOT / "scripts" / "reproduce.sh"


def run(*args: Any) -> Result:
    return CliRunner().invoke(reproduce_command, list(map(str, args)))


# --- the rows -------------------------------------------------------------------------------


def test_the_papers_rows_and_numbers() -> None:
    # Every number the paper is known to report, each beside the run it belongs to.
    def row(name: str) -> Any:
        return choose_rows([], [name])[0]

    def values(name: str) -> tuple[float | None, float | None]:
        return row(name).paper.get("fd_dinov2"), row(name).paper.get("fid")

    assert values("2-32-plain") == (90.1, 2.58)
    assert values("2-32-w2.0") == (82.8, 2.74)
    assert values("2-16-plain") == (97.4, 2.79)
    assert values("2-16-w0.75") == (88.9, 2.68)
    assert values("2-8-plain") == (161.2, 7.06)
    assert values("2-8-w0.5") == (136.9, 4.91)
    assert values("3-32-guid-plain") == (88.5, 2.27)
    assert values("3-32-guid-w1.0") == (83.9, 2.27)
    assert values("3-32-autog-plain") == (50.4, 1.36)
    assert values("3-32-autog-w1.0") == (47.6, 1.36)
    assert values("3-16-guid-plain") == (None, 3.61)
    assert values("3-16-guid-w0.75") == (None, 3.20)
    assert values("3-16-autog-plain") == (None, 2.32)
    assert values("3-16-autog-w0.75") == (None, 1.93)
    table4 = {r.id: r.paper["fid"] for r in TABLES["4"]}
    assert table4 == {
        "4-heun-plain": 89.63, "4-heun-erk": 85.19, "4-dpm2-plain": 44.83, "4-dpm2-erk": 31.59,
        "4-deis-plain": 12.57, "4-deis-erk": 9.56,
    }  # fmt: skip
    sweep = [r for r in TABLES["2"] if r.steps == 32 and r.guided]
    assert [(r.w_stiff, r.w_con) for r in sweep] == [
        (0.5, 0.5), (1.0, 0.5), (1.5, 0.5), (2.0, 0.5), (2.5, 0.5)
    ]  # fmt: skip
    assert (row("2-16-w0.75").w_con, row("2-8-w0.5").w_con) == (0.3, 0.1)
    assert (row("3-16-guid-w0.75").w_con, row("3-16-guid-w0.75").guidance) == (0.5, 1.2)
    assert row("3-16-autog-plain").guidance == 1.55


@pytest.mark.parametrize("table", ["2", "3", "4", "digits"])
def test_every_guided_row_has_one_baseline(table: str) -> None:
    for row in TABLES[table]:
        plain = [r for r in TABLES[table] if r.group == row.group and not r.guided]
        assert len(plain) == 1
    names = [r.id for rows in TABLES.values() for r in rows]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("table", TABLES)
def test_evaluations_are_those_of_the_run(table: str) -> None:
    # Catches: a step to 0 counted twice; levels from a file counted as steps. The other side runs
    # the sampler that the row's own command asks for, and counts.
    job = Reproduction(rows=[], num=2, w_stiff=1.0, w_con=0.5, device="cpu")
    for row in TABLES[table]:
        command = plan(job, row).generate
        arguments = command[command.index("generate") + 1 :]
        with generate_command.make_context("generate", arguments) as context:
            own = inspect.signature(generate_command.callback).parameters
            options = {k: v for k, v in context.params.items() if k not in own}
            config = GenerationConfig(**config_fields(**options))
        assert config.evaluations().main == row.evaluations, row.id


def test_levels_of_one_model_are_not_those_of_another(tmp_path: Path) -> None:
    # Catches: rows that end in an error for every model but the shipped one.
    done = run("--dry-run", "--table=digits", "--model=digits-autog", "--num=10")
    assert done.exit_code == 0, done.output
    assert "06-fitted is left out: its levels were fitted to digits" in done.stderr
    assert "--schedule=fitted" not in done.stdout


def test_a_dry_run_prints_commands_that_parse(tmp_path: Path) -> None:
    done = run("--dry-run", "--gpus", 8)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    commands = [
        shlex.split(line.removeprefix("# ")) for line in lines if re.match("(# )?[a-z]+ -", line)
    ]
    # Those of a row without settings cannot be pasted by mistake.
    assert [line[:2] == "# " for line in lines if "=?" in line] == [True] * 3
    assert not any("?" in line for line in lines if line[0] != "#")
    generate = [c for c in commands if "generate" in c]
    assert len(generate) == 10 + 8 + 6
    name = plan(Reproduction(rows=[], gpus=8), TABLES["2"][0]).name
    assert re.fullmatch("2-32-plain-[0-9a-f]{8}", name)
    assert generate[0] == shlex.split(
        "torchrun --standalone --nproc_per_node=8 -m -- erk_guid generate "
        f"--preset=edm2-img512-s-fid --outdir=output/images/{name} --subdirs "
        "--seeds=100000-149999 --batch=125 --steps=32 --resume"
    )
    score = next(c for c in commands if "metrics" in c)
    assert {"--ref=img512", "--metrics=fid,fd_dinov2", "--num=50000"} <= set(score)
    # The third command of every row of the published script, on the folder of real images that
    # its calculate_precision_recall_is.py expects.
    quality = [c for c in commands if "precision-recall" in c]
    assert len(quality) == 10 + 8  # of the other models' real images nothing is known
    assert quality[0] == shlex.split(
        f"python -m erk_guid precision-recall output/images/{name} "
        f"--real=ILSVRC2012_img_val_resize_centercrop --json=output/scores/{name}-quality.json"
    )
    assert "precision-recall" not in commands_of("--skip-quality")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert f"--real={tmp_path}" in commands_of("--table=4", f"--real={tmp_path}")
    assert ["rm", "-r", f"output/images/{name}"] in commands
    # Every option that is printed exists.
    for command in commands:
        if command[0] == "rm":
            continue
        name = command[command.index("erk_guid") + 1]
        known: Any = command_named(name)
        if name == "metrics":
            known = known.commands["calc"]
        options = {o for p in known.params for o in (*p.opts, *p.secondary_opts)}
        used = {a.partition("=")[0] for a in command[command.index(name) :] if a[:2] == "--"}
        assert used <= options
    # Table 4: six evaluations from sigma_max to sigma_min; what is not known is a question mark.
    table4 = [c for c in generate if "edm-imagenet-64x64-cond-adm" in " ".join(c)]
    assert [next(a for a in c if a.startswith("--steps")) for c in table4] == [
        "--steps=4", "--steps=4", "--steps=4", "--steps=4", "--steps=7", "--steps=7"
    ]  # fmt: skip
    assert all("--no-denoise-to-zero" in c for c in table4)
    assert [("--w_stiff=?" in c, "--w_con=?" in c) for c in table4] == [
        (False, False), (True, True)
    ] * 3  # fmt: skip
    assert ["--solver=deis" in c for c in table4] == [False] * 4 + [True] * 2
    # zju-pi/diff-sampler's README has the unguided numbers; DEIS's with this schedule and order.
    deis = {"--order=4", "--schedule=time_uniform", "--rho=2"}
    assert [deis <= set(c) for c in table4] == [False] * 4 + [True] * 2


def commands_of(*args: Any) -> str:
    done = run("--dry-run", *args)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are there, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.pkl", "w.pkl", "weak.pkl", "mine.npz", "x.npz"):
        Path(name).write_bytes(b"")


def test_other_models_take_the_papers_place(own_files: None) -> None:
    digits = commands_of("--model", "digits", "--num", 500, "--table", "2,3", "--device", "cpu")
    assert "--preset=digits " in digits
    assert "--preset=digits-guid --guidance=1.2" in digits
    assert "--preset=digits-autog --guidance=1.55" in digits
    assert "--seeds=100000-100499" in digits
    assert "--ref=digits --metrics=fd_digits --num=500 --device=cpu" in digits
    assert "edm2" not in digits
    mine = ("--model", "mine.pkl", "--metrics", "fid", "--ref", "mine.npz")
    assert "--net=mine.pkl --gnet=uncond:mine.pkl --guidance=1.4" in commands_of(
        *mine, "--row", "3-32-guid-plain"
    )
    strong = ("--row", "3-32-guid-plain,3-16-autog-plain", "--gnet", "w.pkl")
    both = commands_of("--model", "digits", "--num", 20, *strong)
    assert "--preset=digits-guid" in both  # classifier-free guidance has a network of its own
    assert "--preset=digits --gnet=w.pkl --guidance=1.55" in both
    plain = commands_of("--model", "digits-autog", "--num", 20, "--row", "2-8-plain")
    assert "--preset=digits-autog --guidance=1 " in plain
    weak = commands_of(*mine, "--gnet", "weak.pkl", "--row", "3-16-autog-plain")
    assert "--net=mine.pkl --gnet=weak.pkl --guidance=1.55" in weak
    some = commands_of("--row", "2-8-plain", "--seeds", "3,5,9", "--keep-images")
    assert "--seeds=3,5,9" in some
    assert "rm -r" not in some


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--table", "5"), "choose from 2, 3, 4, digits"),
        (("--row", "2-8"), "there is no row '2-8'; there are 2-32-plain"),
        (("--model", "mine.pkl"), "which data set does --model mine.pkl belong to? Give --metrics"),
        (
            ("--model", "mine.pkl", "--metrics", "fid", "--ref", "x.npz", "--row",
             "3-32-autog-plain"),
            "name one with --gnet",
        ),
        (("--table", "2", "--w_stiff", "0.5"), "--w_stiff 0.5 has nothing to act on"),
        (("--table", "4"), "row 4-heun-erk: the paper's w_stiff and w_con are not known here"),
        (("--row", "2-8-plain", "--seeds", "1"), "1 images are too few"),
        (("--row", "2-8-plain", "--metrics", "fdi"), "unknown metric 'fdi'"),
        (("--row", "2-8-plain", "--gnet", "x.pkl"), "--gnet x.pkl goes with --model"),
        (("--row", "2-8-plain", "--num", 9, "--seeds", "1-8"), "lists 8 seeds, --num asks for 9"),
        (("--row", "2-8-plain", "--bootstrap", 1), "needs at least 2 resamples"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said(
    args: tuple[Any, ...], message: str, own_files: None, tmp_path: Path
) -> None:
    done = run(*args, "--outdir", tmp_path)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output


# --- results --------------------------------------------------------------------------------


def result(key: dict[str, Any], **scores: float) -> dict[str, Any]:
    return {
        "key": key, "scores": scores, "standard_errors": {}, "num": 50000, "commands": ["x"],
        "device": "cuda", "processes": 8, "detectors": [], "versions": {},
        "reference": {"source": "img512", "sha256": "0" * 64},
    }  # fmt: skip


def line(row: str, **scores: float) -> str:
    return json.dumps(result({"row": row}, **scores))


def test_quality_belongs_to_the_real_images_asked_for(tmp_path: Path) -> None:
    # Catches: another --real's precision in the report, and rows scored without it left so.
    rows = choose_rows([], ["2-8-plain"])
    options: dict[str, Any] = {"rows": rows, "outdir": tmp_path, "model": "digits", "num": 100}
    usual, other = Reproduction(**options), Reproduction(**options, real="mine")
    one = plan(usual, rows[0])
    assert one.key == plan(other, rows[0]).key
    before = {**result(one.key, fd_digits=3.0), "standard_errors": {"fd_digits": 0.1}}
    asked = {"real": "digits", "detector": "fd_digits"}
    first, second = (
        {**before, "quality": {"asked": {**asked, "real": real}, "scores": {"precision": value}}}
        for real, value in (("digits", 0.7), ("mine", 0.8))
    )
    assert result_of(usual, [before], one) is None
    assert result_of(usual, [before], one, complete=False) == before
    results = [before, first, second]
    for job, value in ((usual, 0.7), (other, 0.8)):
        found = Findings(job, results)
        assert found.quality(rows[0]) == {"precision": value}
    assert Findings(usual, [second]).quality(rows[0]) == {}
    # Nor are other images of the same name the same: before, their precision was taken.
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.png").write_bytes(b"1")
    own = Reproduction(**options, real=str(real))
    hashed = runner._hash_of_real(str(real))
    quality = {"asked": {**asked, "real": str(real)}, "scores": {}, "real_sha256": hashed}
    assert result_of(own, [{**before, "quality": quality}], plan(own, rows[0]))
    for name, data in (("a.png", b"2"), ("b.png", b"1")):
        runner._hash_of_real.cache_clear()
        (real / name).write_bytes(data)
        assert not result_of(own, [{**before, "quality": quality}], plan(own, rows[0]))
    if sys.platform == "linux":  # before: a traceback for a name that is not UTF-8
        runner._hash_of_real.cache_clear()
        (real / os.fsdecode(b"\xff.png")).write_bytes(b"1")
        assert runner._hash_of_real(str(real))
    shutil.rmtree(real)  # a report made elsewhere
    runner._hash_of_real.cache_clear()
    assert Findings(own, [{**before, "quality": quality}]).by_row
    assert Findings(Reproduction(**options, skip_quality=True), [before]).by_row


def test_images_of_the_old_vae_are_not_taken_for_todays() -> None:
    # Earlier versions decoded latents wrongly; only models that may have a VAE are concerned.
    for model, concerned in ((None, True), ("digits", False), ("edm2-img64-s-fid", False)):
        job = Reproduction(rows=[], model=model, metrics=["fid"], ref="img64")
        assert ("pixels" in plan(job, TABLES["2"][0]).key) == concerned


def test_real_images_are_looked_for_first(tmp_path: Path) -> None:
    args = ["--row=2-8-plain", "--model=digits", "--num=20", "--outdir", tmp_path / "o"]
    done = run(*args, "--real", tmp_path / "none")
    assert done.exit_code == 1
    assert "there is no" in done.output
    (tmp_path / "empty").mkdir()
    done = run(*args, "--real", tmp_path / "empty")
    assert done.exit_code == 1
    assert "no images in" in done.output
    assert not (tmp_path / "o" / "images").exists()
    few = run("--row=2-8-plain", "--model=digits", "--num=5", "--outdir", tmp_path / "o")
    assert few.exit_code == 1
    assert "5 images are too few for an inception score" in few.output
    assert "has no use with --skip-quality" in run(*args, "--real=x", "--skip-quality").output


@pytest.mark.slow
def test_a_row_keeps_its_score_where_precision_fails(tmp_path: Path) -> None:
    # The real images are too few to compare with: that shows only after hours of generating.
    (tmp_path / "real").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "real" / "one.png")
    args = ["--row=2-8-plain", "--model=digits", "--num=12", "--device=cpu", "--outdir",
            tmp_path / "o"]  # fmt: skip
    done = run(*args, "--real", tmp_path / "real")
    assert done.exit_code == 1
    (scored,) = read_results(tmp_path / "o")
    assert scored["scores"]["fd_digits"] > 0
    assert scored["quality"]["scores"] == {}
    done = run(*args, "--skip-quality")
    assert done.exit_code == 0, done.output
    assert len(read_results(tmp_path / "o")) == 1
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert read_results(tmp_path / "o")[-1]["quality"]["scores"]["recall"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True])
def test_files_of_others_in_the_folder_of_a_row_stay(linked: bool, tmp_path: Path) -> None:
    # Before: the folder was deleted, whatever lay in it; a link was an error after the scoring.
    args = ["--row=2-8-plain", "--model=digits", "--num=4", "--device=cpu", "--skip-quality",
            "--outdir", tmp_path / "o"]  # fmt: skip
    plans = plan(Reproduction(rows=choose_rows([], ["2-8-plain"]), outdir=tmp_path / "o",
                              model="digits", num=4, skip_quality=True, device="cpu"),
                 choose_rows([], ["2-8-plain"])[0])  # fmt: skip
    folder = plans.images
    if linked:
        folder.parent.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    kept = [folder / "notes.txt", folder / "mine" / "data.csv", folder / "100000" / "a.tex"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert {path for path in folder.rglob("*") if path.is_file()} == set(kept)
    assert all(path.read_text() == "mine" for path in kept)
    assert not list(folder.rglob("*.png"))
    assert not (folder / "run.json").exists()
    assert "stays: 3 files in it are none of this row's" in done.output
    for path in kept:
        path.unlink()
    (tmp_path / "o" / "results.jsonl").unlink()
    assert run(*args).exit_code == 0
    assert not folder.exists() or linked or list(folder.rglob("*")) == [folder / "mine"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_images_that_change_between_two_scores_give_no_result(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: precision of 13 images was written beside the FD of 12, as one row.
    real = runner._call

    def call(row: Row, command: Sequence[str]) -> None:
        real(row, command)
        if "calc" not in command:
            return
        some, other = sorted((tmp_path / "images").rglob("*.png"))[:2]
        if change == "removed":
            some.unlink()
        else:
            new = some if change == "replaced" else some.with_name("own.png")
            new.write_bytes(other.read_bytes())

    monkeypatch.setattr(runner, "_call", call)
    args = ["--row=2-8-plain", "--model=digits", "--num=12", "--device=cpu", "--outdir", tmp_path]
    done = run(*args)
    assert done.exit_code == 1
    assert "added, removed or replaced while they were scored" in done.output, done.output
    assert not read_results(tmp_path)


def test_a_line_cut_short_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("a", fid=1.0) + "\n" + line("b", fid=2.0)[:20])
    assert [r["key"]["row"] for r in read_results(tmp_path)] == ["a"]
    _mend(tmp_path)
    assert path.read_text() == line("a", fid=1.0) + "\n"
    path.write_text(line("a", fid=1.0) + "\n" + line("b", fid=2.0))  # whole but for its end
    _mend(tmp_path)
    assert len(read_results(tmp_path)) == 2
    for broken in ('{"key": 1}', '{"key": {}, "scores": {"fid": NaN}}', "[" * 100_000):
        path.write_text(line("a", fid=1.0) + "\n" + broken + "\n")
        _mend(tmp_path)
        assert len(read_results(tmp_path)) == 1
    path.write_text("nonsense\n" + line("b", fid=2.0) + "\n")
    done = run("--row", "2-8-plain", "--outdir", tmp_path)
    assert "line 1 is no result; mend or remove it" in done.output


def test_paper_measured_and_difference_stand_side_by_side(tmp_path: Path) -> None:
    job = Reproduction(rows=choose_rows(["2"]), outdir=tmp_path, num=50000, gpus=1)
    known = {"2-8-plain": 7.16, "2-8-w0.5": 5.00}
    with open(tmp_path / "results.jsonl", "w") as file:
        for row in job.rows:
            if row.id not in known:
                continue
            found = result(plan(job, row).key, fid=known[row.id])
            file.write(json.dumps(found) + "\n")
    html, markdown = (path.read_text() for path in write_report(job))
    assert "2 of 10 rows measured" in markdown
    rows = [re.split(r" *\| *", li)[1:-1] for li in markdown.splitlines() if li[:2] == "| "]
    header = rows[0]
    guided = next(r for r in rows if r[:3] == ["8", "ERK-Guid 0.5 / 0.1", "15"])
    found = dict(zip(header, guided, strict=True))
    assert found["FID, paper"] == "4.91"
    assert found["FID, measured"] == "5.00"
    assert found["Difference"] == "+0.090"
    assert found["Change by ERK-Guid"] == "−2.16 (−30 %)"
    # A row that was not run has the paper's number and no other.
    empty = dict(zip(header, next(r for r in rows if r[0] == "16"), strict=True))
    assert (empty["FID, paper"], empty["FID, measured"], empty["Difference"]) == ("2.79", "–", "–")
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_results_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    rows = choose_rows([], ["2-8-plain"])
    one = Reproduction(rows=rows, outdir=tmp_path, num=100)
    other = Reproduction(rows=rows, outdir=tmp_path, num=200)
    results = [result(plan(one, rows[0]).key, fid=3.0)]
    assert Findings(one, results).by_row
    assert not Findings(other, results).by_row


# --- the whole, for real --------------------------------------------------------------------

PIPELINE = (
    "--model", "digits", "--row", "2-8-plain,2-8-w0.5,3-16-guid-plain", "--num", "24",
    "--batch", "4", "--device", "cpu", "--bootstrap", "20",
)  # fmt: skip


def start(outdir: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *PIPELINE, "--outdir", str(outdir)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=outdir.parent, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(out)
    deadline = time.monotonic() + 120
    while not list(out.glob("images/2-8-w0.5-*/*/[0-9]*.png")):  # in the middle of the second row
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert len(read_results(out)) == 1

    second = start(out)
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert "2-8-plain: already in" in output
    results = read_results(out)
    assert [r["key"]["row"] for r in results] == ["2-8-plain", "2-8-w0.5", "3-16-guid-plain"]
    assert results[1]["seconds_generating"] is None  # it was continued
    assert results[2]["seconds_generating"] > 0
    assert not list((out / "images").rglob("*.png"))  # scored and deleted
    lines = (out / "result.txt").read_text().splitlines()
    assert len(lines) == 3
    assert "--preset=digits-guid --guidance=1.2" in lines[2]

    # The same numbers as one uninterrupted run of the metrics.
    done = subprocess.run(
        [sys.executable, "-m", "erk_guid", "metrics", "gen", "--preset", "digits", "--ref",
         "digits", "--metrics", "fd_digits", "--num", "24", "--seed", "100000", "--steps", "8",
         "--w_stiff", "0.5", "--w_con", "0.1", "--json", str(out / "s.json"), "--device", "cpu"],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0
    direct = json.loads((out / "s.json").read_text())["scores"]["fd_digits"]
    assert results[1]["scores"]["fd_digits"] == pytest.approx(direct, rel=1e-3)

    html = (out / "report.html").read_text()
    assert "ERK-Guid on the model digits" in html
    assert "not comparable" in html
    pictures = re.findall(r'src="data:image/(svg\+xml|png);base64,([^"]+)"', html)
    assert len([k for k, _ in pictures if k == "png"]) == 3
    assert all(base64.b64decode(data) for _, data in pictures)
    assert not re.search(r'(src|href)="(?!data:)', html)  # self-contained
    markdown = (out / "report.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (out / target).is_file()
    # A third call has nothing to do.
    third = start(out)
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert output.count("already in") == 3


PLUGIN = """
import torch
from erk_guid.metrics import register_detector

class Corner:
    name, feature_dim = "corner", 4

    def __call__(self, images):
        return images.double().flatten(1)[:, :4]

register_detector("corner", lambda device, weights: Corner())
"""


@pytest.mark.slow
def test_table_4_on_a_tiny_edm_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "corner.py").write_text(PLUGIN)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "r.npz", **{"corner/mu": rng.random(4), "corner/sigma": np.eye(4)})
    command = [
        "bash", str(SCRIPT), "--row=4-dpm2-erk,4-deis-erk", f"--model={DATA / 'edm_ncsnpp.pkl'}",
        "--metrics=corner", f"--plugin={tmp_path / 'corner.py'}", f"--ref={tmp_path / 'r.npz'}",
        "--w_stiff=0.3", "--w_con=0", "--num=6", "--device=cpu", f"--outdir={tmp_path / 'out'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "out")
    assert [r["key"]["solver"] for r in results] == ["dpm2", "deis"]
    assert [r["key"]["w_stiff"] for r in results] == [0.3, 0.3]
    assert "4 | dpm2, ERK-Guid 0.3 / 0" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("named", ["mine_plugin.py", "mine_plugin", "mine_package.inner"])
def test_a_plugin_that_changes_makes_another_row(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: only files were looked at, so a row of a module's old detector was kept as current.
    folder = tmp_path / "mine_package" / "inner"
    folder.mkdir(parents=True)
    files = [tmp_path / "mine_plugin.py", folder / "part.py"]
    for path in (*files, folder / "__init__.py", folder.parent / "__init__.py"):
        path.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (row,) = choose_rows([], ["2-8-plain"])
    job = Reproduction(outdir=tmp_path, rows=[row], model="digits", plugin=(named,))
    before = plan(job, row).key["files"]
    assert plan(job, row).key["files"] == before
    for path in files:
        path.write_text("# other")
    assert plan(job, row).key["files"] != before


@pytest.mark.parametrize("named", ["my_plugin.py", "my_plugin", "my_package"])
def test_a_module_that_a_plugin_imports_makes_another_row(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: a row of a plugin whose helper had changed was kept as current.
    (tmp_path / "my_package").mkdir()
    for path in ("my_plugin.py", "my_package/__init__.py"):
        (tmp_path / path).write_text("def make():\n    from my_helper import S\n    return S\n")
    (tmp_path / "my_helper.py").write_text("S = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (row,) = choose_rows([], ["2-8-plain"])
    job = Reproduction(outdir=tmp_path, rows=[row], model="digits", plugin=(named,))
    before = plan(job, row).key["files"]
    (tmp_path / "my_helper.py").write_text("S = 2\n")
    assert plan(job, row).key["files"] != before


def test_a_model_in_a_folder_that_changes_makes_another_row(tmp_path: Path) -> None:
    # diffusers' layout. Before: only single files were looked at.
    files = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (row,) = choose_rows([], ["2-8-plain"])
    job = Reproduction(
        outdir=tmp_path, rows=[row], model=str(tmp_path), metrics=["fd_digits"], ref="digits"
    )
    before = plan(job, row).key["files"]
    for name in files:
        (tmp_path / name).write_text("{ }")
        after = plan(job, row).key["files"]
        assert after != before
        before = after


@pytest.mark.slow
def test_a_fit_is_a_row(tmp_path: Path) -> None:
    """Made, scored and reported, by the file's solver and levels; nothing else is run."""
    fits = Path(erk_guid.__file__).parent / "data" / "fits"
    file = tmp_path / "mine.json"
    file.write_bytes((fits / "digits-autog-6.json").read_bytes())
    args = ["reproduce", "--settings", str(file), "--num", "12", "--device", "cpu",
            "--skip-quality", "--bootstrap", "0", "--outdir", str(tmp_path / "out"),
            "--keep-images"]  # fmt: skip
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "out" / "images").iterdir()
    record = json.loads((folder / "run.json").read_text())["settings"]
    made_for = json.loads(file.read_text())["made_for"]
    assert record["solver"] == made_for["solver"] == "unipc"
    assert record["schedule"] == made_for["schedule"]
    assert record["guidance"] == 1.5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Settings of your own" in report
    assert "mine.json: autoguidance, unipc, no ERK guidance" in report
    assert "1 of 1 rows measured" in report
    # Beside another file of the same steps and solver it has no "change by guidance".
    other = json.loads(file.read_text())
    other["made_for"] = {"solver": "heun", "num_steps": 4}
    for path, strength in ((tmp_path / "plain.json", 0.0), (tmp_path / "guided.json", 0.5)):
        path.write_text(json.dumps({**other, "w_stiff": strength}))
    rows = [settings_row(p, None) for p in (tmp_path / "plain.json", tmp_path / "guided.json")]
    assert rows[0].group != rows[1].group
    # A changed file is another row's result.
    made_for["schedule"][3] *= 1.01
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_for": made_for}))
    again = CliRunner().invoke(main, [*args, "--dry-run"])
    assert folder.name not in again.output
    assert "settings-mine-" in again.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"net": "/somewhere/net.pkl"}, "is no preset: name a model with --model"),
        ({"net": ["digits"]}, "is no preset"),
        ({"made_for": {"num_steps": -3}}, "says num_steps -3 and lists"),
        ({"made_for": {"num_steps": 0, "schedule": "logsnr"}}, "does not say for how many steps"),
        ({"made_for": {"solver": "rk4"}}, "unknown solver 'rk4'"),
        ({"made_for": {"eta": 2}}, "eta must be a number from 0"),
        ({"guidance": "strong"}, "the model guidance it was measured with is none"),
        ({"guidance_interval": [1]}, "the model guidance it was measured with is none"),
        ({"guidance": 10**400}, "the model guidance it was measured with is none"),
        ({"guidance": 2.0, "gnet": "/my/own.pkl"}, "name networks with --model and --gnet"),
    ],
)
def test_a_settings_file_that_makes_no_row(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fits = Path(erk_guid.__file__).parent / "data" / "fits"
    content = json.loads((fits / "digits-6.json").read_text())
    content["measured"] |= changed
    content["made_for"] |= changed.get("made_for", {})
    (tmp_path / "a.json").write_text(json.dumps(content))
    args = ["reproduce", "--settings", str(tmp_path / "a.json"), "--outdir", str(tmp_path / "o")]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "o").exists()


def test_precision_and_compile_are_other_rows_and_precision_no_comparison() -> None:
    args = ("--model=digits", "--num=500", "--row=2-32-plain", "--device=cpu")
    usual, compiled, low = (
        commands_of(*args, *more) for more in ((), ("--compile",), ("--precision=bfloat16",))
    )
    assert compiled.count(" --compile ") == 1
    assert compiled.replace(" --compile", "") != usual  # another folder
    assert low.count("--precision=bfloat16") == 1
    assert low.replace(" --precision=bfloat16", "") != usual  # another folder
    row = TABLES["2"][0]
    assert plan(Reproduction(rows=[row]), row).papers
    assert plan(Reproduction(rows=[row], compile=True), row).papers
    assert not plan(Reproduction(rows=[row], precision="bfloat16"), row).papers
    fitted = replace(row, options={"precision": "bfloat16"})
    command = plan(Reproduction(rows=[fitted], precision="bfloat16"), fitted).generate
    assert command.count("--precision=bfloat16") == 1
    with pytest.raises(ErkGuidError, match="measured with --precision bfloat16; leave"):
        plan(Reproduction(rows=[fitted], precision="float16"), fitted)


def test_half_a_line_is_not_continued(tmp_path: Path) -> None:
    # Catches: the next row glued to what a killed run left of the one before.
    path = tmp_path / "result.txt"
    for before in ("", "whole\n", "half a li"):
        path.write_text(before)
        _append(path, "next")
        assert path.read_text().splitlines() == [*before.splitlines(), "next"]


def test_what_lies_in_the_working_folder_does_not_change_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a folder "digits" taken for the shipped model's reference and its real images.
    monkeypatch.chdir(tmp_path)
    rows = [row for row in TABLES["digits"] if row.id == "08-plain"]
    assert rows
    job = Reproduction(rows=rows, model="digits", num=20, outdir=tmp_path / "out")
    before = plan(job, rows[0]).key
    for name in ("digits", "img512"):
        (tmp_path / name).mkdir()
        Image.new("L", (32, 32)).save(tmp_path / name / "0.png")
    assert plan(job, rows[0]).key == before
    assert _hash_of_real("digits") is None
    assert _hash_of_real("./digits") is not None


def test_the_script_through_a_link_runs_its_own_checkout(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$PYTHONPATH"\n')
    fake.chmod(0o755)
    link = tmp_path / "there" / "reproduce.sh"
    link.parent.mkdir()
    link.symlink_to(SCRIPT)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(fake)}
    done = subprocess.run(["bash", str(link)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT)
