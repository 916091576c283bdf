"""Several processes are one: the same losses, weights and validation, however the batches are split."""

import json

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_config
from processes import in_processes

from hjepa_engine import TrainEvents
from hjepa_engine.errors import GuardStop
from hjepa_engine.recipes.pretrain import build

REGULARIZED = {f"loss__{name}_weight": 0.1 for name in ("variance", "covariance", "sigreg")}


class FakeImages:
    """Noise, a function of the index."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(index)), index % 3


def trained(processes, folder, data=None, **settings):
    """Metrics of each record, and the weights of every rank, of a run of so many processes."""
    folder.mkdir()
    config = tiny_config(run_dir=folder / "run", probe__enabled="false", collapse__enabled="false", **settings)

    def body():
        run = build(config, data=data)
        run.fit()
        return {name: value.cpu() for name, value in run.modules.state_dict().items()}

    weights = in_processes(processes, folder, body) if processes > 1 else [body()]
    weights = [{name.replace(".module.", "."): value for name, value in each.items()} for each in weights]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()], weights


def assert_same_losses(one, several, tolerance):
    assert len(one) == len(several)
    for record, other in zip(one, several, strict=True):
        for key in [key for key in record if "loss" in key]:
            assert other[key] == pytest.approx(record[key], rel=tolerance, abs=tolerance), (record["step"], key)


@pytest.mark.parametrize(
    ("processes", "images"),
    [(2, 41), pytest.param(4, 43, marks=pytest.mark.slow), pytest.param(4, 3, marks=pytest.mark.slow)],
)
def test_a_last_batch_that_does_not_divide_is_validated_whole(tmp_path, processes, images):
    """Of 41 or 3 images, a process has no share of the last batch."""
    train = FakeImages(16)
    data = (train, FakeImages(images))
    settings = {**REGULARIZED, "training__epochs": 1, "data__batch_size": 8, "training__optimizer": "sgd"}
    (one, _), (several, _) = (trained(number, tmp_path / str(number), data, **settings) for number in (1, processes))
    assert any("val/loss" in record for record in one)
    assert_same_losses(one, several, 1e-6)


def test_an_optimizer_step_waits_for_the_other_ranks_once(tmp_path):
    """Besides DDP's own exchange of gradients, which is no call of ``all_reduce``."""
    config = tiny_config(
        run_dir=tmp_path / "run", probe__enabled="false", collapse__enabled="false", data__fake_size=240
    )

    def body():
        run, calls, reduce = build(config), [], dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: (calls.append(run.trainer.state.iteration), reduce(*args, **kwargs))[
            1
        ]
        run.trainer.run(run.data, max_iters=20)
        run.preemption.close()
        return [calls.count(iteration) for iteration in range(1, 20)]

    for counts in in_processes(2, tmp_path, body):
        # Log intervals, of 2 steps, average the losses; clocks are compared more often at first.
        assert sum(counts[8::2]) <= len(counts[8::2]) + 2, counts


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_run_on_all(tmp_path):
    config = tiny_config(run_dir=tmp_path / "run", probe__enabled="false", collapse__enabled="false")

    def spoil(engine):
        if dist.get_rank() == 1:  # infinite, with gradients that are finite
            engine.state.output["loss"] = engine.state.output["loss"] + float("inf")

    def body():
        run = build(config)
        run.trainer.add_event_handler(TrainEvents.FORWARD_COMPLETED(once=3), spoil)
        with pytest.raises(GuardStop, match="non-finite loss at optimizer step 2"):
            run.trainer.run(run.data, max_epochs=1)
        run.preemption.close()
        return all(bool(value.isfinite().all()) for value in run.modules.state_dict().values())

    assert in_processes(2, tmp_path, body) == [True, True]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_regularizers_are_of_the_whole_batch(tmp_path, processes):
    settings = {**REGULARIZED, "training__optimizer": "sgd", "training__lr": 0.1}
    (one, alone), (several, weights) = (
        trained(number, tmp_path / str(number), **settings) for number in (1, processes)
    )
    assert {"train/loss_variance", "train/loss_covariance", "train/loss_sigreg"} <= {
        key for each in one for key in each
    }
    assert_same_losses(one, several, 1e-6)
    losses = max(abs(a[key] - b[key]) for a, b in zip(one, several, strict=True) for key in a if "loss" in key)
    moved = max(float((each[name] - value).abs().max()) for each in weights for name, value in alone[0].items())
    print(f"\n{processes} processes: losses differ by at most {losses:.1e}, weights by {moved:.1e}")
    assert moved < 1e-6
