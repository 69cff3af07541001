"""Average and PAC-Bayes sharpness and local energy: closed forms, coverage, searches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from integrity import untouched
from zoo import matrix_with_spectrum, quadratic_case

DOUBLE = torch.float64


def quadratic(spectrum=(4.0, 1.0, -0.5, 2.0), linear=None, start=None):
    matrix = matrix_with_spectrum(spectrum, 1)
    n = len(spectrum)
    generator = torch.Generator().manual_seed(3)
    linear = torch.randn(n, generator=generator, dtype=DOUBLE) if linear is None else linear
    start = torch.randn(n, generator=generator, dtype=DOUBLE) if start is None else start
    return matrix, start, quadratic_case(matrix, linear, start).objective()


def classifier(examples=60, dtype=DOUBLE):
    """A net that fits well separated classes."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(3, dtype=dtype)
    y = torch.arange(examples) % 3
    x = centres[y] + 0.3 * torch.randn(examples, 3, generator=generator, dtype=dtype)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=dtype))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    assert (net(x).argmax(1) == y).all()
    return net, x, y


# ------------------------------------------------------------------------------ average sharpness


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_of_a_quadratic_is_half_the_trace(adaptive):
    matrix, start, objective = quadratic()
    c = start.abs() if adaptive else torch.ones_like(start)
    expected = 0.5 * 0.3**2 * float((c**2 * matrix.diagonal()).sum())
    hits = 0
    for seed in range(20):
        result = fm.average_sharpness(
            objective, sigma=0.3, adaptive=adaptive, samples=30, seed=seed
        )
        hits += abs(result.value - expected) <= 2 * result.standard_error
    # 95 % of 20, less three standard deviations of a binomial.
    assert hits >= 16
    many = fm.average_sharpness(objective, sigma=0.3, adaptive=adaptive, samples=1000)
    assert many.value == pytest.approx(expected, abs=3 * many.standard_error)
    assert many.standard_error < 0.1 * expected


def test_pairs_cancel_the_gradient():
    flat = torch.zeros(4, 4, dtype=DOUBLE)
    slope = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=DOUBLE)
    objective = quadratic_case(flat, slope, torch.ones(4, dtype=DOUBLE)).objective()
    result = fm.average_sharpness(objective, sigma=0.5)
    assert abs(result.value) < 1e-14
    assert result.outcome is fm.Outcome.BELOW_ROUNDING


def test_average_is_the_mean_of_its_draws():
    net, x, y = classifier()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=17)
    result = fm.average_sharpness(objective, sigma=0.2, samples=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    pairs = []
    for _ in range(3):
        z = 0.2 * torch.randn(objective.size, generator=generator, dtype=DOUBLE)
        pairs.append((objective.loss_at(z) + objective.loss_at(-z)) / 2 - objective.loss())
    assert result.value == pytest.approx(np.mean(pairs), rel=1e-12)
    assert (result.samples, result.evaluations) == (3, 7)


def test_rtol_ends_when_the_error_is_small_and_says_when_it_is_not():
    _, _, objective = quadratic()
    within = fm.average_sharpness(objective, sigma=0.3, rtol=0.2)
    assert within.outcome is fm.Outcome.WITHIN_RTOL
    assert within.standard_error <= 0.2 * abs(within.value)
    assert 24 <= within.samples < 1000
    with pytest.warns(fm.ConvergenceWarning, match=r"limit of 30 samples.*Increase samples="):
        above = fm.average_sharpness(objective, sigma=0.3, rtol=1e-3, samples=30)
    assert above.outcome is fm.Outcome.ABOVE_RTOL
    with pytest.raises(fm.ConvergenceError) as caught:
        fm.average_sharpness(objective, sigma=0.3, rtol=1e-3, samples=30, strict=True)
    assert caught.value.result == above


def test_a_loss_that_is_not_finite_somewhere_says_so():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.1], dtype=DOUBLE))

        def forward(self, inputs):
            return self.theta.sqrt().sum()

    objective = fm.Objective(Root(), data=[torch.zeros(1)], batch_loss=lambda m, b: m(b))
    result = fm.average_sharpness(objective, sigma=1.0)
    assert result.outcome is fm.Outcome.NON_FINITE_POINTS
    assert math.isnan(result.value)
    assert fm.AverageSharpnessResult.from_json(result.to_json()) == result


# ---------------------------------------------------------------------------- PAC-Bayes sharpness


@pytest.mark.parametrize("adaptive", [False, True])
def test_pac_bayes_of_a_quadratic_bowl(adaptive):
    matrix, start, objective = quadratic((4.0, 1.0, 0.5, 2.0), linear=None)
    c = start.abs() if adaptive else torch.ones_like(start)
    trace = float((c**2 * matrix.diagonal()).sum())
    # E rise = ½ σ² tr(c A c) = target; the gradient has mean zero, so many draws.
    result = fm.pac_bayes_sharpness(
        objective, on="loss", target=2.0, adaptive=adaptive, samples=400, tol=1e-2
    )
    assert result.value == pytest.approx(trace / 4, abs=4 * result.standard_error)
    assert 0 < result.standard_error < 0.2 * result.value
    assert result.sigma == pytest.approx(result.value**-0.5)


def test_pac_bayes_errors_cover_the_truth():
    matrix, _, objective = quadratic((4.0, 1.0, 0.5, 2.0))
    truth = (4.0 / float(matrix.trace())) ** 0.5
    inside = 0
    for seed in range(15):
        found = fm.pac_bayes_sharpness(
            objective, on="loss", target=2.0, samples=30, tol=0.1, seed=seed
        )
        inside += abs(found.sigma - truth) <= 2 * found.sigma_error
    assert inside >= 11


def test_pac_bayes_brackets_the_target_on_the_same_draws():
    net, x, y = classifier()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=25)
    result = fm.pac_bayes_sharpness(objective, target=0.2, samples=5, seed=3)
    assert result.base == 0
    assert result.upper <= 1.01 * result.sigma
    rises = dict(zip(result.sigmas, result.rises, strict=True))
    assert rises[result.sigma] <= 0.2 < rises[result.upper]
    # The rise at any σ is that of the same five draws, counted by hand.
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(objective.size, generator=generator, dtype=DOUBLE) for _ in range(5)]
    for sigma, rise in rises.items():
        wrong = 0.0
        for z in draws:
            vector = objective.point() + sigma * z
            shapes = [p.shape for p in net.parameters()]
            pieces = torch.split(vector, [s.numel() for s in shapes])
            state = {
                n: p.view(s)
                for (n, _), p, s in zip(net.named_parameters(), pieces, shapes, strict=True)
            }
            output = torch.func.functional_call(net, state, (x,))
            wrong += float((output.argmax(1) != y).double().mean()) / 5
        assert rise == pytest.approx(wrong, abs=1e-12)
    assert result.evaluations == 1 + 5 * len(rises)


def test_magnitude_aware_moves_in_proportion():
    net, x, y = classifier()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    result = fm.pac_bayes_sharpness(objective, adaptive=True, samples=5)
    with torch.no_grad():
        for layer, factor in ((net[0], 8.0), (net[2], 1 / 8)):
            layer.weight *= factor
        net[0].bias *= 8
    rescaled = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    again = fm.pac_bayes_sharpness(rescaled, adaptive=True, samples=5)
    assert again.value == pytest.approx(result.value, rel=1e-9)
    plain = fm.pac_bayes_sharpness(rescaled, samples=5).value
    assert plain > 1.5 * fm.pac_bayes_sharpness(objective_of(net, x, y, 8.0), samples=5).value


def objective_of(net, x, y, factor):
    """The net before it was rescaled."""
    with torch.no_grad():
        for layer, f in ((net[0], factor), (net[2], 1 / factor)):
            layer.weight /= f
        net[0].bias /= factor
    return fm.Objective(net, nn.CrossEntropyLoss(), (x, y))


def test_an_error_that_cannot_rise_so_far_is_a_bound():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([x[:, :1] * 0 + 1, self.theta.expand(len(x), 1) * 0], dim=1)

    data = torch.ones(4, 1), torch.zeros(4, dtype=torch.long)
    objective = fm.Objective(Constant(), nn.CrossEntropyLoss(), data)
    result = fm.pac_bayes_sharpness(objective, samples=2)
    assert result.outcome is fm.Outcome.NOT_REACHED
    assert result.outcome.doubtful
    assert result.upper == math.inf
    assert math.isnan(result.standard_error)
    assert fm.PacBayesResult.from_json(result.to_json()) == result
    assert result.measurements()[0].error is None


# -------------------------------------------------------------------------------- local energy


def test_local_energy_of_a_quadratic():
    matrix, start, _ = quadratic()
    bowl = quadratic_case(matrix, -(matrix @ start), start).objective()  # the minimum is at θ
    curvature = float((start**2 * matrix.diagonal()).sum())
    sigmas = (0.4, 0.1, 0.2)
    result = fm.local_energy(bowl, on="loss", samples=500, sigmas=sigmas)
    assert result.sigmas == (0.1, 0.2, 0.4)
    for sigma, rise, error in zip(result.sigmas, result.rises, result.standard_errors, strict=True):
        assert rise == pytest.approx(0.5 * sigma**2 * curvature, abs=4 * error)
    r = result.rises
    area = 0.1 * r[0] / 2 + 0.1 * (r[0] + r[1]) / 2 + 0.2 * (r[1] + r[2]) / 2
    assert result.value == pytest.approx(area / 0.4, rel=1e-12)


def test_local_energy_uses_the_same_draws_at_every_size():
    net, x, y = classifier()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    both = fm.local_energy(objective, sigmas=[0.2, 0.6], samples=6, seed=2)
    one = fm.local_energy(objective, sigmas=[0.6], samples=6, seed=2)
    assert both.rises[1] == one.rises[0]
    assert one.value == pytest.approx(one.rises[0] / 2)  # a triangle from the origin
    assert both.rises[1] > both.rises[0] >= 0
    assert both.evaluations == 1 + 12


# ------------------------------------------------------------------------- which models have errors


def binary(target):
    x = torch.linspace(-1, 1, 8).view(8, 1)
    net = nn.Linear(1, 1)
    nn.init.ones_(net.weight), nn.init.constant_(net.bias, 0.3)
    return net, x, target(x)


def test_errors_of_binary_logits_count():
    net, x, y = binary(lambda x: (x > 0).float())
    objective = fm.Objective(net, nn.BCEWithLogitsLoss(), (x, y))
    assert fm.local_energy(objective, samples=2).base == 1 / 8


def test_errors_of_one_hot_squares_count():
    net, x, y = classifier()
    target = nn.functional.one_hot(y).double()
    objective = fm.Objective(net, nn.MSELoss(), (x, target))
    assert fm.local_energy(objective, samples=2, sigmas=[0.1]).base == 0


@pytest.mark.parametrize("measure", [fm.pac_bayes_sharpness, fm.local_energy])
@pytest.mark.parametrize(
    ("loss_fn", "target"),
    [
        (nn.MSELoss(), lambda x: x),
        (nn.MSELoss(), lambda x: (x > 0).float()),
        (nn.L1Loss(), lambda x: 5 * x),
        (nn.functional.mse_loss, lambda x: x * 0 + 0.5),
        (nn.PoissonNLLLoss(), lambda x: (x > 0).float()),
        (lambda output, target: (output - target).square().mean(), lambda x: 7 * x),
    ],
)
def test_a_regression_has_no_errors(measure, loss_fn, target):
    objective = fm.Objective(*binary(target)[:1], loss_fn, binary(target)[1:])
    with pytest.raises(fm.InvalidArgumentError, match=r"on='error'.*no classifier.*on='loss'"):
        measure(objective)
    assert measure(objective, on="loss", samples=2).value > 0


def test_several_outputs_of_a_regression_have_no_errors():
    net, x, _ = classifier()
    objective = fm.Objective(net, nn.MSELoss(), (x, 2 * x))
    with pytest.raises(fm.InvalidArgumentError, match="no classifier"):
        fm.pac_bayes_sharpness(objective)


def test_outputs_that_are_no_tensor_have_no_errors():
    class Both(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    data = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    loss = lambda output, target: nn.functional.cross_entropy(output[0], target)  # noqa: E731
    objective = fm.Objective(Both(2, 2), loss, data)
    with pytest.raises(fm.InvalidArgumentError, match="returns a tuple"):
        fm.local_energy(objective)


def test_batch_loss_shows_no_errors():
    _, _, objective = quadratic()
    with pytest.raises(fm.InvalidArgumentError, match=r"batch_loss= does not.*loss_fn="):
        fm.pac_bayes_sharpness(objective)


# ---------------------------------------------------------------------------------------- family


MEASURES = {
    "average": lambda o, **k: fm.average_sharpness(o, samples=3, **k),
    "PAC-Bayes": lambda o, **k: fm.pac_bayes_sharpness(o, samples=3, on="loss", **k),
    "local energy": lambda o, **k: fm.local_energy(o, samples=3, on="loss", **k),
}
EVERY = pytest.mark.parametrize("name", MEASURES)


@EVERY
def test_the_same_seed_gives_the_same_number_and_another_does_not(name):
    net, x, y = classifier()
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    first = MEASURES[name](objective, seed=5)
    assert MEASURES[name](objective, seed=5) == first
    assert MEASURES[name](objective, seed=6).value != first.value
    generator = torch.Generator().manual_seed(5)
    one = MEASURES[name](objective, seed=generator)
    assert MEASURES[name](objective, seed=generator).value != one.value


@EVERY
def test_the_cutting_of_the_data_does_not_matter(name):
    net, x, y = classifier()
    values = [
        MEASURES[name](
            fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=size, cache=cache)
        ).value
        for size, cache in ((60, True), (7, True), (13, False))
    ]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-9)


@EVERY
def test_everything_is_left_as_it_was(name):
    net, x, y = classifier(dtype=torch.float32)
    net.train()
    with untouched(net, x, y):
        MEASURES[name](fm.Objective(net, nn.CrossEntropyLoss(), (x, y), batch_size=8))


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (fm.average_sharpness, {"sigma": 0}, "'sigma' argument of average_sharpness"),
        (fm.average_sharpness, {"sigma": -0.1}, "finite number > 0"),
        (fm.average_sharpness, {"samples": 1}, "'samples' argument .* integer ≥ 2"),
        (fm.average_sharpness, {"rtol": 1.5}, "'rtol' argument"),
        (fm.pac_bayes_sharpness, {"target": 0}, "'target' argument of pac_bayes_sharpness"),
        (fm.pac_bayes_sharpness, {"tol": 1}, "'tol' argument .* below 1"),
        (fm.pac_bayes_sharpness, {"samples": 1}, "'samples' argument"),
        (fm.pac_bayes_sharpness, {"on": "accuracy"}, "'on' argument .* 'error', 'loss'"),
        (fm.local_energy, {"sigmas": []}, "'sigmas' argument of local_energy"),
        (fm.local_energy, {"sigmas": [0.1, 0.1]}, "different numbers"),
        (fm.local_energy, {"sigmas": [0.1, -0.1]}, "finite number > 0"),
        (fm.local_energy, {"samples": 0}, "'samples' argument"),
    ],
)
def test_bad_options_are_refused(measure, options, message):
    net, x, y = classifier()
    with pytest.raises(fm.InvalidArgumentError, match=message):
        measure(fm.Objective(net, nn.CrossEntropyLoss(), (x, y)), **options)


@pytest.mark.parametrize("sigmas", [0.1, "0.1", None])
def test_sigmas_are_a_list(sigmas):
    net, x, y = classifier()
    with pytest.raises(fm.ArgumentTypeError, match="list of numbers"):
        fm.local_energy(fm.Objective(net, nn.CrossEntropyLoss(), (x, y)), sigmas=sigmas)


def test_noise_in_proportion_refuses_tensors_of_zeros():
    net, x, y = classifier()
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)
    objective = fm.Objective(net, nn.CrossEntropyLoss(), (x, y))
    for measure in (
        lambda: fm.average_sharpness(objective, adaptive=True),
        lambda: fm.pac_bayes_sharpness(objective, adaptive=True),
        lambda: fm.local_energy(objective),
    ):
        with pytest.raises(fm.InvalidArgumentError, match=r"'0\.bias', '2\.bias'.*them out"):
            measure()


def test_labels_that_the_criterion_ignores_are_no_errors():
    net, x, y = classifier()
    values = []
    for ignored in (-100, -1, 5):
        labels = y.clone()
        labels[::2] = ignored
        wrong = (labels[1:20:2] + 1) % 3
        labels[1:20:2] = wrong
        loss_fn = nn.CrossEntropyLoss(ignore_index=ignored)
        for size in (60, 7):
            objective = fm.Objective(net, loss_fn, (x, labels), batch_size=size)
            values.append(fm.local_energy(objective, samples=2, sigmas=[0.1]))
    assert [v.base for v in values] == pytest.approx([10 / 30] * 6)
    for value in values:
        assert value.rises == pytest.approx(values[0].rises, abs=1e-12)


def test_probabilities_and_logits_have_the_same_errors():
    net, x, y = binary(lambda x: (x > 0).float())
    logits = fm.Objective(net, nn.BCEWithLogitsLoss(), (x, y))
    probable = fm.Objective(nn.Sequential(net, nn.Sigmoid()), nn.BCELoss(), (x, y))
    assert fm.local_energy(logits, samples=4) == fm.local_energy(probable, samples=4)


def test_scores_of_tokens_last_are_told_apart():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6))
    data = torch.randint(5, (8, 3)), torch.randint(6, (8, 3))

    def loss_fn(output, target):
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    with pytest.raises(fm.InvalidArgumentError, match=r"not scores \(N, C, …\).*on='loss'"):
        fm.pac_bayes_sharpness(fm.Objective(net, loss_fn, data))


@pytest.mark.parametrize(
    ("loss_fn", "target"),
    [
        (lambda o, y: (o - y).square().mean(), torch.rand(8, 1)),
        (nn.PoissonNLLLoss(), torch.randint(4, (8, 1))),
    ],
)
def test_numbers_between_zero_and_one_are_no_classes(loss_fn, target):
    objective = fm.Objective(nn.Linear(2, 1), loss_fn, (torch.randn(8, 2), target))
    with pytest.raises(fm.InvalidArgumentError, match="no classifier"):
        fm.pac_bayes_sharpness(objective)


def test_small_rises_of_large_losses_are_known_to_be_rounding():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=generator)
    net = nn.Linear(20, 1)
    target = net(x).detach() + 3
    objective = fm.Objective(net, nn.MSELoss(), (x, target))
    exact = 0.5 * float((2 * x.square().mean(0)).sum() + 2)
    for sigma in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2):
        result = fm.average_sharpness(objective, sigma=sigma, samples=200)
        if result.outcome is fm.Outcome.COMPLETED:
            missed = abs(result.value - sigma**2 * exact)
            assert missed < 3 * result.standard_error + 0.1 * sigma**2 * exact
            assert sigma > 1e-4
        else:
            assert result.outcome is fm.Outcome.BELOW_ROUNDING
            assert sigma < 1e-2
    with pytest.warns(fm.ConvergenceWarning, match="not known to be within rtol"):
        fm.average_sharpness(objective, sigma=1e-5, rtol=0.1, samples=30)
    with pytest.raises(fm.ConvergenceError):
        fm.average_sharpness(objective, sigma=1e-5, rtol=0.1, samples=30, strict=True)
    energy = fm.local_energy(objective, on="loss", sigmas=[1e-8], samples=2)
    assert energy.outcome is fm.Outcome.BELOW_ROUNDING
    searched = fm.pac_bayes_sharpness(objective, on="loss", target=1e-7, samples=2)
    assert searched.outcome is fm.Outcome.BELOW_ROUNDING


def test_short_types_have_their_own_rounding():
    net, x, y = classifier(dtype=torch.float32)
    objective = fm.Objective(
        net.to(torch.bfloat16), nn.CrossEntropyLoss(), (x.to(torch.bfloat16), y)
    )
    result = fm.average_sharpness(objective, sigma=1e-3, samples=10)
    assert result.outcome is fm.Outcome.BELOW_ROUNDING
    assert result.resolution == pytest.approx(8 * 2.0**-7 * result.loss)


def test_sigmas_that_were_chosen_are_in_the_name():
    _, _, objective = quadratic()
    usual = fm.local_energy(objective, on="loss", samples=2)
    own = fm.local_energy(objective, on="loss", samples=2, sigmas=[0.1, 0.5])
    assert usual.name == "local energy (loss), σ ≤ 0.5"
    assert own.name == "local energy (loss), σ = 0.1, 0.5"
