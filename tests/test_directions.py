"""Directions of a landscape: norms, cosines, signs and ends, against closed forms."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.landscape.directions import Directions, check_directions
from flatminima.landscape.model_directions import (
    difference_direction,
    eigenvector_directions,
    gradient_direction,
)
from flatminima.landscape.random_directions import random_directions
from integrity import untouched
from zoo import build, matrix_with_spectrum, quadratic_case

SPECTRUM = torch.tensor([9.0, 5.0, 2.0, 0.5, -1.0, -4.0], dtype=torch.float64)
MATRIX = matrix_with_spectrum(SPECTRUM, 3, torch.float64)


class Odd(nn.Module):
    """Tensors of every number of dimensions, an empty one, zeros, and filters of one entry."""

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, shape in {
            "conv": (4, 3, 2, 2),
            "dense": (5, 7),
            "bias": (5,),
            "scale": (),
            "column": (6, 1),
            "zero": (3, 2),
            "empty": (0, 4),
            "hollow": (4, 0),
        }.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))
        with torch.no_grad():
            self.zero.zero_()
            self.dense[2] = 0
            self.dense[3] *= 100

    def forward(self, inputs=None):
        return sum(p.square().sum() for p in self.parameters())


def odd(dtype=torch.float64) -> tuple[Odd, fm.Objective]:
    model = Odd(dtype)
    return model, fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())


def pieces(objective: fm.Objective, column: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(objective.layout.names, objective.layout.views(column), strict=True))


def quadratic(start=None, linear=None) -> fm.Objective:
    start = torch.arange(1.0, 7.0).double() if start is None else start
    return quadratic_case(MATRIX, linear=linear, start=start).objective()


def by_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


# ------------------------------------------------------------------------------------ random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biases", [False, True])
def test_every_filter_has_the_norm_of_the_models(biases, dtype):
    model, objective = odd(dtype)
    found = random_directions(objective, count=3, biases=biases)
    assert found.vectors.shape == (objective.size, 3)
    assert found.vectors.dtype == dtype
    for column in found.vectors.T:
        for name, piece in pieces(objective, column).items():
            own = getattr(model, name).detach()
            if own.numel() == 0:
                continue
            if own.dim() < 2 and not biases:
                assert not piece.any()
                continue
            wanted = torch.linalg.vector_norm(by_rows(own), dim=1)
            norms = torch.linalg.vector_norm(by_rows(piece), dim=1)
            torch.testing.assert_close(norms, wanted, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert set(found.units) == {"filter norms"}
    assert found.labels == tuple(f"random direction {i}" for i in (1, 2, 3))


def test_filters_of_norm_zero_stay_at_zero_and_are_told():
    _, objective = odd()
    found = random_directions(objective)
    for column in found.vectors.T:
        parts = pieces(objective, column)
        assert not parts["zero"].any()
        assert not parts["dense"][2].any()
        assert parts["dense"][3].any()
    assert any("4 filters or tensors of norm zero" in note for note in found.notes)
    assert any("'bias'" in note for note in found.notes)


@pytest.mark.parametrize("name", ["conv_batch_norm", "embedding_padding", "tied_weights", "resnet"])
def test_real_models_follow_their_own_filters(name):
    objective = build(name).objective()
    found = random_directions(objective, count=1)
    own = objective.parameters
    for name_, piece in pieces(objective, found.vectors[:, 0]).items():
        if own[name_].dim() < 2:
            assert not piece.any()
            continue
        ratio = by_rows(piece).norm(dim=1) / by_rows(own[name_].detach()).norm(dim=1)
        moved = by_rows(own[name_].detach()).norm(dim=1) > 0
        torch.testing.assert_close(ratio[moved], torch.ones_like(ratio[moved]))


def test_tied_weights_are_moved_once():
    objective = build("tied_weights").objective()
    assert random_directions(objective).vectors.shape[0] == objective.size
    assert len(objective.layout.names) == len(set(map(id, objective.parameters.values())))


def test_layers_get_the_norm_of_the_models():
    model, objective = odd()
    found = random_directions(objective, normalize="layer", biases=True)
    for column in found.vectors.T:
        for name, piece in pieces(objective, column).items():
            assert float(piece.norm()) == pytest.approx(
                float(getattr(model, name).detach().norm()), rel=1e-12
            )
    assert found.units == ("layer norms",) * 2


@pytest.mark.parametrize("normalize", ["model", "none"])
def test_whole_directions_are_orthogonal_with_the_norm_asked_for(normalize):
    _, objective = odd()
    found = random_directions(objective, count=4, normalize=normalize)
    norm = float(objective.point().norm()) if normalize == "model" else 1.0
    gram = found.vectors.T @ found.vectors
    torch.testing.assert_close(gram / norm**2, torch.eye(4).double(), rtol=1e-12, atol=1e-13)
    parts = pieces(objective, found.vectors[:, 0])
    assert not parts["bias"].any()
    assert parts["zero"].any(), "only filter and layer norms can be zero"
    assert not any("cosine" in note for note in found.notes)


def test_float32_directions_are_orthogonal_before_they_are_normalised():
    objective = build("resnet", torch.float32).objective()
    found = random_directions(objective, count=3, normalize="none")
    gram = found.vectors.double().T @ found.vectors.double()
    assert float((gram - torch.eye(3).double()).abs().max()) < 1e-6


def test_draws_are_gaussian_and_not_uniform():
    """Li et al. draw from a normal distribution; a slip to [0, 1) has been seen."""
    objective = build("resnet", torch.float64).objective()
    found = random_directions(objective, count=1, normalize="none", biases=True)
    entries = found.vectors[:, 0] * math.sqrt(objective.size)
    n = objective.size
    assert abs(float(entries.mean())) < 5 / math.sqrt(n)
    kurtosis = float((entries**4).mean())
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / n)


def test_orthogonal_filter_by_filter_directions_come_out_as_by_hand():
    model, objective = odd()
    found = random_directions(objective, count=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    draws = [
        torch.randn(objective.size, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    still = {"bias", "scale", "zero"}
    for draw in draws:
        for name, piece in pieces(objective, draw).items():
            if name in still:
                piece.zero_()
            elif name == "dense":
                piece[2] = 0
    first, second = draws
    second = second - first * (first @ second) / (first @ first)
    assert abs(float(first @ second)) < 1e-12
    for column, draw in zip(found.vectors.T, (first, second), strict=True):
        for name, piece in pieces(objective, draw).items():
            if name in still or piece.numel() == 0:
                continue
            rows, own = by_rows(piece), by_rows(getattr(model, name).detach())
            norms = rows.norm(dim=1, keepdim=True)
            wanted = torch.where(norms > 0, rows / norms * own.norm(dim=1, keepdim=True), 0.0)
            torch.testing.assert_close(by_rows(pieces(objective, column)[name]), wanted)


def test_the_cosine_that_normalising_leaves_is_told():
    _, objective = odd()
    found = random_directions(objective)
    cosine = abs(float(found.gram()[0, 1]))
    assert cosine > 1e-6, "filters of different norms turn the directions"
    assert any(f"{cosine:.2g}" in note and "|cosine|" in note for note in found.notes)


def test_seeds_repeat_and_more_directions_begin_with_the_fewer():
    _, objective = odd()
    found = random_directions(objective, seed=1)
    assert found == random_directions(objective, seed=1)
    assert found != random_directions(objective, seed=2)
    more = random_directions(objective, count=3, seed=1)
    torch.testing.assert_close(more.vectors[:, :2], found.vectors)
    generator = torch.Generator().manual_seed(1)
    assert found.vectors.equal(random_directions(objective, seed=generator).vectors)
    again = random_directions(objective, seed=generator)
    assert not found.vectors.equal(again.vectors)


def test_more_directions_than_parameters_that_may_move_are_refused():
    objective = fm.Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    with pytest.raises(fm.InvalidArgumentError, match=r"3 orthogonal.*2 of 3.*biases=True"):
        random_directions(objective, count=3)
    assert random_directions(objective, count=3, biases=True, normalize="none").count == 3


def test_a_model_of_one_dimensional_parameters_is_told_to_move_biases():
    objective = quadratic()
    with pytest.raises(fm.InvalidArgumentError, match="biases=True"):
        random_directions(objective)
    assert random_directions(objective, biases=True).count == 2


def test_directions_that_become_parallel_by_normalising_are_refused():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[2.0], [0.001]]))
            self.v = nn.Parameter(torch.tensor([[2.0]]))

        def forward(self, inputs=None):
            return self.w.sum() + self.v.sum()

    objective = fm.Objective(One(), data=[torch.zeros(1)], batch_loss=lambda m, b: m())
    # Each filter has one entry: only signs are left, of which that of 0.001 is almost nothing.

    def several():
        for seed in range(20):
            random_directions(objective, seed=seed)

    with pytest.raises(fm.InvalidArgumentError, match=r"parallel \(cosine -?0.9999"):
        several()


def test_nan_parameters_are_refused_by_name():
    model, objective = odd()
    with torch.no_grad():
        model.bias[1] = math.nan
    for call in (
        lambda: random_directions(objective),
        lambda: difference_direction(objective, torch.zeros(objective.size).double()),
        lambda: gradient_direction(objective),
    ):
        with pytest.raises(fm.NonFiniteError, match="'bias'"):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"normalize": "filters"}, "'filter'"),
        ({"count": 0}, "≥ 1"),
        ({"biases": 1}, "biases"),
        ({"seed": "a"}, "seed"),
    ],
)
def test_arguments_of_random_directions_are_checked(options, match):
    _, objective = odd()
    with pytest.raises((fm.InvalidArgumentError, fm.ArgumentTypeError), match=match):
        random_directions(objective, **options)


# ------------------------------------------------------------------------------------ eigenvectors


@pytest.mark.parametrize("ranks", [(1, 2), (1, -1), (-1,), (2, -2, 3), (5, -3), (5, -1), (6, 1)])
def test_eigenvectors_of_a_quadratic_have_their_ranks_and_signs(ranks):
    values, vectors = torch.linalg.eigh(MATRIX)
    found = eigenvector_directions(quadratic(), ranks=ranks, normalize="none")
    for rank, column, label, note in zip(
        ranks, found.vectors.T, found.labels, found.notes, strict=False
    ):
        place = -rank if rank > 0 else -rank - 1
        exact = vectors[:, place]
        exact = exact * exact[exact.abs().argmax()].sign()
        torch.testing.assert_close(column, exact, rtol=0, atol=5e-3)
        name = f"eigenvector {rank}".replace("-", "−")
        assert label == f"{name} (λ = {float(values[place]):.3g})"
        assert note.startswith(f"{name}: λ = {float(values[place]):.6g}"[:22])
        assert "residual" in note
    assert found.units == ("parameter units",) * len(ranks)


def test_loss_along_an_eigenvector_is_half_its_eigenvalue():
    objective = quadratic(start=torch.zeros(6).double())
    found = eigenvector_directions(objective, ranks=(1, -1), normalize="none")
    for column, value in zip(found.vectors.T, (9.0, -4.0), strict=True):
        assert objective.loss_at(2 * column) == pytest.approx(value / 2 * 4, rel=1e-4)


def test_eigenvectors_may_have_the_norm_of_the_model():
    objective = quadratic()
    found = eigenvector_directions(objective)
    norms = found.vectors.norm(dim=0)
    torch.testing.assert_close(norms, objective.point().norm().expand(2))
    assert found.units == ("‖θ‖",) * 2


def test_signs_do_not_depend_on_the_random_start():
    found = [eigenvector_directions(quadratic(), seed=seed, normalize="none") for seed in range(6)]
    for other in found[1:]:
        torch.testing.assert_close(other.vectors, found[0].vectors, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("which", "k", "ranks"),
    [
        ("LA", 3, (1, 3)),
        ("SA", 2, (-1, -2)),
        ("BE", (2, 1), (1, -1)),
        ("LM", 3, (1, 2, -1)),
        ("LA", 6, (1, -1, -2)),
    ],
)
def test_known_eigenpairs_are_used_without_a_product(which, k, ranks, monkeypatch):
    objective = quadratic()
    result = fm.lanczos(fm.MatrixOperator(MATRIX), k=k, which=which, tol=1e-8)
    monkeypatch.setattr("flatminima.landscape.model_directions.lanczos", None)
    found = eigenvector_directions(objective, ranks=ranks, result=result, normalize="none")
    order = SPECTRUM.sort(descending=True).values
    for rank, column in zip(ranks, found.vectors.T, strict=True):
        value = order[rank - 1 if rank > 0 else rank]
        torch.testing.assert_close(MATRIX @ column, value * column, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("which", "k", "rank"), [("LA", 2, 3), ("LA", 2, -1), ("SA", 2, 1), ("LM", 2, -1), ("LM", 3, 3)]
)
def test_ranks_that_a_result_does_not_hold_are_refused(which, k, rank):
    """ "LM" with two pairs holds 9 and 5: its last is not the smallest of all."""
    result = fm.lanczos(fm.MatrixOperator(MATRIX), k=k, which=which, tol=1e-8)
    with pytest.raises(fm.InvalidArgumentError, match=rf"rank {rank}.*{which}"):
        eigenvector_directions(quadratic(), ranks=(rank,), result=result)


def test_ranks_in_a_result_of_both_ends_are_said_to_be_counted_there():
    result = fm.lanczos(fm.MatrixOperator(MATRIX), k=(3, 1), which="BE", tol=1e-8)
    found = eigenvector_directions(quadratic(), ranks=(1, 2), result=result)
    assert any("counted among the pairs" in note for note in found.notes)
    with pytest.raises(fm.InvalidArgumentError, match="twice"):
        eigenvector_directions(quadratic(), ranks=(4, -1), result=result)


def test_doubtful_results_are_doubted_in_the_notes():
    exact = fm.lanczos(fm.MatrixOperator(MATRIX), k=2, tol=1e-8)
    doubtful = dataclasses.replace(
        exact,
        outcome=fm.Outcome.PRODUCT_LIMIT,
        residuals=torch.tensor([1e-9, 3.0], dtype=torch.float64),
    )
    found = eigenvector_directions(quadratic(), result=doubtful)
    assert any(fm.Outcome.PRODUCT_LIMIT.value in note for note in found.notes)
    assert [("may be mixed" in note) for note in found.notes[:2]] == [False, True]
    assert not any("mixed" in n for n in eigenvector_directions(quadratic(), result=exact).notes)


def test_another_operator_is_taken():
    objective = quadratic()
    other = fm.MatrixOperator(torch.diag(torch.arange(6.0)).double())
    found = eigenvector_directions(objective, ranks=(1,), operator=other, normalize="none")
    assert int(found.vectors[:, 0].argmax()) == 5
    with pytest.raises(fm.ShapeError, match=r"size 2.*are 6"):
        eigenvector_directions(objective, operator=fm.MatrixOperator(torch.eye(2)))


@pytest.mark.parametrize("ranks", [(0,), (), (1, 1), (6, -1), (7,), (-7,), (1.5,), "12", None])
def test_ranks_are_checked(ranks):
    with pytest.raises((fm.InvalidArgumentError, fm.ArgumentTypeError), match="ranks"):
        eigenvector_directions(quadratic(), ranks=ranks)


def test_results_without_vectors_and_both_sources_are_refused():
    result = fm.lanczos(fm.MatrixOperator(MATRIX), k=2)
    with pytest.raises(fm.InvalidArgumentError, match="dropped"):
        eigenvector_directions(quadratic(), result=result.without_vectors())
    with pytest.raises(fm.InvalidArgumentError, match="not both"):
        eigenvector_directions(quadratic(), result=result, operator=fm.MatrixOperator(MATRIX))
    with pytest.raises(fm.ArgumentTypeError, match="EigenResult"):
        eigenvector_directions(quadratic(), result=torch.eye(6))


# --------------------------------------------------------------------------- gradient, difference


def test_gradient_direction_is_downhill():
    objective = quadratic()
    found = gradient_direction(objective, normalize="none")
    gradient = MATRIX @ objective.point()
    torch.testing.assert_close(found.vectors[:, 0], -gradient / gradient.norm())
    slope = (objective.loss_at(1e-5 * found.vectors[:, 0]) - objective.loss()) / 1e-5
    assert slope == pytest.approx(-float(gradient.norm()), rel=1e-3)
    scaled = gradient_direction(objective)
    torch.testing.assert_close(scaled.vectors.norm(), objective.point().norm())
    assert scaled.units == ("‖θ‖",)


def test_zero_gradient_and_zero_model_are_refused():
    with pytest.raises(fm.InvalidArgumentError, match="gradient is zero"):
        gradient_direction(quadratic(start=torch.zeros(6).double()), normalize="none")
    flat = quadratic(start=torch.zeros(6).double(), linear=torch.ones(6).double())
    for call in (gradient_direction, eigenvector_directions):
        with pytest.raises(fm.InvalidArgumentError, match=r"‖θ‖ is no unit.*'none'"):
            call(flat)
    other = torch.ones(6).double()
    with pytest.raises(fm.InvalidArgumentError, match="no unit"):
        difference_direction(flat, other, normalize="model")
    assert gradient_direction(flat, normalize="none").count == 1


@pytest.mark.parametrize("kind", ["module", "state", "vector"])
@pytest.mark.parametrize("name", ["linear_regression", "tied_weights", "partly_frozen"])
def test_difference_puts_the_other_model_at_one(name, kind):
    case = build(name, torch.float64)
    other = copy.deepcopy(case.model)
    objective = case.objective()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise)
    theirs = fm.Objective(
        other, case.loss_fn, case.batches, batch_loss=case.batch_loss, params=case.params
    )
    given = {"module": other, "state": other.state_dict(), "vector": theirs.point()}[kind]
    found = difference_direction(objective, given)
    assert objective.loss_at(found.vectors[:, 0]) == pytest.approx(theirs.loss(), rel=1e-12)
    torch.testing.assert_close(objective.point() + found.vectors[:, 0], theirs.point())
    assert found.labels == ("towards the other model",)
    assert found.units == ("distance to the other model",)
    scaled = difference_direction(objective, given, normalize="model")
    torch.testing.assert_close(scaled.vectors.norm(), objective.point().norm())
    assert scaled.units == ("‖θ‖",)


def test_exact_numbers_give_the_other_model_exactly():
    model, other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 4.0]]))
        other.weight.copy_(torch.tensor([[2.0, -2.0, 1.0], [0.75, 0.25, 1.0]]))
    data = torch.eye(3), torch.ones(3, 2)
    objective = fm.Objective(model, nn.MSELoss(), data)
    found = difference_direction(objective, other)
    assert objective.loss_at(found.vectors[:, 0]) == fm.Objective(other, nn.MSELoss(), data).loss()


def test_what_a_difference_does_not_move_is_told():
    case = build("conv_batch_norm")
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.dtype.is_floating_point:
                tensor.add_(0.1)
    found = difference_direction(case.objective(), other)
    assert any("running_" in note and "does not move" in note for note in found.notes)


def test_other_models_that_do_not_fit_are_refused_by_name():
    case = build("linear_regression")
    objective = case.objective()
    with pytest.raises(fm.InvalidArgumentError, match="very parameters"):
        difference_direction(objective, copy.deepcopy(case.model))
    with pytest.raises(fm.StateMismatchError, match="'other' argument of difference_direction"):
        difference_direction(objective, nn.Linear(17, 2))
    with pytest.raises(fm.ShapeError, match="difference_direction"):
        difference_direction(objective, torch.ones(objective.size + 1))
    with pytest.raises(fm.ArgumentTypeError, match="difference_direction"):
        difference_direction(objective, 3)
    nan = objective.point().fill_(math.nan)
    with pytest.raises(fm.NonFiniteError, match="difference_direction"):
        difference_direction(objective, nan)


# ------------------------------------------------------------------------------------ checking


def test_every_form_of_directions_is_taken():
    objective = quadratic()
    a, b = torch.eye(6)[0], 3 * torch.eye(6)[1]
    made = gradient_direction(objective)
    for given, labels in (
        (a, ("direction 1",)),
        (torch.stack([a, b], dim=1), ("direction 1", "direction 2")),
        ([a, b], ("direction 1", "direction 2")),
        ([made, a], ("minus the gradient", "direction 2")),
        (made, ("minus the gradient",)),
    ):
        found = check_directions("surface", objective, given)
        assert found.labels == labels
        assert found.vectors.dtype == torch.float64
        assert found.vectors.shape == (6, len(labels))
    assert check_directions("surface", objective, made).notes == made.notes


def test_given_vectors_are_copied_and_columns_lie_in_one_piece():
    objective = quadratic()
    given = torch.eye(6).double()[:, :2].contiguous()
    found = check_directions("surface", objective, given)
    given.zero_()
    assert found.vectors[0, 0] == 1
    assert found.vectors[:, 0].is_contiguous()
    assert random_directions(objective, biases=True).vectors[:, 1].is_contiguous()


def eye(*columns: int) -> torch.Tensor:
    return torch.eye(6)[:, list(columns)].clone()


def with_entry(value: float) -> torch.Tensor:
    made = eye(0, 1)
    made[4, 1] = value
    return made


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (torch.ones(5), fm.ShapeError, r"6 entries.*number 1 has shape \(5,\)"),
        ([torch.ones(6), torch.ones(2, 3)], fm.ShapeError, r"number 2 has shape \(2, 3\)"),
        (torch.ones(6, 0), fm.ShapeError, "at least one"),
        ([], fm.ShapeError, "at least one"),
        (torch.tensor(1.0), fm.ShapeError, r"has shape \(\)"),
        (with_entry(math.nan), fm.NonFiniteError, "direction 2 given to surface.*index 4"),
        (with_entry(math.inf), fm.NonFiniteError, "direction 2 given to surface.*index 4"),
        ([torch.ones(6), torch.zeros(6)], fm.InvalidArgumentError, "direction 2.*zeros"),
        ([torch.ones(6), eye(1)[:, 0], -torch.ones(6)], fm.InvalidArgumentError, "1 and 3.*-1"),
        (
            [torch.ones(6), torch.ones(6) + 1e-4 * torch.eye(6)[0]],
            fm.InvalidArgumentError,
            "1 and 2.*parallel",
        ),
        (
            [eye(0)[:, 0], eye(3)[:, 0], eye(1)[:, 0], eye(0)[:, 0] + eye(1)[:, 0]],
            fm.InvalidArgumentError,
            "directions 1, 3 and 4 .*linearly dependent",
        ),
        ("random", fm.ArgumentTypeError, "str"),
        (3, fm.ArgumentTypeError, "int"),
        ([3], fm.ArgumentTypeError, "holds a int"),
        (torch.ones(6, dtype=torch.complex64), fm.ArgumentTypeError, "real"),
        (torch.ones(6, device="meta"), fm.DeviceError, "meta"),
    ],
)
def test_directions_that_cannot_be_used_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        check_directions("surface", quadratic(), given)


def test_labels_are_in_the_errors():
    objective = quadratic()
    made = gradient_direction(objective)
    with pytest.raises(fm.InvalidArgumentError, match=r"2 \('minus the gradient'\)"):
        check_directions("surface", objective, [2 * made.vectors[:, 0], made])


def test_directions_of_very_different_length_are_no_reason_to_refuse():
    vectors = torch.eye(6).double()[:, :2] * torch.tensor([1e-30, 1e20])
    assert check_directions("surface", quadratic(), vectors).count == 2


def test_half_precision_directions_beyond_the_range_are_refused():
    model = nn.Linear(6, 1, bias=False)
    objective = fm.Objective(model, nn.MSELoss(), (torch.ones(2, 6), torch.ones(2, 1)))
    with pytest.raises(fm.NonFiniteError, match="beyond the range"):
        check_directions("surface", objective, 1e300 * torch.ones(6).double())


# ------------------------------------------------------------------------------------ as a result


def test_directions_are_joined():
    objective = quadratic()
    one, two = gradient_direction(objective), eigenvector_directions(objective)
    both = one + two
    assert both.count == 3
    assert both.labels == one.labels + two.labels
    assert both.notes == one.notes + two.notes
    assert torch.equal(both.vectors, torch.cat([one.vectors, two.vectors], dim=1))
    with pytest.raises(fm.ShapeError, match="6 parameters"):
        both + Directions(torch.ones(2, 1), ("a",), ("b",))
    with pytest.raises(TypeError):
        both + torch.ones(6)


def test_gram_holds_the_cosines():
    vectors = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    gram = Directions(vectors, ("a", "b", "c"), ("u",) * 3).gram()
    wanted = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(gram, wanted)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(fm.ShapeError, match="d labels"):
        Directions(torch.ones(3, 2), ("a",), ("b", "c"))
    with pytest.raises(fm.ShapeError, match="d labels"):
        Directions(torch.ones(3), ("a",), ("b",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_go_to_json_and_back(dtype):
    _, objective = odd(dtype)
    found = random_directions(objective)
    again = Directions.from_json(found.to_json())
    assert again == found
    checked = check_directions("surface", objective, again)
    assert torch.equal(checked.vectors, found.vectors)
    assert "random direction 2" in repr(found)
    assert "filter norms" in found._repr_html_()


@pytest.mark.parametrize("name", ["conv_batch_norm", "mlp_batch_norm_dropout"])
def test_models_and_random_states_are_untouched(name):
    case = build(name)
    objective = case.objective()
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with untouched(case.model, other, case.batches):
        random_directions(objective)
        eigenvector_directions(objective, ranks=(1,), progress=False)
        gradient_direction(objective)
        difference_direction(objective, other)


@pytest.mark.parametrize(
    "call",
    [
        random_directions,
        eigenvector_directions,
        gradient_direction,
        lambda model: difference_direction(model, model),
    ],
)
def test_a_model_in_place_of_an_objective_is_refused(call):
    with pytest.raises(fm.ArgumentTypeError, match="Objective"):
        call(nn.Linear(1, 1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_directions_lie_on_the_device_of_the_model():
    model = Odd().cuda()
    objective = fm.Objective(model, data=[torch.zeros(1)], batch_loss=lambda m, batch: m())
    found = random_directions(objective) + gradient_direction(objective)
    found = found + eigenvector_directions(objective, ranks=(1,))
    other = {n: p.detach().cpu() + 1 for n, p in model.named_parameters()}
    found = found + difference_direction(objective, other)
    assert found.vectors.device == objective.device
    checked = check_directions("surface", objective, Directions.from_json(found.to_json()))
    assert torch.equal(checked.vectors, found.vectors)
