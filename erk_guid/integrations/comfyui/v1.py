"""Classes of ComfyUI's first API, made of the descriptions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from erk_guid.integrations.comfyui.description import Input, Node
from erk_guid.integrations.comfyui.program import category_like


def mappings(nodes: Iterable[Node]) -> tuple[dict[str, type], dict[str, str]]:
    """Return NODE_CLASS_MAPPINGS and NODE_DISPLAY_NAME_MAPPINGS."""
    nodes = list(nodes)
    return {n.node_id: node_class(n) for n in nodes}, {n.node_id: n.title for n in nodes}


def node_class(node: Node) -> type:
    """Return the class of a node."""

    def input_types(cls: type) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"required": {}}
        for given in node.inputs:
            group = found.setdefault("optional" if given.optional else "required", {})
            group[given.name] = _typed(given)
        return found

    def run(self: object, **inputs: Any) -> tuple[Any, ...]:
        return node.run(inputs)

    members: dict[str, Any] = {
        "__doc__": node.description,
        "__module__": __name__,
        "CATEGORY": category_like(node.like, node.menu),
        "DESCRIPTION": node.description,
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(o.kind for o in node.outputs),
        "RETURN_NAMES": tuple(o.name for o in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(o.tooltip for o in node.outputs),
        "FUNCTION": "run",
        "run": run,
    }
    if node.fingerprint is not None:
        fingerprint = node.fingerprint
        members["IS_CHANGED"] = classmethod(lambda cls, **inputs: fingerprint(**inputs))
    return type(node.node_id, (), members)


def _typed(given: Input) -> tuple[Any, dict[str, Any]]:
    """Return an input as this API has it: the type, and its options."""
    options = {
        "default": given.default, "min": given.least, "max": given.most, "step": given.step,
        "tooltip": given.tooltip,
    }  # fmt: skip
    kind = list(given.options) if given.kind == "COMBO" else given.kind
    return kind, {name: value for name, value in options.items() if value is not None}
