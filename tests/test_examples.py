import gzip
import json
import pickle
import struct
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import flatminima as fm

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import hessian_spectrum  # noqa: E402
import image_data  # noqa: E402
import rescaled_minima  # noqa: E402
import small_vs_large_batch  # noqa: E402
import spectrum_report  # noqa: E402


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist_files(root, suffix, count=30):
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("t10k", 10)):
        images = rng.integers(0, 256, (number, 28, 28))
        labels = np.arange(number) % 10
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")],
)
def test_idx_files_are_read_as_they_are_published(tmp_path, suffix, name, folder):
    images, labels = mnist_files(tmp_path / folder, suffix)
    data = image_data.load(name, tmp_path)
    assert data.train_inputs.shape == (30, 784)
    assert data.classes == 10
    assert data.test_labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(
        (data.test_inputs * 255).round().numpy(), images.reshape(10, -1).astype(np.float32)
    )


def test_a_cut_idx_file_is_refused(tmp_path):
    mnist_files(tmp_path, "")
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cut short"):
        image_data.load("mnist", tmp_path)


def cifar_arrays():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, 10, 4)) for _ in range(6)]


def test_cifar10_in_both_versions_gives_the_same(tmp_path):
    arrays = cifar_arrays()
    binary, python = tmp_path / "a/cifar-10-batches-bin", tmp_path / "b/cifar-10-batches-py"
    binary.mkdir(parents=True)
    python.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (images, labels) in zip(names, arrays, strict=True):
        raw = np.concatenate([labels[:, None].astype(np.uint8), images], axis=1)
        (binary / f"{name}.bin").write_bytes(raw.tobytes())
        batch = {b"data": images, b"labels": labels.tolist()}
        (python / name).write_bytes(pickle.dumps(batch, protocol=2))
    first = image_data.load("cifar10", tmp_path / "a")
    second = image_data.load("cifar10", tmp_path / "b")
    assert first.train_inputs.shape == (20, 3072)
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.test_labels, second.test_labels)
    assert torch.equal(first.test_labels, torch.as_tensor(arrays[5][1]))


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("called",))

    for name in ("test_batch", "data_batch_1"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        image_data.load("cifar10", tmp_path)


@pytest.mark.parametrize("root", [None, Path("nowhere")])
def test_files_need_a_folder_that_exists(root):
    with pytest.raises(FileNotFoundError, match="--root"):
        image_data.load("mnist", root)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_empty_folder_says_what_is_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        image_data.load(name, tmp_path)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_bundled_data_are_split_without_overlap(name):
    data = image_data.load(name)
    count = len(data.train_inputs) + len(data.test_inputs)
    assert count == {"digits": 1797, "mnist5k": 5000}[name]
    assert float(data.train_inputs.min()) == 0
    assert float(data.train_inputs.max()) == 1
    assert data.classes == 10
    assert torch.equal(data.train_inputs, image_data.load(name).train_inputs)


def test_the_example_prints_tables_and_writes_its_files(tmp_path, capsys):
    argv = ["--width", "16", "--epochs", "1", "--seeds", "2", "--quiet", "--out", str(tmp_path)]
    assert small_vs_large_batch.main(argv) == 0
    printed = capsys.readouterr().out
    for text in ("1347 training", "large batch / small batch", "ε-sharpness", "±", "2 seeds"):
        assert text in printed
    stem = tmp_path / "small_vs_large_batch_digits"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| small batch | 16 |" in stem.with_suffix(".md").read_text(encoding="utf-8")
    comparison = fm.Comparison.from_json(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert comparison.labels == ("small batch", "large batch")
    assert all(len(v) == 2 for v in comparison.values["large batch"])


@pytest.mark.parametrize(
    "argv", [["--data", "mnist"], ["--large-batch", "5000"], ["--data", "cifar10", "--root", "x"]]
)
def test_the_example_says_what_was_wrong(argv, capsys):
    assert small_vs_large_batch.main([*argv, "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_outliers_lie_above_the_widest_gap():
    eigenvalues = torch.tensor([8.0, 6.0, 5.0, 1.0, 0.9, 0.8, -0.1])
    assert spectrum_report.widest_gap(eigenvalues) == (3, 5.0)
    with pytest.raises(ValueError, match="two positive"):
        spectrum_report.widest_gap(torch.tensor([1.0, 0.0, -2.0]))


def test_outliers_of_the_hessian_follow_the_number_of_classes(tmp_path, capsys):
    assert hessian_spectrum.main(["--quick", "--quiet", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("training loss 0.3", "C − 1", "negative mass", "small inside large"):
        assert text in printed
    stem = tmp_path / "hessian_spectrum_digits"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # The page shows these tables, of a larger run: the same columns, and the same quantities.
    page = (EXAMPLES.parent / "docs/structure.md").read_text(encoding="utf-8")
    table = stem.with_suffix(".md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert sum(row.startswith("| classes C |") for row in rows) == 2
    for row in rows:
        first = row.split("|")[1].strip()
        if first in ("classes C", "quantity"):
            assert row in page
        elif not first.isdigit() and first != "---":
            assert f"| {first} |" in page
    found = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(found) == 8  # two numbers of classes, two batches, two matrices
    for run in found:
        classes, values = run["classes"], run["largest"]
        assert classes - 2 <= run["outliers"] <= classes + 1, run
        # They stand apart, and they are those of the Gauss–Newton matrix.
        assert values[classes - 2] > 1.7 * values[classes], run
        assert run["smallest"] < -1e-2 if run["matrix"] == "H" else run["smallest"] > -1e-4
    for hessian, gauss_newton in zip(found[::2], found[1::2], strict=True):
        count = hessian["classes"] - 1
        np.testing.assert_allclose(
            hessian["largest"][:count], gauss_newton["largest"][:count], rtol=0.1
        )


def test_a_loss_that_is_not_reached_is_an_error(tmp_path, capsys):
    argv = ["--quick", "--quiet", "--epochs", "1", "--loss", "1e-3", "--out", str(tmp_path)]
    assert hessian_spectrum.main(argv) == 2
    assert "give more --epochs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["--data", "mnist"], ["--classes", "12"], ["--large-batch", "5000"]]
)
def test_the_spectrum_example_says_what_was_wrong(argv, capsys):
    assert hessian_spectrum.main([*argv, "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--classes", "1"], "--classes"),
        (["--classes", "30"], "--classes"),
        (["--probes", "1"], "--probes"),
        (["--loss", "0"], "--loss"),
        (["--settle", "-1"], "--settle"),
    ],
)
def test_the_spectrum_example_refuses_options_out_of_range(argv, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        hessian_spectrum.main(argv)
    assert named in capsys.readouterr().err


def test_what_is_said_holds_against_quick():
    options = hessian_spectrum.arguments(["--quick", "--width", "48"])
    assert (options.width, options.loss, options.classes) == (48, 0.3, [3, 10])


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(EXAMPLES / "small_vs_large_batch.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}
    )
    client.execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3


def test_rescaled_minima_print_the_table_of_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n", encoding="utf-8")
    argv = ["--quick", "--quiet", "--images", "100", "--width", "16", "--out", str(tmp_path)]
    assert rescaled_minima.main([*argv, "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "100 training images" in printed
    stem = tmp_path / "rescaled_minima_digits"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = fm.InvarianceTable.from_json(stem.with_suffix(".json").read_text(encoding="utf-8"))
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n<!-- table -->\n\n**The same function")
    assert written.endswith("<!-- end of table -->\nafter\n")
    assert "old" not in written
    # What the committed page says is unchanged is unchanged here, and nothing else.
    committed = (EXAMPLES.parent / "docs/invariance.md").read_text(encoding="utf-8")
    rows = {r.split(" | ")[0][2:]: r for r in committed.splitlines() if r.startswith("| ")}
    for name in table.measures:
        cells = rows[name].rstrip(" |").split(" | ")[2:]
        for kind, cell in zip(("layer", "neuron"), cells, strict=True):
            assert table.invariant(kind, name) == (cell == "unchanged"), (name, kind)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "mnist"], "--root"),
        (["--steps", "1"], "give more --steps"),
        (["--page", "nowhere.md"], "nowhere.md"),
    ],
)
def test_rescaled_minima_say_what_was_wrong(argv, words, tmp_path, capsys):
    argv = ["--quick", "--quiet", "--images", "50", "--width", "8", "--out", str(tmp_path), *argv]
    assert rescaled_minima.main(argv) == 2
    assert words in capsys.readouterr().err
