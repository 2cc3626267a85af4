#!/usr/bin/env python3
"""Run the small pipelines of diffusers' own tests with our schedulers, and compare with theirs.

    pip install accelerate parameterized requests_mock
    python scripts/check_diffusers.py CHECKOUT [PIPELINE ...] [--steps 20] [--jobs 2]

CHECKOUT is diffusers' repository, in about the version that is installed: the installed package has
no tests. Nothing is downloaded. Where a test would fetch a tokenizer or a small text encoder, a
small one of the kind is made with random weights; pipelines whose tests fetch more are left out,
and named.

The expected values come from diffusers: a pipeline's own scheduler, which solves the same ODE with
N and with 2 N steps. Ours, with 2 N, must be as near to its 2 N as it is itself with N, within a
factor of 4 (spacings differ a little). Schedulers that draw noise have the one of their family that
draws none in their place, and clean data are not clipped. Then, with 5 steps and each form of ours:
a run gives the same again, with a scheduler made from the config, and after a run of another
length; and the first of two images is that of a run alone, where it is so with theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import string
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

MANY = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "modal": ("modal", {}),
    "modal, eta": ("modal", {"eta": 0.5}),
    "Heun": ("heun", {"w_stiff": 0}),
    "Heun, published": ("heun", {"w_stiff": 0.5, "w_con": 0.05}),
    "Heun, auto": ("heun", {"w_stiff": "auto"}),
}
PLAIN = ("modal", "Heun")
"""Forms that solve the pipeline's ODE, so that they must end where its own scheduler does."""
FACTOR, FLOOR = 4.0, 1e-3
SAME, SHORT = 2e-4, 5
IN_A_BATCH = 1e-2
"""How far the first of two may be from that of one alone: rounding differs, and guidance may divide
by small numbers."""


@dataclasses.dataclass
class Found:
    """What came out for one pipeline.

    Attributes:
        name: of the pipeline.
        own: of its scheduler.
        apart: how far its own N steps are from its own 2 N, relative.
        ours: how far ours are from its own 2 N, by form.
        wrong: what should be equal and is not.
        left: why it, or a form, was not run.
    """

    name: str
    own: str = ""
    apart: float | None = None
    ours: dict[str, float] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    left: str = ""


# --- what the tests would fetch ---------------------------------------------------------------


def small_tokenizer(*_: Any, **__: Any) -> Any:
    """Return a tokenizer whose tokens are single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    words = special + [c for c in string.printable[:90] if c not in special]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>", model_max_length=77,
    )  # fmt: skip
    found.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else 'x' }}{% endfor %}"
    )
    return found


def put_small_ones_in_place() -> None:
    """Make transformers give small random tokenizers and text encoders in place of fetching."""
    transformers: Any = importlib.import_module("transformers")
    for name in dir(transformers):
        if name.endswith(("Tokenizer", "TokenizerFast")):
            getattr(transformers, name).from_pretrained = staticmethod(small_tokenizer)
    with contextlib.suppress(ImportError):  # it needs sentencepiece
        kolors: Any = importlib.import_module("diffusers.pipelines.kolors.tokenizer")
        kolors.ChatGLMTokenizer.from_pretrained = staticmethod(small_tokenizer)
    t5 = {
        "vocab_size": 1103, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 4,
    }  # fmt: skip
    usual = {
        "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    text = usual | {"vocab_size": 1000, "num_key_value_heads": 4, "head_dim": 8}
    image = usual | {"image_size": 32, "patch_size": 8}
    configs = {
        "T5EncoderModel": transformers.T5Config(**t5),
        "UMT5EncoderModel": transformers.UMT5Config(**t5),
        "BertModel": transformers.BertConfig(**usual | {"vocab_size": 1124}),
        "LlamaForCausalLM": transformers.LlamaConfig(**text | {"hidden_size": 16, "head_dim": 4}),
        "SiglipVisionModel": transformers.SiglipVisionConfig(**image),
        "Gemma3ForConditionalGeneration": transformers.Gemma3Config(
            text_config=text, vision_config=image, mm_tokens_per_image=4
        ),
    }
    for name, config in configs.items():
        kind = getattr(transformers, name)
        kind.from_pretrained = classmethod(lambda cls, *_, _config=config, **__: cls(_config))
    transformers.AutoConfig.from_pretrained = staticmethod(
        lambda *_, **__: transformers.T5Config(**t5)
    )
    transformers.ClapFeatureExtractor.from_pretrained = classmethod(lambda cls, *_, **__: cls())
    transformers.SiglipImageProcessor.from_pretrained = classmethod(
        lambda cls, *_, **__: cls(size={"height": 32, "width": 32})
    )


# --- the pipelines ----------------------------------------------------------------------------


def prepare(checkout: Path) -> None:
    """Make this process ready to import the tests of a checkout."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(checkout), str(root)]
    torch.set_num_threads(1)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    put_small_ones_in_place()


def pipelines(checkout: Path) -> dict[str, tuple[str, str]]:
    """Return the test of each pipeline: the module's and the class's name."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        module = ".".join(path.relative_to(checkout).with_suffix("").parts)
        try:
            members: dict[str, Any] = vars(importlib.import_module(module))
        except Exception as error:  # of any kind, from a file that is not ours
            print(f"{module}: not read ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        for name, kind in list(members.items()):
            if not inspect.isclass(kind) or kind.__module__ != module or "Onnx" in name:
                continue
            try:
                test: Any = kind()
                pipeline = test.pipeline_class.__name__
            except Exception:
                continue  # a test of something else
            if callable(getattr(test, "get_dummy_components", None)):
                found.setdefault(pipeline, (module, name))
    return found


class Pipeline:
    """One of diffusers' pipelines with the small components and inputs of its test."""

    def __init__(self, module: str, name: str) -> None:
        self.test = getattr(importlib.import_module(module), name)()
        torch.manual_seed(0)
        self.pipe: Any = self.test.pipeline_class(**self.test.get_dummy_components())
        self.pipe.set_progress_bar_config(disable=True)
        for part in vars(self.pipe).values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        self.arguments = inspect.signature(type(self.pipe).__call__).parameters

    def run(self, scheduler: Any, steps: int, **changes: Any) -> torch.Tensor:
        """Return what the last step of a run gives."""
        last: list[torch.Tensor] = []
        kind = type(scheduler)
        step = kind.step

        def noted(*args: Any, **options: Any) -> Any:
            found = step(*args, **options)
            last[:] = [found[0].detach().float().clone()]
            return found

        noted.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
        torch.manual_seed(0)
        takes_device = inspect.signature(self.test.get_dummy_inputs).parameters
        inputs = dict(self.test.get_dummy_inputs(*["cpu"][: len(takes_device)]))
        inputs["generator"] = torch.Generator().manual_seed(3)
        self.pipe.scheduler = scheduler
        kind.step = noted  # on the class: some pipelines copy their scheduler
        try:
            with torch.no_grad():
                self.pipe(**inputs | {"num_inference_steps": steps} | changes)
        finally:
            kind.step = step
        if not last:
            raise ValueError("it never calls step")
        return last[0]


def without_noise(scheduler: Any) -> Any:
    """Return the scheduler of a pipeline's family that draws no noise and clips nothing."""
    import diffusers

    instead = {
        "DDPMScheduler": "DDIMScheduler",
        "DDPMParallelScheduler": "DDIMScheduler",
        "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
        "CogVideoXDPMScheduler": "CogVideoXDDIMScheduler",
    }
    name = instead.get(type(scheduler).__name__)
    kind: Any = type(scheduler) if name is None else getattr(diffusers, name)
    return kind.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=True)


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Return the relative distance; infinity where shapes differ."""
    if found.shape != right.shape:
        return float("inf")
    return float((found - right).norm() / right.norm().clamp(min=1e-30))


def check(name: str, module: str, test: str, steps: int) -> Found:
    """Hold one pipeline with our schedulers against itself with its own."""
    from erk_guid.integrations.diffusers import for_pipeline

    found = Found(name)
    case = Pipeline(module, test)
    if "num_inference_steps" not in case.arguments or not hasattr(case.pipe, "scheduler"):
        return dataclasses.replace(found, left="no scheduler, or no number of steps")
    own = without_noise(case.pipe.scheduler)
    found.own = type(own).__name__
    case.pipe.scheduler = own
    ours: dict[str, Callable[[], Any]] = {}
    for form, (solver, options) in FORMS.items():
        case.pipe.scheduler = own
        try:
            made = for_pipeline(case.pipe, solver, **options)
        except ValueError as error:
            found.left = f"refused: {error}"
            continue
        ours[form] = functools.partial(type(made).from_config, made.config)
    if not ours:
        return found
    fine = case.run(own, 2 * steps)
    found.apart = apart(case.run(own, steps), fine)
    for form in PLAIN:
        if form in ours:
            found.ours[form] = apart(case.run(ours[form](), 2 * steps), fine)
            if found.ours[form] > FACTOR * found.apart + FLOOR:
                found.wrong.append(f"{form} ends elsewhere")
    many = next((argument for argument in MANY if argument in case.arguments), None)
    for form, make in ours.items():
        found.wrong += [f"{form}: {what}" for what in unlike(case, make, own, many)]
    return found


def unlike(case: Pipeline, make: Callable[[], Any], own: Any, many: str | None) -> Iterator[str]:
    """Yield what a scheduler does otherwise than it did before, or with two images."""
    scheduler = make()
    first = case.run(scheduler, SHORT)
    if not first.isfinite().all():
        yield "not finite"
    if apart(case.run(scheduler, SHORT), first) > SAME:
        yield "another result when run again"
    case.run(scheduler, SHORT + 2)
    if apart(case.run(scheduler, SHORT), first) > SAME:
        yield "another result after a run of another length"
    if apart(case.run(make(), SHORT), first) > SAME:
        yield "another result with a new scheduler"
    if many is None or scheduler.config.get("eta"):
        return
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 9)]
    two: dict[str, Any] = {many: 2, "generator": generators}
    try:
        alone, both = case.run(own, SHORT), case.run(own, SHORT, **two)
    except (ValueError, RuntimeError, IndexError):
        return  # not with theirs either
    if apart(both[:1], alone) > SAME:
        return
    generators[:] = [torch.Generator().manual_seed(seed) for seed in (3, 9)]
    try:
        if apart(case.run(scheduler, SHORT, **two)[:1], first) > IN_A_BATCH:
            yield "the first of two is not that of one alone"
    except (ValueError, RuntimeError, IndexError) as error:
        yield f"two at once: {type(error).__name__}: {error}"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the body after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def checked(asked: tuple[str, str, str, int, int]) -> Found:
    """Check one pipeline; what goes wrong in it is an answer, too."""
    name, module, test, steps, seconds = asked
    try:
        with at_most(seconds):
            return check(name, module, test, steps)
    except TimeoutError:
        return Found(name, left=f"not done in {seconds} seconds")
    except BaseException as error:  # pytest's skips are no Exceptions
        return Found(name, left=f"{type(error).__name__}: {error}")


def line(found: Found) -> str:
    """Return one row of the table, in Markdown."""
    numbers = [found.apart, *(found.ours.get(form) for form in PLAIN)]
    shown = ["–" if number is None else f"{number:.2g}" for number in numbers]
    said = "; ".join(found.wrong) or ("as its own" if found.ours else "")
    left = " ".join(found.left.split())[:160]
    return f"| {found.name} | {found.own} | {' | '.join(shown)} | {said} {left} |".replace(
        "  ", " "
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, metavar="[PIPELINE]...")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(2), help="N.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option(
    "--seconds", default=300, show_default=True, type=click.IntRange(1),
    help="Longest time of a pipeline.",
)  # fmt: skip
def main(checkout: Path, names: tuple[str, ...], steps: int, jobs: int, seconds: int) -> None:
    """Run the small pipelines of CHECKOUT, diffusers' repository, with our schedulers."""
    checkout = checkout.resolve()
    prepare(checkout)
    tests = pipelines(checkout)
    unknown = sorted(set(names) - set(tests))
    if unknown:
        raise click.ClickException(f"{checkout} has no test of {', '.join(unknown)}")
    asked = [(name, *tests[name], steps, seconds) for name in sorted(names or tests)]
    print(f"| Pipeline | Its own | {steps} to {2 * steps} | {' | '.join(PLAIN)} | |")
    print("|---|---|---:|---:|---:|---|")
    run, wrong = 0, 0
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=20) as pool:
        for found in pool.imap(checked, asked):
            print(line(found), flush=True)
            run, wrong = run + bool(found.ours), wrong + bool(found.wrong)
    print(f"\n{run} of {len(asked)} pipelines were run; in {wrong} of them something is wrong.")
    sys.exit(wrong > 0 or not run)


if __name__ == "__main__":
    main()
