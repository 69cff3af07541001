"""Run benchmarks and put what they print into docs/speed.md.

python -m benchmarks.page products startup
python -m benchmarks.page --all
python -m benchmarks.page eigenpairs -- --threads 1     # options for the benchmark
python -m benchmarks.page startup -- --quick            # into the page as well: only to try
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NAMES", "PAGE", "replaced"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
NAMES = (
    *("products", "ablation", "eigenpairs", "box", "points", "surface", "traces", "scale"),
    "startup",
)


def replaced(page: str, name: str, output: str) -> str:
    """The page with `output` between the markers of a benchmark.

    Raises:
        ValueError: the page has no such markers, or several.
    """
    begin, end = (f"<!-- {name}: {side} -->\n" for side in ("begin", "end"))
    whole = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(whole.findall(page)) != 1:
        raise ValueError(f"The page must have {begin!r} and {end!r} once, in this order.")
    return whole.sub(lambda _: f"{begin}\n{output.strip()}\n\n{end}", page)


def output_of(name: str, options: Sequence[str]) -> str:
    """The command, and what it prints."""
    command = ["-m", f"benchmarks.{name}", *options]
    # Progress goes to the error stream, which is shown.
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"benchmarks.{name} ended with code {done.returncode}; nothing is kept.")
    return f"`python {' '.join(command)}`\n\n{done.stdout}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write, one benchmark after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="What follows -- is passed to the benchmarks."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--all", action="store_true", help="every benchmark")
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    names = NAMES if options.all else options.names
    unknown = sorted(set(names) - set(NAMES))
    if not names or unknown:
        parser.error(
            f"known are {', '.join(NAMES)}; got {', '.join(unknown) or 'none'} (or give --all)"
        )
    for name in names:
        print(f"benchmarks.{name}", file=sys.stderr, flush=True)
        output = output_of(name, words[cut + 1 :])
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(page, name, output), encoding="utf-8")


if __name__ == "__main__":
    main()
