"""ComfyUI's own modules, which exist only inside that program."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from erk_guid.common.errors import ErkGuidError

FOLDER = "erk-guid"
"""Name of this package's folder, among ComfyUI's nodes and among its outputs.

The hyphen matters. Some node packs put `custom_nodes` first on Python's path, where a folder named
`erk_guid` would hide the package of that name.
"""


def module(name: str) -> Any:
    """Return a module of ComfyUI.

    Raises:
        ErkGuidError: outside of ComfyUI.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ErkGuidError(f"the nodes work only inside ComfyUI: there is no {name}") from error


def running() -> bool:
    """Return whether this is ComfyUI's process."""
    return {"comfy.samplers", "comfy.k_diffusion.sampling"} <= sys.modules.keys()


def category_like(node_id: str, otherwise: str) -> str:
    """Return the menu in which a stock node stands; these have moved with versions.

    Args:
        node_id: the stock node.
        otherwise: the menu where there is no such node.
    """
    stock = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    return str(getattr(stock.get(node_id), "CATEGORY", otherwise))


def outputs() -> Path:
    """Return the folder of this package's files among ComfyUI's outputs."""
    return Path(module("folder_paths").get_output_directory()) / FOLDER
