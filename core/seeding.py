"""Every random number comes from a generator named after its purpose.

`generator(seed, "init")` and `generator(seed, "data")` do not depend on each other or on the order in which they are
created. So adding a consumer of randomness changes nothing elsewhere.
"""

from __future__ import annotations

import hashlib
from operator import index

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on the purpose."""
    digest = hashlib.blake2b(repr((index(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator on `device` for one purpose."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *purpose))
