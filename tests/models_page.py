"""The tables in docs/models.md: the models of the zoo and the errors of their Hessian products.

python tests/models_page.py          prints them
python tests/models_page.py --write  puts them into the page
"""

import argparse
import dataclasses
import functools
import math
import warnings
from pathlib import Path

import torch

import flatminima as fm
from zoo import FAMILIES, Case, build, exact_product, facts_of, names_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- zoo: begin -->\n", "<!-- zoo: end -->\n"

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
USUAL = {"float64": "1e-14", "float32": "1e-6"}
"""What most errors stay below, with exact products."""

MOST = """\
| Family | Models, by what is given |
|---|---|
"""
OTHERS = """\
| Model | Given as | float64 | float32 | Differences of |
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
    """The arguments of `Objective` other than model and data."""
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


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the page says of one model; errors as the powers of ten that they stay below."""

    family: str
    title: str
    given: str
    operation: str
    limits: dict[str, str]


def entry(family: str, row: Row) -> Entry:
    limits = {}
    for dtype, error in row.errors.items():
        power = math.ceil(math.log10(SLACK * error))
        name = str(dtype).removeprefix("torch.")
        limits[name] = f"1e{power if row.operation else min(power, PROMISED[dtype])}"
    return Entry(HEADINGS[family], row.title, row.given, row.operation, limits)


def holds(limit: str, error: float) -> bool:
    """Whether the limit bounds the error, and is not much wider than that."""
    return error <= float(limit) <= 1e3 * error


def rows() -> dict[str, list[Row]]:
    """Every model of the zoo, by families."""
    return {family: [measured(name) for name in names_of(family)] for family in FAMILIES}


def render(entries: list[Entry]) -> str:
    """What stands between the markers of the page. `parse` is its inverse."""
    usual = [e for e in entries if not e.operation and e.limits == USUAL]
    exact = sum(not e.operation for e in entries)
    most = ""
    for family in HEADINGS.values():
        titles: dict[str, list[str]] = {}
        for e in usual:
            if e.family == family:
                titles.setdefault(e.given, []).append(e.title)
        models = "<br>".join(f"{given}: {'; '.join(found)}" for given, found in titles.items())
        most += f"| {family} | {models} |\n" if models else ""
    others = ""
    for e in entries:
        if e not in usual:
            double, single, half = (e.limits.get(t, "") for t in ("float64", "float32", "bfloat16"))
            how = f"`{e.operation}` " if e.operation else ""
            single = single or f"{half} (bfloat16)"
            others += f"| {e.title} | {e.given} | {double or '–'} | {single} | {how}|\n"
    version = torch.__version__.split("+")[0]
    return (
        f"\nMeasured with torch {version} on a CPU. {len(entries)} models: {exact} have exact "
        f"products, {len(entries) - exact} differences of gradients.\n"
        f"\nExact, with errors of at most {USUAL['float64']} in float64 and {USUAL['float32']} in "
        f"float32:\n\n{MOST}{most}\nAll others:\n\n{OTHERS}{others}\n"
    )


def parse(text: str) -> list[Entry]:
    """The models that the page names; the family only where it is stated."""
    entries = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 2 and line.startswith("| ") and f"{line}\n" not in MOST:
            for part in cells[1].split("<br>"):
                given, _, titles = part.partition(": ")
                entries += [Entry(cells[0], e, given, "", USUAL) for e in titles.split("; ")]
        elif len(cells) == 5 and f"{line}\n" not in OTHERS:
            title, given, double, single, how = cells
            limits = {} if double == "–" else {"float64": double}
            limit, _, dtype = single.partition(" ")
            limits[dtype.strip("()") or "float32"] = limit
            entries.append(Entry("", title, given, how.strip("`"), limits))
    return entries


def committed() -> str:
    """What stands between the markers now."""
    text = PAGE.read_text(encoding="utf-8")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    write = parser.parse_args().write
    stated = {e.title: e.limits for e in parse(committed())}
    entries = []
    for family, found in rows().items():
        for row in found:
            new = entry(family, row)
            errors = {str(dtype).removeprefix("torch."): e for dtype, e in row.errors.items()}
            old = stated.get(row.title, {})
            # A limit that still holds stays, so that the page does not change with the machine.
            if old.keys() == errors.keys() and all(holds(old[t], errors[t]) for t in errors):
                new = dataclasses.replace(new, limits=old)
            entries.append(new)
    text = render(entries)
    if write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(BEGIN + committed(), BEGIN + text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
