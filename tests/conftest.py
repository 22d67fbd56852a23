"""What every test starts from: the same random numbers, one thread, and GPU tests only where there is one.

Heavy packages are imported by functions: the process that only hands out the tests (xdist) does not need them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.amounts import some

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; each core has a process of pytest already

# The machines are shared: how long an example takes says nothing.
settings.register_profile(
    "shared-machine", max_examples=some(30, 1_000), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tensors of tests are tiny, and threads that wait for each other on shared cores cost most of the time."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def pytest_collection_finish() -> None:
    """Imported modules stay to the end: without this, each search for garbage goes through all of them."""
    gc.freeze()
