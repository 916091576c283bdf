"""What all tests share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bits depend on the number of threads."""
    torch.set_num_threads(1)
