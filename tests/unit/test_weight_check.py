"""The handler that compares the weights of all processes."""

import pytest
import torch
from helpers import linear_trainer, rows
from ignite.engine import Events
from processes import in_processes
from torch import nn

from hjepa_engine.errors import GuardStop
from hjepa_engine.handlers import WeightCheck
from hjepa_engine.handlers.weight_check import bit_sum
from hjepa_engine.utils.distributed import rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_single_bit_changes_the_digest(dtype):
    weights = torch.randn(3, 5).to(dtype)
    for bit in range(8 * weights.element_size()):
        other = weights.clone()
        other.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()])[1, 2] ^= (
            1 << bit if bit < 8 * weights.element_size() - 1 else -(1 << bit)
        )
        assert bit_sum(other) != bit_sum(weights), bit
    assert bit_sum(weights) == bit_sum(weights.clone())


def flip(engine, on):
    """Change the lowest bit of one weight on rank ``on``."""
    if rank() == on:
        next(engine.modules.parameters()).data.view(torch.int32).view(-1)[0] ^= 1


def ended(number, on):
    def body():
        trainer, _ = linear_trainer()
        trainer.modules["other"] = nn.Linear(2, 2)
        for parameter in trainer.modules["other"].parameters():
            nn.init.ones_(parameter)
        trainer.attach(WeightCheck(every=2))
        trainer.add_event_handler(Events.ITERATION_STARTED(once=4), flip, on)
        try:
            trainer.run(rows(*[(1, 2)] * 10), max_epochs=1)
        except GuardStop as stop:
            return str(stop), trainer.state.iteration
        return "", trainer.state.iteration

    return number, body


@pytest.mark.parametrize(("number", "on"), [(2, 1), (3, 0)])
def test_one_bit_is_found_and_its_rank_and_parameter_are_named(tmp_path, number, on):
    first, *others = in_processes(*ended(number, on)[:1], tmp_path, ended(number, on)[1])
    assert all(other == first for other in others)
    assert first[0].startswith("weights differ between processes at optimizer step 4: ") and first[1] == 4
    assert f".weight of rank {on} (of 1 parameters" in first[0] and "from before step 2 are sound" in first[0]


def test_equal_weights_and_a_single_process_go_on(tmp_path):
    assert in_processes(2, tmp_path, ended(2, None)[1]) == [("", 10)] * 2
    assert ended(1, 0)[1]() == ("", 10)


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        WeightCheck(0)
