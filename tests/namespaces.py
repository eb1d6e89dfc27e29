"""Two machines on one: network namespaces joined by a veth pair, each with an address of its own."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def two_machines(name: str = "tickets", rate: str | None = None) -> Iterator[tuple[str, str]]:
    """Yields the names of two namespaces; skips, loudly, where the machine does not let us make any.

    Args:
        rate: what the link between them carries, as tc writes it ("100mbit"); None for as much as it can.
    """
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian: iproute2): the test of two machines did not run")
    spaces = (f"{name}-0", f"{name}-1")
    try:
        _ip("netns", "add", spaces[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here ({error.stderr.strip()}): the test of two machines did not run")
    try:
        _ip("netns", "add", spaces[1])
        _ip("link", "add", f"{name}0", "netns", spaces[0], "type", "veth", "peer", f"{name}1", "netns", spaces[1])
        for i, space in enumerate(spaces):
            _ip("-n", space, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"{name}{i}")
            _ip("-n", space, "link", "set", f"{name}{i}", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            if rate:
                shaping = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
                subprocess.run(
                    ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", f"{name}{i}", *shaping],
                    check=True, capture_output=True, timeout=20,
                )  # fmt: skip
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=20)
