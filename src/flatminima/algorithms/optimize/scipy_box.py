"""SciPy's L-BFGS-B over the unit box, on the host and in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...results import Outcome

__all__ = ["ScipyLBFGSB"]

Floats = np.ndarray[Any, np.dtype[np.float64]]

Function = Callable[[Tensor], tuple[float, Tensor]]


class _NotFiniteError(Exception):
    pass


class ScipyLBFGSB:
    """The same as `LBFGSB`, by `scipy.optimize.minimize`.

    Attributes:
        point: (n,), where `minimize` starts.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """At the centre of the box."""
        self.point = torch.zeros(size, dtype=dtype, device=device)

    def minimize(self, function: Function, iterations: int) -> tuple[Outcome, int]:
        """Go down from `point`; see `LBFGSB.minimize`."""
        from scipy.optimize import minimize

        def on_host(
            u: np.ndarray[Any, np.dtype[np.float64]],
        ) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
            value, gradient = function(torch.as_tensor(u.copy()).to(self.point))
            if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
                raise _NotFiniteError
            return value, gradient.double().cpu().numpy()

        options: Any = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
        try:
            found = minimize(
                on_host,
                self.point.double().cpu().numpy(),
                jac=True,
                method="L-BFGS-B",
                bounds=np.tile([-1.0, 1.0], (len(self.point), 1)),
                options=options,
            )
        except _NotFiniteError:
            return Outcome.UNBOUNDED, 0
        stopped = Outcome.ITERATION_LIMIT if found.nit >= iterations else Outcome.STATIONARY
        return stopped, int(found.nit)
