#!/usr/bin/env python3
"""Check and measure on a CUDA device what no other machine can, and write a report.

It needs the checkout, torch and NumPy; Pillow for the overlap of writing images. Networks have
random weights: EDM2-XS for times, smaller ones for checks. It takes under eight minutes.

    python scripts/gpu.py                 # or: make gpu
    python scripts/gpu.py --device cpu    # tries the script itself: what needs CUDA is left out
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import edm2_xs  # noqa: E402
from plain import Plain  # noqa: E402
from torch import Tensor  # noqa: E402

import erk_guid  # noqa: E402
from erk_guid.models import freeze  # noqa: E402
from erk_guid.models.networks import DOUBLED, Unconditional  # noqa: E402
from erk_guid.models.networks.edm2 import Precond  # noqa: E402
from erk_guid.models.networks.frozen import FrozenConv  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (1, 8, 32)


@dataclass
class Report:
    """What was found, as lines of Markdown."""

    device: torch.device
    quick: bool
    checks: list[tuple[str, str, str]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def bound(self, what: str, found: float, most: float) -> None:
        """Record a number that must be at most `most`."""
        verdict = "passed" if found <= most else "FAILED"
        self.checks.append((what, f"{found:.3g}, at most {most:g}", verdict))
        print(f"  {verdict}: {what}: {found:.3g} (at most {most:g})", flush=True)

    def left_out(self, what: str, why: str) -> None:
        self.checks.append((what, why, "not run"))
        print(f"  not run: {what}: {why}", flush=True)

    def table(self, title: str, head: str, rows: list[str]) -> None:
        columns = head.count("|") + 1
        text = [f"### {title}", "", f"| {head} |", "|" + "---|" * columns]
        self.tables.append("\n".join([*text, *(f"| {row} |" for row in rows)]))
        print("\n" + self.tables[-1] + "\n", flush=True)


def small(seed: int = 0) -> Precond:
    """Return a network for checks: two levels, attention, 10 classes, in its trainable form."""
    torch.manual_seed(seed)
    net = Precond(
        32, 4, 10, model_channels=64, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[16],
        channels_per_head=32, logvar_channels=16,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return net.eval().requires_grad_(False)


def apart(a: Tensor, b: Tensor) -> float:
    """Return the distance of two results over the size of the second."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def noise(net: Any, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, net.img_channels, net.img_resolution, net.img_resolution,
                    generator=generator)  # fmt: skip
    labels = torch.eye(net.label_dim)[torch.arange(count) % net.label_dim]
    return x.to(device), labels.to(device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(*functions: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Return the median seconds of each, measured in turn (A B A B ...)."""
    times: list[list[float]] = [[] for _ in functions]
    for k in range(rounds + 2):
        for function, into in zip(functions, times, strict=True):
            wait(device)
            begun = time.perf_counter()
            function()
            wait(device)
            if k >= 2:  # the first two choose kernels
                into.append(time.perf_counter() - begun)
    return [statistics.median(each) for each in times]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that gets the peak of the allocator, in MiB."""
    found: list[float] = []
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        wait(device)
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
    else:
        found.append(float("nan"))


# --- checks ---------------------------------------------------------------------------------------


def check_precisions(report: Report) -> None:
    """Frozen networks, in each dtype, against float32 on the CPU."""
    trainable = small()
    x, labels = noise(trainable, 4, torch.device("cpu"))
    sigma = torch.tensor([0.1, 1.0, 5.0, 40.0])
    x = x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    skip = x * (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)  # what goes past the U-Net
    exact = trainable(x, sigma, labels) - skip
    given = [t.to(report.device) for t in (x, sigma, labels)]
    for dtype, most in zip(DTYPES, (1e-4, 3e-2, 5e-3), strict=True):
        if dtype == torch.float16 and report.device.type != "cuda":
            continue
        net = copy.deepcopy(trainable).to(report.device)
        frozen = freeze(net, dtype)
        out = frozen(*given).cpu() - skip
        report.bound(
            f"U-Net's output, {dtype}, against float32 on the CPU", apart(out, exact), most
        )
        net.precision = dtype
        wide = net(*given).cpu() - skip
        report.bound(f"frozen against trainable form, {dtype}", apart(out, wide), most)


def check_moving(report: Report) -> None:
    """A network loaded on the CPU and moved becomes what its file asks for."""
    net = freeze(small())
    net.to(report.device)
    expected = torch.float16 if report.device.type == "cuda" else torch.float32
    convs = [m.effective for m in net.modules() if isinstance(m, FrozenConv)]
    wrong = sum(w.dtype != expected for w in convs if w.ndim == 4)
    wrong += sum(w.dtype != torch.float32 for w in convs if w.ndim == 2)
    report.bound("weights in the wrong dtype after .to()", wrong, 0)


def check_channels_last(report: Report) -> None:
    """The other memory format gives the same."""
    net = freeze(small().to(report.device), torch.float32)
    x, labels = noise(net, 4, report.device)
    other = in_channels_last(net)
    found = apart(other(x, 1.0, labels), net(x, 1.0, labels))
    report.bound("channels last against contiguous, float32", found, 1e-4)


def in_channels_last(net: Any) -> Any:
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, FrozenConv) and module.effective.ndim == 4:
            module.effective.data = module.effective.data.contiguous(
                memory_format=torch.channels_last
            )
    return twin


def check_sampling(report: Report) -> None:
    """Whole runs on the device against the CPU, with and without guidance."""
    cpu = freeze(small(), torch.float32)
    there = freeze(small().to(report.device), torch.float32)
    x, labels = noise(cpu, 2, torch.device("cpu"))
    free = erk_guid.ParameterFreeGuidance()
    for solver, more in (
        ("heun", {"w_stiff": 0.5, "w_con": 0.1}), ("heun", {"erk": free}),
        ("modal", {}), ("dpmpp", {}), ("deis", {}), ("unipc", {}),
    ):  # fmt: skip
        told = ", ".join([solver, *map(str, more)])
        options: dict[str, Any] = {"num_steps": 8, "solver": solver, **more}
        a = erk_guid.edm_sampler(cpu, x, labels, **options)
        b = erk_guid.edm_sampler(there, x.to(report.device), labels.to(report.device), **options)
        report.bound(f"final images against the CPU, {told}", apart(b, a), 1e-3)


def check_doubled(report: Report) -> None:
    """Guidance by one network in one call, and in two."""
    net = freeze(small().to(report.device), torch.float32)
    x, labels = noise(net, 4, report.device)
    guide = Unconditional(net)
    both = erk_guid.denoisers.guided_denoiser(net, guide, 1.8)
    two = erk_guid.denoisers.guided_denoiser(net, lambda *args: guide(*args), 1.8)
    sigma = torch.tensor(2.0, device=report.device)
    assert x.numel() <= DOUBLED.get(report.device.type, 0)
    report.bound(
        "guidance by a doubled batch", apart(both(x, sigma, labels), two(x, sigma, labels)), 1e-4
    )


def check_no_waiting(report: Report) -> None:
    """The sampling loop never waits for the device."""
    if report.device.type != "cuda":
        report.left_out("no host synchronization in the loop", "needs CUDA")
        return
    for dtype in (torch.float32, torch.float16):
        net = freeze(small().to(report.device), dtype)
        x, labels = noise(net, 2, report.device)
        for options in (
            {"w_stiff": 0.5}, {"solver": "modal"}, {"solver": "unipc"},
            {"guidance": 1.5, "gnet": Unconditional(net)},
        ):  # fmt: skip
            run: dict[str, Any] = {"num_steps": 5, **options}
            erk_guid.edm_sampler(net, x, labels, **run)  # kernels, cached constants
            wait(report.device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                erk_guid.edm_sampler(net, x, labels, **run)
                waits = 0
            except RuntimeError as error:
                print("   ", error)
                waits = 1
            finally:
                torch.cuda.set_sync_debug_mode("default")
            told = ", ".join(map(str, options))
            report.bound(f"runs that wait for the device ({dtype}, {told})", waits, 0)


def check_graphs(report: Report) -> None:
    """A whole sampling run is one CUDA graph."""
    if report.device.type != "cuda":
        report.left_out("CUDA graph of a whole run", "needs CUDA")
        return
    net = freeze(small().to(report.device), torch.float16)
    x, labels = noise(net, 2, report.device)
    held = x.clone()

    def run() -> Tensor:
        return erk_guid.edm_sampler(net, held, labels, num_steps=5, w_stiff=0.5)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    fresh = torch.randn_like(x)
    held.copy_(fresh)
    graph.replay()
    wait(report.device)
    replayed = out.clone()
    report.bound("CUDA graph of a whole guided run, with new noise", apart(replayed, run()), 1e-3)


def check_compiled(report: Report) -> None:
    """torch.compile: the network, a whole guided step, and reused buffers."""
    net = freeze(small().to(report.device), torch.float32)
    x, labels = noise(net, 4, report.device)
    modes = [None, *(["reduce-overhead"] if report.device.type == "cuda" else [])]
    expected = erk_guid.edm_sampler(net, x, labels, num_steps=5, w_stiff=0.5)
    for mode in modes:
        torch.compiler.reset()
        compiled = copy.deepcopy(net)
        compiled.compile(mode=mode)
        found = erk_guid.edm_sampler(compiled, x, labels, num_steps=5, w_stiff=0.5)
        report.bound(f"sampling with a compiled network, mode {mode}", apart(found, expected), 1e-3)
    if "reduce-overhead" in modes:
        torch.compiler.reset()
        # The whole denoiser, so that its own output lies in a buffer that is used again.
        whole = torch.compile(copy.deepcopy(net), mode="reduce-overhead")
        found = erk_guid.edm_sampler(whole, x, labels, num_steps=5, w_stiff=0.5)
        report.bound("sampling with reused output buffers", apart(found, expected), 1e-3)
    torch.compiler.reset()
    guidance = erk_guid.ERKGuidance(0.5, 0.1)
    (step, *_) = erk_guid.solvers.Heun().plan([20.0, 5.0])

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = net(x, sigma, labels)
        return out

    def one(x: Tensor) -> Tensor:
        return guidance(step(denoiser, x, None)[0]).x

    whole_step = torch.compile(one, fullgraph=True)
    report.bound("a guided Heun step as one graph", apart(whole_step(20 * x), one(20 * x)), 1e-4)
    torch.compiler.reset()


def check_overlap(report: Report) -> None:
    """Images are decoded and written beside sampling, and are right."""
    try:
        from erk_guid.generation.images import generate
        from erk_guid.generation.writing import ImageWriter, finish
        from erk_guid.models.encoders import StandardRGBEncoder
    except ImportError as error:
        report.left_out("decoding and writing beside sampling", str(error))
        return
    torch.manual_seed(0)
    width = 16 if report.quick else 64
    net = Precond(64, 3, 10, model_channels=width, channel_mult=[1, 2], channels_per_head=16)
    net = freeze(net.to(report.device))
    count, batch = (64, 8) if not report.quick else (8, 4)
    options: dict[str, Any] = {"num_steps": 12, "batch_size": batch, "device": report.device}
    batches = generate(net, range(count), **options)

    def alone() -> None:
        for part in batches.shares:
            batches.sample(part)

    with tempfile.TemporaryDirectory() as folder:

        def path(seed: int) -> Path:
            return Path(folder) / f"{seed}.png"

        def whole() -> None:
            with ImageWriter(
                StandardRGBEncoder(), report.device, path, lambda seed, number: str(number)
            ) as writer:
                before: list[Any] = []
                for part in batches.shares:
                    now = writer.write(batches.sample(part))
                    finish(before, Path(folder))
                    before = now
                finish(before, Path(folder))

        a, b = seconds(alone, whole, device=report.device, rounds=3)
        from PIL import Image

        wrong = 0
        for made in batches:
            for seed, pixels in zip(made.seeds, made.images.cpu(), strict=True):
                with Image.open(path(seed)) as image:
                    written = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                written = written.reshape(64, 64, 3).permute(2, 0, 1)
                wrong += int((written.int() - pixels.int()).abs().max() > 1)
    report.bound("images written wrongly", wrong, 0)
    if report.device.type == "cuda":
        report.bound("time of sampling and writing over sampling alone", b / a, 1.06)


def check_nccl(report: Report) -> None:
    """NCCL with one process."""
    import torch.distributed as dist

    if report.device.type != "cuda" or not dist.is_nccl_available():
        report.left_out("NCCL with one process", "needs CUDA and NCCL")
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        value = torch.ones(3, device=report.device)
        dist.all_reduce(value)
        wait(report.device)
        report.bound("sum over one process by NCCL", float((value - 1).abs().max()), 0)
        dist.destroy_process_group()


# --- measurements ---------------------------------------------------------------------------------


def measure_network(report: Report, xs: Precond) -> None:
    """One evaluation of EDM2-XS: plain form, frozen, channels last, compiled."""
    rows = []
    rounds = 2 if report.quick else 10
    plain = Plain(xs)
    batches = BATCHES[:1] if report.quick else BATCHES
    for dtype in DTYPES:
        if dtype == torch.float16 and report.device.type != "cuda":
            continue
        net = freeze(xs, dtype)
        last = in_channels_last(net)
        for batch in batches:
            x, labels = noise(xs, batch, report.device)
            sigma = torch.tensor(1.0, device=report.device)
            x_last = x.contiguous(memory_format=torch.channels_last)
            a, b, c = seconds(
                partial(plain, x, sigma, labels),
                partial(net, x, sigma, labels),
                partial(last, x_last, sigma, labels),
                device=report.device, rounds=rounds,
            )  # fmt: skip
            rows.append(
                f"{str(dtype)[6:]} | {batch} | {a * 1e3:.2f} | {b * 1e3:.2f} | {c * 1e3:.2f} | "
                f"{a / b:.2f}"
            )
    report.table(
        "One evaluation of EDM2-XS",
        "network computes in | batch | plain float32 form, ms | frozen, ms | channels last, ms | "
        "plain over frozen",
        rows,
    )
    if report.quick or report.device.type != "cuda":
        return
    rows = []
    for dtype in (torch.float32, torch.float16):
        net = freeze(xs, dtype)
        for batch in (1, 8):
            torch.compiler.reset()
            x, labels = noise(xs, batch, report.device)
            sigma = torch.tensor(1.0, device=report.device)
            compiled = copy.deepcopy(net)
            compiled.compile()
            begun = time.perf_counter()
            compiled(x, sigma, labels)
            wait(report.device)
            first = time.perf_counter() - begun
            a, b = seconds(
                partial(net, x, sigma, labels),
                partial(compiled, x, sigma, labels),
                device=report.device, rounds=rounds,
            )  # fmt: skip
            rows.append(
                f"{str(dtype)[6:]} | {batch} | {a * 1e3:.2f} | {b * 1e3:.2f} | {a / b:.2f} | "
                f"{first:.0f}"
            )
    torch.compiler.reset()
    report.table(
        "Compiled",
        "network computes in | batch | frozen, ms | compiled, ms | ratio | first call, s",
        rows,
    )


def measure_guidance(report: Report, xs: Precond) -> None:
    """Guided and plain sampling: time and memory."""
    rows = []
    dtype = torch.float16 if report.device.type == "cuda" else torch.float32
    net = freeze(xs, dtype)
    for batch in BATCHES[:1] if report.quick else BATCHES:
        x, labels = noise(xs, batch, report.device)

        def run(w: float, x: Tensor = x, labels: Tensor = labels) -> Tensor:
            return erk_guid.edm_sampler(net, x, labels, num_steps=4, w_stiff=w)

        a, b = seconds(
            partial(run, 0.5),
            partial(run, 0.0),
            device=report.device,
            rounds=1 if report.quick else 7,
        )
        peaks = []
        for w in (0.5, 0.0):
            with peak_memory(report.device) as found:
                run(w)
            peaks += found
        rows.append(
            f"{batch} | {a * 1e3:.1f} | {b * 1e3:.1f} | {a / b:.4f} | {peaks[0]:.0f} | "
            f"{peaks[1]:.0f} | {(peaks[0] - peaks[1]) / (x.nbytes / 2**20):.1f}"
        )
    report.table(
        "ERK guidance on EDM2-XS, 4 steps of Heun",
        "batch | guided, ms | plain, ms | ratio | guided, peak MiB | plain, peak MiB | "
        "more, in batches of float32",
        rows,
    )


def measure_doubled(report: Report, xs: Precond) -> None:
    """Guidance by one network: a doubled batch against two calls."""
    rows = []
    net = freeze(xs, torch.float16 if report.device.type == "cuda" else torch.float32)
    sigma = torch.tensor(1.0, device=report.device)
    for batch in BATCHES[:1] if report.quick else (*BATCHES, 64):
        x, labels = noise(xs, batch, report.device)
        both = torch.cat([labels, torch.zeros_like(labels)])

        def doubled(x: Tensor = x, both: Tensor = both) -> Tensor:
            out: Tensor = net(torch.cat([x, x]), sigma, both)
            return out

        def two(x: Tensor = x, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
            return net(x, sigma, labels), net(x, sigma, None)

        a, b = seconds(
            doubled,
            two,
            device=report.device, rounds=2 if report.quick else 7,
        )  # fmt: skip
        rows.append(f"{batch} | {x.numel()} | {a * 1e3:.2f} | {b * 1e3:.2f} | {a / b:.2f}")
    report.table(
        "Guidance by one network, EDM2-XS",
        "batch | elements | doubled batch, ms | two calls, ms | ratio",
        rows,
    )


CHECKS = (
    check_precisions, check_moving, check_channels_last, check_sampling, check_doubled,
    check_no_waiting, check_graphs, check_compiled, check_overlap, check_nccl,
)  # fmt: skip
MEASUREMENTS = (measure_network, measure_guidance, measure_doubled)


def named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def written(report: Report, took: float) -> str:
    """Return the report as Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    failed = sum(verdict == "FAILED" for *_, verdict in report.checks)
    lines = [
        "# What a GPU showed", "",
        f"Written by `python scripts/gpu.py` on {time.strftime('%Y-%m-%d')}: "
        f"{named(report.device)}; torch {torch.__version__}, Python {platform.python_version()}"
        + (f", commit {commit}" if commit else "") + f". It took {took:.0f} s.", "",
        f"{len(report.checks)} checks, {failed} failed.", "",
        "| check | found | verdict |", "|---|---|---|",
        *(f"| {what} | {found} | {verdict} |" for what, found, verdict in report.checks), "",
        "Times are medians, measured in turn. Networks have random weights.", "",
    ]  # fmt: skip
    return "\n".join([*lines, "\n\n".join(report.tables), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="the report [default: docs/gpu.md on CUDA]")
    parser.add_argument("--quick", action="store_true", help="few rounds, to try the script")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device here; --device cpu tries the script without one")
        device = torch.device("cuda", device.index or 0)
    # Exact comparisons: TensorFloat-32, which convolutions use by default, has 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report = Report(device, args.quick)
    print(named(device))
    begun = time.perf_counter()
    with torch.no_grad():
        for check in CHECKS:
            print(check.__doc__)
            try:
                check(report)
            except Exception as error:
                traceback.print_exc()
                report.checks.append(
                    (check.__name__, f"{type(error).__name__}: {error}"[:200], "FAILED")
                )
        torch.backends.cudnn.allow_tf32 = True  # torch's own default, for the times
        xs = edm2_xs(str(device))
        for measure in MEASUREMENTS:
            print(measure.__doc__)
            measure(report, xs)
    out = args.out or (ROOT / "docs" / "gpu.md" if device.type == "cuda" else None)
    text = written(report, time.perf_counter() - begun)
    if out:
        out.write_text(text)
        print(f"written to {out}")
    if any(verdict == "FAILED" for *_, verdict in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
