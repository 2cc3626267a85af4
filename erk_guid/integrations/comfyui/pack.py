"""The folder that ComfyUI loads, made of the descriptions: nodes, their help, examples."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import erk_guid
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import write_bytes
from erk_guid.integrations.comfyui.description import Input, Node
from erk_guid.integrations.comfyui.nodes import NODES
from erk_guid.integrations.comfyui.program import FOLDER
from erk_guid.integrations.comfyui.workflows import examples

NAME = "erk-guid"
EARLIER = "erk_guid"
"""Name of the folder that the docs once told to link."""
INIT = '''"""ERK-Guid for ComfyUI. All code is in the package erk-guid; see README.md."""

import importlib.util

try:
    import erk_guid.integrations.comfyui as nodes
except ImportError as error:
    raise ImportError(
        f"ERK-Guid's nodes need the package erk-guid in ComfyUI's Python ({error}); install it, "
        "and see that no folder in custom_nodes is named erk_guid, which would hide it"
    ) from error

WEB_DIRECTORY = "./web"

if importlib.util.find_spec("comfy_api") and importlib.util.find_spec("comfy_api.latest"):
    comfy_entrypoint = nodes.comfy_entrypoint
else:  # before 2025
    NODE_CLASS_MAPPINGS = nodes.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS = nodes.NODE_DISPLAY_NAME_MAPPINGS
'''
PROJECT = """\
[project]
name = "{name}"
description = "Samplers with ERK guidance, the modal solver, and noise levels fitted to your model"
version = "{version}"
license = {{ text = "Apache-2.0" }}
requires-python = ">=3.10"
dependencies = ["erk-guid>={version}"]

[project.urls]
Repository = "{repository}"

[tool.comfy]
PublisherId = "{publisher}"
DisplayName = "ERK-Guid"
Icon = ""
requires-comfyui = ">=0.3.64"
"""
README = """\
# ERK-Guid for ComfyUI

Samplers that need fewer evaluations of the model. After `pip install erk-guid` into ComfyUI's
Python, this folder belongs into `custom_nodes`. In the dropdown of every KSampler there are then
`modal`, `erk_heun` and `erk_dpm_2`, and these nodes:

{nodes}

Example workflows are in the templates of ComfyUI, under the name of this folder.
"""


def write_pack(custom_nodes: Path, publisher: str = "", repository: str = "") -> Path:
    """Write the folder of the nodes; return its path.

    Args:
        custom_nodes: where to, ComfyUI's folder of that name.
        publisher, repository: for ComfyUI's registry.

    Raises:
        ErkGuidError: it cannot be written, or there is something else.
    """
    folder = custom_nodes / FOLDER
    _check(custom_nodes, folder)
    for name, text in files(publisher, repository).items():
        try:
            write_bytes(folder / name, text.encode())
        except OSError as error:
            raise ErkGuidError(
                f"cannot write {printable(folder / name, 200)}: {error.strerror}"
            ) from error
    return folder


def _check(custom_nodes: Path, folder: Path) -> None:
    shown = printable(folder, 200)
    if not custom_nodes.is_dir():
        raise ErkGuidError(
            f"there is no folder {printable(custom_nodes, 200)}; name ComfyUI's custom_nodes"
        )
    if folder.is_symlink():
        raise ErkGuidError(f"{shown} is a link: delete it first, it is not needed any more")
    if folder.exists() and not (folder / "pyproject.toml").is_file():
        raise ErkGuidError(f"{shown} is something else: delete or rename it first")
    earlier = custom_nodes / EARLIER
    if earlier.exists() or earlier.is_symlink():
        raise ErkGuidError(
            f"{printable(earlier, 200)} hides the package from some node packs: if it is the link "
            f"that earlier versions asked for, delete it, {FOLDER} takes its place; else rename it"
        )


def files(publisher: str = "", repository: str = "") -> dict[str, str]:
    """Return the texts of all files by name."""
    listed = "\n".join(f"- **{node.title}**: {node.description}" for node in NODES)
    project = {
        "name": NAME, "version": erk_guid.__version__, "publisher": _quoted(publisher),
        "repository": _quoted(repository),
    }  # fmt: skip
    return {
        "__init__.py": INIT,
        "pyproject.toml": PROJECT.format(**project),
        "requirements.txt": f"erk-guid>={erk_guid.__version__}\n",
        "README.md": README.format(nodes=listed),
        "LICENSE": _licence(),
        **{f"web/docs/{node.node_id}.md": help_of(node) for node in NODES},
        **{
            f"example_workflows/{name}.json": json.dumps(content, indent=1) + "\n"
            for name, content in examples().items()
        },
    }  # fmt: skip


def _quoted(text: str) -> str:
    """Return text that may stand between a TOML string's quotes.

    Raises:
        ErkGuidError: it may not.
    """
    if not text.isprintable() or '"' in text or "\\" in text:
        raise ErkGuidError(f"{printable(repr(text), 100)} has characters that a name has not")
    return text


def help_of(node: Node) -> str:
    """Return the help that ComfyUI shows for a node, Markdown."""
    lines = [f"# {node.title}", "", node.description, "", node.guide.strip(), ""]
    lines += ["| input | type | | default |", "|---|---|---|---|"]
    lines += [
        f"| {i.name} | {i.kind} | {i.tooltip} | {_default(i)} |" for i in node.inputs
    ]  # fmt: skip
    lines += ["", "| output | type | |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.kind} | {o.tooltip} |" for o in node.outputs]
    return "\n".join(lines) + "\n"


def _default(given: Input) -> str:
    return "" if given.default is None else str(given.default)


def _licence() -> str:
    """Return the licence's text, of the installed package or of the checkout."""
    checkout = Path(erk_guid.__file__).parents[1] / "LICENSE"
    try:
        installed = distribution("erk-guid").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        installed = None
    if installed is None and checkout.is_file():
        installed = checkout.read_text()
    if installed is None:
        raise ErkGuidError("this installation has no LICENSE file; install erk-guid again")
    return installed
