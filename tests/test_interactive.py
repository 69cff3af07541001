"""Pages to turn a surface around in: what they hold, and that a browser draws them offline."""

import dataclasses
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.landscape.surface import Grid, Surface
from flatminima.landscape.trajectory.path_losses import TrajectoryLosses
from flatminima.landscape.trajectory.principal import PrincipalResult, principal_components
from flatminima.landscape.trajectory.trajectory import Trajectory
from flatminima.plotting import interactive as module
from flatminima.plotting.interactive import interactive

INF, NAN = math.inf, math.nan
plotly = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("plotly"), reason="plotly is not installed"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to try it in")

X = tuple(i / 5 for i in range(-5, 6))
Y = tuple(2 * x for x in X)


def surface(height=lambda x, y: 0.01 + 5 * x**2 + y**2, *, gaps=(), **changes) -> Surface:
    """A surface of 11 × 11 points with values put at some of them."""
    x, y = torch.meshgrid(*(torch.tensor(v, dtype=torch.float64) for v in (X, Y)), indexing="ij")
    loss = height(x, y)
    for i, j, value in gaps:
        loss[i, j] = value
    made = Surface(
        coordinates=(X, Y),
        grids={"train": Grid(loss, {"accuracy": torch.exp(-loss)})},
        labels=("first direction", "second direction"),
        units=("filter norms", "‖θ‖"),
        evaluations=loss.numel(),
        outcome=fm.Outcome.COMPLETED,
    )
    return dataclasses.replace(made, **changes)


def real_path() -> PrincipalResult:
    model = nn.Linear(2, 1)
    trajectory = Trajectory(model)
    for step in range(3):
        for parameter, value in zip(model.parameters(), (step - 1.0, step**2), strict=True):
            nn.init.constant_(parameter, value)
        trajectory.record(step)
    return principal_components(trajectory, components=2)


def path(points, steps=None) -> PrincipalResult:
    coordinates = torch.tensor(points, dtype=torch.float64)
    steps = tuple(steps or range(len(points)))
    return dataclasses.replace(REAL, coordinates=coordinates, steps=steps)


REAL = real_path()
PATH = path([[0.9, 1.8], [0.5, 0.5], [0.2, -0.4], [0.0, 0.0]], steps=(0, 10, 20, 30))
GAPS = ((0, 0, INF), (0, 1, INF), (9, 9, NAN))


def content(page: str) -> tuple[list[dict], dict, dict]:
    """Traces, layout and configuration that the page gives plotly."""
    place = page.index("Plotly.newPlot(", page.rindex("<script")) + len("Plotly.newPlot(")
    found, decoder = [], json.JSONDecoder()
    for _ in range(4):
        while page[place] in " \n\t,":
            place += 1
        value, place = decoder.raw_decode(page, place)
        found.append(value)
    return tuple(found[1:])


def trace(traces: list[dict], kind: str, name: str | None = None) -> dict:
    found = [t for t in traces if t["type"] == kind and name in (None, t.get("name"))]
    assert len(found) == 1, [(t["type"], t.get("name")) for t in traces]
    return found[0]


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


# ---------------------------------------------------------------------------- what a page holds


@plotly
def test_a_page_is_complete_and_asks_no_server():
    page = interactive(surface(), title="A & <b>")
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    assert "<title>A &amp; &lt;b&gt;</title>" in page
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'; ", page)
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page)
    assert "://" not in without_scripts(page)
    assert len(page) > 2e6, "plotly itself is in it"
    _, _, config = content(page)
    assert config["showSendToCloud"] is False
    assert config["displaylogo"] is False
    assert "BASE_URL='http" not in page


@plotly
def test_the_same_call_gives_the_same_page():
    assert interactive(surface(), trajectory=PATH) == interactive(surface(), trajectory=PATH)


@plotly
def test_axes_have_labels_and_units_and_hovering_tells_all():
    traces, layout, _ = content(interactive(surface()))
    titles = [layout["scene"][axis]["title"]["text"] for axis in ("xaxis", "yaxis", "zaxis")]
    assert titles == ["first direction<br>(filter norms)", "second direction (‖θ‖)", "loss"]
    assert layout["xaxis"]["title"]["text"] == "first direction (filter norms)"
    relief = trace(traces, "surface")
    for words in ("first direction", "filter norms", "second direction", "‖θ‖", "loss", "accuracy"):
        assert words in relief["hovertemplate"]
    assert relief["customdata"][3][5] == pytest.approx([0.65, math.exp(-0.65)])
    assert relief["colorscale"][0][1] == "#00224e", "cividis"


@plotly
def test_the_first_direction_is_the_horizontal_axis():
    traces, _, _ = content(interactive(surface(lambda x, y: 10 * x + y)))
    for kind in ("surface", "contour"):
        found = trace(traces, kind)
        assert (found["x"], found["y"]) == (list(X), list(Y))
        assert found["z"][2][7] == pytest.approx(10 * X[7] + Y[2])


@plotly
def test_scales_are_logarithmic_with_ticks_that_are_losses():
    traces, layout, _ = content(interactive(surface()))
    axis, bar = layout["scene"]["zaxis"], trace(traces, "surface")["colorbar"]
    assert axis["type"] == "log"
    assert axis["ticktext"] == bar["ticktext"]
    assert [float(t) for t in axis["ticktext"]] == axis["tickvals"]
    assert np.allclose(10.0 ** np.array(bar["tickvals"]), axis["tickvals"])
    assert all(0.01 <= t <= 9.01 for t in axis["tickvals"])
    assert len(axis["tickvals"]) >= 3
    relief = trace(traces, "surface")
    assert relief["z"][5][5] == 0.01
    assert relief["surfacecolor"][5][5] == pytest.approx(-2)


@plotly
@pytest.mark.parametrize(
    "height",
    [lambda x, y: 1 + x**2 + y**2, lambda x, y: x**2 - y**2, lambda x, y: x**2 + y**2],
    ids=["less than a factor of ten", "negative losses", "zero"],
)
def test_other_scales_are_linear(height):
    traces, layout, _ = content(interactive(surface(height)))
    assert layout["scene"]["zaxis"].get("type") != "log"
    assert "tickvals" not in trace(traces, "surface")["colorbar"]
    relief = trace(traces, "surface")
    assert relief["surfacecolor"] == relief["z"]


@plotly
def test_what_is_not_finite_is_a_gap_with_a_mark_and_is_said():
    page = interactive(surface(gaps=GAPS))
    traces, _, _ = content(page)
    for kind in ("surface", "contour"):
        z = trace(traces, kind)["z"]
        assert [(i, j) for j in range(11) for i in range(11) if z[j][i] is None] == [
            (0, 0),
            (0, 1),
            (9, 9),
        ]
    infinite, unknown = (
        trace(traces, "scatter3d", name) for name in ("infinite loss (2)", "NaN loss (1)")
    )
    assert (infinite["x"], infinite["y"]) == ([X[0], X[0]], [Y[0], Y[1]])
    assert (unknown["x"], unknown["y"]) == ([X[9]], [Y[9]])
    assert infinite["marker"]["color"] != unknown["marker"]["color"]
    assert "The loss is infinite at 2 of 121 points" in page
    assert "The loss is NaN at 1 of 121 points" in page
    assert "The loss is" not in interactive(surface())


@plotly
def test_the_model_is_marked_on_relief_and_map():
    traces, _, _ = content(interactive(surface()))
    model = trace(traces, "scatter3d", "the model")
    assert (model["x"], model["y"], model["z"]) == ([0.0], [0.0], [0.01])
    assert trace(traces, "scatter", "the model")["visible"] is False


@plotly
def test_a_button_shows_the_map_in_place_of_the_relief():
    traces, layout, _ = content(interactive(surface(), trajectory=PATH))
    on_the_map = [t["type"] in ("contour", "scatter") for t in traces]
    buttons = {b["label"]: b["args"] for b in layout["updatemenus"][0]["buttons"]}
    assert buttons["map"] == [
        {"visible": on_the_map},
        {"xaxis.visible": True, "yaxis.visible": True},
    ]
    assert buttons["relief"][0] == {"visible": [not there for there in on_the_map]}
    assert [t.get("visible", True) for t in traces] == [not there for there in on_the_map]


@plotly
def test_snapshots_lie_on_the_surface_with_time_in_colour():
    traces, _, _ = content(interactive(surface(lambda x, y: 5 + x + 0.5 * y), trajectory=PATH))
    found = trace(traces, "scatter3d", "snapshots")
    points = PATH.coordinates.tolist()
    assert [list(p) for p in zip(found["x"], found["y"], strict=True)] == points
    assert found["z"] == pytest.approx([5 + x + 0.5 * y for x, y in points])
    assert found["marker"]["color"] == [0, 10, 20, 30]
    assert [step for step, _ in found["customdata"]] == [0, 10, 20, 30]


@plotly
def test_between_points_the_height_is_logarithmic_where_the_scale_is():
    middle = path([[0.1, 0.0], [0.0, 0.0]])
    traces, _, _ = content(interactive(surface(), trajectory=middle))
    height = trace(traces, "scatter3d", "snapshots")["z"][0]
    assert height == pytest.approx(math.sqrt(0.01 * 0.21))


@plotly
def test_snapshots_without_a_height_are_on_the_map_only():
    far = path([[3.0, 0.0], [0.9, 1.8], [0.0, 0.0]])
    page = interactive(surface(gaps=[(10, 10, NAN)]), trajectory=far)
    traces, _, _ = content(page)
    assert [z is None for z in trace(traces, "scatter3d", "snapshots")["z"]] == [True, True, False]
    assert trace(traces, "scatter", "snapshots")["x"] == [3.0, 0.9, 0.0]
    assert "2 of 3 have none and are on the map only." in page


@plotly
def test_snapshots_are_at_their_true_losses_where_these_are_given():
    losses = TrajectoryLosses(
        PATH.steps,
        (4.0, 2.0, INF, 0.01),
        (3.0, 1.0, 1.0, 0.01),
        (0.0,) * 4,
        8,
        fm.Outcome.COMPLETED,
    )
    page = interactive(surface(), trajectory=PATH, losses=losses)
    traces, _, _ = content(page)
    assert trace(traces, "scatter3d", "snapshots")["z"] == [4.0, 2.0, None, 0.01]
    assert "their height is their own loss" in page


@plotly
def test_labels_are_words_and_never_markup():
    hostile = "</script><b>%{x}&"
    page = interactive(surface(labels=(hostile, hostile)), title=hostile)
    traces, layout, _ = content(page)
    assert layout["xaxis"]["title"]["text"] == html.escape(hostile).replace("%{", "% {") + (
        " (filter norms)"
    )
    assert "%{x}&" not in trace(traces, "surface")["hovertemplate"]
    assert page.count("</script>") == interactive(surface()).count("</script>")


@plotly
def test_notes_of_the_result_are_on_the_page():
    page = interactive(surface(notes=("Computed in a < b.",)))
    assert "Computed in a &lt; b." in page
    assert fm.Outcome.COMPLETED.value in page


# ---------------------------------------------------------------------------------------- lines


@plotly
def test_lines_of_a_profile_and_of_an_interpolation():
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    objective = fm.Objective(net, nn.MSELoss(), (torch.randn(8, 2), torch.randn(8, 1)))
    line = fm.interpolate(objective, torch.zeros(3), torch.ones(3), metrics={"error": nn.L1Loss()})
    page = interactive(line)
    traces, layout, _ = content(page)
    assert [t["name"] for t in traces] == ["train loss", "train error"]
    assert traces[0]["y"] == pytest.approx(line.loss)
    assert traces[1]["yaxis"] == "y2"
    assert layout["xaxis"]["title"]["text"] == "α"
    assert layout["yaxis"]["type"] == "log"

    values = torch.tensor([2.0, INF, 0.0], dtype=torch.float64)
    profile = surface(coordinates=((-1.0, 0.0, 1.0),), grids={"train": Grid(values, {})})
    page = interactive(profile)
    traces, layout, _ = content(page)
    assert traces[0]["y"] == [2.0, None, 0.0]
    assert layout["yaxis"]["type"] == "linear"
    assert layout["xaxis"]["title"]["text"] == "first direction (filter norms)"
    assert "1 losses are not finite" in page


# ----------------------------------------------------------------------------- files, notebooks


@plotly
def test_the_file_is_the_page(tmp_path):
    target = tmp_path / "new" / "page.html"
    page = interactive(surface(), target)
    assert target.read_text(encoding="utf-8") == page
    assert interactive(surface(), str(target)) == page
    assert list(target.parent.iterdir()) == [target]


@plotly
def test_a_file_is_written_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("before")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        interactive(surface(), target)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@plotly
def test_a_notebook_shows_it_and_prints_little():
    page = interactive(surface())
    assert isinstance(page, str)
    assert len(repr(page)) < 100
    frame = page._repr_html_()
    inside = re.fullmatch(r'<iframe srcdoc="([^"]*)" title="[^"]+" style="[^"]+"></iframe>', frame)
    assert html.unescape(inside[1]) == page


# ------------------------------------------------------------------------------ what it refuses


@plotly
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"result": 3}, fm.ArgumentTypeError, "no page for a int"),
        ({"path": 3}, fm.ArgumentTypeError, "'path' argument"),
        ({"title": 3}, fm.ArgumentTypeError, "'title' argument"),
        ({"trajectory": 3}, fm.ArgumentTypeError, "principal_components"),
        ({"trajectory": PATH, "losses": 3}, fm.ArgumentTypeError, "path_losses"),
        ({"losses": 3}, fm.ArgumentTypeError, "'trajectory' argument"),
        ({"trajectory": path([[1.0], [0.0]])}, fm.InvalidArgumentError, "1 components"),
        (
            {"result": surface(coordinates=(X,)), "trajectory": PATH},
            fm.InvalidArgumentError,
            "got 1 directions",
        ),
        (
            {
                "trajectory": PATH,
                "losses": TrajectoryLosses((1,), (1.0,), (1.0,), (0.0,), 2, fm.Outcome.COMPLETED),
            },
            fm.InvalidArgumentError,
            "another trajectory",
        ),
        ({"result": surface(coordinates=(X, Y, X))}, fm.InvalidArgumentError, "has 3"),
    ],
)
def test_what_cannot_be_drawn_says_so(arguments, error, message):
    arguments = {"result": surface(), **arguments}
    with pytest.raises(error, match=message):
        interactive(arguments.pop("result"), **arguments)


def test_without_plotly_it_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(fm.InvalidArgumentError, match=r'pip install "flatminima\[interactive\]"'):
        interactive(surface())


def test_plotly_is_loaded_by_the_first_page_only():
    source = Path(module.__file__).parents[2]
    script = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import flatminima.plotting.interactive"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "flatminima.plotting.interactive" in done.stdout.split()
    assert "plotly" not in done.stdout.split()


# --------------------------------------------------------------------------------- in a browser

REPORT = """<script>
window.addEventListener("load", () => setTimeout(() => {
  ACTION
  setTimeout(() => {
    const asked = performance.getEntriesByType("resource").map(entry => entry.name);
    document.body.dataset.asked = JSON.stringify(asked);
    const plot = document.getElementById("flatminima");
    document.body.dataset.sizes = JSON.stringify([plot.clientHeight, innerHeight]);
  }, 1500);
}, 1500));
</script></body>"""
MAP = """for (const button of document.querySelectorAll(".updatemenu-button"))
    if (button.textContent === "map") button.dispatchEvent(new MouseEvent("click"));"""
HARMLESS = ("willReadFrequently", "GPU stall")


def browse(page: Path, folder: Path, *options: str, action: str = "") -> tuple[str, list[str]]:
    """What the browser prints, and what its console says; `action` is a script to run first."""
    text = page.read_text(encoding="utf-8")
    page = page.with_name(f"tried_{page.name}")
    page.write_text(text.replace("</body>", REPORT.replace("ACTION", action)), encoding="utf-8")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
        *("--window-size=1000,700", "--enable-logging=stderr", "--v=0"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=15000"),
    ]
    for attempt in range(3):
        profile = folder / f"profile{attempt}"
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", *options, page.as_uri()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            continue
        finally:
            shutil.rmtree(profile, ignore_errors=True)
        console = [line for line in err.splitlines() if "CONSOLE" in line]
        return out, [line for line in console if not any(words in line for words in HARMLESS)]
    pytest.fail("Chromium did not come to an end, three times")


def shown(dom: str) -> list[str]:
    """The words in the picture."""
    return [html.unescape(t) for t in re.findall(r"<text[^>]*>([^<]+)</text>", dom)]


@plotly
@in_a_browser
def test_a_browser_draws_the_relief_offline(tmp_path):
    page = tmp_path / "page.html"
    interactive(surface(gaps=GAPS), page, trajectory=PATH, title="In a browser")
    dom, console = browse(page, tmp_path, "--dump-dom")
    assert console == []
    dom = without_scripts(dom)
    assert 'data-asked="[]"' in dom
    height, window = json.loads(re.search(r'data-sizes="\[(.*?)\]"', dom)[1].join("[]"))
    assert 0.8 * window < height < window
    assert re.search(r"<canvas[^>]* width=\"\d{3,}", dom), "WebGL has drawn"
    assert {"In a browser", "the model", "snapshots", "infinite loss (2)", "NaN loss (1)"} <= set(
        shown(dom)
    )
    assert {"loss", "0.01", "1", "training step"} <= set(shown(dom))
    tools = re.findall(r'data-title="([^"]*)"', dom)
    assert "download plot as a png" in [tool.lower() for tool in tools]
    assert not [t for t in tools if re.search("[Ss]hare|[Cc]loud|[Ee]dit", t)]


@plotly
@in_a_browser
def test_a_browser_draws_the_map_at_the_press_of_a_button(tmp_path):
    page = tmp_path / "page.html"
    interactive(surface(gaps=GAPS), page, trajectory=PATH)
    dom, console = browse(page, tmp_path, "--dump-dom", action=MAP)
    assert console == []
    dom = without_scripts(dom)
    assert 'data-asked="[]"' in dom
    assert {"first direction (filter norms)", "second direction (‖θ‖)"} <= set(shown(dom))
    assert 'class="contour"' in dom
    assert dom.count('class="point"') >= len(PATH.steps)


@plotly
@in_a_browser
def test_the_relief_is_seen_in_its_colours(tmp_path):
    page = tmp_path / "page.html"
    interactive(surface(), page)
    picture = tmp_path / "picture.png"
    _, console = browse(page, tmp_path, f"--screenshot={picture}")
    assert console == []
    red, green, blue = np.moveaxis(matplotlib.image.imread(picture)[100:600, :700, :3], -1, 0)
    low = (blue > red + 0.1) & (red < 0.2)
    high = (red > blue + 0.2) & (green > blue + 0.1)
    assert low.sum() > 200
    assert high.sum() > 5000


@plotly
@in_a_browser
def test_a_browser_draws_lines(tmp_path):
    values = torch.tensor([2.0, 0.1, 3.0], dtype=torch.float64)
    page = tmp_path / "page.html"
    interactive(surface(coordinates=((-1.0, 0.0, 1.0),), grids={"train": Grid(values, {})}), page)
    dom, console = browse(page, tmp_path, "--dump-dom")
    assert console == []
    assert "first direction (filter norms)" in shown(without_scripts(dom))
    assert re.search(r'<path class="js-line"[^>]* d="M[^"]+"', dom)
