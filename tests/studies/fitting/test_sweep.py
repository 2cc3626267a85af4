"""Many settings walked at once against one run each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erk_guid import Denoiser, ERKGuidance, ParameterFreeGuidance, karras_sigmas, sample
from erk_guid.guidance import Guidance
from erk_guid.mixtures import GaussianMixture, tree_mixture
from erk_guid.solvers import DEIS, Heun, make_solver
from erk_guid.studies.fitting.sweep import Task, distances, fine_path, step_errors

SIGMAS = karras_sigmas(7, sigma_max=5.0)[:-1]
STRENGTHS = [
    ERKGuidance(w_stiff, w_con, bound=bound, gate=gate)
    for w_stiff in (0.4, 1.0)
    for w_con in (0.0, 0.7, 30.0)
    for bound, gate in ((None, "stiffness"), (0.2, "stiffness"), (None, "step"))
]


class Tree:
    """The tree's denoiser, moved by each sample's label, and how many rows it was given."""

    def __init__(self) -> None:
        self.tree, self.rows, self.largest = tree_mixture(), 0, 0

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        self.rows += len(x)
        self.largest = max(self.largest, len(x))
        return self.tree(x - labels, sigma) + labels


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _task(count: int = 11, batch: int = 4) -> tuple[Task, Tree]:
    generator = _seeded(0)
    draws = torch.randn(3, count, 2, dtype=torch.float64, generator=generator)
    denoiser = Tree()
    x = denoiser.tree.sample(count, generator) + SIGMAS[0] * draws[0] + draws[1]
    return Task(denoiser, x, draws[1], SIGMAS, batch), denoiser


@pytest.mark.parametrize("solver", ["heun", "dpm2", "deis"])
def test_where_every_setting_leads(solver: str) -> None:
    """As a run of its own for each. Catches rows that lose their owner, their companion or their
    label, and a gate that is read once for all."""
    task, denoiser = _task()
    made = make_solver(solver)
    settings: list[Guidance] = [ERKGuidance(), *STRENGTHS]
    if made.two_stages:
        settings.append(ParameterFreeGuidance())
    ends = torch.randn(task.x.shape, dtype=torch.float64, generator=_seeded(1))
    found = distances(task, made.plan(SIGMAS.tolist()), settings, ends)
    assert found.nfe == denoiser.rows
    assert denoiser.largest <= task.batch
    alone = 0
    for setting, values in zip(settings, found.values, strict=True):
        before = denoiser.rows
        end = sample(
            lambda x, sigma: denoiser(x, sigma, task.labels), task.x, SIGMAS, solver=solver,
            guidance=setting,
        )  # fmt: skip
        alone += denoiser.rows - before
        expected = (end - ends).norm(dim=1)
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=0)
    assert found.nfe < alone / 2


def test_settings_that_never_part_cost_one_run() -> None:
    task, denoiser = _task()
    settings = [ERKGuidance(), ERKGuidance(0.5, 1e9), ERKGuidance(1.0, 1e9, gate="step")]
    found = distances(task, Heun().plan(SIGMAS.tolist()), settings, task.x)
    assert found.nfe == denoiser.rows == len(task.x) * 2 * (len(SIGMAS) - 1)
    assert (found.values == found.values[0]).all()


def network(*layers: torch.nn.Module) -> Denoiser:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), *layers).train()
    return lambda x, sigma: net(x / sigma)


@pytest.mark.parametrize(
    "denoiser",
    [network(torch.nn.Dropout(0.1)), network(torch.nn.BatchNorm1d(8)),
     lambda x, sigma: x + 0.1 * sigma * torch.randn_like(x),
     lambda x, sigma: x + (0.1 * torch.randn_like(x) if sigma < 0.05 else 0),
     lambda x, sigma: x + (0.3 * torch.randn_like(x) if 0.5 < sigma < 2 else 0),
     lambda x, sigma: x + (x.mean(0) if sigma > 50 else 0)],
)  # fmt: skip
def test_a_denoiser_that_answers_by_chance_or_by_the_batch_is_refused(denoiser: Denoiser) -> None:
    # A forgotten .eval() is what both usually come from. In another order only, the samples of a
    # batch have the same mean, and batch normalization would not be seen.
    task = Task(denoiser, torch.randn(8, 8), None, torch.tensor([80.0, 0.002]), 32)
    with pytest.raises(ValueError, match=r"twice alike.*needs \.eval\(\)"):
        task.check_denoiser()


def test_a_denoiser_in_half_precision_is_not_refused() -> None:
    net = torch.nn.Linear(64, 64).bfloat16()
    denoiser: Denoiser = lambda x, sigma: net((x / sigma).bfloat16()).to(x.dtype)  # noqa: E731
    Task(denoiser, torch.randn(8, 64), None, torch.tensor([80.0, 0.002]), 32).check_denoiser()


def test_error_of_each_step() -> None:
    """By a loop: a Heun step from the path, corrected by the companion of the one before."""
    task, denoiser = _task()
    path = fine_path(task, 16, DEIS(order=4, deis_mode="rhoab"))
    settings = [ERKGuidance(), ERKGuidance(0.4, 0.7)]
    before = denoiser.rows
    found = step_errors(task, Heun().plan(SIGMAS.tolist()), settings, path)
    assert denoiser.rows - before == len(task.x) * 2 * (len(SIGMAS) - 1)
    memory = None
    for i, step in enumerate(Heun().plan(SIGMAS)):
        result, memory = step(lambda x, sigma: denoiser(x, sigma, task.labels), path[i], memory)
        moves = [torch.zeros_like(result.x)] * 2
        if result.pair is not None:
            moves[1] = settings[1].correction(result.pair)
        for k in range(2):
            expected = (result.x + moves[k] - path[i + 1]).norm(dim=1)
            torch.testing.assert_close(found[k, i], expected, rtol=1e-9, atol=1e-13)


def test_fine_path_on_gaussian_data() -> None:
    """Where the solution is known: every coordinate goes as sqrt(s^2 + sigma^2)."""
    stds = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 3), stds.square().diag()[None])
    unit = torch.randn(5, 3, dtype=torch.float64, generator=_seeded(0))
    exact = torch.stack([unit * (stds**2 + sigma**2).sqrt() for sigma in SIGMAS])
    task = Task(data, exact[0], None, SIGMAS, 2)
    errors = [
        (fine_path(task, substeps, DEIS(order=4)) - exact).norm(dim=2).amax(1)
        for substeps in (8, 32)
    ]
    assert errors[0][0] == 0
    assert (errors[1][1:] < 2e-4 * exact[1:].norm(dim=2).mean(1)).all()
    assert (errors[1][1:] < errors[0][1:] / 8).all()
