"""`sharpness()`: the measures, in turn, of one model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..algorithms.eigen.lanczos import lanczos
from ..algorithms.estimators.spectral_density import spectral_density
from ..algorithms.estimators.trace import trace
from ..derivatives.hand_written import HandWritten
from ..derivatives.torch_private import BATCH_NORM
from ..errors import FlatMinimaWarning, InvalidArgumentError, NotPositiveDefiniteError
from ..measures.gradient_norm import gradient_norm
from ..measures.result import MeasureResult
from ..objective.microbatches import Microbatch
from ..objective.modules import drops
from ..objective.objective import Objective
from ..objective.selection import Selection
from ..operators.gauss_newton import GaussNewtonOperator
from ..operators.hessian import HessianOperator
from ..support.checks import check_integer
from ..support.progress import progress_bar
from ..support.randomness import Seed, draw_seed
from .measure_table import FAMILY, Options, chosen_measures
from .result import SharpnessReport

__all__ = ["MEASURES", "sharpness"]

MEASURES = (
    "gradient_norm",
    "epsilon_sharpness",
    "random_sharpness",
    "eigenvalues",
    "trace",
    "density",
    "gauss_newton",
    *(name for name in FAMILY if name not in ("epsilon_sharpness", "random_sharpness")),
)
ON_HESSIAN = ("eigenvalues", "trace")
DEFAULT = (
    "gradient_norm",
    "epsilon_sharpness",
    "random_sharpness",
    "eigenvalues",
    "trace",
    "gauss_newton",
)
TOL = 1e-4
"""Of eigenvalues: the negative end is small compared with the largest; this separates it from
zero."""


def sharpness(
    model: nn.Module | Objective,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    measures: str | Sequence[str] | Mapping[str, Options | Sequence[Options] | None] | None = None,
    eigenvalues: int = 3,
    trace_products: int = 50,
    samples: int = 10,
    params: Selection = None,
    weight: Callable[[Any], float] | None = None,
    mode: Literal["eval", "train", "keep"] = "eval",
    device: torch.device | str | None = None,
    cache: bool | Literal["auto"] = "auto",
    batch_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int = 1024,
    microbatch: Microbatch = None,
    hand_written: HandWritten = True,
    seed: Seed = 0,
    progress: bool = True,
) -> SharpnessReport:
    """Return how sharp the minimum is that a trained model lies in, in one call.

    It measures the loss, the norm of its gradient, Keskar's ε-sharpness in the full space and in
    a random subspace of dimension 100, each at ε = 1e-3 and 5e-4, the sharpness under random
    perturbations, the largest and the smallest eigenvalues of the Hessian and its trace, and the
    largest eigenvalue and the trace of the Gauss–Newton matrix. Traces have the traces of all
    modules with them. On request it also takes the density of the Hessian's eigenvalues. The model
    is left exactly as it was.

    Args:
        model: any module; or an [`Objective`][flatminima.Objective], in place of `model`,
            `loss_fn`, `data` and every other argument of an objective.
        loss_fn: `loss_fn(output, target)` → a scalar.
        data: a tuple of tensors `(inputs, targets)`, a list of batches, a DataLoader or a
            Dataset: the data whose loss is studied, usually the training data.
        measures: which to take: names, "all", or a mapping of names to settings. The names are
            "gradient_norm", "epsilon_sharpness", "random_sharpness", "eigenvalues", "trace",
            "density", "gauss_newton", and those of the functions "sam_sharpness",
            "average_sharpness", "pac_bayes_sharpness", "local_energy", "fisher_rao_norm",
            "relative_flatness", "critical_sharpness" and "laplace_log_evidence". Default: the
            first seven without "density", which usually takes 900 products, and without
            "gauss_newton" if there is no `loss_fn`. "density" brings
            "eigenvalues" with it, which are taken out of it first. The loss is always there. A
            mapping gives the options of each function, as in {"sam_sharpness": {"rho": 0.1},
            "trace": None}, or a list of such for several numbers; None is for those that a report
            takes by default. With "all", what a model or loss does not allow is left out with a
            note.
        eigenvalues: how many of the largest of the Hessian.
        trace_products: products for each trace.
        samples: random perturbations of each parameter tensor.
        params: as in [`Objective`][flatminima.Objective].
        weight: as in [`Objective`][flatminima.Objective].
        mode: as in [`Objective`][flatminima.Objective].
        device: as in [`Objective`][flatminima.Objective].
        cache: as in [`Objective`][flatminima.Objective].
        batch_loss: as in [`Objective`][flatminima.Objective].
        batch_size: as in [`Objective`][flatminima.Objective].
        microbatch: as in [`Objective`][flatminima.Objective].
        hand_written: as in [`Objective`][flatminima.Objective].
        seed: of everything random; each measure starts from it, so a subset of the measures gives
            the same numbers.
        progress: show bars for what takes long.

    Returns:
        The report: printed, it is a table; in a notebook, a rendered one.

    Raises:
        InvalidArgumentError: an unknown measure or option (with the closest name), bad counts, or
            a measure named in `measures` that the model or the loss does not allow, such as
            "gauss_newton" with `batch_loss`.
        FlatMinimaError: whatever [`Objective`][flatminima.Objective] refuses.

    Warns:
        ConvergenceWarning: eigenvalues did not converge; the report says how far they came.
        FlatMinimaWarning: "gauss_newton" is named in `measures`, and the loss is linear in the
            outputs, so its matrix is zero. If it is not named, a note says so.

    Examples:
        >>> import torch
        >>> from flatminima import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> report = sharpness(model, torch.nn.MSELoss(), (x, y), measures=["gradient_norm"])
        >>> print(report)
        Sharpness of Linear: 2 parameters, 2 examples, mode 'eval'
        measure             value  ± error  diagnosis        cost
        ──────────────────  ─────  ───────  ─────────  ──────────
        loss L(θ)             2.5                          1 loss
        gradient norm ‖∇L‖  4.123                      1 gradient
    """
    call = "sharpness"
    lenient = isinstance(measures, str) and measures == "all"
    chosen = chosen_measures(call, measures, known=MEASURES, default=DEFAULT)
    if "density" in chosen:
        chosen.setdefault("eigenvalues", ())
    check_integer(call, "eigenvalues", eigenvalues, low=1)
    check_integer(call, "trace_products", trace_products, low=2)
    check_integer(call, "samples", samples, low=1)
    options: dict[str, Any] = {
        "loss_fn": loss_fn,
        "data": data,
        "params": params,
        "weight": weight,
        "mode": mode,
        "device": device,
        "cache": cache,
        "batch_loss": batch_loss,
        "batch_size": batch_size,
        "microbatch": microbatch,
        "hand_written": hand_written,
    }
    if isinstance(model, Objective):
        _check_no_options(call, options)
        objective = model
    else:
        objective = Objective(model, **options, progress=progress)
    before = objective.batches.readings
    without_outputs = (measures is None or lenient) and objective.loss_fn is None
    if without_outputs:
        del chosen["gauss_newton"]
    hessian = HessianOperator(objective)
    gauss_newton = GaussNewtonOperator(objective) if "gauss_newton" in chosen else None
    # One number, so that every measure starts from the same seed.
    shared: dict[str, Any] = {"seed": draw_seed(seed, objective.device), "progress": progress}
    left_out: list[str] = []

    def family(name: str) -> tuple[MeasureResult, ...]:
        """Return the results of a measure, one for each of its settings."""
        function, found = FAMILY[name][0], []
        for options in chosen[name]:
            own = _fitted(name, options, objective, samples)
            try:
                found.append(function(objective, **own, **shared))
            except (InvalidArgumentError, NotPositiveDefiniteError) as error:
                if not lenient:
                    raise
                settings = ", ".join(f"{key}={value!r}" for key, value in own.items())
                left_out.append(f"{name}({settings}) is left out: {error}")
        return tuple(found)

    def fields_of(name: str) -> dict[str, Any]:
        """Return what a measure adds to the report."""
        if name == "gradient_norm":
            return {name: gradient_norm(objective).value}
        if name == "eigenvalues":
            count = min(eigenvalues, objective.size)
            return _spectrum(hessian, count, density="density" in chosen, **shared)
        if name == "trace":
            return {name: trace(hessian, products=trace_products, **shared)}
        results[name] = found = family(name)
        if name == "epsilon_sharpness":
            return {name: found}
        return {name: found[0]} if name == "random_sharpness" and len(found) == 1 else {}

    results: dict[str, tuple[MeasureResult, ...]] = {}
    fields: dict[str, Any] = dict.fromkeys(
        ("gradient_norm", "random_sharpness", "largest", "smallest", "trace")
    )
    # The density comes with the eigenvalues.
    names = [name for name in chosen if name != "density"]
    on_hessian = [name for name in names if name in ON_HESSIAN]
    with progress_bar("sharpness", total=len(names), unit="measure", show=progress) as bar:

        def take(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            if gauss_newton is not None and name == "gauss_newton":
                asked = measures is not None and not lenient
                fields.update(_gauss_newton(gauss_newton, trace_products, asked=asked, **shared))
            else:
                fields.update(fields_of(name))
            bar.update()

        # Only one of the operators keeps its graphs at a time.
        with hessian.session():
            loss = objective.loss()
            for name in on_hessian:
                take(name)
        for name in names:
            if name not in on_hessian:
                take(name)
    return SharpnessReport(
        model=type(objective.model).__name__,
        parameters=objective.size,
        examples=objective.examples,
        mode=objective.mode,
        loss=loss,
        notes=_notes(objective, hessian, gauss_newton, left_out, without_outputs=without_outputs),
        readings=objective.batches.readings - before,
        results={name: found for name, found in results.items() if found},
        **{"epsilon_sharpness": ()} | fields,
    )


def _check_no_options(call: str, options: Mapping[str, Any]) -> None:
    """Refuse arguments that belong to an objective when one is given."""
    defaults = {n: p.default for n, p in inspect.signature(Objective).parameters.items()}
    given = [
        name
        for name, value in options.items()
        # Only numbers and words are compared by their values.
        if value is not defaults[name]
        and not (isinstance(value, (int, str)) and value == defaults[name])
    ]
    if given:
        raise InvalidArgumentError(
            f"{call}(objective) takes the model, the data and their options from the objective; "
            f"give {', '.join(f'{name}=' for name in given)} to fm.Objective instead."
        )


def _fitted(name: str, options: Options, objective: Objective, samples: int) -> dict[str, Any]:
    """Return options as this objective can have them, where they are the standard ones."""
    fitted = dict(options)
    for option in ("subspace", "outliers"):
        if option in fitted and any(options is standard for standard in FAMILY[name][1]):
            fitted[option] = min(fitted[option], objective.size)
    if name == "random_sharpness":
        fitted.setdefault("samples", samples)
    return fitted


def _spectrum(
    operator: HessianOperator, count: int, *, density: bool, seed: Seed, progress: bool
) -> dict[str, Any]:
    """The largest eigenvalues and the smallest one, from the same products; what lies between."""
    # The search for the negative end, with its tolerance, meets the largest on the way.
    found = lanczos(
        operator,
        k=(count, 1) if count < operator.shape[0] else (count, 0),
        which="BE",
        tol=TOL,
        basis_size=max(2 * count + 12, 30),
        seed=seed,
        progress=progress,
    )
    ends = found.without_vectors()
    fields: dict[str, Any] = {"largest": ends.part("LA", count), "smallest": ends.part("SA", 1)}
    if density:
        fields["density"] = spectral_density(operator, outliers=found, seed=seed, progress=progress)
    return fields


def _gauss_newton(
    operator: GaussNewtonOperator, products: int, *, asked: bool, **shared: Any
) -> dict[str, Any]:
    """Return its largest eigenvalue and its trace."""
    with warnings.catch_warnings(), operator.session():
        if not asked:
            # That the matrix is zero is in its notes.
            warnings.filterwarnings("ignore", "The loss is linear", FlatMinimaWarning)
        largest = lanczos(operator, tol=TOL, **shared).without_vectors()
        return {
            "gauss_newton_largest": largest,
            "gauss_newton_trace": trace(operator, products=products, **shared),
        }


def _notes(
    objective: Objective,
    hessian: HessianOperator,
    gauss_newton: GaussNewtonOperator | None,
    left_out: Sequence[str],
    *,
    without_outputs: bool,
) -> tuple[str, ...]:
    notes = list(left_out)
    modules = list(objective.model.modules())
    found = {
        "dropout off": any(map(drops, modules)),
        "batch norm with its running statistics": any(
            isinstance(m, BATCH_NORM) and m.running_mean is not None for m in modules
        ),
    }
    if objective.mode == "eval" and any(found.values()):
        notes.append(f"Evaluation mode: {' and '.join(w for w, is_so in found.items() if is_so)}.")
    operators: list[tuple[HessianOperator | GaussNewtonOperator, str]] = [
        (hessian, "Hessian products are differences of gradients")
    ]
    if gauss_newton is not None:
        operators.append((gauss_newton, "Gauss–Newton products are differences of outputs"))
    for operator, said in operators:
        if operator.reason:
            notes.append(
                f"{operator.reason[:-1]}: {said}, with an estimated error of up to "
                f"{operator.error:.1e} for unit vectors."
            )
    if without_outputs:
        notes.append(
            "The Gauss–Newton matrix is left out, as batch_loss= does not show the model's "
            "outputs; give loss_fn=, or name the measures."
        )
    # Of autocast and short types both operators know.
    return tuple(dict.fromkeys([*notes, *(n for operator, _ in operators for n in operator.notes)]))
