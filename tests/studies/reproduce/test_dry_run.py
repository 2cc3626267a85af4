"""A dry run meets the errors of a run; one job a folder; a journal's dropped line is told."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from erk_guid.cli.reproduce import reproduce_command
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.locks import locked
from erk_guid.studies.reproduce import Reproduction, choose_rows, runner
from erk_guid.studies.reproduce.runner import RESULTS, _mend, run

LONG = "a" * 400
OWN = ("--metrics=fd_digits", "--ref=digits")


def reproduce(*args: Any) -> Result:
    return CliRunner().invoke(reproduce_command, list(map(str, args)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--num=-5",), "-5 is not in the range"),
        (("--outdir=",), "it is empty; name a file or a folder"),
        (("--outdir=file/below",), "cannot write to file/below: Not a directory"),
        ((f"--outdir={LONG}",), "File name too long; choose another folder"),
        (("--model=/nonexistent", *OWN), "'/nonexistent' is no file, no URL and no preset"),
        ((f"--model={LONG}", *OWN), "is no file, no URL and no preset"),
        (("--model=", *OWN), "the name of the network is empty"),
        (("--model=digits", "--gnet=/nonexistent"), "'/nonexistent' is no file"),
        (("--model=digits", "--gnet=digits"), "--gnet digits has nothing to act on"),
        (("--ref=/nonexistent",), "'/nonexistent' is no reference"),
        ((f"--ref={LONG}",), "File name too long"),
        (("--real=/nonexistent",), "there is no /nonexistent"),
        ((f"--real={LONG}",), "File name too long; name a folder, zip or .npz"),
        (("--device=nonsense",), "unknown device 'nonsense'"),
        (("--detector-weights=nonsense=x",), "unknown metric 'nonsense'"),
        (("--detector-weights=fd_digits=/nonexistent",), "there is no such file"),
        (("--metrics=nonsense",), "unknown metric 'nonsense'"),
        (("--num=5",), "5 images are too few for an inception score"),
    ],
)
def test_a_dry_run_meets_the_errors_of_a_run(
    args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: commands printed with exit code 0 for options that no run can follow.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_run_row", lambda job, one: pytest.fail("a row was begun"))
    Path("file").write_text("")
    for more in (("--dry-run",), ()):
        done = reproduce("--table=digits", *args, *more)
        assert done.exit_code in (1, 2), done.output
        assert message in " ".join(done.output.split())
        assert "python -m erk_guid" not in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_is_planned_where_the_usual_real_images_are_not(tmp_path: Path) -> None:
    # Catches: a dry run of the paper's tables that needs 50,000 images of ImageNet.
    done = reproduce("--table=2", "--dry-run", f"--outdir={tmp_path / 'new'}")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "new").exists()


def test_one_job_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: two jobs that write one journal; an error that does not say who is at work.
    monkeypatch.setattr(runner, "_run_row", lambda job, one: pytest.fail("a row was begun"))
    job = Reproduction(
        rows=choose_rows([], ["05-plain"]), outdir=tmp_path, num=20, device="cpu", gpus=1
    )
    with (
        locked(tmp_path),
        pytest.raises(ErkGuidError, match=rf"another job is at work in {re.escape(str(tmp_path))} "
                      r"\(process \d+ on .*\); wait for it"),
    ):  # fmt: skip
        run(job)


def test_the_folder_is_locked_while_rows_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a lock that is let go before the work, or kept after it.
    seen: list[str] = []

    def row(job: Reproduction, one: Any) -> None:
        seen.extend(p.name for p in tmp_path.glob(".*lock"))

    monkeypatch.setattr(runner, "_run_row", row)
    run(Reproduction(rows=choose_rows([], ["05-plain"]), outdir=tmp_path, num=20, device="cpu"))
    assert seen == [".erk_guid.lock"]
    assert not list(tmp_path.glob(".*lock"))
    assert all(t is threading.main_thread() or t.daemon for t in threading.enumerate())


@pytest.mark.parametrize("bad", ['{"key": {"row": "a"}, "sco', '{"key": 1}\n', "\x1b[31mred\n"])
def test_a_dropped_line_is_told(
    bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Catches: results of hours deleted in silence; escapes of a file that reach the terminal.
    (tmp_path / RESULTS).write_text(bad)
    _mend(tmp_path)
    told = capsys.readouterr().err
    assert told.startswith(f"Note: the last line of {tmp_path / RESULTS} is no whole result")
    assert bad.strip().replace("\x1b", "?") in told
    assert told.rstrip("\n").isprintable()
    assert (tmp_path / RESULTS).read_text() == ""
    _mend(tmp_path)
    assert capsys.readouterr().err == ""
