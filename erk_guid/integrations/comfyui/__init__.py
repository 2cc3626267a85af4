"""Nodes and samplers for ComfyUI.

    python -m erk_guid.integrations.comfyui ComfyUI/custom_nodes

writes the folder `erk-guid` there, which loads them. This package's own folder works in its place,
as a link of that name.
"""

from __future__ import annotations

if __name__ == "erk_guid":
    raise ImportError(
        f"the folder {__file__} is named erk_guid and hides the package of that name; rename that "
        "folder of custom_nodes to erk-guid"
    )

from typing import Any

from erk_guid.integrations.comfyui import v1, v3
from erk_guid.integrations.comfyui.nodes import NODES
from erk_guid.integrations.comfyui.program import running
from erk_guid.integrations.comfyui.sampling import register

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = v1.mappings(NODES)


def comfy_entrypoint() -> Any:
    """Return the extension; ComfyUI calls this where there are no NODE_CLASS_MAPPINGS."""
    return v3.extension(NODES)


if running():
    register()  # ComfyUI has no later moment for it: the dropdown is read when nodes are asked for
