"""A results.jsonl from a stranger: the report shows it, and obeys nothing in it."""

from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import erk_guid
from erk_guid.cli.reproduce import reproduce_command
from erk_guid.common.errors import ErkGuidError
from erk_guid.studies.reproduce import TABLES, Reproduction, choose_rows, plan, write_report
from erk_guid.studies.reproduce.findings import Findings, number
from erk_guid.studies.reproduce.planning import SCORE_NAME, slug
from erk_guid.studies.reproduce.report import _for_markdown
from erk_guid.studies.reproduce.runner import read_results

ROWS = "2-8-plain,2-8-w0.5,2-16-plain,2-16-w0.75"
EVIL = (
    "<script>alert(1)</script>\" onload='x' ](javascript:alert(2)) ![i](http://evil/x.png) a|b `c` "
    "**d** _e_ $f$ &lt; <!-- \x1b[31m\u202e\ud800 \n\n# heading\n\n| x | y |\r\n[1]: http://evil"
)
"""HTML, Markdown, an escape of terminals, marks of direction, half a character, new lines."""


def job(outdir: Path, rows: str = ROWS) -> Reproduction:
    return Reproduction(
        rows=choose_rows([], rows.split(",")), outdir=outdir, model="digits", num=100,
        device="cpu", skip_quality=True, bootstrap=0,
    )  # fmt: skip


def report(outdir: Path, *more: Any) -> Result:
    """Run the command; every row is in results.jsonl, so that nothing is generated."""
    args = ["--model=digits", f"--row={ROWS}", "--num=100", "--device=cpu", "--skip-quality",
            "--bootstrap=0", "--outdir", outdir, *more]  # fmt: skip
    return CliRunner().invoke(reproduce_command, list(map(str, args)))


def result(key: dict[str, Any], text: str = "x", **scores: float) -> dict[str, Any]:
    return {
        "key": key, "scores": {"fd_digits": 3.0, **scores}, "standard_errors": {}, "num": 100,
        "commands": [text, "--good"], "device": text, "processes": 1,
        "detectors": [{"name": text, "preprocessing": text}], "versions": {text: text},
        "reference": {"source": text, "sha256": text},
    }  # fmt: skip


def write(outdir: Path, results: list[dict[str, Any]]) -> None:
    outdir.mkdir(parents=True, exist_ok=True)
    (outdir / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))


def keys(outdir: Path) -> list[dict[str, Any]]:
    one = job(outdir)
    return [plan(one, row).key for row in one.rows]


class Page(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def check_report(outdir: Path) -> None:
    html = (outdir / "report.html").read_text(encoding="utf-8")
    markdown = (outdir / "report.md").read_text(encoding="utf-8")
    for text in (html, markdown):
        assert all(c.isprintable() or c == "\n" for c in text)
    page = Page(html)
    assert "script" not in page.tags
    assert {name for name, _ in page.attributes} <= {
        "lang", "charset", "name", "content", "scope", "class", "src", "alt",
    }  # fmt: skip
    assert all(value and value.startswith("data:image/") for name, value in page.attributes
               if name == "src")  # fmt: skip
    # Another library's reading of the Markdown: nothing but our own headings, tables, pictures.
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark").enable("table")
    seen = Page(reader.render(markdown))
    assert seen.tags <= {
        "h1", "h2", "p", "ul", "li", "strong", "table", "thead", "tbody", "tr", "th", "td", "img",
        "pre", "code",
    }  # fmt: skip
    assert not [1 for name, _ in seen.attributes if name in ("href", "onload")]
    for name, value in seen.attributes:
        if name == "src":
            assert value is not None
            assert (outdir / value).is_file()
    headings = [line for line in markdown.splitlines() if line.startswith("#")]
    assert not [line for line in headings if line.startswith("# heading")]
    tables = [line.count("|") for line in markdown.splitlines() if line.startswith("| ")]
    assert len(set(tables)) <= 2


def test_a_report_shows_hostile_texts_and_obeys_none(tmp_path: Path) -> None:
    # Catches: markup of a reference's name, a device, a version, a command in the report.
    out = tmp_path / "out"
    write(out, [result(key, EVIL) for key in keys(out)])
    done = report(out)
    assert done.exit_code == 0, done.output
    assert done.exception is None
    assert "\x1b" not in done.output
    check_report(out)
    assert "4 of " in (out / "report.md").read_text()
    assert "alert(1)" in (out / "report.md").read_text()  # shown, not swallowed
    assert "    --good" in (out / "report.md").read_text()
    for path in out.rglob("*.svg"):
        tree = ElementTree.parse(path)
        assert not [e for e in tree.iter() if "script" in str(e.tag).lower()]


@pytest.mark.parametrize(
    "name",
    ["../../x", "/proc/x/y", "a/b", "..", "", "<script>", "a|b", "a\nb", "\x1b[31m", "a" * 81, "ü",
     "a\\b", "x y", ".hidden", "-rf"],
)  # fmt: skip
@pytest.mark.parametrize("part", ["scores", "standard_errors", "quality"])
def test_a_score_is_no_path(name: str, part: str, tmp_path: Path) -> None:
    # Catches: a plot written outside of the report's folder.
    out = tmp_path / "deep" / "out"
    results = [result(key) for key in keys(out)]
    for one in results[:-1]:
        if part == "quality":
            one["quality"] = {"scores": {name: 1.0}}
        else:
            one[part][name] = 1.0
    write(out, results)
    done = report(out)
    assert done.exit_code == 1
    assert "line 1 is no result; mend or remove it" in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.svg"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("standard_errors", "fd_digits"), -0.1),
        (("standard_errors", "fd_digits"), float("nan")),
        (("standard_errors", "fd_digits"), True),
        (("scores",), {}),
        (("scores", "fd_digits"), True),
        (("scores", "fd_digits"), float("inf")),
        (("scores", "fd_digits"), 1e300),
        (("scores", "fd_digits"), 10**400),
        (("num",), True),
        (("num",), 0),
        (("num",), 10**30),
        (("processes",), True),
        (("processes",), -1),
        (("detectors",), [3]),
        (("detectors",), [{"name": 3, "preprocessing": "x"}]),
        (("versions",), {"torch": 2}),
        (("commands",), [1]),
        (("commands",), "ls"),
        (("device",), None),
        (("reference",), {"source": 1, "sha256": "x"}),
        (("quality",), []),
        (("quality",), {"scores": []}),
        (("key",), []),
        (("key", "ref"), 1),
        (("key", "steps"), True),
        (("key", "model"), "digits"),
        (("key", "model"), [1]),
        (("key", "metrics"), [[]]),
        (("key", "options"), []),
        (("key", "settings"), {}),
        (("key", "row"), None),
    ],
)
def test_a_result_of_other_types_is_none(
    path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    # Catches: tracebacks of what is computed from them, and true taken for 1.
    out = tmp_path / "out"
    results = [result(key) for key in keys(out)]
    place: Any = results[0]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    write(out, results)
    done = report(out)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "line 1 is no result; mend or remove it" in " ".join(done.output.split())


def test_our_own_results_are_sound(tmp_path: Path) -> None:
    # Catches: a check that is stricter than what a run writes, for any row.
    for table, rows in TABLES.items():
        out = tmp_path / table
        one = Reproduction(rows=rows, outdir=out, w_stiff=0.5, w_con=0.1, device="cpu")
        write(out, [result(plan(one, row).key) for row in rows])
        assert len(read_results(out)) == len(rows)


def test_extreme_numbers_are_written_and_drawn(tmp_path: Path) -> None:
    # Catches: an overflow in a difference or a quotient, and 100 digits in a table.
    out = tmp_path / "out"
    one = job(out)
    for values in ((1e100, -1e100, 5e-324, 0.0), (-1e100, 1e100, 1e100, 5e-324)):
        scores = [{"fd_digits": value} for value in values]
        write(out, [
            {**result(plan(one, row).key), "scores": s, "standard_errors": {"fd_digits": 1e100}}
            for row, s in zip(one.rows, scores, strict=True)
        ])  # fmt: skip
        done = report(out)
        assert done.exit_code == 0, (done.output, done.exception)
        check_report(out)
    assert number(-1.5e99, sign=True) == "−1.5e+99"
    assert number(123.4) == "123"


def test_files_of_the_report_lie_in_its_folder(tmp_path: Path) -> None:
    # Catches: a folder of results whose plots or whose report lead elsewhere.
    for name, victim in (("plots", "elsewhere"), ("report.md", "notes.md"), ("report.html", "n")):
        out = tmp_path / name.replace(".", "-")
        write(out, [result(key) for key in keys(out)])
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (out / name).symlink_to(tmp_path / victim)
        done = report(out)
        assert done.exit_code == 1
        assert "leads out of" in " ".join(done.output.split())
        assert not (tmp_path / "notes.md").exists()
        assert not list((tmp_path / "elsewhere").iterdir())
    # The folder itself may be a link.
    out = tmp_path / "real"
    (tmp_path / "link").symlink_to(out)
    write(out, [result(key) for key in keys(out)])
    assert report(tmp_path / "link").exit_code == 0


def test_the_report_keeps_files_of_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, [result(key) for key in keys(out)])
    assert report(out).exit_code == 0
    for mine in (out / "report.md", next((out / "plots").glob("*.svg"))):
        before = mine.read_bytes()
        mine.write_text("<svg>mine</svg>" if mine.suffix == ".svg" else "# My notes")
        done = report(out)
        assert done.exit_code == 1
        assert "is no earlier output of this kind" in " ".join(done.output.split())
        assert "mine" in mine.read_text().lower() or "My notes" in mine.read_text()
        mine.write_bytes(before)
    assert report(out).exit_code == 0


def test_a_damaged_grid_is_left_out(tmp_path: Path) -> None:
    # Catches: a traceback of the decoder of pictures.
    out = tmp_path / "out"
    one = job(out)
    write(out, [result(plan(one, row).key) for row in one.rows])
    for number_, row in enumerate(one.rows[:2]):
        grid = plan(one, row).grid
        grid.parent.mkdir(exist_ok=True)
        Image.effect_noise((400, 400), 90).save(grid)
        if number_:
            data = bytearray(grid.read_bytes())
            data[16:24] = b"\xff" * 8
            grid.write_bytes(data)
    assert grid.stat().st_size > 100_000
    done = report(out)
    assert done.exit_code == 0, done.exception
    assert (out / "report.md").read_text().count("](grids/") == 1
    check_report(out)


# --- settings files -------------------------------------------------------------------------


def settings_file(path: Path, **measured: Any) -> Path:
    fits = Path(erk_guid.__file__).parent / "data" / "fits"
    content = json.loads((fits / "digits-6.json").read_text())
    content["measured"] |= measured
    path.write_text(json.dumps(content))
    return path


def test_the_name_of_a_settings_file_is_a_text(tmp_path: Path) -> None:
    # Catches: markup in a file's name, and a dollar that begins a formula in a plot.
    from erk_guid.studies.reproduce.tables import settings_row

    name = r"x<img src=q onerror=a>|](javascript:b)`c`$\frac$ _d_.json"
    row = settings_row(settings_file(tmp_path / name), None)
    out = tmp_path / "out"
    one = Reproduction(
        rows=[row], outdir=out, num=100, device="cpu", skip_quality=True, bootstrap=0
    )
    made = plan(one, row)
    assert re.fullmatch(r"[\w.+-]+", made.name)
    made.grid.parent.mkdir(parents=True)
    Image.new("L", (8, 8)).save(made.grid)
    write(out, [{**result(made.key), "commands": list(made.lines(True))}])
    write_report(one)
    check_report(out)
    assert "1 of 1 rows measured" in (out / "report.md").read_text()
    assert "](grids/settings-" in (out / "report.md").read_text()
    args = [f"--settings={tmp_path / name}", "--dry-run", "--device=cpu", "--num=100"]
    done = CliRunner().invoke(reproduce_command, args)
    assert done.exit_code == 0, done.output


def test_a_formula_is_no_formula(tmp_path: Path) -> None:
    # matplotlib takes text between two dollars for a formula, and this one it cannot read.
    from erk_guid.common.plots import Curve, draw

    for text in (r"a$\frac$", r"a\$b$\frac$", "$$"):
        curves = [Curve(text, [1.0, 2.0], [1.0, 2.0], [0.0, 0.0])]
        svg = draw("t", curves, "x", "y").decode()
        texts = [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]
        assert text in texts


@pytest.mark.parametrize("name", ["a\x1b[31m.json", "a\nb.json", "a\u202eb.json", "a\udcff.json"])
def test_a_settings_file_whose_name_no_terminal_should_see(name: str, tmp_path: Path) -> None:
    # Catches: the name printed as it is, and UnicodeEncodeError where it is not UTF-8.
    path = settings_file(Path(os.fsdecode(os.fsencode(tmp_path / name))))
    for more in ([], ["--dry-run"]):
        args = [f"--settings={path}", "--device=cpu", "--num=100", f"--outdir={tmp_path / 'o'}"]
        done = CliRunner().invoke(reproduce_command, [*args, *more])
        assert done.exit_code == 1
        assert "has characters that cannot be shown; rename it" in " ".join(done.output.split())
        assert all(c.isprintable() or c == "\n" for c in done.output)
    # A wide space of another script is no such character.
    good = settings_file(tmp_path / "a\u3000b.json")
    args = [f"--settings={good}", "--device=cpu", "--num=100", "--dry-run"]
    assert CliRunner().invoke(reproduce_command, args).exit_code == 0


def test_options_of_a_settings_file_are_printable(tmp_path: Path) -> None:
    # Catches: a dtype or a precision that is printed with the commands of --dry-run.
    for name in ("dtype", "precision"):
        path = settings_file(tmp_path / "a.json", **{name: EVIL})
        done = CliRunner().invoke(
            reproduce_command, [f"--settings={path}", "--device=cpu", "--num=100", "--dry-run"]
        )
        assert done.exit_code == 1
        assert f"{name} cannot be" in done.output
        assert all(c.isprintable() or c == "\n" for c in done.output)


# --- the parts ------------------------------------------------------------------------------


def test_markdown_shows_a_text_as_it_is() -> None:
    # markdown-it reads back what was escaped: an identity, for every punctuation mark.
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark").enable("table")
    marks = "".join(chr(c) for c in range(33, 127) if not chr(c).isalnum())
    for text in (marks, marks[::-1], "w_con fd_digits _a_ __b__", r"a\|b \\| c", "[a](b) ![c](d)"):
        for line in (_for_markdown(text), f"x {_for_markdown(text)} x"):
            found: list[str] = []
            for token in reader.parse(f"| h |\n|---|\n| z{line} |"):
                if token.type == "inline":
                    assert {child.type for child in token.children} <= {"text", "text_special"}
                    found.append("".join(child.content for child in token.children))
            expected = "z" + (text if line == _for_markdown(text) else f"x {text} x")
            assert found == ["h", expected]
    assert _for_markdown("w_con") == "w_con"


def test_names_of_scores_become_names_of_files() -> None:
    for name in ("fid", "fd_dinov2", "kid:fd_digits", "a.b+c-d", "0"):
        assert SCORE_NAME.fullmatch(name)
        assert re.fullmatch(r"[\w.+-]+", slug(name))
    assert slug("../../x") == "..-..-x"
    assert slug("a\x1b\udcff/b") == "a-b"


def test_a_detector_that_no_report_could_show_is_refused_first(tmp_path: Path) -> None:
    # Catches: hours of work whose result is then "no result".
    from erk_guid.metrics.detectors import base

    name = "größe"
    base.register_detector(name, lambda device, weights: None)  # type: ignore[arg-type, return-value]
    try:
        one = Reproduction(
            rows=TABLES["2"][:1], outdir=tmp_path, model="digits", metrics=[name], ref="digits",
            device="cpu", num=100,
        )  # fmt: skip
        with pytest.raises(ErkGuidError, match="register the detector under another name"):
            plan(one, TABLES["2"][0])
    finally:
        base._FACTORIES.pop(name)


def test_pictures_in_the_page_are_whole(tmp_path: Path) -> None:
    # Catches: a picture's data that is shortened like a text.
    out = tmp_path / "out"
    write(out, [result(key) for key in keys(out)])
    assert report(out).exit_code == 0
    found = re.findall(
        r'src="data:image/svg\+xml;base64,([^"]+)"', (out / "report.html").read_text()
    )
    plots = sorted(path.read_bytes() for path in out.rglob("*.svg"))
    assert plots
    assert sorted(map(base64.b64decode, found)) == plots


def test_findings_keep_only_rows_of_the_job(tmp_path: Path) -> None:
    # Equal keys are needed for a row to be shown, so that a key's content never is.
    one = job(tmp_path)
    key = {**plan(one, one.rows[0]).key, "ref": "<script>"}
    assert not Findings(one, [result(key)]).by_row
