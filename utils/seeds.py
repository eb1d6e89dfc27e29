"""Seeds that do not depend on the machine or the version of Python."""

import hashlib


def stable_seed(*numbers: int) -> int:
    """64-bit hash of integers: the same on every machine and Python, and unrelated for neighbouring inputs."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
