"""What all tests share."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads, in child processes too


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Where torch had been imported before the variable was set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server():
    """Forks processes that need not import anything any more."""
    from forkserver import ForkServer  # not needed by the process that hands out tests

    server = ForkServer()
    yield server
    server.close()
