"""Example workflows, as ComfyUI's window saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erk_guid.integrations.comfyui.description import WIDGETS, Node
from erk_guid.integrations.comfyui.nodes import FIT, NODES, SAMPLER, TRACE

Socket = tuple[str, str]
"""Name and type."""


@dataclass(frozen=True)
class Kind:
    """A kind of node, as far as a workflow needs it: sockets that are connected, and outputs."""

    sockets: tuple[Socket, ...]
    outputs: tuple[Socket, ...]
    height: int = 120


MODEL_CLIP_VAE = (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))
CONDS = (("positive", "CONDITIONING"), ("negative", "CONDITIONING"))
CUSTOM = (
    ("noise", "NOISE"), ("guider", "GUIDER"), ("sampler", "SAMPLER"), ("sigmas", "SIGMAS"),
    ("latent_image", "LATENT"),
)  # fmt: skip
STOCK = {
    "CheckpointLoaderSimple": Kind((), MODEL_CLIP_VAE, 100),
    "CLIPTextEncode": Kind((("clip", "CLIP"),), (("CONDITIONING", "CONDITIONING"),), 110),
    "EmptyLatentImage": Kind((), (("LATENT", "LATENT"),), 110),
    "KSampler": Kind(
        (("model", "MODEL"), *CONDS, ("latent_image", "LATENT")), (("LATENT", "LATENT"),), 270
    ),
    "CFGGuider": Kind((("model", "MODEL"), *CONDS), (("GUIDER", "GUIDER"),), 100),
    "RandomNoise": Kind((), (("NOISE", "NOISE"),), 90),
    "BasicScheduler": Kind((("model", "MODEL"),), (("SIGMAS", "SIGMAS"),), 110),
    "SamplerCustomAdvanced": Kind(
        CUSTOM, (("output", "LATENT"), ("denoised_output", "LATENT")), 110
    ),
    "VAEDecode": Kind((("samples", "LATENT"), ("vae", "VAE")), (("IMAGE", "IMAGE"),), 50),
    "SaveImage": Kind((("images", "IMAGE"),), (), 270),
    "PreviewImage": Kind((("images", "IMAGE"),), (), 250),
    "PreviewAny": Kind((("source", "*"),), (), 120),
}
"""ComfyUI's own nodes that the examples use."""


def _kind_of(node: Node) -> Kind:
    sockets = tuple((i.name, i.kind) for i in node.inputs if i.kind not in WIDGETS)
    widgets = len(node.inputs) - len(sockets)
    outputs = tuple((o.name, o.kind) for o in node.outputs)
    return Kind(sockets, outputs, 16 + 20 * max(len(sockets), len(outputs)) + 24 * widgets)


KINDS = {**STOCK, **{node.node_id: _kind_of(node) for node in NODES}}


@dataclass(frozen=True)
class Placed:
    """A node of a workflow.

    Attributes:
        kind: a name of `KINDS`.
        column: where it stands; nodes of a column stand below each other.
        widgets: their values, in ComfyUI's order.
        links: name of an input to the name of another node and the number of its output.
    """

    kind: str
    column: int
    widgets: Sequence[Any] = ()
    links: Mapping[str, tuple[str, int]] = field(default_factory=dict)


WIDTH, GAP, TOP = 300, 50, 90


def workflow(nodes: Mapping[str, Placed], notes: str) -> dict[str, Any]:
    """Return a workflow as JSON has it.

    Args:
        nodes: by names that are used in `Placed.links` only.
        notes: what it shows, for the reader.
    """
    number = {name: i + 1 for i, name in enumerate(nodes)}
    links = [
        [0, number[source], slot, number[name], _slot(placed, given), _type(nodes[source], slot)]
        for name, placed in nodes.items()
        for given, (source, slot) in placed.links.items()
    ]
    for i, link in enumerate(links):
        link[0] = i + 1
    heights: dict[int, int] = {}
    drawn = []
    for name, placed in nodes.items():
        kind = KINDS[placed.kind]
        y = heights.get(placed.column, TOP)
        heights[placed.column] = y + kind.height + GAP
        drawn.append(
            {
                "id": number[name], "type": placed.kind,
                "pos": [40 + placed.column * (WIDTH + GAP), y], "size": [WIDTH, kind.height],
                "flags": {}, "order": number[name] - 1, "mode": 0,
                "inputs": [
                    {"name": given, "type": type_, "link": _link(links, number[name], i)}
                    for i, (given, type_) in enumerate(kind.sockets)
                ],
                "outputs": [
                    {
                        "name": given, "type": type_, "slot_index": i,
                        "links": [k[0] for k in links if k[1:3] == [number[name], i]],
                    }
                    for i, (given, type_) in enumerate(kind.outputs)
                ],
                "properties": {"Node name for S&R": placed.kind},
                "widgets_values": list(placed.widgets),
            }
        )  # fmt: skip
    return {
        "last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": links,
        "groups": [], "config": {}, "extra": {"notes": notes}, "version": 0.4,
    }  # fmt: skip


def _slot(placed: Placed, given: str) -> int:
    return [name for name, _ in KINDS[placed.kind].sockets].index(given)


def _type(source: Placed, slot: int) -> str:
    return KINDS[source.kind].outputs[slot][1]


def _link(links: list[list[Any]], node: int, slot: int) -> int | None:
    return next((link[0] for link in links if link[3:5] == [node, slot]), None)


def _widgets(node: Node, **changed: Any) -> list[Any]:
    return list({**node.defaults(), **changed}.values())


BEGIN = {
    "model": Placed("CheckpointLoaderSimple", 0, ["v1-5-pruned-emaonly-fp16.safetensors"]),
    "yes": Placed(
        "CLIPTextEncode", 1, ["a lighthouse on a cliff, evening"], {"clip": ("model", 1)}
    ),
    "no": Placed("CLIPTextEncode", 1, [""], {"clip": ("model", 1)}),
    "latent": Placed("EmptyLatentImage", 0, [512, 512, 1]),
}
GUIDED = {"model": ("model", 0), "positive": ("yes", 0), "negative": ("no", 0)}


def _end(latent: str, column: int) -> dict[str, Placed]:
    return {
        "decode": Placed("VAEDecode", column, [], {"samples": (latent, 0), "vae": ("model", 2)}),
        "save": Placed("SaveImage", column, ["ERK-Guid"], {"images": ("decode", 0)}),
    }


def _custom(kind: str, sampler: tuple[str, int], sigmas: tuple[str, int]) -> dict[str, Placed]:
    """Return guider, noise, and a node that samples with them."""
    links = {
        "noise": ("noise", 0), "guider": ("guider", 0), "sampler": sampler, "sigmas": sigmas,
        "latent_image": ("latent", 0),
    }  # fmt: skip
    return {
        "guider": Placed("CFGGuider", 2, [7.0], GUIDED),
        "noise": Placed("RandomNoise", 1, [0, "fixed"]),
        "run": Placed(kind, 3, [], links),
    }


def _scheduled(steps: int, **settings: Any) -> dict[str, Placed]:
    """Return the sampler's node with settings, and a schedule."""
    return {
        "sampler": Placed(SAMPLER.node_id, 2, _widgets(SAMPLER, **settings)),
        "sigmas": Placed("BasicScheduler", 2, ["karras", steps, 1.0], {"model": ("model", 0)}),
    }


def examples() -> dict[str, dict[str, Any]]:
    """Return the example workflows by name."""
    dropdown = Placed(
        "KSampler", 2, [0, "fixed", 16, 7.0, "modal", "karras", 1.0],
        {**GUIDED, "latent_image": ("latent", 0)},
    )  # fmt: skip
    plain = _custom("SamplerCustomAdvanced", ("sampler", 0), ("sigmas", 0))
    fitted = _custom("SamplerCustomAdvanced", ("fit", 1), ("fit", 0))
    traced = _custom(TRACE.node_id, ("sampler", 0), ("sigmas", 0))
    fit = Placed(FIT.node_id, 2, _widgets(FIT), {**GUIDED, "latent_image": ("latent", 0)})
    return {
        "erk-guid dropdown": workflow(
            {**BEGIN, "run": dropdown, **_end("run", 3)},
            "The modal solver in the ordinary KSampler. Its list also has erk_heun and erk_dpm_2.",
        ),
        "erk-guid sampler": workflow(
            {**BEGIN, **_scheduled(8), **plain, **_end("run", 4)},
            "Heun with parameter-free guidance, 8 steps, 15 calls of the model.",
        ),
        "erk-guid fit": workflow(
            {
                **BEGIN, "fit": fit, **fitted,
                "report": Placed("PreviewAny", 3, [], {"source": ("fit", 2)}), **_end("run", 4),
            },
            "Noise levels for 8 calls of this model, and a picture with them. The search takes "
            "minutes, once.",
        ),
        "erk-guid trace": workflow(
            {
                **BEGIN, **_scheduled(8, form="published"), **traced,
                "drawn": Placed("PreviewImage", 3, [], {"images": ("run", 1)}), **_end("run", 4),
            },
            "What the published form sees and does at each step, as a picture.",
        ),
    }  # fmt: skip
