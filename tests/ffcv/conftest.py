"""What the tests of FFCV's loader and writer share: files made from one tree, and no test that hangs.

The helpers are imported late: where FFCV is not installed they skip the tests, which a conftest cannot.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    from tests.ffcv_helpers import deadline

    with deadline(240):
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    from tests.ffcv_helpers import make_tree

    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def raw(tree, tmp_path_factory) -> Path:
    """Betons that hold exactly the pixels of the tree."""
    from tests.ffcv_helpers import write_raw

    return write_raw(tree, tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def jpeg(tree, tmp_path_factory) -> Path:
    from tests.ffcv_helpers import write

    folder = tmp_path_factory.mktemp("jpeg")
    assert write(tree, folder, "--compress_probability", "1") == 0
    return folder
