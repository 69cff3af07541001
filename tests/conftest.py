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
