import os

os.environ.setdefault("MPLBACKEND", "Agg")
# Also for processes that tests start, which would share the cores with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")

# Tensors here are tiny: a second thread would only be waited for.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="run the exhaustive suite: every model, type and operator through every test",
    )


def pytest_collection_modifyitems(config, items):
    """Leave out what only the exhaustive suite runs, but not what is named by its id."""
    named = any("[" in argument for argument in config.args)
    if config.getoption("--full") or named:
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
