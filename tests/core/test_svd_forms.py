"""The square of a shifted G says of G what is true, and is taken where float32 resolves it."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_core.certify import certify
from pissa_core.svd import RESOLUTION, narrow, truncated_svd
from pissa_core.svd.forms import Form, Plain, Square, best_form
from pissa_core.svd.krylov import Ritz, random_start
from pissa_core.svd.narrow import BLOCK, few_eigenpairs
from pissa_core.svd.products import times_transposed
from pissa_core.svd.space import Space

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def rotated(theta: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a symmetric matrix of these eigenvalues and no preferred axes, float32."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(
        torch.randn(len(theta), len(theta), generator=generator, dtype=torch.float64)
    )
    G = (U * theta) @ U.T
    return ((G + G.T) / 2).float()


@given(seed=st.integers(0, 2**32), center=st.floats(0, 1.2), power=st.sampled_from([0.3, 1, 4]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_way_back_is_a_bound_wherever_the_center_is(
    seed: int, center: float, power: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.rand(40, generator=generator, dtype=torch.float64) ** power
    theta = theta.sort(descending=True).values
    mu = (theta - center).square().sort(descending=True).values
    back = Square(lambda X: X, center).back(mu)
    assert bool((back >= theta - 1e-12).all())
    beyond = int((theta >= 2 * center).sum())
    torch.testing.assert_close(back[:beyond], theta[:beyond])


def test_products_with_the_square() -> None:
    G, X = rotated(torch.linspace(2, 0.1, 50).double(), 0), torch.eye(50)[:7]
    square = Square(lambda Y: Y @ G, 0.3)
    shifted = G.double() - 0.3 * torch.eye(50)
    torch.testing.assert_close(square.apply(X).double(), (shifted @ shifted)[:7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("rank", [41, 64, 100])
def test_a_few_steps_tell_where_the_center_belongs(power: float, rank: int) -> None:
    theta = torch.arange(1, 12 * rank + 1, dtype=torch.float64) ** -power
    G = rotated(theta, rank)
    generator = torch.Generator().manual_seed(0)
    start = random_start(BLOCK, len(theta), generator, CPU)
    form = best_form(lambda X: times_transposed(X, G), start, rank, 1e-2, generator)
    assert isinstance(form, Square)
    assert theta[5 * rank] < 2 * form.center < theta[rank]


def test_no_square_where_it_would_drown_the_rest_in_roundings() -> None:
    theta = torch.linspace(1, 0.1, 600, dtype=torch.float64)
    kinds = []
    for top in (50, 300, 1000, 10_000):
        theta[:20] = top
        G = rotated(theta, top)
        generator = torch.Generator().manual_seed(0)
        start = random_start(BLOCK, 600, generator, CPU)
        form = best_form(lambda X, G=G: times_transposed(X, G), start, 44, 1e-4, generator)
        kinds.append(type(form))
    assert kinds[0] is Square
    assert kinds[-1] is Plain
    assert sorted(kinds, key=lambda kind: kind is Plain) == kinds


def spectrum(kind: str, d: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    """Return eigenvalues of a kind, drawn anew each time."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    i = torch.arange(1, d + 1, dtype=torch.float64)
    bulk = torch.linspace(1, number(0.02, 0.9), d, dtype=torch.float64)
    if kind == "power":
        theta = i ** -number(0.1, 2.5)
    elif kind == "spikes":
        theta, many = bulk, int(number(1, 2 * rank))
        theta[:many] = torch.logspace(number(0, 3), 0, many, dtype=torch.float64)
    elif kind == "cluster":
        theta, above, members = 0.9 * bulk, int(number(0, 45)), int(number(20, 130))
        spread = 10 ** number(-5, -1)
        theta[above : above + members] = 1 + spread * torch.rand(members, generator=draw)
        theta[:above] = 10 ** number(0.1, 2.6)
    elif kind == "exponential":
        theta = torch.exp(-i / number(5, 300)) + 10 ** number(-6, -1)
    else:
        theta = (torch.randn(d, generator=draw, dtype=torch.float64).abs() + 0.05) ** number(1, 4)
    return theta.sort(descending=True).values * 10 ** number(-3, 3)


@pytest.fixture
def certified(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The forms that found something, one for each time."""
    forms: list[type] = []
    search = narrow._search

    def noting(form: Form, *args: Any) -> Ritz | None:
        found = search(form, *args)
        forms.extend([type(form)] if found else [])
        return found

    monkeypatch.setattr(narrow, "_search", noting)
    return forms


@pytest.mark.parametrize("kind", ["power", "spikes", "cluster", "exponential", "random"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_false_bound_on_spectra_of_many_kinds(
    kind: str, symmetric: bool, certified: list[type]
) -> None:
    # Thousands more of these, of squares mostly, came no nearer than 0.993.
    draw = torch.Generator().manual_seed(5)
    for run in range(12):
        rank, d = (41, 44, 50)[run % 3], 640
        tolerance = (1e-2, 1e-3, 1e-4, 2e-5)[run % 4]
        G = rotated(spectrum(kind, d, rank, draw), run)
        found = few_eigenpairs(
            lambda X, G=G: times_transposed(X, G),
            d,
            rank,
            8,
            tolerance=tolerance,
            generator=torch.Generator().manual_seed(run),
            device=CPU,
            symmetric=symmetric,
        )
        if found is None:
            continue
        assert found.missed <= tolerance
        Q, _ = torch.linalg.qr(found.vectors[:rank].double().T)
        captured = float(((G.double() @ Q) * Q).sum())
        best = float(torch.linalg.eigvalsh(G.double()).flip(0)[:rank].sum())
        assert 1 - captured / best <= found.missed + RESOLUTION
    assert certified.count(Square if symmetric else Plain) >= 4


@pytest.mark.parametrize("top", [20, 100, 400])
@pytest.mark.parametrize("spikes", [1, 5])
def test_roundings_move_the_bound_by_less_than_is_resolved(top: float, spikes: int) -> None:
    # Nearly all energy is near theta_r, so that what rounding does there shows.
    rank, d = 44, 640
    theta = torch.arange(1, d + 1, dtype=torch.float64) ** -0.15
    theta /= float(theta[rank - 1])
    theta[:spikes] = top
    G = rotated(theta, 0)
    square = Square(lambda X: times_transposed(X, G), float(theta[110]) / 2)
    shifted = G.double() - square.center * torch.eye(d)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        space = Space(square.apply, random_start(BLOCK, d, generator, CPU), 256, generator)
        space.expand_to(256)
        said = square.back(space.ritz(rank, graded=True)[0][:rank])
        Q, _ = torch.linalg.qr(space.K[:256].double().T)
        exact = torch.linalg.eigvalsh((shifted @ Q).T @ (shifted @ Q)).flip(0)[:rank]
        moved = float((said - square.back(exact)).sum() / theta[:rank].sum())
        assert abs(moved) < RESOLUTION


def test_steeper_spectra_than_were_measured_are_refused() -> None:
    theta = torch.ones(200, dtype=torch.float64)
    theta[100:] = 0.5
    for top, refused in ((399.0, False), (401.0, True)):
        theta[0] = top
        assert (Square(lambda X: X, 0.25).by_rounding(theta, 44) == math.inf) is refused


def test_a_square_that_resolves_too_little_gives_way_to_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, certified: list[type]
) -> None:
    theta = torch.arange(1, 601, dtype=torch.float64) ** -0.3
    G = rotated(theta, 0)

    def ask() -> Ritz | None:
        return few_eigenpairs(
            lambda X: times_transposed(X, G),
            600,
            44,
            8,
            tolerance=1e-4,
            generator=torch.Generator().manual_seed(0),
            device=CPU,
        )

    assert ask()
    # A center beyond theta_r, which the look at the spectrum would have to miss by half.
    far = Square(lambda X: times_transposed(X, G), float(theta[10]) / 2)
    monkeypatch.setattr(narrow, "best_form", lambda *_: far)
    found = ask()
    assert found is not None
    V = found.vectors[:44].double()
    captured = float(((V @ G.double()) * V).sum())
    assert 1 - captured / float(theta[:44].sum()) <= found.missed + RESOLUTION
    assert certified == [Square, Plain]


def test_pairs_within_a_space_of_squares_are_those_of_g() -> None:
    theta = torch.arange(1, 401, dtype=torch.float64) ** -0.5
    G = rotated(theta, 0)
    generator = torch.Generator().manual_seed(0)
    square = Square(lambda X: times_transposed(X, G), 0.07)
    space = Space(square.apply, random_start(BLOCK, 400, generator, CPU), 192, generator)
    space.expand_to(128)
    values, S, couplings = space.ritz(40, graded=True)
    thetas, V, residuals = square.pairs(space, values, S, couplings, 50)
    assert bool((thetas[:40].cumsum(0) <= square.back(values[:40]).cumsum(0) + 1e-6).all())
    torch.testing.assert_close(V @ V.T, torch.eye(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(V @ G - thetas.float()[:, None] * V, residuals, atol=1e-5, rtol=0)
    assert float((residuals @ V.T).abs().max()) < 1e-5


@pytest.mark.parametrize("form", [Plain, Square])
@pytest.mark.parametrize("sound", [0, 3, 12, 19, 21, 25])
def test_what_is_no_number_is_no_answer(form: type[Form], sound: int) -> None:
    # After that many products that are sound: in the look, in the search, outside, at the end.
    theta = torch.arange(1, 601, dtype=torch.float32) ** -0.4
    products = 0

    def multiply(X: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return X * theta if products <= sound else X * torch.nan

    with suppress(RuntimeError):  # LAPACK's, which is an answer, too
        found = few_eigenpairs(
            multiply,
            600,
            44,
            8,
            tolerance=1e-2,
            generator=torch.Generator().manual_seed(0),
            device=CPU,
            symmetric=form is Square,
        )
        assert found is None or products <= sound


def test_of_what_is_no_number_all_is_missing() -> None:
    found = truncated_svd(torch.eye(50), 4, method="exact", tolerance=0.1, niter=0, seed=0)
    broken = dataclasses.replace(found, optimum=math.nan)
    assert certify(broken, torch.zeros(4), 0.0).missed == 1.0


@pytest.mark.parametrize("copies", [1, 33, 40, 200])
def test_the_look_outside_a_space_of_squares_meets_members_that_hide(copies: int) -> None:
    theta = torch.linspace(0.5, 0, 800, dtype=torch.float64)
    theta[:copies] = 1.0
    generator = torch.Generator().manual_seed(0)
    square = Square(lambda X: X * theta.float(), 0.2)
    start = random_start(BLOCK, 800, generator, CPU)
    space = Space(square.apply, start, 256, generator, look=Square.look)
    space.expand_to(192)
    met = square.center + math.sqrt(space.ceiling())
    K = space.K[: space.k].double()
    P = torch.eye(800, dtype=torch.float64) - K.T @ K
    largest = float(torch.linalg.eigvalsh(P @ torch.diag((theta - 0.2).square()) @ P)[-1])
    largest = square.center + math.sqrt(largest)
    assert 0.98 * largest <= met <= 1.05 * largest
    assert not space.K[space.k :].any()
