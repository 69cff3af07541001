"""The benchmarks run and print tables, and what judges others is right. Nothing here is timed."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from benchmarks import page, scale
from benchmarks.eigenpairs import Judge
from benchmarks.models import Problem
from benchmarks.peers import Found
from torch import nn

SCRIPTS = sorted(
    path.stem
    for path in Path(page.__file__).parent.glob("*.py")
    if path.stem != "page" and "\ndef main(" in path.read_text(encoding="utf-8")
)
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_prints_tables(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick"]
    if name == "scale":
        options = ["--parameters", "1e6", "--examples", "--figure", str(tmp_path / "scale.png")]
    importlib.import_module(f"benchmarks.{name}").main([*options, "--threads", "1"])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed.splitlines()[0]
    tables = TABLE.findall(printed)
    assert tables
    for table in tables:
        header, rule, *rows = table.splitlines()
        assert set(rule) <= set("|- ")
        assert rows
        assert {line.count("|") for line in rows} == {header.count("|")}
    if name == "scale":
        assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
        # The basis alone has 20 vectors of a million float32 numbers.
        assert 76 <= float(tables[0].split("|")[-2]) <= 400


# ------------------------------------------------------------------------------------ eigenpairs


@pytest.fixture(scope="module")
def regression() -> tuple[Problem, torch.Tensor]:
    """Least squares with batches of unequal size, and its Hessian 2 XᵀX / N."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([8.0, 6.0, 4.0, 2.0, 1.0, 0.5])
    x = torch.randn(50, 6, generator=generator) * scales
    batches = [(part, torch.zeros(len(part), 1)) for part in x.split([30, 20])]
    problem = Problem(nn.Linear(6, 1, bias=False), batches, "cpu")
    problem.loss_fn = nn.MSELoss()
    return problem, 2 * x.double().T @ x.double() / 50


def test_the_judge_finds_exact_pairs_exact(regression):
    problem, hessian = regression
    judge = Judge(problem, 3)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(hessian))
    torch.testing.assert_close(judge.values, values[:3])
    vector = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(judge.product(vector), hessian @ vector)
    # In any order, and whatever the lengths of the vectors.
    found = Found(values[[1, 0, 2]], 5 * vectors[:, [1, 0, 2]], 0)
    residual, error = judge.verdict(found)
    assert residual < 1e-6
    assert error < 1e-6


def test_the_judge_sees_wrong_values_and_missed_pairs(regression):
    problem, hessian = regression
    judge = Judge(problem, 3)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(hessian))
    off = values[:3] + torch.tensor([0.0, 0.02, 0.0]) * values[0]
    residual, error = judge.verdict(Found(off, vectors[:, :3], 0), whole=True)
    assert residual == pytest.approx(0.02, rel=1e-3)
    assert error == pytest.approx(0.02, rel=1e-3)
    missed = [0, 1, 3]
    residual, error = judge.verdict(Found(values[missed], vectors[:, missed], 0))
    assert residual < 1e-6
    assert error == pytest.approx(float((values[2] - values[3]) / values[0]), rel=1e-3)


# ----------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("parameters", [1e3, 1e5, 1e6])
def test_nets_have_the_size_that_is_asked_for(parameters):
    size = sum(p.numel() for p in scale.net(parameters).parameters())
    assert size == pytest.approx(parameters, rel=0.05)


@pytest.mark.parametrize("power", [1, 2])
def test_slope_is_the_power_at_the_large_end(power):
    points = [
        scale.Point(n, 64, max(1.0, 1e-3 * n**power), 0.0, 0.0, 0, 0.0, 0.0)
        for n in (1, 10, 10**4, 10**5, 10**6)
    ]
    assert scale.slope(points, "parameters", "gradient") == pytest.approx(power)


# ------------------------------------------------------------------------------------------ page


def test_the_page_has_a_place_for_every_benchmark():
    assert set(SCRIPTS) <= set(page.NAMES)
    text = page.PAGE.read_text(encoding="utf-8")
    for name in page.NAMES:
        changed = page.replaced(text, name, "new figures")
        assert changed.count("new figures") == 1
        assert page.replaced(changed, name, "other") == page.replaced(text, name, "other")


def test_only_what_is_between_the_markers_changes():
    text = "before\n<!-- box: begin -->\nold \\1\n<!-- box: end -->\nafter\n"
    changed = page.replaced(text, "box", "new \\1\n")
    assert changed == "before\n<!-- box: begin -->\n\nnew \\1\n\n<!-- box: end -->\nafter\n"
    with pytest.raises(ValueError, match="scale: begin"):
        page.replaced(text, "scale", "new")
    with pytest.raises(ValueError, match="once"):
        page.replaced(text + text, "box", "new")


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        page.main(["boxes"])
    assert (
        "known are products, ablation, eigenpairs, box, points, surface, traces, scale, startup"
        in capsys.readouterr().err
    )
