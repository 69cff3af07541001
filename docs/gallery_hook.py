"""A hook of MkDocs: runs the Python on pages that ask for pictures, and puts these in.

A page asks by comments below a block of Python, one for each figure that the block leaves open, or
for a page of HTML that it writes:

    <!-- picture: what is to be seen -->
    <!-- page: name.html: what is to be seen -->

The blocks of a page run from top to bottom in one namespace and a process of their own, once for
each state of page and library: what they made is kept in the system's folder for temporary files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

PART = re.compile(
    r"^```python\n(?P<source>.*?)^```$|^<!-- (?P<kind>picture|page): (?P<what>.+?) -->$",
    re.MULTILINE | re.DOTALL,
)
DISTRIBUTIONS = ("torch", "numpy", "matplotlib", "plotly", "scikit-learn")
KEPT = 4
"""States of a page whose pictures are kept."""
DPI = 150


class GalleryError(Exception):
    """A block failed, or has other pictures than the page asks for."""


@dataclasses.dataclass
class Block:
    """A block of Python, the line before it, and what the page asks for below it."""

    line: int
    source: str
    wanted: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def blocks(text: str) -> list[Block]:
    """The blocks of a page with the comments that follow each."""
    found: list[Block] = []
    for part in PART.finditer(text):
        line = text.count("\n", 0, part.start())
        if part["kind"] is None:
            found.append(Block(line + 1, part["source"]))
        elif found:
            found[-1].wanted.append((part["kind"], part["what"]))
        else:
            raise GalleryError(f"line {line + 1}: no block of Python above this comment")
    return found


def file_name(number: int, kind: str, what: str) -> str:
    """Of what the n-th comment of a page stands for."""
    return f"{number:02d}.png" if kind == "picture" else what.partition(":")[0].strip()


def description(kind: str, what: str) -> str:
    """The words for those who cannot see it."""
    return what if kind == "picture" else what.partition(":")[2].strip()


# ---------------------------------------------------------------------- in a process of its own


def run(name: str, text: str, out: Path) -> None:
    """Run a page's blocks, where they may write; what the page asks for goes to `out`."""
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    # For tracebacks, which would look for a file of this name.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    number = 0
    for block in blocks(text):
        try:
            # Empty lines in front, so that a traceback has the page's line numbers.
            exec(compile("\n" * block.line + block.source, name, "exec"), namespace)
        except BaseException as error:
            trace = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in trace if frame.filename == name]
            line = error.lineno if isinstance(error, SyntaxError) else [block.line, *lines][-1]
            raise GalleryError(
                f"{name}, line {line}: the block raised {type(error).__name__}: {error}"
            ) from error
        figures = plt.get_fignums()
        asked = sum(kind == "picture" for kind, _ in block.wanted)
        if len(figures) != asked:
            raise GalleryError(
                f"{name}, line {block.line}: the block leaves {len(figures)} figures open, and "
                f"{asked} comments '<!-- picture: ... -->' follow it"
            )
        for kind, what in block.wanted:
            number += 1
            target = out / file_name(number, kind, what)
            if kind == "picture":
                figure = plt.figure(figures.pop(0))
                figure.savefig(target, dpi=DPI, metadata={"Software": None})
            elif Path(target.name).is_file():
                shutil.copyfile(target.name, target)
            else:
                raise GalleryError(
                    f"{name}, line {block.line}: the block does not write {target.name!r}"
                )
        plt.close("all")


def main() -> int:
    """What the hook starts: the name of the page, its text in a file, the folder to fill."""
    name, text, out = sys.argv[1:]
    try:
        run(name, Path(text).read_text(encoding="utf-8"), Path(out))
    except GalleryError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(error, file=sys.stderr)
        return 1
    return 0


# --------------------------------------------------------------------------------- in the build


def cache() -> Path:
    """The folder for pictures, of this user alone."""
    user = os.getuid() if hasattr(os, "getuid") else "all"
    folder = Path(tempfile.gettempdir()) / f"flatminima-gallery-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        raise GalleryError(f"{folder} belongs to another user; set TMPDIR")
    return folder


def library() -> str:
    """A checksum of all that the pictures depend on beside the page."""
    mark = hashlib.sha256(Path(__file__).read_bytes())
    spec = importlib.util.find_spec("flatminima")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).rglob("*.py")):
            mark.update(path.read_bytes())
    for distribution in DISTRIBUTIONS:
        try:
            mark.update(importlib.metadata.version(distribution).encode())
        except importlib.metadata.PackageNotFoundError:
            mark.update(b"-")
    return mark.hexdigest()


def made(name: str, text: str) -> Path:
    """The folder with what a page asks for, made unless it is there already."""
    asked = json.dumps([name, [dataclasses.astuple(b)[1:] for b in blocks(text)], library()])
    page = re.sub(r"\W", "-", name)
    target = cache() / f"{page}.{hashlib.sha256(asked.encode()).hexdigest()[:24]}"
    if target.is_dir():
        os.utime(target)
        return target
    with tempfile.TemporaryDirectory(dir=cache(), prefix="running-") as place:
        work, out, source = (Path(place) / part for part in ("work", "out", "page.md"))
        work.mkdir()
        out.mkdir()
        source.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), name, str(source), str(out)],
            cwd=work,
            env={**os.environ, "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise GalleryError(done.stderr.strip() or f"{name}: ended with {done.returncode}")
        try:
            out.rename(target)
        except OSError:
            # Another build made it meanwhile.
            if not target.is_dir():
                raise
    states = sorted(cache().glob(f"{page}.*"), key=lambda p: p.stat().st_mtime)
    for old in states[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


_made: dict[str, list[File]] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the pages that ask for something, and add what they made to the site."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    _made.clear()
    for file in list(files.documentation_pages()):
        text = file.content_string
        try:
            wanted = [pair for block in blocks(text) for pair in block.wanted]
            folder = made(file.src_uri, text) if wanted else None
        except GalleryError as error:
            raise PluginError(f"The pictures of {file.src_uri}: {error}") from error
        if folder is None:
            continue
        base = file.src_uri.removesuffix(".md")
        _made[file.src_uri] = [
            File.generated(config, f"{base}/{name}", abs_src_path=str(folder / name))
            for name in (file_name(i, *pair) for i, pair in enumerate(wanted, 1))
        ]
        for generated in _made[file.src_uri]:
            files.append(generated)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Pictures and frames in the place of the comments."""
    waiting = iter(_made.get(page.file.src_uri, ()))

    def shown(part: re.Match[str]) -> str:
        if part["kind"] is None:
            return part[0]
        generated = next(waiting)
        words = description(part["kind"], part["what"])
        # As from this page's file, for MkDocs to check and rewrite.
        link = os.path.relpath(generated.src_uri, os.path.dirname(page.file.src_uri) or ".")
        if part["kind"] == "picture":
            return f"![{words}]({link}){{ loading=lazy }}"
        address = generated.url_relative_to(page.file)
        return (
            f'<iframe src="{address}" title="{words}" loading="lazy" '
            'style="width: 100%; height: 34rem; border: 0"></iframe>\n\n'
            f"[{words}, on a page of its own]({link})"
        )

    return PART.sub(shown, markdown) if page.file.src_uri in _made else markdown


if __name__ == "__main__":
    sys.exit(main())
