"""Random states: generators made from seeds, and the global states kept out of harm's way."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import ArgumentTypeError, InvalidArgumentError

__all__ = [
    "Seed",
    "as_generator",
    "one_seed",
    "preserved_random_state",
    "rademacher",
    "random_state",
    "reseed",
]

Seed = int | torch.Generator


def as_generator(seed: Seed, device: torch.device) -> torch.Generator:
    """Return a generator for draws on `device`.

    Args:
        seed: an int gives a new generator on `device`, the same one every time. A
            `torch.Generator` is used, and moves on, as it does everywhere in torch.
        device: where the numbers are needed.

    Raises:
        ArgumentTypeError: `seed` is neither.
        InvalidArgumentError: the int is too large.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ArgumentTypeError(
            f"The 'seed' argument must be an int or a torch.Generator; got {seed!r}."
        )
    if not -(2**63) <= int(seed) < 2**64:
        raise InvalidArgumentError(f"The 'seed' argument must fit into 64 bits; got {seed!r}.")
    return torch.Generator(device=device).manual_seed(int(seed))


def one_seed(seed: Seed, device: torch.device) -> int:
    """A number from which the same draws can be made again; a generator moves on by one draw."""
    if not isinstance(seed, torch.Generator):
        as_generator(seed, device)
        return int(seed)
    return int(torch.randint(2**62, (), generator=seed, device=seed.device).item())


def rademacher(
    count: int, size: int, generator: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return independent signs, shape (count, size)."""
    bits = torch.randint(2, (count, size), generator=generator, device=generator.device)
    return bits.to(device, dtype).mul_(2).sub_(1)


def reseed(seed: int) -> None:
    """Put every global random state (Python, NumPy, torch on all devices) at `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: it leaves a seed behind for a CUDA that is initialised only later.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def random_state() -> list[bytes]:
    """Return every global random state of torch, to be compared."""
    states = [torch.get_rng_state()]
    if _cuda_in_use():
        states += torch.cuda.get_rng_state_all()
    return [state.cpu().numpy().tobytes() for state in states]


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Run the block and put Python's, NumPy's and torch's random states back after it."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda = _cuda_in_use()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    mps = torch.backends.mps.is_available()
    mps_state = torch.mps.get_rng_state() if mps else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def _cuda_in_use() -> bool:
    """Return whether CUDA has states worth keeping; asking for them would start it otherwise."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
