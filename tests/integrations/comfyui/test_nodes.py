"""The nodes and samplers for ComfyUI, with a stand-in that has that program's call shapes."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import oracle
from support.comfyui_program import (
    CONST,
    EPS,
    CFGGuider,
    FromPicture,
    Patcher,
    Unlike,
    Wrapped,
    installed,
)

import erk_guid
from erk_guid.common.errors import ErkGuidError
from erk_guid.integrations.comfyui import comfy_entrypoint, nodes, sampling, tracing, v1, v3
from erk_guid.integrations.comfyui.__main__ import main as pack_command
from erk_guid.integrations.comfyui.kinds import kind_of, model_sampling_of
from erk_guid.integrations.comfyui.pack import files, write_pack
from erk_guid.integrations.comfyui.tracing import in_sigma
from erk_guid.integrations.comfyui.workflows import KINDS, examples
from erk_guid.solvers.ancestral import Descent

SIGMAS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.1, 0.0])
TIMES = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0])


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return installed(monkeypatch, tmp_path / "output")


def made(**settings: Any) -> Any:
    return nodes.SAMPLER.run(settings)[0]


def noise(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def judged(mixing: Any, x: torch.Tensor, levels: torch.Tensor, **options: Any) -> torch.Tensor:
    model = Wrapped(mixing)
    return erk_guid.sample(lambda x, s: model(x, s.expand(len(x))), x, levels, **options)


# --- the sampler ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "dpm_2"])
def test_each_form_is_that_of_the_library(solver: str) -> None:
    # A form that is mixed up, or a widget's value that does not arrive, differs.
    forms: dict[str, tuple[dict[str, Any], Any]] = {
        "auto": ({}, erk_guid.ParameterFreeGuidance()),
        "none": ({}, None),
        "published": (
            {"w_stiff": 0.7, "w_con": 0.2, "gate": "step", "bound": 0.1},
            erk_guid.ERKGuidance(0.7, 0.2, gate="step", bound=0.1),
        ),
    }
    assert set(nodes.FORM_NAMES) == set(forms)
    x = 14.6 * noise()
    for form, (settings, guidance) in forms.items():
        sampler = made(solver=solver, form=form, **settings)
        expected = judged(EPS(), x, SIGMAS, solver=solver.replace("_", ""), guidance=guidance)
        assert torch.equal(sampler.sample(Wrapped(EPS()), x, SIGMAS), expected)


def test_the_published_form_is_bounded_unless_told_otherwise() -> None:
    # With step caches it ran away: the default was no limit.
    x = 14.6 * noise()
    for settings, bound in (({}, 0.2), ({"bound": 0.0}, None)):
        guidance = erk_guid.ERKGuidance(5.0, 0.0, bound=bound)
        sampler = made(form="published", w_stiff=5.0, w_con=0.0, **settings)
        expected = judged(EPS(), x, SIGMAS, guidance=guidance)
        assert torch.equal(sampler.sample(Wrapped(EPS()), x, SIGMAS), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"solver": "huen"}, "solver 'huen' is unknown; take heun, dpm_2, modal"),
        ({"form": "paper"}, "form 'paper' is unknown"),
        ({"gate": "steps"}, "gate 'steps' is unknown"),
        ({"model_type": "edm"}, "model_type 'edm' is unknown"),
        ({"w_stif": 1.0}, "has no input 'w_stif'; it has w_stiff"),
        ({"w_stiff": -1.0}, "w_stiff must be a number from 0 to 10, got -1"),
        ({"w_con": float("nan")}, "w_con must be a number"),
        ({"eta": 0.5}, "eta must be 0 with the solver heun, got 0.5"),
        ({"eta": 3, "solver": "modal"}, "eta must be a number from 0 to 1, got 3"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], said: str) -> None:
    # ComfyUI checks widgets only: what is connected to them, and calls by programs, came through.
    with pytest.raises(ErkGuidError, match=said.replace(".", r"\.")):
        made(**given)


def test_the_seed_decides_the_noise_of_modal() -> None:
    # Global noise would not repeat. The seed itself would draw the noise that x began as.
    sampler = made(solver="modal", eta=0.5)
    start = 80 * torch.randn(200, 2, generator=torch.Generator().manual_seed(7))

    def sampled(seed: int) -> torch.Tensor:
        found: torch.Tensor = sampler.sampler_function(
            _Nothing(), start, torch.tensor([80.0, 20.0]), extra_args={"seed": seed}, disable=True,
            **sampler.extra_options,
        )  # fmt: skip
        return found

    first, again, other, _ = (sampled(seed) for seed in (7, 7, 8, 2**64 - 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    descent = Descent.of(80.0, 20.0, 0.5)
    added = (first - start * descent.scale) / descent.spread
    assert float(added.std()) == pytest.approx(1, rel=0.1)
    assert abs(float((added * start).mean())) / 80 < 0.15


class _Nothing:
    model_sampling = EPS()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        return torch.zeros_like(x)


# --- what the model is ------------------------------------------------------------------------


def test_flows_are_integrated_as_flows() -> None:
    # Integrated as the other kind, modal was 220 % off.
    flow = erk_guid.RectifiedFlow()
    for settings, options in (
        ({"solver": "modal"}, {"solver": "modal", "process": flow}),
        ({}, {"guidance": erk_guid.ParameterFreeGuidance(), "process": flow}),
        ({"solver": "dpm_2"}, {"solver": "dpm2", "guidance": erk_guid.ParameterFreeGuidance()}),
        ({"form": "none"}, {"solver": "heun"}),
    ):  # fmt: skip
        end = made(**settings).sample(Wrapped(CONST()), noise(), TIMES)
        assert torch.equal(end, judged(CONST(), noise(), TIMES, **options)), settings


def test_wrappers_are_looked_through() -> None:
    # Only a depth of exactly two was seen before; at all others a flow passed for the other kind.
    mixing = CONST()
    deep: Any = types.SimpleNamespace(model_sampling=mixing)
    for depth in range(6):
        assert model_sampling_of(deep) is mixing, depth
        deep = types.SimpleNamespace(inner_model=deep)
    guider = types.SimpleNamespace(model_patcher=Patcher(mixing))
    assert model_sampling_of(types.SimpleNamespace(inner_model=guider)) is mixing
    circle = types.SimpleNamespace()
    circle.inner_model = circle
    assert model_sampling_of(circle) is None


@pytest.mark.parametrize(
    ("mixing", "said"),
    [
        (None, "something wraps it"),
        (object(), "object does not mix noise and data"),
        (FromPicture(), "begins at a picture and not at noise"),
        (Unlike(), "mixes unlike both"),
    ],
)
def test_a_model_that_cannot_be_told_is_refused(mixing: Any, said: str) -> None:
    # "sigma" was assumed in silence. The message must name the widget that helps.
    with pytest.raises(ErkGuidError, match=f"{said}.*model_type to 'sigma' or 'flow'"):
        kind_of(mixing)
    assert [kind_of(known) for known in (EPS(), CONST())] == ["sigma", "flow"]


def test_nothing_is_asked_where_it_does_not_matter() -> None:
    # The published form and plain solvers have one formula: a hidden model is no error there.
    def hidden(x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        return Wrapped(CONST())(x, sigma)

    for settings in ({"form": "published"}, {"form": "none"}, {"solver": "dpm_2"}):
        end = made(**settings).sample(hidden, noise(), TIMES)
        assert torch.equal(end, made(**settings).sample(Wrapped(CONST()), noise(), TIMES))
    with pytest.raises(ErkGuidError, match="set model_type"):
        made(solver="modal").sample(hidden, noise(), TIMES)
    end = made(solver="modal", model_type="flow").sample(hidden, noise(), TIMES)
    assert torch.equal(end, made(solver="modal").sample(Wrapped(CONST()), noise(), TIMES))


def test_flip_sigmas_goes_up_or_is_named() -> None:
    # Refused before, with a message that named nothing the user had done.
    up = SIGMAS[:-1].flip(0)
    end = made(form="none").sample(Wrapped(EPS()), noise(), up)
    x = noise()
    for s, t in pairwise(up):  # Heun's formula, written once more
        d = (x - Wrapped(EPS())(x, s.reshape(1))) / s
        low = x + (t - s) * d
        x = x + (t - s) * (d + (low - Wrapped(EPS())(low, t.reshape(1))) / t) / 2
    torch.testing.assert_close(end, x, rtol=1e-5, atol=1e-6)
    for settings in ({}, {"form": "published"}, {"solver": "modal"}):
        with pytest.raises(ValueError, match="FlipSigmas"):
            made(**settings).sample(Wrapped(EPS()), noise(), up)


# --- the dropdown -----------------------------------------------------------------------------


def test_the_dropdown_has_each_sampler_once(program: Any) -> None:
    # A second registration (a reload, two packs) must not list it twice, and a name that another
    # pack has is left alone.
    functions = sys.modules["comfy.k_diffusion.sampling"]
    theirs = types.FunctionType((lambda: None).__code__, {"__name__": "another_pack"})
    theirs.__module__ = "another_pack"
    functions.sample_modal = theirs  # type: ignore[attr-defined]
    sampling.register()
    sampling.register()
    assert program.KSampler.SAMPLERS == ["euler", "heun", "erk_heun", "erk_dpm_2"]
    assert functions.sample_modal is theirs  # type: ignore[attr-defined]
    del functions.sample_modal  # type: ignore[attr-defined]
    sampling.register()
    assert program.KSampler.SAMPLERS[2:] == ["erk_heun", "erk_dpm_2", "modal"]
    discarding = program.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    assert discarding == {"dpm_2", "erk_dpm_2"}


@pytest.mark.parametrize("name", ["erk_heun", "erk_dpm_2", "modal"])
def test_an_entry_is_the_node_with_its_defaults(name: str) -> None:
    sampling.register()
    function = getattr(sys.modules["comfy.k_diffusion.sampling"], f"sample_{name}")
    assert function.__name__ == f"sample_{name}"  # other packs look at it
    found = function(Wrapped(CONST()), noise(), TIMES, extra_args={}, callback=None, disable=True)
    sampler = made(solver=name.removeprefix("erk_"))
    assert torch.equal(found, sampler.sample(Wrapped(CONST()), noise(), TIMES))


# --- fits -------------------------------------------------------------------------------------


def fitted(mixing: Any, **more: Any) -> tuple[torch.Tensor, Any, str]:
    given = {
        "model": Patcher(mixing), "positive": [], "negative": [], "cfg": 1.0, "evaluations": 5,
        "latent_image": {"samples": torch.zeros(1, 4, 2, 2)}, "samples": 16, "batch": 16,
        "trials": 4, **more,
    }  # fmt: skip
    found: Any = nodes.FIT.run(given)
    return found


@pytest.mark.parametrize(("mixing", "first"), [(EPS(), 14.6), (CONST(), 1.0)])
@pytest.mark.parametrize(("solver", "zero"), [("modal", True), ("heun", True), ("dpmpp", False)])
def test_a_fit_is_read_back(mixing: Any, first: float, solver: str, zero: bool) -> None:
    sigmas, sampler, report = fitted(mixing, solver=solver, end_at_zero=zero, name="mine")
    # What ComfyUI's own nodes expect of SIGMAS.
    assert sigmas.dtype == torch.float32
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[0]) == pytest.approx(first)
    assert float(sigmas[-1]) == pytest.approx(0.0 if zero else mixing.sigma_min, rel=1e-4)
    again, also = nodes.SIGMAS.run({"file": "mine-5.json"})
    assert torch.equal(again, sigmas)
    assert "mine-5.json" in report
    # The sampler has the fitted responses, which the node's own modal does not know.
    x = first * noise()
    ends = [s.sample(Wrapped(mixing), x, sigmas) for s in (sampler, also)]
    assert torch.equal(*ends)
    # It calls the model as often as was asked for, and its progress reaches ComfyUI.
    calls: list[int] = []

    class Counted(Wrapped):
        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
            calls.append(len(x))
            return super().__call__(x, sigma)

    sampler.sample(Counted(mixing), x, sigmas)
    assert len(calls) <= 5
    assert sys.modules["comfy.utils"].progress  # type: ignore[attr-defined]


def test_a_fit_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def asked() -> None:
        raise StoppedError

    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", asked)
    with pytest.raises(StoppedError):
        fitted(EPS())


@pytest.mark.parametrize("name", ["../x", "a/b", "", " .. ", "a\nb", "\x1b[2J"])
def test_a_fit_writes_into_its_own_folder(name: str, tmp_path: Path) -> None:
    # The one who types it may be another than the one whose computer it is.
    with pytest.raises(ErkGuidError, match="is no name of a file") as caught:
        fitted(EPS(), name=name)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "output").exists()


def test_a_settings_file_is_seen_to_change(tmp_path: Path) -> None:
    # ComfyUI keeps a node's output while its inputs stay: a file that is written again would not
    # be read. And a file of the command line, with guidance of a named solver, keeps that.
    path = tmp_path / "mine.json"
    assert nodes.SIGMAS.fingerprint is not None
    before = nodes.SIGMAS.fingerprint(file=str(path))
    content = {
        "erk_guid_settings": 1, "w_stiff": 0.5, "w_con": 0.1,
        "made_for": {"solver": "heun", "schedule": [14.6, 3.0, 0.2], "denoise_to_zero": True},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert nodes.SIGMAS.fingerprint(file=str(path)) != before
    sigmas, sampler = nodes.SIGMAS.run({"file": str(path)})
    assert torch.equal(sigmas, torch.tensor([14.6, 3.0, 0.2, 0.0]))
    assert sampler.extra_options["guidance"] == erk_guid.ERKGuidance(0.5, 0.1)
    del content["made_for"]["schedule"]  # type: ignore[attr-defined]
    path.write_text(json.dumps(content))
    with pytest.raises(ErkGuidError, match="holds no noise levels"):
        nodes.SIGMAS.run({"file": str(path)})
    with pytest.raises(ErkGuidError, match="cannot read"):
        nodes.SIGMAS.run({"file": "there-is-none.json"})


# --- traces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixing", "levels"), [(EPS(), SIGMAS), (CONST(), TIMES)])
@pytest.mark.parametrize("form", ["auto", "published", "none"])
def test_a_trace_changes_no_sample(mixing: Any, levels: torch.Tensor, form: str) -> None:
    pytest.importorskip("matplotlib")
    given = {
        "noise": noise(), "guider": CFGGuider(Patcher(mixing)), "sampler": made(form=form),
        "sigmas": levels, "latent_image": {"samples": torch.zeros(3, 4, 2, 2)},
    }  # fmt: skip
    latent, picture = nodes.TRACE.run(given)
    x = mixing.noise_scaling(levels[0], noise(), torch.zeros(3, 4, 2, 2), True)
    assert torch.equal(latent["samples"], given["sampler"].sample(Wrapped(mixing), x, levels))
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert given["sampler"].extra_options["record"] is None  # the SAMPLER itself is unchanged


def test_what_cannot_be_traced_is_named(monkeypatch: pytest.MonkeyPatch, program: Any) -> None:
    given = {
        "noise": noise(), "guider": CFGGuider(Patcher(EPS())), "sigmas": SIGMAS,
        "latent_image": {"samples": torch.zeros(3, 4, 2, 2)},
    }  # fmt: skip
    with pytest.raises(ErkGuidError, match="'modal' has no embedded pair"):
        nodes.TRACE.run({**given, "sampler": made(solver="modal")})
    with pytest.raises(ErkGuidError, match="only samplers of the node"):
        nodes.TRACE.run({**given, "sampler": program.KSAMPLER(lambda *a: None)})
    # Without matplotlib it says so before the run, and not behind it.
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ErkGuidError, match=r"needs the package matplotlib"):
        nodes.TRACE.run({**given, "guider": None, "sampler": made()})


def test_a_trace_of_a_flow_has_one_unit() -> None:
    # Stiffness is per unit of noise over signal there, and the step was in t: their product, h rho,
    # would be in no unit. The judge is the same run written in noise over signal.
    heard: list[Any] = []
    flow, guidance = erk_guid.RectifiedFlow(), erk_guid.ParameterFreeGuidance()
    times = TIMES[1:].double()
    x = noise().double()
    judged(CONST(), x, times, process=flow, guidance=guidance, callback=heard.append)
    expected: list[Any] = []
    judged(
        EPS(), x / (1 - times[0]), times / (1 - times), guidance=guidance,
        callback=expected.append,
    )  # fmt: skip
    for info, there in zip(heard, expected, strict=True):
        seen = in_sigma(info, flow)
        for name in ("sigma", "sigma_hat", "sigma_next"):
            assert getattr(seen, name) == pytest.approx(getattr(there, name))
        torch.testing.assert_close(seen.x, there.x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(seen.x_before, there.x_before, rtol=1e-6, atol=1e-6)
        if there.correction_size is not None:
            torch.testing.assert_close(
                seen.correction_size, there.correction_size, rtol=1e-3, atol=1e-6
            )


# --- both APIs, from one description ----------------------------------------------------------


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.node_id)
def test_both_apis_have_the_same_node(node: Any) -> None:
    old, new = v1.node_class(node), v3.node_class(node)
    schema = new.define_schema().options  # type: ignore[attr-defined]
    groups = old.INPUT_TYPES()  # type: ignore[attr-defined]
    flat = [(n, v, g == "optional") for g in groups for n, v in groups[g].items()]
    assert [i.values[0] for i in schema["inputs"]] == [name for name, _, _ in flat]
    for given, (_, (kind, options), optional) in zip(schema["inputs"], flat, strict=True):
        theirs = dict(given.options)
        assert theirs.pop("optional") == optional
        assert type(given).__name__.removesuffix("Input").upper() == (
            "COMBO" if isinstance(kind, list) else kind
        )
        assert theirs.pop("options", kind) == kind
        assert theirs == options
    assert [o.options["display_name"] for o in schema["outputs"]] == list(
        old.RETURN_NAMES  # type: ignore[attr-defined]
    )
    assert schema["node_id"] == old.__name__
    # The function takes what is described, by the same names.
    assert list(inspect.signature(node.function).parameters) == [i.name for i in node.inputs]
    # ComfyUI asks for unique names among inputs and outputs together.
    names = [*(i.name for i in node.inputs), *(o.name for o in node.outputs)]
    assert len(names) == len(set(names))
    # A default is allowed by the node itself.
    for given in node.inputs:
        if given.default is not None:
            given.check(given.default)


def test_saved_workflows_keep_their_widgets() -> None:
    # ComfyUI saves values by position. Those of earlier versions begin with these, in this order.
    earlier = ["w_stiff", "w_con", "form", "solver", "gate", "bound", "model_type", "eta"]
    assert [i.name for i in nodes.SAMPLER.inputs][: len(earlier)] == earlier
    assert set(v1.mappings(nodes.NODES)[0]) >= {"ERKGuidSampler", "ERKGuidSigmas"}


def test_both_apis_run() -> None:
    old, new = v1.node_class(nodes.SAMPLER), v3.node_class(nodes.SAMPLER)
    x = 14.6 * noise()
    (first,) = getattr(old(), old.FUNCTION)(w_stiff=0.5, w_con=0.1)  # type: ignore[attr-defined]
    (second,) = new.execute(w_stiff=0.5, w_con=0.1).values  # type: ignore[attr-defined]
    assert torch.equal(*(s.sample(Wrapped(EPS()), x, SIGMAS) for s in (first, second)))
    with pytest.raises(ErkGuidError, match="no input 'w_stif'"):
        new.execute(w_stif=0.5)  # type: ignore[attr-defined]
    extension = comfy_entrypoint()
    listed = asyncio.run(extension.get_node_list())
    assert [c.__name__ for c in listed] == [node.node_id for node in nodes.NODES]
    # The menu is that of a stock node, where the program has it.
    trace = v1.node_class(nodes.TRACE)
    assert trace.CATEGORY == "sampling/advanced"  # type: ignore[attr-defined]
    assert old.CATEGORY == "sampling/samplers"  # type: ignore[attr-defined]


# --- the folder -------------------------------------------------------------------------------


def test_the_folder_is_whole(tmp_path: Path) -> None:
    folder = write_pack(tmp_path, "someone", "https://example.org/x")
    assert folder.name == "erk-guid"  # with an underscore it would hide the package
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(files())
    assert (folder / "LICENSE").read_text().strip()
    for node in nodes.NODES:
        text = (folder / "web" / "docs" / f"{node.node_id}.md").read_text()
        assert all(f"| {i.name} |" in text for i in node.inputs)
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    # What the registry asks for: a name without the program's own, a fixed version, a publisher.
    assert "comfy" not in project["project"]["name"].lower()
    assert project["project"]["version"] == erk_guid.__version__
    assert project["project"]["dependencies"] == [f"erk-guid>={erk_guid.__version__}"]
    assert project["project"]["urls"]["Repository"] == "https://example.org/x"
    assert project["tool"]["comfy"]["PublisherId"] == "someone"
    write_pack(tmp_path)  # a newer version over an older one


def test_the_folder_loads_with_either_api(tmp_path: Path, monkeypatch: Any) -> None:
    # As ComfyUI loads it: by path. With both names NODE_CLASS_MAPPINGS would win.
    path = write_pack(tmp_path) / "__init__.py"

    def loaded() -> Any:
        spec = importlib.util.spec_from_file_location("custom_nodes.erk-guid", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    new = loaded()
    assert not hasattr(new, "NODE_CLASS_MAPPINGS")
    assert (path.parent / new.WEB_DIRECTORY / "docs").is_dir()
    assert asyncio.run(new.comfy_entrypoint().get_node_list())
    for name in ("comfy_api", "comfy_api.latest"):
        monkeypatch.delitem(sys.modules, name)
    old = loaded()
    assert set(old.NODE_CLASS_MAPPINGS) == set(old.NODE_DISPLAY_NAME_MAPPINGS)
    assert not hasattr(old, "comfy_entrypoint")


def test_a_folder_that_hides_the_package_is_named(tmp_path: Path) -> None:
    # The docs once told to link a folder named erk_guid; with custom_nodes on the path, which some
    # packs put there, "No module named erk_guid.integrations" was all that a user saw.
    source = Path(erk_guid.__file__).parent / "integrations" / "comfyui"
    (tmp_path / "erk_guid").symlink_to(source)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[0] = {str(tmp_path)!r}; import erk_guid"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "hides the package of that name; rename that folder" in done.stderr
    with pytest.raises(ErkGuidError, match="hides the package"):
        write_pack(tmp_path)


def test_an_empty_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: the pack written into the current folder.
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(pack_command, [""])
    assert done.exit_code == 2
    assert "it is empty" in done.output
    assert not list(tmp_path.iterdir())


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ErkGuidError, match="there is no folder"):
        write_pack(tmp_path / "none")
    (tmp_path / "a" / "erk-guid").mkdir(parents=True)
    with pytest.raises(ErkGuidError, match="is something else"):
        write_pack(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "erk-guid").symlink_to(tmp_path / "a")
    with pytest.raises(ErkGuidError, match="is a link"):  # it would write into the package
        write_pack(tmp_path / "b")
    with pytest.raises(ErkGuidError, match="has characters"):
        write_pack(tmp_path, publisher='x"\n[tool]')


@pytest.mark.parametrize("name", examples())
def test_examples_are_connected(name: str) -> None:
    # The real program judges them in scripts/check_comfyui; this sees that links are consistent.
    content = examples()[name]
    by_id = {node["id"]: node for node in content["nodes"]}
    for number, source, slot, target, at, kind in content["links"]:
        assert number in by_id[source]["outputs"][slot]["links"]
        assert by_id[target]["inputs"][at]["link"] == number
        assert kind == by_id[source]["outputs"][slot]["type"]
        assert by_id[target]["inputs"][at]["type"] in (kind, "*")
    for node in content["nodes"]:
        assert all(given["link"] for given in node["inputs"]), node["type"]
        assert node["type"] in KINDS
    assert any(node["type"] == "SaveImage" for node in content["nodes"])


def test_outside_of_comfyui_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "comfy" or n.startswith("comfy.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ErkGuidError, match=r"only inside ComfyUI: there is no comfy\.samplers"):
        made()


def test_the_oracle_is_near_with_modal() -> None:
    # From outside: on a problem with a known solution modal is nearer than Heun at equal calls.
    denoiser, start, exact = oracle("tree80")

    class Model:
        model_sampling = EPS()

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
            return denoiser(x, sigma[0])

    def error(steps: int, **settings: Any) -> float:
        end = made(**settings).sample(Model(), start, erk_guid.karras_sigmas(steps))
        return float((end - exact).norm(dim=1).mean())

    assert error(15, solver="modal") < error(8, form="none")
