"""Sketches: the fast formulas against what they stand for, written out with one basis each."""

from __future__ import annotations

import math

import pytest
import torch

import flatminima as fm
from flatminima.algorithms.estimators import leave_one_out, sketch
from flatminima.algorithms.estimators.leave_one_out import (
    trace_known_blocks,
    xdiag,
    xtrace,
    xtrace_blocks,
)
from flatminima.algorithms.estimators.sketch import Sketch
from spectra import MATRICES, SIZE, hidden, low_rank

BLOCKS = (40, 0, 1, 80, 29)
EVERY_MATRIX = pytest.mark.parametrize("name", MATRICES)


def sketched(matrix: torch.Tensor, *counts: int, signs: bool = False, seed: int = 0) -> Sketch:
    generator = torch.Generator().manual_seed(seed)
    made = Sketch(hidden(matrix), generator, signs=signs, keep=True, step=lambda count: None)
    for count in counts:
        made.extend(count)
    return made


def basis_without(matrix: torch.Tensor, tests: torch.Tensor, *left_out: int) -> torch.Tensor:
    """An orthonormal basis of A times the test vectors (rows) but these, as columns."""
    rest = [row for row in range(len(tests)) if row not in left_out]
    left, sizes, _ = torch.linalg.svd(matrix @ tests[rest].T, full_matrices=False)
    return left[:, sizes > 1e-12 * sizes[0]]


def estimate(matrix: torch.Tensor, tests: torch.Tensor, i: int, *others: int) -> torch.Tensor:
    """XTrace's estimate i of the diagonal blocks, from its definition."""
    q = basis_without(matrix, tests, i, *others)
    projection = q @ q.T
    outside = torch.eye(len(matrix)).double() - projection
    x = outside @ tests[i]
    scale = (len(matrix) - q.shape[1]) / (x @ x)
    known = matrix - outside @ matrix @ outside
    return known.diagonal() + scale * x * (outside @ matrix @ x)


@EVERY_MATRIX
@pytest.mark.parametrize("counts", [(2,), (9,), (4, 5), (3, 1, 16)])
def test_xtrace_is_what_its_definition_says(name, counts):
    matrix = MATRICES[name]
    made = sketched(matrix, *counts)
    scale = float(matrix.abs().sum())
    samples, _ = xtrace(made)
    blocks = xtrace_blocks(made, BLOCKS)
    for i in range(sum(counts)):
        entries = estimate(matrix, made.tests, i)
        assert abs(float(samples[i] - entries.sum())) <= 1e-10 * scale
        wanted = torch.stack([part.sum() for part in torch.split(entries, list(BLOCKS))])
        assert torch.allclose(blocks[i], wanted, rtol=0, atol=1e-10 * scale)
    assert torch.allclose(blocks.sum(dim=1), samples, rtol=0, atol=1e-10 * scale)


@EVERY_MATRIX
def test_covariance_of_xtrace_is_that_of_estimates_without_two_vectors(name):
    matrix, count = MATRICES[name], 8
    made = sketched(matrix, count)
    samples, excess = xtrace(made)
    lacking = torch.tensor(
        [
            [
                float(estimate(matrix, made.tests, i, j).sum()) if i != j else 0.0
                for i in range(count)
            ]
            for j in range(count)
        ]
    ).double()
    differences = (samples[None, :] - lacking).fill_diagonal_(0)
    covariance = float((differences * differences.T).sum()) / (count * (count - 1))
    variance = float(samples.var()) / count
    assert excess == pytest.approx(math.sqrt(1 + max(covariance, 0) / variance), rel=1e-6)


def test_spread_alone_tells_too_little_and_the_excess_mends_it():
    matrix = MATRICES["heavy-tailed of low rank"]
    exact = float(matrix.trace())
    errors, spreads, excesses = [], [], []
    for seed in range(200):
        samples, excess = xtrace(sketched(matrix, 50, seed=seed))
        errors.append(float(samples.mean()) - exact)
        spreads.append(float(samples.std()) / math.sqrt(50))
        excesses.append(excess)
    squares = torch.tensor([errors, spreads, excesses]).double().square()
    met, told = float(squares[0].mean()), float((squares[1] * squares[2]).mean())
    assert float(squares[1].mean()) < 0.5 * met
    # The mean of 200 squares is known to about 10 %.
    assert told == pytest.approx(met, rel=0.4)


@EVERY_MATRIX
@pytest.mark.parametrize("counts", [(2,), (10,), (4, 6)])
def test_xdiag_is_what_its_definition_says(name, counts):
    matrix = MATRICES[name]
    made = sketched(matrix, *counts, signs=True)
    entries = []
    for i in range(sum(counts)):
        q = basis_without(matrix, made.tests, i)
        outside = torch.eye(SIZE).double() - q @ q.T
        known = (q @ (q.T @ matrix)).diagonal()
        entries.append(known + made.tests[i] * (outside @ matrix @ made.tests[i]))
    values, errors = xdiag(made)
    wanted = torch.stack(entries)
    scale = float(matrix.abs().max())
    assert torch.allclose(values, wanted.mean(dim=0), rtol=0, atol=1e-10 * scale)
    spread = wanted.std(dim=0) / math.sqrt(len(wanted))
    ratio = errors / spread
    assert bool((ratio >= 1 - 1e-9).all())
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)


def test_excess_of_xdiag_is_that_of_estimates_without_two_vectors():
    matrix, count = MATRICES["exponential"], 7
    made = sketched(matrix, count, signs=True)

    def entries(i: int, *others: int) -> torch.Tensor:
        q = basis_without(matrix, made.tests, i, *others)
        outside = torch.eye(SIZE).double() - q @ q.T
        known = (q @ (q.T @ matrix)).diagonal()
        return known + made.tests[i] * (outside @ matrix @ made.tests[i])

    whole = torch.stack([entries(i) for i in range(count)])
    total = 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                one, other = whole[i] - entries(i, j), whole[j] - entries(j, i)
                total += float(one @ other)
    variance = float(whole.var(dim=0).sum()) / count
    wanted = math.sqrt(1 + total / (count * (count - 1)) / variance)
    errors = xdiag(made)[1]
    assert wanted > 1
    assert torch.allclose(errors, wanted * whole.std(dim=0) / math.sqrt(count), rtol=1e-6)


def test_excess_of_xdiag_from_a_sample_of_the_entries_is_nearly_that_of_all(monkeypatch):
    made = sketched(MATRICES["exponential"], 20, signs=True)
    whole = xdiag(made)[1]
    monkeypatch.setattr(leave_one_out, "ENTRIES", 60)
    assert torch.allclose(xdiag(made)[1], whole, rtol=0.2)


# ------------------------------------------------------------------------------------ the basis


@EVERY_MATRIX
@pytest.mark.parametrize("counts", [(1,), (12,), (5, 7), (1, 1, 10)])
def test_factors_are_those_of_the_products(name, counts):
    matrix = MATRICES[name]
    made = sketched(matrix, *counts)
    q, tests = made.basis.T, made.tests.T
    scale = float(torch.linalg.matrix_norm(matrix @ tests))
    eye = torch.eye(made.rank).double()
    assert torch.allclose(q.T @ q, eye, rtol=0, atol=1e-12)
    assert torch.allclose(q @ made.factor, matrix @ tests, rtol=0, atol=1e-13 * scale)
    assert torch.allclose(made.images.T, matrix @ q, rtol=0, atol=1e-12 * scale)
    assert torch.allclose(made.compressed, q.T @ matrix @ q, rtol=0, atol=1e-12 * scale)
    assert torch.allclose(made.weights, q.T @ tests, rtol=0, atol=1e-11)


@EVERY_MATRIX
def test_left_out_directions_lie_across_every_other_column(name):
    made = sketched(MATRICES[name], 12)
    directions = made.missing_directions()
    across = directions.T @ made.factor
    lengths = torch.linalg.vector_norm(made.factor, dim=0)
    assert torch.allclose(directions.square().sum(dim=0), torch.ones(12).double())
    across.fill_diagonal_(0)
    assert bool((across.abs() <= 1e-12 * lengths).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [(12,), (6, 6), (2, 2, 8), (4, 8)])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_rounding_makes_no_directions(rank, counts, dtype):
    matrix = low_rank(rank, dtype) if rank else torch.zeros(SIZE, SIZE, dtype=dtype)
    operator = hidden(matrix)
    generator = torch.Generator().manual_seed(0)
    made = Sketch(operator, generator, signs=False, keep=True, step=lambda count: None)
    for count in counts:
        made.extend(count)
    assert made.rank == rank
    assert operator.multiplied == 12 + rank
    assert torch.count_nonzero(made.missing_directions()) == 0
    gap = made.basis @ made.basis.T - torch.eye(rank)
    assert bool((gap.abs() < 1e-5).all())


def test_equal_test_vectors_do_not_hide_that_others_are_needed():
    # Signs of three entries are soon equal, or opposite.
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()
    made = sketched(matrix, 3, signs=True)
    made.tests = torch.tensor([[1, 1, 1], [1, 1, 1], [1, -1, 1]]).double()
    left, sizes, right = torch.linalg.svd(matrix @ made.tests.T)
    made.basis, made.factor = left[:, :2].T, torch.diag(sizes[:2]) @ right[:2]
    kept = made.missing_directions().square().sum(dim=0)
    assert torch.allclose(kept, torch.tensor([0, 0, 1]).double())


@pytest.mark.parametrize("strip", [1, 700, 2**22])
def test_strips_change_nothing_but_rounding(strip, monkeypatch):
    whole = sketched(MATRICES["decaying"], 6, 3)
    monkeypatch.setattr(sketch, "STRIP", strip)
    monkeypatch.setattr(leave_one_out, "STRIP", strip)
    cut = sketched(MATRICES["decaying"], 6, 3)
    assert torch.allclose(xtrace(cut)[0], xtrace(whole)[0], rtol=1e-12)
    assert torch.allclose(xtrace_blocks(cut, BLOCKS), xtrace_blocks(whole, BLOCKS), atol=1e-12)
    assert torch.allclose(
        trace_known_blocks(cut, BLOCKS), trace_known_blocks(whole, BLOCKS), atol=1e-12
    )


def test_what_is_known_of_a_block_is_what_deflation_takes_away():
    matrix = MATRICES["indefinite"]
    made = sketched(matrix, 10)
    outside = torch.eye(SIZE).double() - made.basis.T @ made.basis
    known = (matrix - outside @ matrix @ outside).diagonal()
    wanted = torch.stack([part.sum() for part in torch.split(known, list(BLOCKS))])
    assert torch.allclose(trace_known_blocks(made, BLOCKS), wanted, atol=1e-11)
    rows = torch.eye(SIZE).double()[:4]
    assert torch.allclose(made.project(rows), outside[:4], atol=1e-12)


def test_memory_that_runs_out_is_told_with_the_way_out(monkeypatch):
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sketch, "multiply_rows", fail)
    with pytest.raises(
        fm.DeviceMemoryError, match=r"sketch with 5 vectors of length 150.*products="
    ):
        sketched(MATRICES["flat"], 5)
