"""The package as a whole: what it loads, what it exports, and which file may know which."""

from __future__ import annotations

import ast
import compileall
import graphlib
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flatminima as fm

PACKAGE = Path(fm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES]

# Each folder, or file at the root, with the folders that it may import from, lowest first. Files
# may also import from their own folder; circles are forbidden everywhere.
ROOMS = {
    room: tuple(below.split())
    for room, below in {
        "errors": "",
        "results": "errors",
        "support": "errors",
        "derivatives": "errors support",
        "objective": "errors support derivatives",
        "operators/outputs": "errors support derivatives objective",
        "operators/products": "errors support derivatives objective operators/outputs",
        "operators": "errors support derivatives objective operators/outputs operators/products",
        "algorithms/eigen": "errors results support operators",
        "algorithms/estimators": "errors results support operators algorithms/eigen",
        "algorithms/optimize": "errors results support",
        "landscape": "errors results support derivatives objective operators algorithms/eigen",
        "landscape/symmetry": "errors results support derivatives objective landscape",
        "landscape/trajectory": "errors results support objective landscape",
        "measures": "errors results support derivatives objective operators algorithms/eigen "
        "algorithms/estimators algorithms/optimize",
        "report": "errors results support derivatives objective operators algorithms/eigen "
        "algorithms/estimators landscape/symmetry measures",
        "plotting": "errors results support algorithms/eigen algorithms/estimators landscape "
        "landscape/trajectory measures report",
    }.items()
}
AT_THE_ROOT = {"__init__.py", "errors.py", "results.py", "testing.py", "py.typed"}

# Files may be longer than 500 lines only when they are named here.
LONG_FILES: set[str] = set()

every_file = pytest.mark.parametrize("name", NAMES)
every_export = pytest.mark.parametrize("name", fm.__all__)


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported(node: ast.AST, package: list[str]) -> list[str]:
    """The modules that an import statement names, in full; `package` is the file's own."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level == 0:
            return [node.module]
        base = package[: len(package) - node.level + 1]
        if node.module is None:
            return [".".join([*base, alias.name]) for alias in node.names]
        return [".".join([*base, node.module])]
    return []


def imports(name: str, *, top_level: bool = False) -> set[str]:
    """Every module that a file imports; only those at import time with `top_level`."""
    package = ["flatminima", *name.split("/")[:-1]]
    nodes = import_time_nodes(tree(name)) if top_level else ast.walk(tree(name))
    return {module for node in nodes for module in imported(node, package)}


def import_time_nodes(module: ast.Module) -> list[ast.AST]:
    """The statements that run when the file is imported: none inside a function."""
    found, waiting = [], list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


# --------------------------------------------------------------------------------- what it loads


def loaded_by(statement: str) -> set[str]:
    """The modules in memory after a statement in a fresh interpreter."""
    script = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {statement}"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return loaded_by("import flatminima")


@pytest.mark.parametrize(
    "module",
    ["matplotlib", "plotly", "scipy.optimize", "scipy.sparse", "sklearn", "IPython", "lightning"],
)
def test_importing_the_package_does_not_load(module, loaded):
    assert "flatminima" in loaded
    assert module not in loaded


def test_asking_for_plot_loads_matplotlib():
    assert {"matplotlib", "flatminima.plotting"} <= loaded_by("from flatminima import plot")


def test_importing_says_nothing():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import flatminima",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


# -------------------------------------------------------------------------------- what it exports


@every_export
def test_export_exists(name):
    assert getattr(fm, name) is not None


def test_exports_are_sorted_and_each_named_once():
    assert fm.__all__ == sorted(set(fm.__all__))
    assert dir(fm) == fm.__all__


def test_names_are_there_without_source_text(tmp_path):
    # As in an application that is frozen into one file.
    shutil.copytree(PACKAGE, tmp_path / "flatminima", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tmp_path, quiet=1, legacy=True)
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import flatminima as fm; "
        "print(fm.__file__.endswith('.pyc'), *fm.__all__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", *fm.__all__]


def test_unknown_attribute_raises_as_usual():
    with pytest.raises(AttributeError, match="has no attribute 'sharpnes'"):
        fm.sharpnes  # noqa: B018


def test_every_result_error_and_warning_is_exported():
    for name in NAMES:
        if name.endswith("__init__"):
            continue
        module = importlib.import_module("flatminima." + name.replace("/", "."))
        for member in vars(module).values():
            if not inspect.isclass(member) or member.__module__ != module.__name__:
                continue
            # Stop never leaves the room that raises it.
            public = not member.__name__.startswith("_") and member.__name__ != "Stop"
            if public and issubclass(member, fm.Result | Exception):
                assert member.__name__ in fm.__all__


@every_export
def test_export_has_a_docstring_of_its_own(name):
    member = getattr(fm, name)
    assert member.__doc__
    assert len(member.__doc__.split()) >= 5
    if inspect.isclass(member):
        assert "__doc__" in vars(member)
        assert not member.__doc__.startswith(f"{name}("), "the signature is no docstring"


@every_export
def test_export_has_an_example_that_the_doctests_run(name):
    member = getattr(fm, name)
    if inspect.isclass(member) and issubclass(member, Exception):
        return
    assert re.search(r"^ *Examples?:$", inspect.getdoc(member), re.MULTILINE), "no Example section"
    assert ">>> " in member.__doc__
    home = inspect.getsourcefile(inspect.unwrap(member))
    assert PACKAGE in Path(home).parents, "the doctests run on the files of the package"


@every_export
def test_public_methods_have_docstrings(name):
    member = getattr(fm, name)
    if not inspect.isclass(member):
        return
    for attribute, value in vars(member).items():
        if attribute.startswith("_") or not (
            inspect.isfunction(value) or isinstance(value, property)
        ):
            continue
        assert inspect.getdoc(value), f"{name}.{attribute}"


@every_export
def test_functions_take_their_subject_first_and_then_keywords_only(name):
    member = getattr(fm, name)
    if not inspect.isfunction(member) or name == "accuracy":
        return
    subjects = {
        "apply_permutations": 2,
        "connect": 3,
        "difference_direction": 2,
        "interactive": 2,
        "interpolate": 3,
        "invariance_table": 3,
        "log_determinant": 2,
        "match_weights": 2,
        "path_losses": 2,
        "plot": 2,
        "pytorch_derivatives": 0,
        "sharpness": 3,
        "surface": 2,
        "token_weight": 0,
    }
    free = [
        p
        for p in inspect.signature(member).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert len(free) == subjects.get(name, 1)


@every_export
def test_every_argument_is_described(name):
    member = getattr(fm, name)
    if not inspect.isfunction(member) and member is not fm.Objective:
        return
    described = inspect.getdoc(member)
    for parameter in inspect.signature(member).parameters:
        assert re.search(rf"^ *(\*\*)?{parameter}: ", described, re.MULTILINE), parameter


# -------------------------------------------------------------------------- who may know whom


def room(name: str) -> str:
    """The folder of a file, or the file itself at the root."""
    return name.rpartition("/")[0] or name


def own_imports(name: str) -> set[str]:
    """The files of the package that a file imports, as in `NAMES`."""
    used = {
        m.partition(".")[2].replace(".", "/")
        for m in imports(name)
        if ".".join(m.split(".")[:1]) == "flatminima"
    }
    return {u if u in NAMES else f"{u}/__init__" for u in used}


def test_nothing_else_lies_at_the_root():
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    folders = {n.split("/")[0] for n in NAMES if "/" in n}
    assert files <= AT_THE_ROOT
    assert folders == {r.split("/")[0] for r in ROOMS} - {"errors", "results"}


def test_every_file_belongs_to_a_room():
    inside = {n for n in NAMES if not n.endswith("__init__") and n != "testing"}
    assert {room(n) for n in inside} == set(ROOMS)


def test_rooms_are_listed_from_the_lowest_up():
    for position, below in enumerate(ROOMS.values()):
        assert set(below) <= set(list(ROOMS)[:position])


@every_file
def test_file_imports_only_from_rooms_below_it(name):
    if name in ("__init__", "testing"):
        return
    used = {room(u) for u in own_imports(name)}
    assert used <= {room(name), *ROOMS.get(room(name), ())}


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: own_imports(name) for name in NAMES if name != "__init__"}
    graphlib.TopologicalSorter(graph).prepare()


@every_file
def test_file_never_imports_the_package_as_a_whole(name):
    if name != "__init__":
        assert "flatminima" not in imports(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("algorithms/e")])
def test_solvers_and_estimators_see_an_operator_and_never_a_model(name):
    assert not {u for u in own_imports(name) if u.startswith(("objective", "operators/p"))}
    assert "torch.nn" not in imports(name)


@pytest.mark.parametrize("name", [n for n in NAMES if "/optimize/" in n])
def test_maximisers_see_a_function_and_never_a_model(name):
    assert not {u for u in own_imports(name) if u.startswith(("objective", "operators"))}


@every_file
def test_only_the_plotting_room_imports_matplotlib(name):
    found = {m for m in imports(name) if m.split(".")[0] == "matplotlib"}
    assert bool(found) == (name.startswith("plotting/") and not name.endswith("__init__"))


@every_file
def test_scipy_is_imported_only_inside_functions(name):
    assert not {m for m in imports(name, top_level=True) if m.split(".")[0] == "scipy"}


@every_file
def test_nothing_is_pickled(name):
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {m.split(".")[0] for m in imports(name)} & forbidden
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"\btorch\.(save|load)\(", source)


@every_file
def test_nothing_is_printed_or_shown(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "plt.show")


@every_file
def test_input_is_not_checked_by_assertions(name):
    # What is left narrows a type that is known to hold, for the type checker.
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Assert):
            assert re.fullmatch(r"\w+ is not None", ast.unparse(node.test)), node.lineno


@pytest.mark.parametrize("name", [n for n in NAMES if n != "support/randomness"])
def test_global_seeds_are_touched_in_one_place_only(name):
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"\b(torch|random|np\.random|torch\.cuda)\.(manual_)?seed\(", source)


@every_file
def test_files_stay_short(name):
    lines = len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert (lines > 500) == (name in LONG_FILES), lines


@every_file
def test_all_names_what_is_there(name):
    if name.endswith("__init__"):
        return
    module = importlib.import_module("flatminima." + name.replace("/", "."))
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, n) for n in module.__all__)


# ----------------------------------------------------------------------------- the distribution


def test_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", fm.__version__)
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert source.count(f'"{fm.__version__}"') == 1
    others = [
        n for n in NAMES if n != "__init__" and fm.__version__ in (PACKAGE / f"{n}.py").read_text()
    ]
    assert others == []


def test_build_reads_the_version_from_the_package():
    project = PACKAGE.parent.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("not run from a checkout")
    text = project.read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert re.search(r'\[tool\.hatch\.version\]\npath = "src/flatminima/__init__\.py"', text)
    assert not re.search(r"^version *=", text, re.MULTILINE)


def test_types_are_announced():
    assert (PACKAGE / "py.typed").is_file()
