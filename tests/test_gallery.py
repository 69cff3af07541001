"""The gallery: a page's blocks run when the documentation is built, and their pictures go in."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

DRAW = """\
# A page

```python
import matplotlib.pyplot as plt

_, ax = plt.subplots(figsize=(2, 2))
ax.plot([0, 1])
```

<!-- picture: a rising line -->

Words, and a block that goes on where the first one ended.

```python
for title in ("first", "second"):
    plt.figure(figsize=(1, 1)).suptitle(title)
ax.plot([1, 0])
with open("page.html", "w") as stream:
    stream.write("<!DOCTYPE html><title>by hand</title>")
```

<!-- picture: the first -->

<!-- picture: the second -->

<!-- page: page.html: something to open -->
"""


@pytest.fixture
def hook(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gallery_hook", ROOT / "docs" / "gallery_hook.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gallery_hook", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return module


@pytest.fixture
def runs(hook, monkeypatch):
    """The processes that were started."""
    started, run = [], hook.subprocess.run

    def counting(command, **options):
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(hook.subprocess, "run", counting)
    return started


def site(folder: Path, pages: dict[str, str], **options) -> Path:
    """A small site, built with the hook alone."""
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    for name, text in pages.items():
        path = folder / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "mkdocs.yml").write_text("site_name: a site\n", encoding="utf-8")
    settings = {
        "theme": {"name": None, "custom_dir": str(folder / "theme")},
        "markdown_extensions": ["attr_list", "md_in_html"],
        "plugins": [],
        "hooks": [str(ROOT / "docs" / "gallery_hook.py")],
        "strict": True,
        **options,
    }
    (folder / "theme").mkdir()
    (folder / "theme" / "main.html").write_text("{{ page.content }}", encoding="utf-8")
    config = load_config(str(folder / "mkdocs.yml"), site_dir=str(folder / "site"), **settings)
    build.build(config)
    return folder / "site"


# ------------------------------------------------------------------------------- what it makes


def test_pictures_and_pages_are_made_in_order(hook):
    folder = hook.made("page.md", DRAW)
    assert sorted(p.name for p in folder.iterdir()) == ["01.png", "02.png", "03.png", "page.html"]
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
    assert "by hand" in (folder / "page.html").read_text()


@pytest.mark.parametrize("directories", [False, True])
def test_a_site_has_the_pictures_in_their_places(tmp_path, monkeypatch, directories):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pages = {"index.md": "# Home\n", "sub/page.md": DRAW, "other.md": "```python\n1 / 0\n```\n"}
    built = site(tmp_path, pages, use_directory_urls=directories)
    path = built / "sub" / ("page/index.html" if directories else "page.html")
    text = path.read_text(encoding="utf-8")
    images = re.findall(r'<img alt="([^"]*)" loading="lazy" src="([^"]*)"', text)
    assert [words for words, _ in images] == ["a rising line", "the first", "the second"]
    for _, address in images:
        assert (path.parent / address).read_bytes().startswith(PNG)
    frame = re.search(r'<iframe src="([^"]*)" title="something to open"', text)[1]
    assert "by hand" in (path.parent / frame).read_text()
    assert re.search(r'<a href="([^"]*page\.html)">something to open', text)
    assert "<!--" not in text
    # Each picture stands below its block, and no other page was run.
    assert text.index("ax.plot([0, 1])") < text.index("a rising line") < text.index("Words, and")
    assert len(list(tmp_path.glob("flatminima-gallery-*/*"))) == 1


# ------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# A\n\n```python\nx = 1\n\nx / 0\n```\n\n<!-- picture: no -->\n",
            "line 6: .*ZeroDivision",
        ),
        ("```python\nif\n```\n\n<!-- picture: no -->\n", "line 2: .*SyntaxError"),
        ("```python\nraise SystemExit\n```\n\n<!-- picture: no -->\n", "line 2: .*SystemExit"),
        (
            "```python\nx = 1\n```\n\n<!-- picture: no -->\n",
            "line 1: .*leaves 0 figures open, and 1",
        ),
        (DRAW.replace("<!-- picture: the second -->", ""), "line 14: .*leaves 2 .*and 1"),
        (DRAW.replace("page.html:", "other.html:"), "line 14: .*does not write 'other.html'"),
        (DRAW.replace('"page.html"', '"../page.html"'), "does not write 'page.html'"),
        ("<!-- picture: of what? -->\n", "line 1: no block"),
    ],
)
def test_a_page_that_fails_is_named_with_the_line(hook, text, message):
    with pytest.raises(hook.GalleryError, match=message):
        hook.made("some/page.md", text)
    assert list(hook.cache().iterdir()) == []


FAILS = """\
# A

```python
def fails():
    raise ValueError("why")


fails()
```

<!-- picture: no -->
"""


def test_a_failing_block_ends_the_build_with_its_traceback(tmp_path, monkeypatch, caplog):
    exceptions = pytest.importorskip("mkdocs.exceptions")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(exceptions.Abort):
        site(tmp_path, {"index.md": FAILS})
    assert "The pictures of index.md" in caplog.text
    assert 'File "index.md", line 5, in fails\n    raise ValueError("why")' in caplog.text
    assert "index.md, line 5: the block raised ValueError: why" in caplog.text


# ---------------------------------------------------------------------------------- what it keeps


def test_what_did_not_change_is_not_run_again(hook, runs):
    first = hook.made("page.md", DRAW)
    assert hook.made("page.md", DRAW.replace("Words, and", "Other words and")) == first
    assert len(runs) == 1
    assert hook.made("page.md", DRAW.replace("ax.plot([0, 1])", "ax.plot([0, 2])")) != first
    assert len(runs) == 2


def test_it_runs_again_when_the_library_or_a_package_changes(hook, runs, monkeypatch):
    first = hook.made("page.md", DRAW)
    monkeypatch.setattr(hook, "library", lambda: "another state")
    assert hook.made("page.md", DRAW) != first
    assert len(runs) == 2


def test_the_state_of_the_library_is_that_of_its_files(hook, monkeypatch, tmp_path):
    before = hook.library()
    assert hook.library() == before
    package = tmp_path / "flatminima"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(
        hook.importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(package)]}),
    )
    empty = hook.library()
    (package / "new.py").write_text("x = 1")
    assert len({before, empty, hook.library()}) == 3


def test_old_states_are_removed(hook, monkeypatch):
    text = "```python\nimport matplotlib.pyplot as plt\nplt.figure()\n```\n\n<!-- picture: a -->\n"
    monkeypatch.setattr(hook, "KEPT", 1)
    hook.made("page.md", text)
    kept = hook.made("page.md", text.replace("figure()", "figure(3)"))
    assert list(hook.cache().iterdir()) == [kept]
    assert hook.cache().stat().st_mode & 0o077 == 0


# ------------------------------------------------------------------------------ the gallery itself


def test_the_gallery_shows_what_the_library_draws(hook):
    wanted = [w for b in hook.blocks((ROOT / "docs" / "gallery.md").read_text()) for w in b.wanted]
    assert len(wanted) >= 10
    assert [kind for kind, _ in wanted].count("page") == 1
    for kind, what in wanted:
        assert len(hook.description(kind, what).split()) >= 5, "words for those who cannot see it"


def test_blocks_of_the_gallery_are_short(hook):
    for block in hook.blocks((ROOT / "docs" / "gallery.md").read_text())[1:]:
        assert len(block.source.splitlines()) <= 14
