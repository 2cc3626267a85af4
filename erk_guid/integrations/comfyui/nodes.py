"""The nodes: their descriptions, and the sampler's function."""

from __future__ import annotations

from typing import Any, get_args

from erk_guid.common.errors import ErkGuidError
from erk_guid.guidance import FORMS, ERKGuidance, Gate, make_guidance
from erk_guid.integrations.comfyui.description import Input, Node, Output
from erk_guid.integrations.comfyui.fitting import fingerprint_of_fit, fit_model, read_fit
from erk_guid.integrations.comfyui.kinds import MODEL_TYPES
from erk_guid.integrations.comfyui.sampling import make_ksampler
from erk_guid.integrations.comfyui.tracing import sample_and_trace
from erk_guid.solvers import DPM2, Heun, Modal, Solver, names_of_solvers
from erk_guid.studies.fitting.levels import BEST

SOLVERS: dict[str, type[Solver]] = {"heun": Heun, "dpm_2": DPM2, "modal": Modal}
PUBLISHED, NONE = "published", "none"
FORM_NAMES = (*FORMS, PUBLISHED, NONE)
GATES: tuple[str, ...] = get_args(Gate)
BOUND = 0.2
"""Default limit of the published form. Step caches make it run away without one."""
LARGEST_SEED = 2**64 - 1


def make_sampler(
    w_stiff: float,
    w_con: float,
    form: str,
    solver: str,
    gate: str,
    bound: float,
    model_type: str,
    eta: float,
) -> tuple[Any]:
    """Return the SAMPLER.

    Raises:
        ErkGuidError: eta for a solver without it.
    """
    if eta and solver != "modal":
        raise ErkGuidError(f"eta must be 0 with the solver {solver}, got {eta}; modal takes it")
    if solver == "modal":
        return (make_ksampler(Modal(eta=eta), None, model_type),)
    guidance = None
    if form == PUBLISHED:
        guidance = make_guidance(w_stiff, w_con=w_con, bound=bound or None, gate=gate)
    elif form != NONE:  # every widget has a value; these forms ignore those of the published one
        guidance = make_guidance(form)
    return (make_ksampler(SOLVERS[solver](), guidance, model_type),)


SAMPLER = Node(
    node_id="ERKGuidSampler",
    title="ERK-Guid sampler",
    like="KSamplerSelect",
    menu="sampling/samplers",
    description=(
        "A sampler with ERK guidance: better samples for no extra evaluation of the model. "
        "heun and dpm_2 call the model twice a step, modal once."
    ),
    guide="""
Connect SAMPLER to "SamplerCustomAdvanced" or "SamplerCustom".

**What to take first:** `solver` modal with as many steps as you take now, and nothing else changed.
With `solver` heun, `form` auto needs no numbers; it counts two calls of the model a step, so take
half of the steps.

- The form "published" is the paper's. `w_stiff` is its strength, `w_con` is where it begins to act.
  For flow-matching models (SD3, FLUX, Qwen-Image, Wan) take `gate` step, because the unit of the
  other gate is that of another kind of noise level.
- `bound` 0.2 limits the published form. With 0 it has no limit, and with EasyCache or LazyCache in
  the workflow the picture may then burst.
- The form "none" is the plain solver. With it, heun and dpm_2 also follow FlipSigmas upwards, from
  a picture to noise.
- `eta` adds noise in each step of modal, drawn by the seed. 0.5 is what to begin with.
- `model_type` is for models that are wrapped so that they cannot be asked. The error names it.
""",
    inputs=(
        Input(
            "w_stiff", "FLOAT", "Strength of the published form.",
            default=0.5, least=0.0, most=10.0, step=0.01,
        ),
        Input(
            "w_con", "FLOAT", "The published form acts where the gate's quantity exceeds this.",
            default=ERKGuidance.w_con, least=0.0, most=100.0, step=0.01,
        ),
        Input(
            "form", "COMBO",
            "auto: without settings, it ignores the numbers and the gate. published: the paper's. "
            "none: the plain solver. The modal solver takes none of them.",
            default=FORM_NAMES[0], options=FORM_NAMES, optional=True,
        ),
        Input(
            "solver", "COMBO",
            "heun and dpm_2 call the model twice a step, modal once.",
            default="heun", options=tuple(SOLVERS), optional=True,
        ),
        Input(
            "gate", "COMBO",
            "What w_con is compared with: the stiffness, in units of 1/sigma, as published; or "
            "that times the step, which has no unit and is what to take for flow models.",
            default=GATES[0], options=GATES, optional=True,
        ),
        Input(
            "bound", "FLOAT",
            "Limits the published correction to this share of what the step's two solutions "
            "differ by; 0: no limit, as published.",
            default=BOUND, least=0.0, most=10.0, step=0.01, optional=True,
        ),
        Input(
            "model_type", "COMBO",
            "detect: ask the model. sigma: x is clean plus sigma noise. flow: (1 - t) clean + t "
            "noise. The form auto of heun, and modal, need to know it.",
            default=MODEL_TYPES[0], options=MODEL_TYPES, optional=True,
        ),
        Input(
            "eta", "FLOAT", "Noise in each step of the modal solver: 0 none, 1 the reverse SDE.",
            default=0.0, least=0.0, most=1.0, step=0.01, optional=True,
        ),
    ),
    outputs=(Output("sampler", "SAMPLER", "For SamplerCustomAdvanced and SamplerCustom."),),
    function=make_sampler,
)  # fmt: skip

SIGMAS = Node(
    node_id="ERKGuidSigmas",
    title="ERK-Guid fitted sigmas",
    like="BasicScheduler",
    menu="sampling/schedulers",
    description=(
        "Noise levels that a fit found for a model, with the solver that they were fitted for."
    ),
    guide="""
Reads a settings file of the node "ERK-Guid fit", or of the command `erk-guid fit`. Take its SIGMAS
together with its SAMPLER: levels are fitted for one solver, one model, one CFG and one number of
evaluations.

A file that the command line wrote holds noise levels, not the times of a flow-matching model.
""",
    inputs=(
        Input(
            "file", "STRING",
            "Path of the settings file; without folders it is looked for in output/erk-guid.",
            default="fit-8.json",
        ),
    ),
    outputs=(
        Output("sigmas", "SIGMAS", "The fitted noise levels."),
        Output("sampler", "SAMPLER", "The solver that they were fitted for."),
    ),
    function=read_fit,
    fingerprint=fingerprint_of_fit,
)  # fmt: skip

FIT = Node(
    node_id="ERKGuidFit",
    title="ERK-Guid fit",
    like="BasicScheduler",
    menu="sampling/schedulers",
    description=(
        "Searches the noise levels at which few evaluations of this model come nearest to many. "
        "It takes minutes, once; the settings file keeps what it found."
    ),
    guide="""
Samples from noise are solved finely, then the noise levels are moved until a run with `evaluations`
calls of the model ends as near to them as it can. The report says how near, on samples that the
search did not see. It is nearness to the exact solution, not how pictures look.

It costs about `samples` x (96 + `evaluations` x 15) calls of the model for one picture (three times
as many searched with `solver` best), so begin with a small latent. The queue can be interrupted.
The result is for this model, this conditioning, this CFG and pictures of about this size.

If the report says that nothing is significantly better, SIGMAS is the best usual spacing.
""",
    inputs=(
        Input("model", "MODEL", "The model to fit."),
        Input("positive", "CONDITIONING", "A typical prompt."),
        Input("negative", "CONDITIONING", "As in your workflow; with cfg 1 it is not used."),
        Input("latent_image", "LATENT", "An empty latent of the size to fit for."),
        Input(
            "cfg", "FLOAT", "As in your workflow.", default=7.0, least=0.0, most=100.0, step=0.1
        ),
        Input(
            "evaluations", "INT", "Calls of the model that a run may take.",
            default=8, least=3, most=64, step=1,
        ),
        Input(
            "solver", "COMBO", "The solver to fit for; best tries several.",
            default="modal", options=(*names_of_solvers(), BEST),
        ),
        Input(
            "samples", "INT", "Samples from noise: half of them are for the report alone.",
            default=32, least=16, most=1024, step=1,
        ),
        Input("batch", "INT", "Samples at a time.", default=4, least=1, most=256, step=1),
        Input(
            "trials", "INT", "Budget of the search, in runs; 0 is the usual one.",
            default=0, least=0, most=10000, step=1,
        ),
        Input(
            "fit_seed", "INT", "Decides the noise.", default=0, least=0, most=LARGEST_SEED, step=1
        ),
        Input(
            "end_at_zero", "BOOLEAN",
            "End with a step to 0, as ComfyUI's schedules do. Off: end at the model's lowest "
            "level, which saves an evaluation.",
            default=True,
        ),
        Input(
            "name", "STRING",
            "Name of the settings file, in output/erk-guid; the number of evaluations is added.",
            default="fit",
        ),
    ),
    outputs=(
        Output("sigmas", "SIGMAS", "The fitted noise levels."),
        Output("sampler", "SAMPLER", "The solver that they were fitted for."),
        Output("report", "STRING", "What was found, and how near it comes."),
    ),
    function=fit_model,
)  # fmt: skip

TRACE = Node(
    node_id="ERKGuidTrace",
    title="ERK-Guid sample and trace",
    like="SamplerCustomAdvanced",
    menu="sampling",
    description=(
        "Samples as SamplerCustomAdvanced does, and draws stiffness and correction at each step."
    ),
    guide="""
Takes the place of "SamplerCustomAdvanced". `sampler` must come from "ERK-Guid sampler", with the
solver heun or dpm_2. The picture shows, over the noise levels: the stiffness; the stiffness times
the step; where the gate is open; and the size of the correction beside the step. A correction above
a tenth of the step no longer corrects: take a smaller `w_stiff`.

It needs matplotlib: `pip install matplotlib` in ComfyUI's Python.
""",
    inputs=(
        Input("noise", "NOISE", "As of SamplerCustomAdvanced."),
        Input("guider", "GUIDER", "As of SamplerCustomAdvanced."),
        Input("sampler", "SAMPLER", "Of the node ERK-Guid sampler: heun or dpm_2."),
        Input("sigmas", "SIGMAS", "As of SamplerCustomAdvanced."),
        Input("latent_image", "LATENT", "As of SamplerCustomAdvanced."),
    ),
    outputs=(
        Output("samples", "LATENT", "The result."),
        Output("trace", "IMAGE", "The drawing."),
    ),
    function=sample_and_trace,
)

NODES = (SAMPLER, SIGMAS, FIT, TRACE)
