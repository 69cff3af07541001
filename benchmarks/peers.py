"""The eigensolvers that are compared: flatminima, and other libraries where they are installed."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flatminima as fm

from .models import Problem

__all__ = ["METHODS", "BudgetSpentError", "Found", "Method"]

TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Found:
    """What a solver gave: eigenvalues (k,), eigenvectors (n, k), and the products it took."""

    values: Tensor
    vectors: Tensor
    products: int


class BudgetSpentError(Exception):
    """The solver took longer than it was given."""


class Counted:
    """A product that counts itself, and ends the solver when its time is over."""

    def __init__(self, product: Callable[..., Any], seconds: float) -> None:
        self.product, self.count = product, 0
        self.end = time.perf_counter() + seconds

    def __call__(self, *args: Any) -> Any:
        """One product."""
        if time.perf_counter() > self.end:
            raise BudgetSpentError
        self.count += 1
        return self.product(*args)


class Method(abc.ABC):
    """One library's way to the k eigenpairs of largest magnitude.

    Attributes:
        name: as the table has it.
        package: what must be importable.
    """

    name: str
    package: str

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return importlib.util.find_spec(self.package) is not None

    @abc.abstractmethod
    def settings(self, problem: Problem, k: int, budget: float) -> Iterator[dict[str, Any]]:
        """Its own options, from the loosest on, so that the first that is exact enough is taken."""

    @abc.abstractmethod
    def solve(
        self, problem: Problem, k: int, setting: dict[str, Any], budget: float = math.inf
    ) -> Found:
        """From the model and its data to the eigenpairs."""


class FlatMinima(Method):
    """`flatminima.lanczos`, asked for the residual that is wanted and not helped further."""

    name, package = "flatminima", "flatminima"

    def settings(self, problem: Problem, k: int, budget: float) -> Iterator[dict[str, Any]]:
        """The tolerance itself."""
        yield {"tol": TOLERANCE}

    def solve(
        self, problem: Problem, k: int, setting: dict[str, Any], budget: float = math.inf
    ) -> Found:
        """Objective, operator, Lanczos."""
        objective = fm.Objective(problem.model, problem.loss_fn, problem.batches)
        operator = fm.HessianOperator(objective)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fm.ConvergenceWarning)
            result = fm.lanczos(operator, k=k, which="LM", progress=False, **setting)
        assert result.eigenvectors is not None
        return Found(result.eigenvalues, result.eigenvectors, result.products)


class PyHessian(Method):
    """Power iteration with deflation, until an eigenvalue changes by less than `tol`.

    Given one batch it keeps the graph of the gradient, given several it builds each anew; the
    data come in whichever of the two is faster.
    """

    name, package = "PyHessian", "pyhessian"

    def settings(self, problem: Problem, k: int, budget: float) -> Iterator[dict[str, Any]]:
        """Tolerances, with as many iterations for a pair as fit the whole budget."""
        seconds = {}
        for one_batch in (False, True):
            start = time.perf_counter()
            found = self.solve(problem, 1, {"one_batch": one_batch, "maxIter": 5, "tol": 0.0})
            seconds[one_batch] = (time.perf_counter() - start) / found.products
        fastest = min(seconds, key=lambda key: seconds[key])
        iterations = math.ceil(budget / seconds[fastest])
        for exponent in range(3, 9):
            tol = 10.0**-exponent
            yield {"one_batch": fastest, "maxIter": iterations, "tol": tol}

    def solve(
        self, problem: Problem, k: int, setting: dict[str, Any], budget: float = math.inf
    ) -> Found:
        """`hessian(...).eigenvalues(...)`."""
        module: Any = importlib.import_module("pyhessian.hessian")
        options = dict(setting)
        if options.pop("one_batch"):
            inputs, targets = zip(*problem.batches, strict=True)
            data: dict[str, Any] = {"data": (torch.cat(inputs), torch.cat(targets))}
        else:
            data = {"dataloader": problem.batches}
        cuda = problem.device.startswith("cuda")
        torch.manual_seed(0)
        original = module.hessian_vector_product
        counted = module.hessian_vector_product = Counted(original, budget)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
                solver = module.hessian(problem.model, problem.loss_fn, cuda=cuda, **data)
                over_batches = solver.dataloader_hv_product = Counted(
                    solver.dataloader_hv_product, budget
                )
                values, vectors = solver.eigenvalues(top_n=k, **options)
        finally:
            module.hessian_vector_product = original
            # It leaves the graph in .grad.
            problem.model.zero_grad(set_to_none=True)
        columns = [torch.cat([part.detach().flatten() for part in vector]) for vector in vectors]
        products = counted.count + over_batches.count
        return Found(torch.tensor(values), torch.stack(columns, dim=1), products)


class Curvlinops(Method):
    """`HessianLinearOperator` as a SciPy operator, and ARPACK."""

    name, package = "curvlinops + ARPACK", "curvlinops"

    def settings(self, problem: Problem, k: int, budget: float) -> Iterator[dict[str, Any]]:
        """ARPACK's tolerances."""
        for tol in (1.0, 0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 1e-4):
            yield {"tol": tol}

    def solve(
        self, problem: Problem, k: int, setting: dict[str, Any], budget: float = math.inf
    ) -> Found:
        """Without curvlinops' own check of determinism, which costs passes over the data."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        curvlinops = importlib.import_module("curvlinops")
        hessian = curvlinops.HessianLinearOperator(
            problem.model,
            problem.loss_fn,
            [p for p in problem.model.parameters() if p.requires_grad],
            problem.batches,
            check_deterministic=False,
            num_data=sum(len(y) for _, y in problem.batches),
        ).to_scipy()
        counted = Counted(hessian.matvec, budget)
        operator = LinearOperator(hessian.shape, matvec=counted, dtype=hessian.dtype)
        start = np.random.default_rng(0).standard_normal(hessian.shape[0]).astype(hessian.dtype)
        values, vectors = eigsh(operator, k=k, which="LM", v0=start, **setting)
        return Found(torch.as_tensor(values), torch.as_tensor(vectors), counted.count)


class EigenThings(Method):
    """hessian-eigenthings' Lanczos: so many steps without a restart, reorthogonalised."""

    name, package = "hessian-eigenthings", "hessian_eigenthings"

    def settings(self, problem: Problem, k: int, budget: float) -> Iterator[dict[str, Any]]:
        """Numbers of steps."""
        steps = k + 4
        while steps <= min(problem.size, 20 * k + 100):
            yield {"max_iter": steps}
            steps = math.ceil(1.2 * steps)

    def solve(
        self, problem: Problem, k: int, setting: dict[str, Any], budget: float = math.inf
    ) -> Found:
        """Its batches count alike, which is right for batches of equal size."""
        library = importlib.import_module("hessian_eigenthings")
        operator = library.HessianOperator(
            problem.model, problem.batches, library.supervised_loss(problem.loss_fn)
        )
        counted = operator.matvec = Counted(operator.matvec, budget)
        result = library.lanczos(operator, k=k, reorthogonalize=True, seed=0, **setting)
        return Found(result.eigenvalues, result.eigenvectors.T, counted.count)


METHODS: tuple[Method, ...] = (FlatMinima(), PyHessian(), Curvlinops(), EigenThings())
