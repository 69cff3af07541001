"""Draw the rooms of the package and who imports whom, from the imports themselves.

    python docs/draw_rooms.py

writes docs/images/rooms.svg. An arrow leads from a room to one that it imports from; arrows that
follow from others (A → C beside A → B → C) are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "flatminima"
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
WIDTH, BOX, GAP, LINE, TOP = 940, 200, 56, 16, 34


def files() -> dict[str, Path]:
    """Return the files of the package by their dotted names, without those that only gather."""
    found = {p.relative_to(PACKAGE).with_suffix(""): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(n.parts): p for n, p in found.items() if n.name != "__init__"}


def imports(name: str, path: Path) -> set[str]:
    """Return the dotted names inside the package that a file imports from."""
    parts = ("", *name.split("."))
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        ".".join(p for p in (*parts[: len(parts) - n.level], *(n.module or "").split(".")) if p)
        for n in nodes
        if isinstance(n, ast.ImportFrom) and n.level
    }


def rooms() -> dict[str, dict[str, int]]:
    """Return each room with the number of files in it and in each of its folders."""
    found: dict[str, dict[str, int]] = {}
    for name in files():
        room, *rest = name.split(".")
        folder = rest[0] if len(rest) > 1 else ""
        inside = found.setdefault(room, {})
        inside[folder] = inside.get(folder, 0) + 1
    return found


def arrows() -> dict[str, set[str]]:
    """Return for each room those that it imports from."""
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for name, path in files().items():
        own = name.split(".")[0]
        found[own] |= {m.split(".")[0] for m in imports(name, path)} - {own, ""}
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest way down from each room."""
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((level(below) for below in graph[room]), default=-1)
        return found[room]

    for room in graph:
        level(room)
    return found


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph without the arrows that follow from others."""

    def reach(room: str) -> set[str]:
        return set().union(*({below} | reach(below) for below in graph[room]))

    return {
        room: {b for b in below if not any(b in reach(other) for other in below - {b})}
        for room, below in graph.items()
    }


def svg() -> str:
    """Return the picture."""
    contents, graph = rooms(), arrows()
    level = levels(graph)
    rows: dict[int, list[str]] = {}
    for room in graph:
        rows.setdefault(level[room], []).append(room)
    places: dict[str, tuple[float, float, float]] = {}
    y = float(TOP)
    for number in sorted(rows, reverse=True):
        row = sorted(rows[number])
        height = max(30 + LINE * sum(1 for f in contents[r] if f) for r in row)
        start = (WIDTH - len(row) * BOX - (len(row) - 1) * GAP) / 2
        for column, room in enumerate(row):
            places[room] = (start + column * (BOX + GAP), y, float(height))
        y += height + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
        'font-family="sans-serif" font-size="13" role="img" '
        'aria-label="Rooms of the package; arrows lead to what a room imports from">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#fff"/>',
    ]
    for room, below in sorted(reduced(graph).items()):
        x, top, height = places[room]
        for other in sorted(below):
            end, under, _ = places[other]
            start, middle = top + height, (top + height + under) / 2
            bend = f"M{x + BOX / 2:.0f} {start:.0f}C{x + BOX / 2:.0f} {middle:.0f}"
            if end != x and level[room] - level[other] > 1:
                # From the side, past the rooms between.
                side, start = (x if end < x else x + BOX), top + height / 2
                bend = f"M{side:.0f} {start:.0f}C{end + BOX / 2:.0f} {start:.0f}"
            parts.append(
                f'<path d="{bend} {end + BOX / 2:.0f} {middle:.0f} {end + BOX / 2:.0f} '
                f'{under:.0f}" fill="none" stroke="#555" marker-end="url(#tip)"/>'
            )
    for room in sorted(places):
        x, top, height = places[room]
        parts.append(
            f'<rect x="{x:.0f}" y="{top:.0f}" width="{BOX}" height="{height:.0f}" rx="6" '
            'fill="#e8eef7" stroke="#34568b"/>'
        )
        parts.append(
            f'<text x="{x + BOX / 2:.0f}" y="{top + 20:.0f}" text-anchor="middle" '
            f'font-weight="bold">{room}</text>'
        )
        folders = sorted(f for f in contents[room] if f)
        parts += [
            f'<text x="{x + BOX / 2:.0f}" y="{top + 20 + LINE * line:.0f}" '
            f'text-anchor="middle" fill="#444">{folder}/</text>'
            for line, folder in enumerate(folders, start=1)
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
