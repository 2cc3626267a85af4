"""What is checked inside ComfyUI's process, without its server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scripts.check_comfyui import tiny

Found = tuple[str, str, bool | None]
"""What was run, what came out, and whether it agrees."""

STEPS = 6
COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50, 60)
"""Numbers of steps at which every schedule is tried."""
SEED = 5
FUNCTION_CASES: list[tuple[str, dict[str, float], float]] = [
    ("heun", {}, 0.0),
    ("dpm_2", {}, 1e-5),
    ("heun", {"s_churn": 10.0}, 1e-6),
    ("dpm_2", {"s_churn": 10.0}, 1e-5),
    ("heun", {"s_churn": 30.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}, 1e-6),
]
"""A function of its k_diffusion, its options, and how far apart (relative) results may be."""


def begin() -> None:
    """Make this process ComfyUI's, on the CPU."""
    sys.argv = ["main.py", "--cpu"]
    import_module("comfy.options").enable_args_parsing()
    import_module("comfy.samplers")


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def compared(what: str, ours: Tensor, theirs: Tensor, allowed: float) -> Found:
    """Return a row for two results."""
    found = apart(ours, theirs)
    return what, f"{found:.1e} apart", found <= allowed


# --- the program's parts ----------------------------------------------------------------------


def stock(name: str) -> Any:
    """Return one of ComfyUI's own samplers."""
    return import_module("comfy.samplers").sampler_object(name)


def ours(**settings: Any) -> Any:
    """Return the SAMPLER of our node."""
    from erk_guid.integrations.comfyui.nodes import SAMPLER

    return SAMPLER.run(settings)[0]


def schedule(model: Any, steps: int = STEPS, name: str = "normal") -> Tensor:
    """Return noise levels as ComfyUI's BasicScheduler makes them."""
    mixing = model.get_model_object("model_sampling")
    levels: Tensor = import_module("comfy.samplers").calculate_sigmas(mixing, name, steps)
    return levels


def run(
    model: Any, sampler: Any, sigmas: Tensor, cfg: float = 4.0, batch: int = 2, **more: Any
) -> Tensor:
    """Sample as ComfyUI's SamplerCustom does."""
    latent = more.pop("latent", tiny.latent(model, batch))
    program = import_module("comfy.sample")
    noise = program.prepare_noise(latent, SEED)
    end: Tensor = program.sample_custom(
        model, noise, cfg, sampler, sigmas, tiny.prompt(3), tiny.prompt(4), latent,
        disable_pbar=True, seed=SEED, **more,
    )  # fmt: skip
    return end


def sampler_of(function: Callable[..., Tensor]) -> Any:
    """Return ComfyUI's holder of a sampler function."""
    return import_module("comfy.samplers").KSAMPLER(function)


def by_our_loop(**options: Any) -> Any:
    """Return a SAMPLER that calls `erk_guid.sample` itself, the judge of the adapter."""
    import erk_guid

    def function(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any
    ) -> Tensor:
        def denoiser(x: Tensor, sigma: Tensor, /) -> Tensor:
            found: Tensor = model(x, sigma * x.new_ones(len(x)), **extra_args)
            return found

        return erk_guid.sample(denoiser, x, sigmas, **options)

    return sampler_of(function)


def error_of(function: Callable[..., object], *args: Any, **more: Any) -> str:
    """Return what a call raises, in words; nothing if it does not."""
    try:
        function(*args, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- the checks -------------------------------------------------------------------------------


def functions() -> Iterator[Found]:
    """Compare the functions of its k_diffusion with ours, unguided, on the same random numbers."""
    import erk_guid
    from erk_guid.integrations import k_diffusion

    theirs = import_module("comfy.k_diffusion.sampling")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    sigmas = theirs.get_sigmas_karras(8, 0.03, 14.6)
    x = sigmas[0] * torch.randn(2, 4, 8, 8)

    def model(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        s = sigma[:, None, None, None]
        return (x + s * torch.tanh(layer(x / (1 + s**2).sqrt()))) / (1 + s**2)

    def denoiser(x: Tensor, sigma: Tensor, /) -> Tensor:
        return model(x, sigma * x.new_ones(len(x)))

    yield compared(
        "function res_multistep", erk_guid.sample(denoiser, x, sigmas, solver="res"),
        theirs.sample_res_multistep(model, x.clone(), sigmas, disable=True), 1e-5,
    )  # fmt: skip
    for name, options, allowed in FUNCTION_CASES:
        ends = []
        for function, more in (
            (getattr(k_diffusion, f"sample_erk_{name}"), {"w_stiff": 0}),
            (getattr(theirs, f"sample_{name}"), {}),
        ):
            torch.manual_seed(1)
            ends.append(function(model, x.clone(), sigmas, disable=True, **options, **more))
        given = "".join(f" {k}={v:g}" for k, v in options.items())
        yield compared(f"function {name}{given}", ends[0], ends[1], allowed)


def plain(models: dict[str, Any]) -> Iterator[Found]:
    """Compare plain solvers with ComfyUI's own, in its loop, on each model."""
    for (name, model), (solver, allowed) in product(
        models.items(), (("heun", 0.0), ("dpm_2", 1e-5))
    ):
        sigmas = schedule(model)
        end = run(model, ours(solver=solver, form="none"), sigmas)
        yield compared(f"plain {solver}, {name}", end, run(model, stock(solver), sigmas), allowed)


def our_own(models: dict[str, Any]) -> Iterator[Found]:
    """Compare modal and the parameter-free form with `erk_guid.sample`, told what the model is."""
    import erk_guid

    for name, model in models.items():
        flow = erk_guid.RectifiedFlow() if tiny.KINDS[name] == "flow" else None
        sigmas = schedule(model)
        judged = by_our_loop(solver="modal", process=flow)
        end = run(model, ours(solver="modal"), sigmas)
        yield compared(f"modal, {name}", end, run(model, judged, sigmas), 0.0)
        auto = erk_guid.ParameterFreeGuidance()
        for solver, process in (("heun", flow), ("dpm_2", None)):
            judged = by_our_loop(
                solver=solver.replace("_", ""), guidance=auto, process=process
            )  # fmt: skip
            end = run(model, ours(solver=solver), sigmas)
            yield compared(f"{solver} auto, {name}", end, run(model, judged, sigmas), 0.0)


def detection(models: dict[str, Any]) -> Iterator[Found]:
    """Ask what x of a model is, through wrappers and of every class that ComfyUI has."""
    from erk_guid.integrations.comfyui.kinds import model_sampling_of

    expected = {
        "EPS": "sigma", "V_PREDICTION": "sigma", "EDM": "sigma", "X0": "sigma", "CONST": "flow",
        "COSMOS_RFLOW": "sigma", "IMG_TO_IMG": "sigma", "IMG_TO_IMG_FLOW": "at a picture",
        "IMG_TO_IMG_VELOCITY": "at a picture",
    }  # fmt: skip
    classes = import_module("comfy.model_sampling")
    for name, kind in expected.items():
        if hasattr(classes, name):
            found = _kind(getattr(classes, name)())
            yield f"detection, class {name}", found[:70], kind in found
    for name, model in models.items():
        mixing = model.get_model_object("model_sampling")
        guider = SimpleNamespace(model_patcher=model)
        deep: Any = SimpleNamespace(model_sampling=mixing)
        for _ in range(5):
            deep = SimpleNamespace(inner_model=deep)
        for where, wrapped in (("deep", deep), ("a guider", guider)):
            found = _kind(model_sampling_of(wrapped))
            yield f"detection, {name} in {where}", found[:70], found == tiny.KINDS[name]
    model = models["flux"]
    sigmas = schedule(model)

    def hidden(function: Callable[..., Tensor]) -> Any:
        def wrapped(model_k: Any, *args: Any, **kwargs: Any) -> Tensor:
            return function(lambda *a, **k: model_k(*a, **k), *args, **kwargs)

        return sampler_of(wrapped)

    def called(**settings: Any) -> Callable[..., Tensor]:
        made = ours(**settings)

        def function(*args: Any, **kwargs: Any) -> Tensor:
            end: Tensor = made.sampler_function(*args, **kwargs, **made.extra_options)
            return end

        return function

    for settings in ({"solver": "modal"}, {"solver": "heun"}):
        said = error_of(run, model, hidden(called(**settings)), sigmas)
        yield f"hidden model, {settings['solver']}", said[:90], "set model_type" in said
        told = {**settings, "model_type": "flow"}
        end = run(model, hidden(called(**told)), sigmas)
        yield compared(
            f"hidden model, {settings['solver']}, told", end, run(model, ours(**settings), sigmas),
            0.0,
        )  # fmt: skip
    published = {"form": "published", "w_stiff": 0.5}
    end = run(model, hidden(called(**published)), sigmas)
    yield compared(
        "hidden model, published form", end, run(model, ours(**published), sigmas), 0.0
    )  # fmt: skip


def _kind(mixing: Any) -> str:
    from erk_guid.integrations.comfyui.kinds import kind_of

    try:
        return kind_of(mixing)
    except Exception as error:
        return str(error)


def matrix(models: dict[str, Any]) -> Iterator[Found]:
    """Run all combinations of settings; count callbacks, and look for NaN."""
    for name in ("eps", "sd3", "flux"):
        model = models[name]
        sigmas, bad, count = schedule(model), [], 0
        for solver, form, gate, bound, cfg, batch in product(
            ("heun", "dpm_2", "modal"), ("auto", "published", "none"), ("stiffness", "step"),
            (0.0, 0.2), (1.0, 4.0), (1, 3),
        ):  # fmt: skip
            if (form != "published" and (gate, bound) != ("stiffness", 0.2)) or (
                solver == "modal" and form != "auto"
            ):
                continue  # the other widgets have no part in these
            heard: list[int] = []
            end = run(
                model, ours(solver=solver, form=form, gate=gate, bound=bound), sigmas, cfg, batch,
                callback=lambda i, *rest, heard=heard: heard.append(i),
            )  # fmt: skip
            count += 1
            if not bool(end.isfinite().all()) or heard != list(range(STEPS)):
                bad.append((solver, form, gate, bound, cfg, batch))
        said = f"{count - len(bad)} of {count} finite, one callback a step {bad[:2] or ''}"
        yield f"settings, {name}", said, not bad


def masks(models: dict[str, Any]) -> Iterator[Found]:
    """See that a mask keeps the latent outside of it."""
    for name in ("eps", "flux"):
        model = models[name]
        torch.manual_seed(9)
        latent = torch.randn_like(tiny.latent(model))
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4] = 1
        for solver in ("heun", "dpm_2", "modal"):
            end = run(
                model, ours(solver=solver), schedule(model), latent=latent, noise_mask=mask
            )  # fmt: skip
            kept = apart(end[..., 4:], latent[..., 4:])
            changed = apart(end[..., :4], latent[..., :4])
            said = f"outside {kept:.1e} apart, inside {changed:.1e}"
            yield f"mask, {solver}, {name}", said, kept < 1e-5 < changed


def schedules(models: dict[str, Any]) -> Iterator[Found]:
    """Give every schedule of ComfyUI to every sampler of ours."""
    names = import_module("comfy.samplers").SCHEDULER_NAMES
    settings: tuple[dict[str, Any], ...] = (
        {"solver": "heun"}, {"solver": "dpm_2"}, {"solver": "modal"},
        {"form": "published"}, {"solver": "modal", "eta": 0.5},
    )  # fmt: skip
    for name in ("eps", "flux"):
        model = models[name]
        mixing = model.get_model_object("model_sampling")
        flow = tiny.KINDS[name] == "flow"
        wrapped = _Exact(mixing, flow)
        bad, count = [], 0
        for scheduler, steps, given in product(names, COUNTS, settings):
            sigmas = schedule(model, steps, scheduler)
            made = ours(**given)
            said = error_of(
                made.sampler_function, wrapped, sigmas[0] * torch.ones(1, 1, 2, 2), sigmas,
                {"seed": 1}, disable=True, **made.extra_options,
            )  # fmt: skip
            count += 1
            if said:
                bad.append((scheduler, steps, given, said))
        said = f"{count - len(bad)} of {count} run {bad[:2] or ''}"
        yield f"schedules, {name}: {', '.join(names)}", said, not bad


class _Exact:
    """A model of standard normal data, which costs nothing."""

    def __init__(self, mixing: Any, flow: bool) -> None:
        self.model_sampling, self.flow = mixing, flow

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        s = sigma[:, None, None, None]
        share = 1 - s if self.flow else torch.ones_like(s)
        return share * x / (share**2 + s**2)


def upwards(models: dict[str, Any]) -> Iterator[Found]:
    """Follow FlipSigmas from a picture to noise, or say why not."""
    flip = import_module("nodes_of_comfyui").FlipSigmas
    for name, model in models.items():
        (sigmas,) = flip().get_sigmas(schedule(model))
        if tiny.KINDS[name] == "flow":
            sigmas = sigmas[:-1]  # ComfyUI divides the end by 1 - t
        torch.manual_seed(9)
        latent = torch.randn_like(tiny.latent(model))
        for solver, allowed in (("heun", 0.0), ("dpm_2", 1e-5)):
            end = run(model, ours(solver=solver, form="none"), sigmas, latent=latent)
            expected = run(model, stock(solver), sigmas, latent=latent)
            yield compared(f"FlipSigmas, {solver}, {name}", end, expected, allowed)
    for settings in ({"solver": "heun"}, {"solver": "modal"}, {"form": "published"}):
        said = error_of(run, model, ours(**settings), sigmas)
        yield f"FlipSigmas, {settings}", said[:100], "FlipSigmas" in said


def caches(models: dict[str, Any]) -> Iterator[Found]:
    """Sample with ComfyUI's step caches; the default bound must stay near the plain solver."""
    nodes = import_module("comfy_extras.nodes_easycache")
    for name, (kind, node) in product(
        ("eps", "flux"), (("EasyCache", nodes.EasyCacheNode), ("LazyCache", nodes.LazyCacheNode))
    ):
        cached = node.execute(tiny.model(name), 0.2, 0.15, 0.95, False).result[0]
        sigmas = schedule(cached, 20)

        def spread(model: Any = cached, levels: Tensor = sigmas, **settings: Any) -> float:
            return float(run(model, ours(**settings), levels, batch=1).std())

        plain = spread(form="none")
        published = {"form": "published", "w_stiff": 0.5, "w_con": 0.1}
        rows: list[tuple[str, dict[str, Any], bool]] = [("auto", {}, True)]
        for gate, (bound, more) in product(
            ("stiffness", "step"), (("the default bound", {}), ("no bound", {"bound": 0.0}))
        ):
            rows.append(
                (f"published, {gate}, {bound}", {**published, "gate": gate, **more}, not more)
            )
        for what, settings, judged in rows:
            ratio = spread(**settings) / plain
            said = f"std {ratio:.3g} times plain Heun's"
            yield f"{kind}, {name}, {what}", said, (0.5 < ratio < 2) if judged else None


def dropdown(models: dict[str, Any]) -> Iterator[Found]:
    """Sample by the names that are registered, as KSampler does."""
    from erk_guid.integrations.comfyui.sampling import LISTED, register

    program, samplers = import_module("comfy.sample"), import_module("comfy.samplers")
    register()
    register()
    for entry in LISTED:
        listed = samplers.SAMPLER_NAMES.count(entry.name)
        yield f"dropdown, {entry.name}", f"listed {listed} times", listed == 1
        for name, model in models.items():
            latent = tiny.latent(model)
            noise = program.prepare_noise(latent, SEED)
            end = program.sample(
                model, noise, STEPS, 4.0, entry.name, "normal", tiny.prompt(3), tiny.prompt(4),
                latent, disable_pbar=True, seed=SEED,
            )  # fmt: skip
            solver = entry.name.removeprefix("erk_")
            levels = samplers.KSampler(model, STEPS, "cpu", entry.name, "normal").sigmas
            expected = run(model, ours(solver=solver), levels, batch=1)
            yield compared(f"dropdown, {entry.name}, {name}", end, expected, 0.0)


def seams(models: dict[str, Any]) -> Iterator[Found]:
    """Measure what SplitSigmas costs modal, which begins anew at the seam."""
    model = models["flux"]
    fine = run(model, stock("heun"), schedule(model, 200))
    sigmas = schedule(model, 12)
    for name, made in (("modal", ours(solver="modal")), ("dpmpp_2m", stock("dpmpp_2m"))):
        whole = run(model, made, sigmas)
        program = import_module("comfy.sample")
        first = run(model, made, sigmas[:7])
        half = program.sample_custom(
            model, torch.zeros_like(first), 4.0, made, sigmas[6:], tiny.prompt(3), tiny.prompt(4),
            first, disable_pbar=True, seed=SEED,
        )  # fmt: skip
        errors = [float((end - fine).norm() / fine.norm()) for end in (whole, half)]
        said = f"error {errors[0]:.2g} whole, {errors[1]:.2g} split in the middle"
        yield f"SplitSigmas, {name}", said, None


def fits(models: dict[str, Any], work: Path) -> Iterator[Found]:
    """Fit on the connected model, read the file back, sample with it; interrupt a fit."""
    from erk_guid.integrations.comfyui.nodes import FIT, SIGMAS

    import_module("folder_paths").set_output_directory(str(work / "outputs"))
    cases = (("eps", "modal", True), ("flux", "modal", True), ("flux", "heun", True),
             ("flux", "dpmpp", False))  # fmt: skip
    for name, solver, zero in cases:
        model = models[name]
        given = {
            "model": model, "positive": tiny.prompt(3), "negative": tiny.prompt(4),
            "latent_image": {"samples": tiny.latent(model)}, "cfg": 2.0, "evaluations": 5,
            "samples": 16, "batch": 16, "trials": 8, "name": name,
        }  # fmt: skip
        sigmas, made, report = FIT.run({**given, "solver": solver, "end_at_zero": zero})
        (again, also) = SIGMAS.run({"file": f"{name}-5.json"})
        right = sigmas.dtype == torch.float32 and sigmas.ndim == 1
        right &= bool((sigmas.diff() < 0).all()) and (float(sigmas[-1]) == 0) == zero
        right &= torch.equal(sigmas, again)
        ends = [run(model, m, sigmas, 2.0) for m in (made, also)]
        right &= torch.equal(*ends) and bool(ends[0].isfinite().all())
        yield f"fit, {solver}, {name}", report.splitlines()[0][:110], right
    management = import_module("comfy.model_management")
    management.interrupt_current_processing()
    said = error_of(FIT.run, given)
    yield "fit, interrupted", said[:60], "InterruptProcessing" in said
    said = error_of(FIT.run, {**given, "name": "../x"})
    yield "fit, a name with a folder", said[:90], "no name of a file" in said


def traces(models: dict[str, Any]) -> Iterator[Found]:
    """Draw a trace, and compare its samples with SamplerCustomAdvanced's."""
    from erk_guid.integrations.comfyui.nodes import TRACE

    stock_nodes = import_module("nodes_of_comfyui")
    for name, form in product(("eps", "flux"), ("auto", "published")):
        model = models[name]
        guider = import_module("comfy.samplers").CFGGuider(model)
        guider.set_conds(tiny.prompt(3), tiny.prompt(4))
        guider.set_cfg(4.0)
        given = {
            "noise": stock_nodes.Noise_RandomNoise(SEED), "guider": guider,
            "sampler": ours(form=form), "sigmas": schedule(model),
            "latent_image": {"samples": tiny.latent(model, 2)},
        }  # fmt: skip
        latent, picture = TRACE.run(given)
        expected = stock_nodes.SamplerCustomAdvanced()
        expected = getattr(expected, expected.FUNCTION)(**given)
        same = torch.equal(latent["samples"], expected[0]["samples"])
        drawn = picture.ndim == 4 and picture.shape[-1] == 3 and float(picture.std()) > 0.01
        yield f"trace, {form}, {name}", f"picture {list(picture.shape)}", same and drawn
    said = error_of(TRACE.run, {**given, "sampler": ours(solver="modal")})
    yield "trace, modal", said[:80], "no embedded pair" in said
    said = error_of(TRACE.run, {**given, "sampler": stock("euler")})
    yield "trace, another sampler", said[:80], "only samplers" in said


def loading(work: Path) -> Iterator[Found]:
    """Load the pack as ComfyUI does: written, as a link, and with a path that could hide it."""
    from erk_guid.integrations import comfyui
    from erk_guid.integrations.comfyui.nodes import NODES
    from erk_guid.integrations.comfyui.pack import write_pack

    nodes = import_module("nodes")
    asyncio.run(nodes.init_builtin_extra_nodes())
    written, linked, hidden = (work / name for name in ("written", "linked", "hidden"))
    for folder in (written, linked, hidden):
        folder.mkdir()
    write_pack(written)
    write_pack(hidden)
    source = Path(comfyui.__file__).parent
    (linked / "erk-guid").symlink_to(source)
    infos = {}
    for how, folder in (("written", written), ("a link", linked), ("on the path", hidden)):
        for node in NODES:
            nodes.NODE_CLASS_MAPPINGS.pop(node.node_id, None)
        if folder == hidden:
            sys.path.insert(0, str(folder))
        loaded = asyncio.run(nodes.load_custom_node(str(folder / "erk-guid")))
        infos[how] = {n.node_id: _info(nodes, n.node_id) for n in NODES}
        yield f"loading, {how}", f"{len(infos[how])} nodes", loaded is True
    sys.path.remove(str(hidden))
    differ = _differences(infos["written"], infos["a link"])
    yield "V1 and V3 agree", ", ".join(differ) or "equal", not differ
    menus = {info["category"] for info in infos["written"].values()}
    theirs = {nodes.NODE_CLASS_MAPPINGS[node.like].CATEGORY for node in NODES}
    yield "menus as stock", ", ".join(sorted(menus)), menus == theirs
    said = _in_another_process(
        "import sys; sys.path.insert(0, sys.argv[1]); import erk_guid", work / "shadow", source
    )
    yield "a folder named erk_guid", said[-120:], "rename that folder" in said


def _info(nodes: Any, name: str) -> dict[str, Any]:
    """Return what /object_info says of a node."""
    made = nodes.NODE_CLASS_MAPPINGS[name]
    if hasattr(made, "GET_NODE_INFO_V1"):
        info: dict[str, Any] = made.GET_NODE_INFO_V1()
        return info
    return {
        "input": made.INPUT_TYPES(), "output": list(made.RETURN_TYPES),
        "output_name": list(made.RETURN_NAMES), "category": made.CATEGORY,
        "description": made.DESCRIPTION, "name": name,
        "output_tooltips": list(made.OUTPUT_TOOLTIPS),
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS[name],
    }  # fmt: skip


def _differences(v3: dict[str, Any], v1: dict[str, Any]) -> list[str]:
    differ = []
    for node, info in v1.items():
        for key, value in info.items():
            other = v3[node][key]
            if key == "input":
                value, other = _inputs(value), _inputs(other)
            if list(value) != list(other) or value != other:
                differ.append(f"{node} {key}: {value} {other}")
    return differ


def _inputs(given: dict[str, Any]) -> dict[str, Any]:
    """Return inputs as both APIs have them: type or options, and what is known of them."""
    found = {}
    for group, inputs in given.items():
        for name, (kind, *more) in inputs.items():
            options = dict(more[0]) if more else {}
            kind = options.pop("options", kind)
            for extra in ("multiselect", "optional", "multiline"):
                options.pop(extra, None)
            found[name] = (group, kind, options)
    return found


def _in_another_process(code: str, folder: Path, source: Path) -> str:
    import subprocess

    folder.mkdir()
    (folder / "erk_guid").symlink_to(source)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    return done.stderr.strip()


def everything(work: Path) -> Iterator[Found]:
    """Yield all rows."""
    begin()
    logging.disable(logging.WARNING)
    sys.modules["nodes_of_comfyui"] = import_module("comfy_extras.nodes_custom_sampler")
    models = {name: tiny.model(name) for name in tiny.KINDS}
    yield from functions()
    yield from loading(work)
    for check in (
        plain, our_own, detection, matrix, masks, schedules, upwards, caches, dropdown, seams,
        traces,
    ):  # fmt: skip
        yield from check(models)
    yield from fits(models, work)
