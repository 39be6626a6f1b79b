"""What all tests share: our packages first on the path, a calm environment, and a marker from the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import gumshoe

GROUPS = ("unit", "engines", "kills", "es", "browser")

os.environ.update(gumshoe.child_env())
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: their threads must add up to the cores
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(group if group in GROUPS else "unit")
