"""The page itself: what it is made of, what its command asks for, and what a browser shows."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from support.browser import opened

from erk_guid.cli import play as command
from erk_guid.cli.play import config_of, first_choice, fits_of
from erk_guid.play import page as play_page
from erk_guid.play.choice import Choice
from erk_guid.play.session import Session

HOST = "127.0.0.1"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let the command end where the page would begin; the list gets what it would serve."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(play_page, "serve", lambda *args: given.append(args))
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    return given


@pytest.mark.parametrize(
    ("args", "network", "guided", "strength", "fits"),
    [
        ([], ["--preset=digits", "--gnet=uncond:digits"], True, 1.0, ["fitted"]),
        (["--preset=digits"], ["--preset=digits"], False, 1.0, ["fitted"]),
        (["--preset=digits-autog"], ["--preset=digits-autog"], True, 1.5, ["fitted"]),
        (["--net=digits", "--batch=5"], ["--net=digits", "--batch=5"], False, 1.0, []),
        (
            ["--net=digits", "--gnet=uncond:digits", "--guidance=2.5"],
            ["--net=digits", "--gnet=uncond:digits"], True, 2.5, [],
        ),
        (
            ["--precision=bfloat16"],
            ["--preset=digits", "--gnet=uncond:digits", "--precision=bfloat16"],
            True, 1.0, ["fitted"],
        ),
    ],
)  # fmt: skip
def test_the_command_names_the_networks(
    args: list[str], network: list[str], guided: bool, strength: float, fits: list[str],
    served: list[tuple[Any, ...]],
) -> None:  # fmt: skip
    # Catches an option that is dropped on the way to the copied command line.
    done = CliRunner().invoke(command.play_command, args)
    assert done.exit_code == 0, done.output
    ((session, start, port, open_page),) = served
    assert list(session.network) == network
    assert session.guided is guided
    assert start.strength == strength
    assert list(session.fits) == fits
    assert (port, open_page) == (command.PORT, False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--net=nothing.pkl"], "'nothing.pkl' is no file, no URL and no preset"),
        (["--preset=digit"], "unknown --preset 'digit'; did you mean digits"),
        (["--settings=nothing.json"], "cannot read nothing.json"),
        (["--preset=digits", "--guidance=2"], "a strength of 2 needs a guiding network"),
    ],
)
def test_mistakes_on_the_command_line(
    args: list[str], message: str, served: list[tuple[Any, ...]]
) -> None:
    done = CliRunner().invoke(command.play_command, args)
    assert done.exit_code == 1
    assert message in done.output
    assert not served


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(command.play_command, [])
    assert done.exit_code == 1
    assert "pip install 'erk-guid[app]'" in done.output


@pytest.mark.slow
def test_the_controls_are_the_fields_of_a_choice() -> None:
    # Catches a control without a field, a field without a control, and a way to load files.
    gradio = pytest.importorskip("gradio", reason="needs the package gradio (extra app)")
    net = ["--preset=digits", "--gnet=uncond:digits"]
    session = Session.open(net, config_of, True, fits_of("digits", None))
    blocks = play_page.make_page(session, first_choice("digits", 1.0))
    made = blocks.get_config_file()
    (button,) = [c["id"] for c in made["components"] if c["props"].get("elem_id") == "make"]
    (click,) = [d for d in made["dependencies"] if (button, "click") in map(tuple, d["targets"])]
    assert len(click["inputs"]) == len(fields(Choice))
    for component in blocks.blocks.values():
        if isinstance(component, (gradio.Slider, gradio.Number)):
            assert component.preprocess(None) is None  # an emptied box reaches `Choice`
    kinds = {c["type"] for c in made["components"]}
    assert not kinds & {"file", "uploadbutton", "image", "fileexplorer", "gallery"}
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page, served by the command itself; afterwards Ctrl-C ends it."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the package gradio (extra app)")
    port = free_port()
    args = [sys.executable, "-u", "-m", "erk_guid", "play", f"--port={port}"]
    running = subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert running.stdout is not None
    try:
        said = running.stdout.readline()
        assert f"http://{HOST}:{port}" in said, said + running.stdout.read()
        # A second page cannot be at the same port.
        second = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 1
        assert "give another --port" in second.stderr
        yield f"http://{HOST}:{port}"
        running.send_signal(signal.SIGINT)
        # A server that goes on after Ctrl-C fails here; a plain read would wait without end.
        rest, _ = running.communicate(timeout=60)
        assert running.returncode == 128 + signal.SIGINT
        assert "Stopped by SIGINT" in rest
        assert "Traceback" not in rest
    finally:
        running.kill()
        running.wait()


def copied(page: Any, what: str) -> str:
    page.click(f"#copy-{what}")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def distance(page: Any, run: str) -> float:
    return float(page.inner_text(f"[data-run={run}] .play-distance").split()[0])


def answered(page: Any) -> None:
    page.click("#make")
    page.wait_for_selector("#trace img", timeout=120_000)


@pytest.mark.slow
def test_a_browser_plays(address: str, tmp_path: Path) -> None:
    # What no other test sees: that the page's own program joins controls and answer, that the
    # buttons copy, and that nothing is asked of another machine.
    with opened() as page:
        page.goto(address)
        page.wait_for_selector("#make")
        page.fill("input[aria-label*='Number of images']", "4")
        page.keyboard.press("Tab")
        answered(page)
        assert page.inner_text("[data-run=chosen] .play-evaluations") == "15"
        assert page.inner_text("[data-run=plain] .play-evaluations") == "15"
        assert 0 < distance(page, "chosen") < distance(page, "plain") < 10
        line, program = copied(page, "command"), copied(page, "python")
        assert "--seeds=0-3" in line

        # The same images, by the command line as a shell runs it, and by the program.
        script = line.replace("generate_images.py", shlex.quote(str(ROOT / "generate_images.py")))
        script = script.replace("python", shlex.quote(sys.executable), 1)
        subprocess.run(script, shell=True, check=True, cwd=tmp_path, capture_output=True)
        scope: dict[str, Any] = {}
        exec(program, scope)
        for seed, image in enumerate(scope["images"]):
            with Image.open(tmp_path / "out" / f"{seed:06d}.png") as picture:
                assert torch.equal(torch.from_numpy(np.array(picture)), image[0])

        # A mistake is a sentence in the page; the copied texts of before are gone.
        page.click("label:has-text('auto')")
        page.fill("input[aria-label='Solver']", "modal")
        page.keyboard.press("Enter")
        page.click("#make")
        page.wait_for_selector("#answer [role=alert]")
        assert "has no parameter-free form" in page.inner_text("#answer")

        hosts = {urlparse(url).hostname for url in page.requests if not url.startswith("data:")}
        assert hosts == {HOST}
        assert page.complaints == []


@pytest.mark.slow
def test_a_visitor_gets_no_file(address: str) -> None:
    # gradio has an address for files; those of the checkout are not for visitors.
    for name in (ROOT / "pyproject.toml", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{address}/gradio_api/file={name}")
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        text = answer.read().decode()
    assert "default-src 'self'" in policy
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?:', text)


@pytest.mark.slow
def test_a_page_from_elsewhere_is_not_let_in(address: str) -> None:
    # Catches: another site's page in the same browser, whose name points at this machine.
    for host, code in (("evil.com", 400), ("evil.com:7860", 400), ("localhost:7860", 200)):
        request = urllib.request.Request(address, headers={"Host": host})
        try:
            with urllib.request.urlopen(request) as answer:
                found = answer.status
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == code
