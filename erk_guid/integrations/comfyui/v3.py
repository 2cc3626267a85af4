"""Classes of ComfyUI's present API ("V3"), made of the descriptions."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from erk_guid.integrations.comfyui.description import Input, Node
from erk_guid.integrations.comfyui.program import category_like, module

TYPES = {
    "BOOLEAN": "Boolean", "COMBO": "Combo", "CONDITIONING": "Conditioning", "FLOAT": "Float",
    "GUIDER": "Guider", "IMAGE": "Image", "INT": "Int", "LATENT": "Latent", "MODEL": "Model",
    "NOISE": "Noise", "SAMPLER": "Sampler", "SIGMAS": "Sigmas", "STRING": "String",
}  # fmt: skip
"""ComfyUI's name of a type to this API's class."""


def available() -> bool:
    """Return whether this ComfyUI has the API; it came in 2025."""
    return find_spec("comfy_api") is not None and find_spec("comfy_api.latest") is not None


def extension(nodes: Iterable[Node]) -> Any:
    """Return the ComfyExtension with these nodes, which `comfy_entrypoint` gives to ComfyUI."""
    nodes = list(nodes)

    async def get_node_list(self: object) -> list[type]:
        return [node_class(node) for node in nodes]

    base = module("comfy_api.latest").ComfyExtension
    return type("ERKGuidExtension", (base,), {"get_node_list": get_node_list})()


def node_class(node: Node) -> type:
    """Return the class of a node."""
    io = module("comfy_api.latest").io

    def define_schema(cls: type) -> Any:
        return io.Schema(
            node_id=node.node_id,
            display_name=node.title,
            category=category_like(node.like, node.menu),
            description=node.description,
            inputs=[_typed(io, given) for given in node.inputs],
            outputs=[
                getattr(io, TYPES[o.kind]).Output(display_name=o.name, tooltip=o.tooltip)
                for o in node.outputs
            ],
        )

    def execute(cls: type, /, **inputs: Any) -> Any:
        return io.NodeOutput(*node.run(inputs))

    members: dict[str, Any] = {
        "__doc__": node.description,
        "__module__": __name__,
        "define_schema": classmethod(define_schema),
        "execute": classmethod(execute),
    }
    if node.fingerprint is not None:
        fingerprint = node.fingerprint
        members["fingerprint_inputs"] = classmethod(lambda cls, **inputs: fingerprint(**inputs))
    return type(node.node_id, (io.ComfyNode,), members)


def _typed(io: Any, given: Input) -> Any:
    """Return an input as this API has it."""
    options = {
        "default": given.default, "min": given.least, "max": given.most, "step": given.step,
        "options": list(given.options) or None,
    }  # fmt: skip
    known = {name: value for name, value in options.items() if value is not None}
    kind = getattr(io, TYPES[given.kind])
    return kind.Input(given.name, tooltip=given.tooltip, optional=given.optional, **known)
