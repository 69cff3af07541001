"""The documentation runs: its blocks, its printed output, its lists of names."""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flatminima as fm
import models_page
from test_package import ROOMS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOLERANCE = 0.02
COUNTED = {"(residual)", "(rounding)", "gradients", "products", "passes", "converged", "for"}
"""What follows numbers that rounding on another machine changes; only their size is checked."""
ALONE = {"models.md"}
"""Pages of recipes, each of which is complete."""


class Checker(doctest.OutputChecker):
    """Compares word by word, numbers to `TOLERANCE`."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        # Rules in a table are as long as its numbers are wide.
        wanted, given = (re.sub("─+", "─", text).split() for text in (want, got))
        if len(wanted) != len(given):
            return False
        return all(
            _same(w, g, following)
            for w, g, following in zip(wanted, given, [*wanted[1:], ""], strict=False)
        )


def _same(wanted: str, given: str, following: str) -> bool:
    if wanted == given:
        return True
    try:
        w, g = float(wanted), float(given)
    except ValueError:
        return False
    if following in COUNTED:
        return w > 0 and 0.1 <= g / w <= 10
    return abs(w - g) <= TOLERANCE * abs(w)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, source) of every block of Python on the page."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(2)), match[1], match[2]) for match in BLOCK.finditer(text)
    ]


def run(page: Path) -> None:
    """Run the page's blocks from top to bottom in one namespace, or recipes in one for each."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    name = str(page.relative_to(ROOT))
    for line, language, source in blocks(page):
        if language == "python":
            if page.name in ALONE:
                namespace = {"__name__": "__main__"}
            # Empty lines in front, so that a traceback has the page's line numbers.
            exec(compile("\n" * line + source, name, "exec"), namespace)
            continue
        examples = doctest.DocTestParser().get_examples(source, name)
        test = doctest.DocTest(examples, namespace, name, name, line, source)
        report: list[str] = []
        runner = doctest.DocTestRunner(checker=Checker(), optionflags=doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=report.append, clear_globs=False)
        assert not runner.failures, "".join(report)
        namespace.update(test.globs)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if p.exists() and blocks(p)],
)
def test_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    try:
        run(page)
    finally:
        plt.close("all")


def test_the_readme_prints_the_table_below_its_first_block(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, source = blocks(ROOT / "README.md")[0]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    assert text.index(source) < text.index(table) < text.index("```bash")
    exec(compile(source, "README.md", "exec"), {})
    assert Checker().check_output(table, capsys.readouterr().out, doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES if p.exists()])
def test_every_block_of_python_is_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", text, re.MULTILINE)) == len(blocks(page))
    assert ">>>" not in BLOCK.sub("", text)
    for _, language, source in blocks(page):
        assert (">>>" in source) == (language == "pycon")


def test_every_public_name_has_its_place_in_the_api() -> None:
    pages = [p.read_text(encoding="utf-8") for p in sorted((DOCS / "api").glob("*.md"))]
    documented = re.findall(r"^::: flatminima\.(\S+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(documented) == sorted([*fm.__all__, "testing.check_operator"])


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = configuration.split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_every_outcome_is_explained() -> None:
    page = (DOCS / "numbers.md").read_text(encoding="utf-8")
    for outcome in fm.Outcome:
        assert f"| {outcome.name} | {outcome.value} | {outcome.brief} |" in page


def test_every_error_is_in_the_guide() -> None:
    page = (DOCS / "measuring.md").read_text(encoding="utf-8")
    for name in fm.__all__:
        thing = getattr(fm, name)
        if isinstance(thing, type) and issubclass(thing, fm.FlatMinimaError | Warning):
            assert name in page or thing is fm.FlatMinimaWarning


def test_the_architecture_names_every_room_in_its_order() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w/]+?)/?` \|", page, re.MULTILINE) == list(ROOMS)


def test_the_picture_of_the_rooms_is_that_of_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import draw_rooms

    assert draw_rooms.PICTURE.read_text(encoding="utf-8") == draw_rooms.svg()
    assert set(draw_rooms.rooms()) == {room.split("/")[0] for room in ROOMS} | {"testing"}


def test_the_tables_of_models_are_what_is_measured() -> None:
    """Words exactly; errors within their bounds, which are not much wider than that."""
    stated = models_page.committed()
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)[1]
    assert f"Measured with torch {version} on a CPU." in stated
    if torch.__version__.split("+")[0] != version:
        pytest.skip(f"the tables are those of torch {version}")
    entries = models_page.parse(stated)
    assert models_page.render(entries) == stated
    said = {entry.title: entry for entry in entries}
    assert len(said) == len(entries)
    measured = [(family, row) for family, rows in models_page.rows().items() for row in rows]
    assert len(measured) == len(entries)
    for family, row in measured:
        entry = said[row.title]
        assert entry.family in (models_page.HEADINGS[family], "")
        assert (entry.given, entry.operation) == (row.given, row.operation)
        assert set(entry.limits) == {str(dtype).removeprefix("torch.") for dtype in row.errors}
        for dtype, error in row.errors.items():
            limit = entry.limits[str(dtype).removeprefix("torch.")]
            assert models_page.holds(limit, error), (row.title, dtype, error, limit)


def test_the_documentation_asks_no_server_for_anything() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in configuration
    assert "http" not in configuration
    for page in PAGES:
        if page.exists():
            text = page.read_text(encoding="utf-8")
            assert not re.search(r"!\[[^]]*\]\(http|<(?:script|img|link|iframe)[^>]*http", text)


def test_examples_in_docstrings_are_headed_examples() -> None:
    # The singular is not a section to the tool that makes the API pages; it prints a quotation.
    wrong = [
        path.name
        for path in sorted((ROOT / "src").rglob("*.py"))
        if re.search(r"^ *Example:$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert wrong == []


def test_the_checker_sees_differences() -> None:
    checker = Checker()
    flags = doctest.NORMALIZE_WHITESPACE
    assert checker.check_output("a  1.00\n─────\n", "a 1.01\n──────\n", flags)
    assert checker.check_output("2.0e-04 (residual)\n", "7.0e-04 (residual)\n", flags)
    for want, got in (
        ("1.00", "1.05"),
        ("a", "b"),
        ("nan", "1"),
        ("converged", "stationary"),
        ("1 converged", "1 NOT CONVERGED"),
        ("-1", "1"),
    ):
        assert not checker.check_output(want + "\n", got + "\n", flags)
