"""What the processes of a group compute together, over real groups."""

import pytest
import torch
from processes import in_processes

from hjepa_engine.losses import REGULARIZERS
from hjepa_engine.utils.distributed import gather_samples, of_rank_zero, rank

SIZES = (3, 0, 2)  # of each rank


def samples():
    return torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(0))


def own(rows):
    return rows.split(SIZES)[rank()]


def test_gathered_samples_and_their_gradients_are_those_of_one_process(tmp_path):
    def body():
        mine = own(samples()).clone().requires_grad_()
        everything = gather_samples(mine)
        everything.square().sum(dim=1).prod().backward()  # of no row alone
        return everything.detach(), mine.grad

    alone = samples().requires_grad_()
    alone.square().sum(dim=1).prod().backward()
    found = in_processes(len(SIZES), tmp_path, body)
    assert all(torch.equal(everything, samples()) for everything, _ in found)
    # What DDP averages: a parameter that the rows were multiplied by has the mean of the ranks' gradients.
    gradients = torch.cat([gradient for _, gradient in found]) / len(SIZES)
    assert torch.allclose(gradients, alone.grad, rtol=1e-6)


def test_rank_zero_decides(tmp_path):
    assert in_processes(2, tmp_path, lambda: of_rank_zero(torch.tensor([rank() + 5]))) == [5, 5]


@pytest.mark.parametrize("name", REGULARIZERS)
def test_one_process_alone_gathers_nothing(name):
    rows = samples()
    assert gather_samples(rows) is rows and of_rank_zero(rows) is rows
    assert REGULARIZERS[name](rows).isfinite()
