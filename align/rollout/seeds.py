"""Seeds that are a pure function of what they are for."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^62) that depends on nothing but `parts`, the same on every machine and in every process.

    Two bits are left free because vLLM adds the sample index to a request's seed.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
