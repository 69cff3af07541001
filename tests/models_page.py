"""The tables in docs/models.md: the models of the zoo and the errors of their Hessian products.

python tests/models_page.py          prints them
python tests/models_page.py --write  puts them into the page
"""

import argparse
import dataclasses
import functools
import math
import re
import warnings
from pathlib import Path

import torch

import flatminima as fm
from zoo import FAMILIES, Case, build, exact_product, facts_of, names_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- zoo: begin -->\n", "<!-- zoo: end -->\n"
BOUND = re.compile(r"≤ (1e-?\d+)")
"""How an error is stated: by a power of ten that it stays below."""

HEADINGS = {
    "basic": "Plain models",
    "layers": "Layers and operations",
    "recurrent": "Recurrent nets",
    "attention": "Attention",
    "transformers": "Hugging Face transformers",
    "structure": "Shared, frozen and parametrized parameters",
    "wrappers": "Checkpointing, wrappers and types",
    "batches": "Batches, outputs and losses",
}
COLUMNS = """\
| Model | Given as | float64 error | float32 error | How |
|---|---|---|---|---|
"""

SLACK = 3
"""By how much rounding on another machine may make an error larger."""

LUCK = {torch.float64: 4e-16, torch.float32: 2e-7, torch.bfloat16: 4e-3}
"""Relative errors below these are no merit of the model."""

PROMISED = {torch.float64: -9, torch.float32: -4, torch.bfloat16: -2}
"""The power of ten that test_zoo.py asks of exact products in any case."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model with the errors of its products, relative, in each type that it comes in."""

    title: str
    given: str
    errors: dict[torch.dtype, float]
    operation: str
    """Without a second derivative; "" where products are exact."""


def measured(name: str) -> Row:
    """Products with three random vectors, compared with those of the loss written by hand."""
    errors, operation = {}, ""
    for dtype in facts_of(name).dtypes:
        case = build(name, dtype)
        objective = case.objective()
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(objective.size, 3, generator=generator, dtype=torch.float64)
        vectors = vectors.to(objective.dtype)
        try:
            found = fm.HessianOperator(objective, method="double_backward") @ vectors
        except fm.NotTwiceDifferentiableError as error:
            operation = error.operation
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fm.FiniteDifferenceWarning)
                found = fm.HessianOperator(objective) @ vectors
        wanted = exact_product(case, vectors)
        worst = ((found.double() - wanted).norm(dim=0) / wanted.norm(dim=0)).max()
        errors[dtype] = max(float(worst), LUCK[dtype])
    return Row(case.title, given(case), errors, operation)


def given(case: Case) -> str:
    """The arguments of `Objective` beside model and data."""
    loss = "`batch_loss`"
    if case.batch_loss is None:
        function = case.loss_fn
        while isinstance(function, functools.partial):
            function = function.func
        kind = function if hasattr(function, "__name__") else type(function)
        loss = "own `loss_fn`" if kind.__name__ == "<lambda>" else f"`{kind.__name__}`"
    options = {
        "`weight`": case.weight is not None,
        "`params`": case.params is not None,
        '`mode="train"`': case.mode == "train",
    }
    return ", ".join([loss, *(option for option, is_there in options.items() if is_there)])


def bound(row: Row, dtype: torch.dtype) -> str:
    """The smallest power of ten that the error surely stays below."""
    power = math.ceil(math.log10(SLACK * row.errors[dtype]))
    return f"≤ 1e{power if row.operation else min(power, PROMISED[dtype])}"


def cells(row: Row) -> list[str]:
    double, single, half = (
        bound(row, dtype) if dtype in row.errors else ""
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    how = f"differences: `{row.operation}`" if row.operation else "exact"
    return [row.title, row.given, double or "–", single or (half and f"{half} (bfloat16)"), how]


def rows() -> dict[str, list[Row]]:
    """Every model of the zoo, by families."""
    return {family: [measured(name) for name in names_of(family)] for family in FAMILIES}


def tables(families: dict[str, list[Row]]) -> str:
    """What stands between the markers of the page."""
    every = [row for family in families.values() for row in family]
    exact = sum(not row.operation for row in every)
    parts = [
        f"Measured with torch {torch.__version__.split('+')[0]} on a CPU. {len(every)} models: "
        f"{exact} have exact products, {len(every) - exact} differences of gradients.\n"
    ]
    for family, found in families.items():
        lines = "".join(f"| {' | '.join(cells(row))} |\n" for row in found)
        parts.append(f"### {HEADINGS[family]}\n\n{COLUMNS}{lines}")
    return "\n" + "\n".join(parts) + "\n"


def errors(families: dict[str, list[Row]]) -> list[float]:
    """The errors as their bounds follow one another in `tables`."""
    order = (torch.float64, torch.float32, torch.bfloat16)
    every = [row for family in families.values() for row in family]
    return [row.errors[dtype] for row in every for dtype in order if dtype in row.errors]


def committed() -> str:
    """What stands between the markers now."""
    text = PAGE.read_text(encoding="utf-8")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    write = parser.parse_args().write
    text = tables(rows())
    if write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(BEGIN + committed(), BEGIN + text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
