import os

import hypothesis
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")

# Tensors here are tiny: a second thread would only be waited for.
torch.set_num_threads(1)
