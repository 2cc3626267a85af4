"""What is checked through ComfyUI's server: nodes are listed, prompts run, and can be stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = "from scripts.check_comfyui.tiny import TinyModel\n\nNODE_CLASS_MAPPINGS = "
PATIENCE = 180
"""Seconds that a start or a prompt may take."""
LONG = 2000
"""Steps of the run that is stopped."""

Found = tuple[str, str, bool | None]


class Server:
    """ComfyUI with our nodes and a tiny model, on a port of this computer only."""

    def __init__(self, checkout: Path, base: Path, api: str) -> None:
        from erk_guid.integrations import comfyui
        from erk_guid.integrations.comfyui.pack import write_pack

        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True)
        (base / "models").mkdir()
        if api == "V3":
            write_pack(nodes)
        else:
            (nodes / "erk-guid").symlink_to(Path(comfyui.__file__).parent)
        (nodes / "tiny_model.py").write_text(TINY + '{"TinyModel": TinyModel}\n')
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = base / "log.txt"
        path = [str(checkout), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-W", "ignore", "main.py", "--cpu", "--port", str(port),
                    "--base-directory", str(base), "--disable-auto-launch",
                    "--database-url", "sqlite:///:memory:",
                ],
                cwd=checkout, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer to a GET, or to a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")[:500]) from error
        return json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended, or takes too long; with the end of its log.
        """
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.ask("/system_stats")
                return
            time.sleep(0.3)
        raise RuntimeError(f"the server does not answer: {self.log.read_text()[-1000:]}")

    def begin(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt; return its number."""
        return str(self.ask("/prompt", {"prompt": prompt})["prompt_id"])

    def end(self, number: str) -> dict[str, Any]:
        """Wait for a prompt; return what became of it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            history = self.ask(f"/history/{number}")
            if number in history:
                found: dict[str, Any] = history[number]
                return found
            time.sleep(0.2)
        raise RuntimeError(f"the prompt does not end: {self.log.read_text()[-1000:]}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def prompt(steps: int, **sampler: Any) -> dict[str, Any]:
    """Return a prompt that samples with our node and saves the latent."""
    return {
        "1": {"class_type": "TinyModel", "inputs": {"name": "flux"}},
        "2": {"class_type": "ERKGuidSampler", "inputs": {"w_stiff": 0.5, "w_con": 0.5, **sampler}},
        "3": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": steps, "denoise": 1.0},
        },
        "4": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["1", 0], "add_noise": True, "noise_seed": 5, "cfg": 2.0,
                "positive": ["1", 1], "negative": ["1", 2], "sampler": ["2", 0],
                "sigmas": ["3", 0], "latent_image": ["1", 3],
            },
        },
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": "x"}},
    }  # fmt: skip


def dropdown(name: str) -> dict[str, Any]:
    """Return a prompt that samples with KSampler and saves the latent."""
    return {
        **{k: v for k, v in prompt(2).items() if k in "15"},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "seed": 5, "steps": 4, "cfg": 2.0, "sampler_name": name,
                "scheduler": "normal", "positive": ["1", 1], "negative": ["1", 2],
                "latent_image": ["1", 3], "denoise": 1.0,
            },
        },
    }  # fmt: skip


def fit() -> dict[str, Any]:
    """Return a prompt that fits and shows the report."""
    from erk_guid.integrations.comfyui.nodes import FIT

    given = {
        **FIT.defaults(), "model": ["1", 0], "positive": ["1", 1], "negative": ["1", 2],
        "latent_image": ["1", 3], "evaluations": 4, "samples": 16, "batch": 16, "trials": 4,
    }  # fmt: skip
    return {
        "1": {"class_type": "TinyModel", "inputs": {"name": "flux"}},
        "2": {"class_type": "ERKGuidFit", "inputs": given},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}},
    }


def everything(checkout: Path, work: Path) -> Iterator[Found]:
    """Yield all rows."""
    from erk_guid.integrations.comfyui.nodes import NODES
    from erk_guid.integrations.comfyui.sampling import LISTED
    from erk_guid.integrations.comfyui.workflows import examples

    for api in ("V3", "V1"):
        with Server(checkout, work / api, api) as server:
            server.wait()
            infos = server.ask("/object_info")
            missing = [node.node_id for node in NODES if node.node_id not in infos]
            yield f"server, {api}: /object_info", f"missing: {missing}", not missing
            names = infos["KSampler"]["input"]["required"]["sampler_name"][0]
            listed = all(entry.name in names for entry in LISTED)
            yield f"server, {api}: the dropdown", f"listed: {listed}", listed
            for name, content in examples().items():
                wrong = _faults(content, infos)
                yield f"server, {api}: example {name!r}", "; ".join(wrong) or "fits", not wrong
            prompts = {"heun": prompt(4), "modal": prompt(4, solver="modal"), "fit": fit()}
            prompts |= {f"KSampler {entry.name}": dropdown(entry.name) for entry in LISTED}
            for name, given in prompts.items():
                status = server.end(server.begin(given))["status"]
                said = status["status_str"]
                yield f"server, {api}: prompt, {name}", said, said == "success"
            said = str(_refused(server)).strip()
            yield f"server, {api}: eta for heun", said[-90:], "modal takes it" in said
            number = server.begin(prompt(LONG))
            began = time.monotonic()
            while not server.ask("/queue")["queue_running"]:
                time.sleep(0.05)
            time.sleep(1)
            server.ask("/interrupt", {})
            messages = [kind for kind, _ in server.end(number)["status"]["messages"]]
            said = f"{messages[-1]} after {time.monotonic() - began:.1f} s"
            yield f"server, {api}: /interrupt", said, "execution_interrupted" in messages
            if api == "V3":
                text = server.ask("/extensions/erk-guid/docs/ERKGuidSampler.md")
                yield "server: help of a node", text.splitlines()[0], "ERK-Guid sampler" in text
                templates = server.ask("/workflow_templates").get("erk-guid", [])
                said = ", ".join(sorted(templates))
                yield "server: templates", said, sorted(templates) == sorted(examples())


def _refused(server: Server) -> Any:
    """Return what the user is told of a wrong setting."""
    messages = server.end(server.begin(prompt(4, eta=0.5)))["status"]["messages"]
    return next(more["exception_message"] for kind, more in messages if kind == "execution_error")


def _faults(workflow: dict[str, Any], infos: dict[str, Any]) -> list[str]:
    """Return where a saved workflow differs from what the server's nodes have."""
    wrong = []
    for node in workflow["nodes"]:
        info = infos.get(node["type"])
        if info is None:
            wrong.append(f"there is no {node['type']}")
            continue
        groups = info["input"]
        known = {
            n: g[n] for g in (groups.get("required", {}), groups.get("optional", {})) for n in g
        }
        sockets = {given["name"]: given["type"] for given in node["inputs"]}
        for name, kind in sockets.items():
            if name not in known or known[name][0] not in (kind, "*"):
                wrong.append(f"{node['type']} has no input {name} of {kind}")
        widgets = [n for n in known if n not in sockets]
        extra = sum(
            bool(more and more[0].get("control_after_generate")) for _, *more in known.values()
        )
        extra += sum(n in ("seed", "noise_seed") and not _controlled(known[n]) for n in widgets)
        if len(node.get("widgets_values", [])) != len(widgets) + extra:
            wrong.append(f"{node['type']} has the widgets {widgets}")
        if [o["type"] for o in node["outputs"]] != list(info["output"]):
            wrong.append(f"{node['type']} has the outputs {info['output']}")
    return wrong


def _controlled(given: list[Any]) -> bool:
    return len(given) > 1 and bool(given[1].get("control_after_generate"))
