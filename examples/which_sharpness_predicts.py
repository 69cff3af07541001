"""Which sharpness predicts generalisation? Ranks of measures against ranks of test errors.

Trains a few dozen small nets on a few real images to the same training loss, varying batch size,
learning rate, width, weight decay and seed. Takes every measure of sharpness of each net and
reports Kendall's τ with the test error: over all nets, and granulated, within groups of nets that
differ in a single hyper-parameter (Jiang et al. 2020, arXiv:1912.02178, section 2.2). Each finished
net is kept in a file, so an interrupted run resumes where it stopped.

    python examples/which_sharpness_predicts.py                      # digits, a few minutes
    python examples/which_sharpness_predicts.py --against gap        # the same nets, in seconds
    python examples/which_sharpness_predicts.py --quick              # a few nets, fewer settings
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flatminima as fm
import image_data
from net_cache import Cache, Net
from rank_correlation import TARGETS, report

MEASURES: dict[str, Any] = {
    "gradient_norm": None,
    "epsilon_sharpness": [
        {"epsilon": 1e-3},
        {"epsilon": 5e-4},
        {"epsilon": 1e-3, "subspace": 100},
        {"epsilon": 5e-4, "subspace": 100},
    ],
    "random_sharpness": {"samples": 10},
    "eigenvalues": None,
    "trace": None,
    "gauss_newton": None,
    "sam_sharpness": [
        {"rho": 0.05},
        {"rho": 0.05, "steps": 20},
        {"rho": 0.05, "m": 50},
        {"rho": 0.5, "adaptive": True, "steps": 20},
        {"rho": 0.5, "adaptive": True, "steps": 20, "normalize_logits": True},
    ],
    "average_sharpness": [
        {"sigma": 0.01},
        {"sigma": 0.1, "adaptive": True},
        {"sigma": 0.1, "adaptive": True, "normalize_logits": True},
    ],
    "pac_bayes_sharpness": [{"target": 0.1}, {"target": 0.1, "adaptive": True}],
    "local_energy": {"samples": 20},
    "fisher_rao_norm": {"kind": "exact"},
    "relative_flatness": {"products": 50},
    "critical_sharpness": {"tol": 0.01},
    # Without removing outliers first, the error is as large as the differences between nets.
    "laplace_log_evidence": {
        "prior_precision": "optimise",
        "probes": 8,
        "steps": 20,
        "outliers": 60,
    },
}
LIGHT: dict[str, Any] = {
    "gradient_norm": None,
    "epsilon_sharpness": [{"epsilon": 1e-3, "iterations": 3}],
    "random_sharpness": {"samples": 2},
    "eigenvalues": None,
    "trace": None,
    "gauss_newton": None,
    "sam_sharpness": [{"rho": 0.05}, {"rho": 0.5, "adaptive": True, "steps": 3}],
    "average_sharpness": [{"sigma": 0.01, "samples": 5}],
    "pac_bayes_sharpness": [{"target": 0.1, "samples": 3, "tol": 0.2}],
    "local_energy": {"samples": 3, "sigmas": [0.1, 0.3, 0.5]},
    "fisher_rao_norm": {"kind": "exact"},
    "relative_flatness": {"products": 10},
    "critical_sharpness": {"tol": 0.1},
    "laplace_log_evidence": {"prior_precision": "optimise", "probes": 2, "steps": 10},
}
QUICK = {
    "train_images": 120,
    "loss": 0.3,
    "batch_sizes": [16, 64],
    "learning_rates": [0.2, 0.5],
    "widths": [16, 32],
    "weight_decays": [0.0],
    "seeds": 1,
    "bootstrap": 200,
}
LARGER_IS_FLATTER = ("Laplace log evidence", "λₙ smallest eigenvalue")
"""Numbers whose sign is changed, so that larger is sharper for all of them."""
TRAINING_LOSS = "training loss"


def network(features: int, classes: int, width: int) -> nn.Sequential:
    """Return an MLP without batch norm, for which every measure means what it should."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def split(data: image_data.ImageData, count: int) -> image_data.ImageData:
    """Draw `count` training images with a fixed seed; all others become the test set."""
    total = len(data.train_inputs)
    if count >= total:
        raise ValueError(f"{data.name} has {total} training images; train on fewer")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    kept, rest = order[:count], order[count:]
    inputs = torch.cat([data.train_inputs[rest], data.test_inputs])
    labels = torch.cat([data.train_labels[rest], data.test_labels])
    return image_data.ImageData(
        data.name, data.train_inputs[kept], data.train_labels[kept], inputs, labels
    )


def train(
    model: nn.Module, inputs: Tensor, labels: Tensor, net: Net, *, loss: float, max_steps: int
) -> tuple[int, float]:
    """Train with plain SGD to a training loss of `loss`; return the number of steps and the loss.

    The loss on all images, without weight decay, is evaluated after every step. The last step is
    shortened to hit `loss`, so that all nets are measured at the same loss. The returned loss
    differs from it if the steps ran out or the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(net.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=net.learning_rate, weight_decay=net.weight_decay
    )
    loss_fn = nn.CrossEntropyLoss()
    parameters = list(model.parameters())

    def value() -> float:
        with torch.no_grad():
            return float(loss_fn(model(inputs), labels))

    steps, found = 0, value()
    while steps < max_steps and math.isfinite(found):
        order = torch.randperm(len(inputs), generator=generator)
        for first in range(0, len(order) - net.batch_size + 1, net.batch_size):
            before = [p.detach().clone() for p in parameters]
            rows = order[first : first + net.batch_size]
            optimizer.zero_grad()
            loss_fn(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            steps, found = steps + 1, value()
            if found <= loss:
                return steps, _shortened(parameters, before, value, loss)
            if steps == max_steps or not math.isfinite(found):
                break
    return steps, found


def _shortened(
    parameters: Sequence[Tensor], before: Sequence[Tensor], value: Any, loss: float
) -> float:
    """Shorten the last step until the loss is the wanted one, and return the loss."""
    after = [p.detach().clone() for p in parameters]
    low, high = 0.0, 1.0
    found = float(value())
    while abs(found - loss) > 1e-4 * loss and high - low > 1e-6:
        middle = (low + high) / 2
        with torch.no_grad():
            for p, a, b in zip(parameters, before, after, strict=True):
                p.copy_(torch.lerp(a, b, middle))
        found = float(value())
        low, high = (low, middle) if found <= loss else (middle, high)
    return found


def measured(
    model: nn.Module, inputs: Tensor, labels: Tensor, measures: Mapping[str, Any], products: int
) -> tuple[dict[str, float], list[str]]:
    """Take every measure on the training images; also return the names of the doubtful ones."""
    with warnings.catch_warnings():
        # Outcomes say what did not converge; they are counted below the table.
        warnings.simplefilter("ignore", fm.ConvergenceWarning)
        report = fm.sharpness(
            model,
            nn.CrossEntropyLoss(),
            (inputs, labels),
            measures=measures,
            eigenvalues=1,
            trace_products=products,
            progress=False,
        )
    found: dict[str, float] = {}
    doubtful = []
    for line in report.measurements()[1:]:  # the loss comes first
        turned = line.name.startswith(LARGER_IS_FLATTER)
        name = f"−{line.name}" if turned else line.name
        assert name not in found, name
        found[name] = -line.value if turned else line.value
        if line.outcome is not None and line.outcome.doubtful:
            doubtful.append(name)
    return found, doubtful


def fitted(net: Net, data: image_data.ImageData, options: argparse.Namespace) -> dict[str, Any]:
    """Train one net, measure it, and return its record."""
    torch.manual_seed(net.seed)
    model = network(data.features, data.classes, net.width)
    inputs, labels = data.train_inputs, data.train_labels
    began = time.perf_counter()
    steps, loss = train(model, inputs, labels, net, loss=options.loss, max_steps=options.max_steps)
    trained = time.perf_counter()
    record: dict[str, Any] = {"steps": steps, "training_loss": loss}
    if not loss <= options.loss * 1.001:
        return record | {"reached": False, "training_loss": loss if math.isfinite(loss) else None}
    measures, doubtful = measured(model, inputs, labels, options.measures, options.trace_products)
    with torch.no_grad():
        outputs = model(data.test_inputs)
        error = 1 - fm.accuracy(outputs, data.test_labels).item()
        gap = error - 1 + fm.accuracy(model(inputs), labels).item()
        test_loss = nn.functional.cross_entropy(outputs, data.test_labels).item()
    squares = math.fsum(float(p.detach().double().square().sum()) for p in model.parameters())
    return record | {
        "reached": True,
        "error": error,
        "gap": gap,
        "loss": test_loss,
        "measures": {n: v if math.isfinite(v) else None for n, v in measures.items()},
        "doubtful": doubtful,
        "baselines": {
            "‖θ‖²": squares,
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps of training": steps,
            TRAINING_LOSS: loss,
        },
        "seconds": [trained - began, time.perf_counter() - trained],
    }


def grid(options: argparse.Namespace) -> list[Net]:
    """List all nets, with the seeds in the outermost loop."""
    axes = (options.batch_sizes, options.learning_rates, options.widths, options.weight_decays)
    levels = itertools.product(range(options.seeds), *(sorted(set(values)) for values in axes))
    return [Net(b, rate, width, decay, seed) for seed, b, rate, width, decay in levels]


def all_nets(
    data: image_data.ImageData, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Return the record of every net, read from its file or trained and measured now."""
    images = hashlib.sha256()
    for tensor in (data.train_inputs, data.train_labels, data.test_inputs, data.test_labels):
        images.update(tensor.numpy().tobytes())
    cache = Cache(
        folder,
        {
            "version": fm.__version__,
            "data": data.name,
            "images": images.hexdigest(),
            "train_images": len(data.train_inputs),
            "loss": options.loss,
            "max_steps": options.max_steps,
            "measures": options.measures,
            "trace_products": options.trace_products,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    nets = grid(options)
    found = {net: record for net in nets if (record := cache.read(net)) is not None}
    print(f"{len(found)} of {len(nets)} nets taken from {folder}")
    silent = options.quiet or len(found) == len(nets)
    with tqdm(total=len(nets), initial=len(found), unit="net", disable=silent) as bar:
        for net in nets:
            if net not in found:
                bar.set_postfix_str(str(net), refresh=True)
                try:
                    found[net] = fitted(net, data, options)
                except fm.FlatMinimaError as error:
                    raise ValueError(f"{net}: {error}") from error
                cache.write(net, found[net])
                bar.update()
    return [{"net": dataclasses.asdict(net), **found[net]} for net in nets]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=image_data.NAMES, default="digits", help="which images")
    add("--root", type=Path, help="folder with the files of mnist, fashion-mnist or cifar10")
    add("--train-images", type=int, default=300, help="training images; all others test")
    add("--loss", type=float, default=0.05, help="training loss of all nets")
    add("--max-steps", type=int, default=20000, help="steps after which a net is left out")
    add("--batch-sizes", type=int, nargs="+", default=[10, 50, 150], help="batch sizes of SGD")
    add("--learning-rates", type=float, nargs="+", default=[0.05, 0.3], help="learning rates")
    add("--widths", type=int, nargs="+", default=[32, 128], help="units per layer")
    add("--weight-decays", type=float, nargs="+", default=[0.0, 5e-3], help="weight decays")
    add("--seeds", type=int, default=3, help="seeds for each combination")
    add("--against", choices=TARGETS, default="error", help="what to predict")
    add("--bootstrap", type=int, default=2000, help="resamples per interval")
    add("--quick", action="store_true", help="a few nets and fewer settings")
    add("--out", type=Path, default=Path("results"), help="folder to write to")
    add("--quiet", action="store_true", help="no progress bars")
    if parser.parse_args(argv).quick:
        # Arguments on the command line override the quick settings.
        parser.set_defaults(**QUICK)
    options = parser.parse_args(argv)
    for name, low in (
        *((n, 1) for n in ("train_images", "max_steps", "batch_sizes", "widths", "seeds")),
        ("weight_decays", 0),
        ("bootstrap", 10),
    ):
        value = getattr(options, name)
        if not min(value if isinstance(value, list) else [value]) >= low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    for name in ("loss", "learning_rates", "weight_decays"):
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        if not all(math.isfinite(v) and (v > 0 or name == "weight_decays") for v in values):
            parser.error(f"--{name.replace('_', '-')} must be positive and finite")
    options.measures, options.trace_products = (LIGHT, 10) if options.quick else (MEASURES, 50)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, print and draw."""
    options = arguments(argv)
    mpl.use("Agg")
    # The nets are too small for a second thread to help.
    torch.set_num_threads(1)
    stem = options.out / f"which_sharpness_predicts_{options.data}"
    try:
        data = split(image_data.load(options.data, options.root), options.train_images)
        if max(options.batch_sizes) > len(data.train_inputs):
            raise ValueError(f"a batch is larger than the {len(data.train_inputs)} training images")
        everything = all_nets(data, options, stem)
        runs = [run for run in everything if run["reached"]]
        missed = [run for run in everything if not run["reached"]]
        for run in missed:
            loss = run["training_loss"]
            came = "is not finite" if loss is None else f"is {loss:.3g}"
            print(
                f"left out: {Net(**run['net'])}: after {run['steps']} steps its training loss "
                f"{came}, not {options.loss:g}"
            )
        if len(runs) < 3:
            raise ValueError(
                f"{len(runs)} of {len(everything)} nets reached a training loss of "
                f"{options.loss:g}; three are needed. Give more --max-steps, another "
                "--learning-rates or a larger --loss"
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; finished nets are kept in {stem}", file=sys.stderr)
        return 130
    stem = stem.with_name(stem.name + ("" if options.against == "error" else f"_{options.against}"))
    numbers = {
        "data": data.name,
        "train_images": len(data.train_inputs),
        "test_images": len(data.test_inputs),
        "loss": options.loss,
        "against": options.against,
        "version": fm.__version__,
    }
    report(runs, missed, numbers, options.bootstrap, stem)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
