"""Seeds that are the same on every machine and in every Python."""

import hashlib


def stable_seed(*numbers: int) -> int:
    """A 64-bit hash of some integers: the same on every machine and Python, and different for neighbouring inputs."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
