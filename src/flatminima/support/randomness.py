"""Generators made from seeds, and the global random states, which are preserved."""

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
    "draw_seed",
    "draw_signs",
    "preserve_random_state",
    "read_random_state",
    "reseed",
]

Seed = int | torch.Generator


def as_generator(seed: Seed, device: torch.device) -> torch.Generator:
    """Return a generator for draws on `device`.

    Args:
        seed: an int gives a new generator on `device`, always in the same state. A
            `torch.Generator` is used as it is and advances, as everywhere in torch.
        device: where the numbers are needed.

    Raises:
        ArgumentTypeError: `seed` is neither an int nor a generator.
        InvalidArgumentError: the int does not fit into 64 bits.
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


def draw_seed(seed: Seed, device: torch.device) -> int:
    """Return an int that allows the same draws to be repeated; a generator advances by one draw."""
    if not isinstance(seed, torch.Generator):
        as_generator(seed, device)
        return int(seed)
    return int(torch.randint(2**62, (), generator=seed, device=seed.device).item())


def draw_signs(
    count: int, size: int, generator: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return independent random signs (Rademacher variables), shape (count, size)."""
    bits = torch.randint(2, (count, size), generator=generator, device=generator.device)
    return bits.to(device, dtype).mul_(2).sub_(1)


def reseed(seed: int) -> None:
    """Seed every global random state: Python, NumPy, and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would also seed a CUDA that is initialised later.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def read_random_state() -> list[bytes]:
    """Return every global random state of torch, for comparison."""
    states = [torch.get_rng_state()]
    if _cuda_in_use():
        states += torch.cuda.get_rng_state_all()
    return [state.cpu().numpy().tobytes() for state in states]


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block."""
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
    """Return whether CUDA is initialised; reading its random states would initialise it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
