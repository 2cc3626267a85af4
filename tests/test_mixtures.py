"""The exact oracle, and what the solvers do on it."""

from __future__ import annotations

import pytest
import torch
from conftest import golden

import erk_guid
from erk_guid.mixtures import GaussianMixture, tree_mixture
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import make_solver


@pytest.fixture(scope="module")
def tree() -> GaussianMixture:
    return tree_mixture()


def test_scores_of_the_tree(tree: GaussianMixture) -> None:
    data = golden("tree")
    for sigma in (0.05, 0.2, 1.0, 5.0):
        expected = data[f"score_A_sigma_{sigma}"]
        apart = (tree.score(data["points"].double(), sigma) - expected).abs().max()
        assert apart / expected.abs().max() < 1e-6  # the stored tree is float32


def test_a_single_gaussian_in_closed_form() -> None:
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    one = GaussianMixture(torch.ones(1), mean, covariance[None])
    x, sigma = torch.randn(5, 2, dtype=torch.float64), 0.7
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(2))
    torch.testing.assert_close(one(x, sigma), mean + (x - mean) @ gain.T)
    torch.testing.assert_close(one.jacobian(x, sigma), gain.expand(5, 2, 2))
    drawn = one.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.05, atol=0.05)


def test_jacobians_are_the_derivatives(tree: GaussianMixture) -> None:
    x = tree.sample(4, torch.Generator().manual_seed(1)) + 0.1
    for sigma in (0.1, 1.0):
        whole = torch.autograd.functional.jacobian(lambda x, s=sigma: tree(x, s), x)
        expected = torch.stack([whole[i, :, i] for i in range(4)])
        torch.testing.assert_close(tree.jacobian(x, sigma), expected)
        drift = (torch.eye(2) - expected) / sigma
        torch.testing.assert_close(tree.drift_jacobian(x, sigma), drift)


def test_stiffness_is_the_largest_eigenvalue_along_the_pair(tree: GaussianMixture) -> None:
    # Two nearby points apart along an eigenvector: the estimate is that eigenvalue.
    x = tree.sample(6, torch.Generator().manual_seed(2))
    sigma = torch.tensor(0.3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(tree.drift_jacobian(x, sigma))
    low = x + 1e-5 * vectors[:, :, -1]
    f_high, f_low = ((p - tree(p, sigma)) / sigma for p in (x, low))
    rho = erk_guid.stiffness(x, low, f_high, f_low)
    torch.testing.assert_close(rho, values[:, -1].abs(), rtol=5e-3, atol=1e-3)


COLUMNS = [
    ("heun", {}, None), ("heun", {}, (0.5, 0.5)), ("dpm2", {}, None), ("dpm2", {}, (0.408, 0.0)),
    ("deis", {"order": 4}, None), ("ipndm_v", {"order": 3}, None), ("ipndm_v", {"order": 4}, None),
    ("dpmpp", {"order": 3}, None), ("dpmpp", {"order": 3, "predict_x0": False}, None),
    ("unipc", {"order": 3}, None), ("unipc", {"order": 3, "predict_x0": False}, None),
]  # fmt: skip
# Mean end-point distances measured with the published programs (0.5 / 0.5 and 0.408 / 0 are
# w_stiff / w_con of the guided columns).
TABLE = {
    ("tree5", 6): (0.335, 0.263, 0.208, 0.211, 0.0473, 0.0233, 0.0222, 0.0950, 0.0227, 0.107,
                   0.0438),
    ("tree5", 10): (0.102, 0.0699, 0.0689, 0.0573, 0.0148, 0.00639, 0.00584, 0.0191, 0.00633,
                    0.0171, 0.00632),
    ("tree5", 14): (0.0485, 0.0263, 0.0290, 0.0256, 0.00654, 0.00305, 0.00370, 0.00512, 0.00312,
                    0.00711, 0.00175),
    ("tree5", 20): (0.0224, 0.0171, 0.0127, 0.00807, 0.00255, 0.00135, 0.00183, 0.00143, 0.00150,
                    0.00173, 0.00067),
    ("tree5", 30): (0.00978, 0.00811, 0.00568, 0.00340, 0.00083, 0.00055, 0.00074, 0.00055,
                    0.00068, 0.00036, 0.00022),
    ("tree80", 6): (1.25, 0.964, 1.01, 0.957, 0.100, 0.0847, 0.0839, 0.0602, 0.0809, 0.0546,
                    0.164),
    ("tree80", 10): (0.383, 0.290, 0.246, 0.257, 0.0440, 0.0250, 0.0237, 0.106, 0.0236, 0.114,
                     0.0452),
    ("tree80", 14): (0.196, 0.116, 0.113, 0.0897, 0.0230, 0.0122, 0.0109, 0.0607, 0.0111, 0.0491,
                     0.0142),
    ("tree80", 20): (0.0796, 0.0379, 0.0470, 0.0371, 0.0110, 0.00519, 0.00457, 0.0101, 0.00499,
                     0.0138, 0.00358),
    ("tree80", 30): (0.0311, 0.0238, 0.0177, 0.0112, 0.00354, 0.00164, 0.00278, 0.00213, 0.00183,
                     0.00271, 0.00094),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "evaluations"), list(TABLE))
def test_end_point_errors_on_the_tree(
    tree: GaussianMixture, problem: str, evaluations: int
) -> None:
    # Catches what golden end points at one step count may not: a wrong step among many, a
    # guidance sign, an order that is lowered where it should not be.
    data = golden("tree")
    sigma_max = {"tree5": 5.0, "tree80": 80.0}[problem]
    for (name, options, guided), expected in zip(COLUMNS, TABLE[problem, evaluations], strict=True):
        levels = evaluations // 2 + 1 if name in ("heun", "dpm2") else evaluations + 1
        found = erk_guid.sample(
            tree, data[f"{problem}_start"],
            erk_guid.karras_sigmas(levels, sigma_max=sigma_max)[:-1],
            solver=make_solver(name, **options),
            guidance=erk_guid.ERKGuidance(*guided) if guided else None,
        )  # fmt: skip
        error = (found - data[f"{problem}_end"]).norm(dim=1).mean()
        assert float(error) == pytest.approx(expected, rel=0.1), (name, options)


# Of the whole table of that comparison: the best of its eleven columns at each place.
BEST = {
    "tree5": {6: 0.0222, 10: 0.00584, 14: 0.00175, 20: 0.00067, 30: 0.00022},
    "tree80": {6: 0.0546, 10: 0.0236, 14: 0.0109, 20: 0.00358, 30: 0.00094},
}


@pytest.mark.slow
@pytest.mark.parametrize("problem", list(BEST))
def test_the_modal_solver_beats_every_column(tree: GaussianMixture, problem: str) -> None:
    data = golden("tree")
    sigma_max = {"tree5": 5.0, "tree80": 80.0}[problem]
    for evaluations, best in BEST[problem].items():
        sigmas = make_sigmas("logsnr", evaluations + 1, 0.002, sigma_max, 7)[:-1]
        found = erk_guid.sample(tree, data[f"{problem}_start"], sigmas, solver="modal")
        error = (found - data[f"{problem}_end"]).norm(dim=1).mean()
        assert error < best, evaluations


def test_what_is_no_mixture_is_refused() -> None:
    eye = torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match=r"weights must be \[K\]"):
        GaussianMixture(torch.ones(2), torch.zeros(3, 2), eye)
    with pytest.raises(ValueError, match="covariances must be"):
        GaussianMixture(torch.ones(3), torch.zeros(3, 2), eye[:2])
    with pytest.raises(ValueError, match="must be positive"):
        GaussianMixture(torch.tensor([1.0, 0, 1]), torch.zeros(3, 2), eye)
    with pytest.raises(ValueError, match=r"x must be \[N, 2\]"):
        GaussianMixture(torch.ones(3), torch.zeros(3, 2), eye)(torch.zeros(2, 3), 1.0)
