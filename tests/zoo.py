"""Small seeded models with their data, through which every product and measure goes.

Each is a `Case` of `cases.py` and lives in the file of its family, zoo_*.py.
"""

import zoo_attention
import zoo_basic
import zoo_batches
import zoo_layers
import zoo_recurrent
import zoo_structure
import zoo_transformers
import zoo_wrappers
from cases import (
    Case,
    Facts,
    Transposed,
    build,
    cached_dense_hessian,
    copied,
    cut,
    dense_hessian,
    exact_gradient,
    exact_loss,
    exact_product,
    facts_of,
    joined,
    map_tensors,
    matrix_with_spectrum,
    names_of,
    quadratic_case,
    random_orthogonal,
    settle_batch_norm,
)
from zoo_basic import TiedAutoencoder

__all__ = [
    "FAMILIES",
    "NAMES",
    "NAMES_AND_DTYPES",
    "Case",
    "Facts",
    "TiedAutoencoder",
    "Transposed",
    "build",
    "cached_dense_hessian",
    "copied",
    "cut",
    "dense_hessian",
    "exact_gradient",
    "exact_loss",
    "exact_product",
    "facts_of",
    "joined",
    "map_tensors",
    "matrix_with_spectrum",
    "names_of",
    "quadratic_case",
    "random_orthogonal",
    "settle_batch_norm",
]

FAMILIES = tuple(
    module.__name__.removeprefix("zoo_")
    for module in (
        zoo_basic,
        zoo_layers,
        zoo_recurrent,
        zoo_attention,
        zoo_transformers,
        zoo_structure,
        zoo_wrappers,
        zoo_batches,
    )
)

NAMES = tuple(name for family in FAMILIES for name in names_of(family))
"""Every case, for `pytest.mark.parametrize("name", NAMES)` and `build(name)`."""

NAMES_AND_DTYPES = tuple((name, dtype) for name in NAMES for dtype in facts_of(name).dtypes)
"""Every case in each type in which it makes sense."""
