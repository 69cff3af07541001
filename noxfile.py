"""What a change must pass: `nox` runs lint, docs and tests in the active environment.

`nox -s full` runs the exhaustive tests, before a release; `nox -s lowest newest` the core of the
tests on the lowest torch that is allowed, and on a newer Python.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.sessions = ["lint", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
LOWEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
CORE = [
    f"tests/test_{name}.py"
    for name in (
        "package",
        "objective",
        "operators",
        "composed_operators",
        "products",
        "lanczos",
        "power_iteration",
        "report",
        "hand_written",
        "torch_private",
    )
]
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "transformers"]


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    site = session.posargs or [str(Path(session.create_tmp()) / "site")]
    environment = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--quiet", "--strict", "--site-dir", *site, env=environment)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run the default tests."""
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session(python=False)
def full(session: nox.Session) -> None:
    """Run all tests."""
    session.run("pytest", "-n", "auto", "--full", *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the core of the tests on the lowest torch that is allowed."""
    others = [
        line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")
    ]
    path = Path(session.virtualenv.location) / "constraints.txt"
    path.write_text("\n".join([*others, f"torch=={LOWEST}.*"]) + "\n")
    session.install("-c", str(path), ".[examples]", *TOOLS)
    session.run("pytest", "-n", "auto", *CORE, *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run the core of the tests on a newer Python."""
    session.install("-c", str(CONSTRAINTS), ".[examples]", *TOOLS)
    session.run("pytest", "-n", "auto", *CORE, *session.posargs)
