"""Shards (FSDP) are what copies (DDP) and one process are: weights, losses, monitors, checkpoints, exports."""

import os
import shutil
import signal
import subprocess
import sys

import ignite.distributed as idist
import pytest
import torch
from helpers import NOISE, ROOT, largest_difference, logged, options, same_bits
from processes import Commands, in_processes
from resuming import ALIKE, TWO, outcome, train
from safetensors.torch import load_file
from torch import nn

from hjepa_engine import TrainEvents, load_config, load_encoder
from hjepa_engine.checkpoint import serialization
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.checkpoint.storage import read_state
from hjepa_engine.devices import distribute
from hjepa_engine.errors import ConfigError, GuardStop
from hjepa_engine.handlers import OptimizerStep
from hjepa_engine.optim import build_optimizer, param_groups
from hjepa_engine.recipes import pretrain
from hjepa_engine.types import unwrap
from hjepa_engine.utils.distributed import rank, rank_zero
from hjepa_engine.utils.sharding import is_sharded, local, state_of, whole

#: Deep enough for blocks that are gathered one by one, in both; Adam, whose moments are in shards too.
DEEP = {
    **NOISE,
    "model.depth": 2,
    "model.predictor.depth": 2,
    "model.predictor.init": "trunc_normal",  # small gradients of larger weights are rounded to other Adam updates
    "training.lr": 1e-2,
    "probe.enabled": "false",
    "collapse.enabled": "false",
}
#: The target encoder does not run while it trains, and is averaged all the same.
PIXELS = {
    "model.num_hierarchies": None,
    "model.levels": "[{pool: 1, depth: 0}]",
    "masking.type": "random",
    "model.predictor.targets": "joint",
}
SHARDED = {"distributed.strategy": "fsdp"}
#: All that reads features, weights or gradients. With 129 images, one rank measures one batch more than the other.
MONITORS = {
    "collapse.enabled": "true",
    "collapse.images": 129,
    "collapse.lidar_views": 2,
    "collapse.every": 4,
    "online_probe.every": 1,
    "online_probe.linear_epochs": 2,
    "online_probe.train_images": 40,
    "online_probe.val_images": 20,
    "probe.enabled": "true",
    "probe.epochs": 2,
    "logging.watch": "all",
    "logging.watch_frequency": 4,
    "training.epochs": 1,
    "data.fake_size": 160,
    "data.batch_size": 16,
}


def weights(run):
    """Every weight of a run, whole, on rank 0."""
    found = {name: state_of(unwrap(module)) for name, module in run.modules.items()}
    return {f"{part}.{name}": tensor for part, state in found.items() for name, tensor in state.items()}


def parts_of(run):
    """Share of the numbers of parameters, moments and target encoder that this rank keeps."""
    moments = run.handler(OptimizerStep).optimizer.state.values()
    tensors = [*run.modules.parameters(), *(value for each in moments for value in each.values() if value.ndim)]
    return sum(local(tensor).numel() for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def moments_in(state):
    """Momentum of each parameter, of SGD."""
    saved = state["handlers"]["OptimizerStep"]["optimizer"]["state"]
    return {number: moments["momentum_buffer"] for number, moments in saved.items()}


def assert_same_logs(one, other, tolerance=1e-5):
    assert len(one) == len(other)
    for record, also in zip(one, other, strict=True):
        assert record.keys() == also.keys()
        for key, value in record.items():
            if isinstance(value, float):
                assert also[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (record["step"], key)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        pytest.param({**MONITORS, "training.clip_grad": 0.05}, 1e-5, marks=pytest.mark.slow),
        ({"training.accumulation_steps": 3, "training.clip_grad": 0.05}, 1e-5),
        pytest.param({"training.accumulation_steps": 3, "training.optimizer": "sgd"}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"training.use_amp": "true"}, 5e-2, marks=pytest.mark.slow),
        pytest.param(
            {"model.activation_checkpointing": "true", "model.predictor.level_depth": 2}, 1e-5, marks=pytest.mark.slow
        ),
        pytest.param({"model.predictor.targets": "joint", "loss.sigreg_weight": 0.1}, 1e-5, marks=pytest.mark.slow),
        pytest.param(PIXELS, 1e-5, marks=pytest.mark.slow),
    ],
    ids=["monitors", "accumulation", "sgd", "bf16", "recompute", "joint", "pixels"],
)
def test_shards_train_as_copies_and_as_one_process_do(tmp_path, settings, tolerance):
    values = {**DEEP, **settings}

    def body():
        copied = train(tmp_path / "ddp", values)
        sharded = train(tmp_path / "fsdp", {**values, **SHARDED})
        assert not is_sharded(copied.modules) and is_sharded(sharded.modules)
        return weights(copied), weights(sharded), parts_of(copied), parts_of(sharded)

    (copied, sharded, *shares), (*_, share_of_one) = in_processes(2, tmp_path, body)
    alone = weights(train(tmp_path / "one", values))
    assert largest_difference(copied, sharded) < 1e-6
    assert largest_difference(alone, sharded) < tolerance
    assert shares[0] == 1 and shares[1] + share_of_one == 1 and 0.4 < share_of_one < 0.6
    assert_same_logs(logged(tmp_path / "ddp"), logged(tmp_path / "fsdp"))
    exported = [load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("ddp", "fsdp")]
    assert largest_difference(*exported) < 1e-6
    if settings.items() >= MONITORS.items():
        keys = {key for record in logged(tmp_path / "fsdp") for key in record}
        assert {"collapse/target_lidar", "collapse/target_rank", "probe/knn", "probe/online_linear"} <= keys
        assert "probe/linear" in keys and any(key.startswith("gradients/") for key in keys), keys


def test_a_checkpoint_of_either_goes_on_as_the_other_and_as_one_process(tmp_path):
    values = {**ALIKE, "collapse.enabled": "false", "training.max_iters": 12}
    short = {**values, "training.max_iters": 5}
    undisturbed = weights(train(tmp_path / "whole", values))
    train(tmp_path / "one", short)

    def goes_on(saved, name, **strategy):
        folder = tmp_path / f"{saved}_{name}"
        rank_zero(lambda: shutil.copytree(tmp_path / saved, folder) and None)
        return weights(train(folder, {**values, **strategy}))

    def body():
        train(tmp_path / "ddp", short)
        train(tmp_path / "fsdp", {**short, **SHARDED})
        return [goes_on("ddp", "fsdp", **SHARDED), goes_on("fsdp", "ddp"), goes_on("one", "fsdp", **SHARDED)]

    found = [*in_processes(2, tmp_path, body)[0], goes_on("fsdp", "one")]
    assert max(largest_difference(undisturbed, each) for each in found) < 1e-5
    assert largest_difference(undisturbed, weights(train(tmp_path / "start", short))) > 1e-2
    copied, sharded = (read_state(list_checkpoints(tmp_path / name / "checkpoints")[0]) for name in ("ddp", "fsdp"))
    assert largest_difference(copied["modules"]["predictor"], sharded["modules"]["predictor"]) < 1e-6
    moments = [moments_in(state) for state in (copied, sharded)]
    assert moments[0] and largest_difference(*moments) < 1e-6


@pytest.mark.slow
def test_shards_that_are_stopped_go_on_with_the_same_bits(tmp_path):
    values = {**TWO, **SHARDED, "collapse.enabled": "false", "training.max_iters": 10}

    def ask_on_one(run, iteration):
        if idist.get_rank() == 1:
            run.trainer.add_event_handler(
                TrainEvents.LOSS_READY(once=iteration), lambda: run.preemption.request("asked")
            )

    def body():
        undisturbed = outcome(train(tmp_path / "whole", values))
        reason = "asked" if rank() == 1 else "another process was asked to stop"
        stopped = train(tmp_path / "run", values, stop=4, ask=ask_on_one, reason=reason)
        assert stopped.trainer.state.iteration == 4
        return undisturbed, outcome(train(tmp_path / "run", values))

    for undisturbed, resumed in in_processes(2, tmp_path, body):
        assert resumed[0] == undisturbed[0] and resumed[2:] == undisturbed[2:]
        assert same_bits(resumed[1], undisturbed[1])
        assert any("exp_avg" in name for name in resumed[1])


def test_a_rank_that_is_killed_while_a_state_is_gathered_leaves_no_part_of_a_checkpoint(tmp_path):
    values = {**DEEP, "training.epochs": 1, "checkpoint.save_every_steps": 1}
    arguments = options({**values, **SHARDED, "run_dir": tmp_path / "run"})

    def main(argv):
        calls = []

        def gather(tensor):
            calls.append(tensor)
            if os.environ["RANK"] == "1" and len(calls) == 500:  # within the third save
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(tensor)

        serialization.whole = gather
        pretrain.main(argv)

    commands = Commands(2, tmp_path, main, lambda _: arguments)
    assert commands.wait() == [75, -signal.SIGKILL], commands.said(0)
    problems = []
    found = list_checkpoints(tmp_path / "run" / "checkpoints", lambda path, error: problems.append(path))
    assert found and not problems and found[0].record.step < 5
    assert all(read_state(each)["modules"].keys() >= {"context_encoder", "predictor"} for each in found)
    commands = Commands(2, tmp_path, pretrain.main, lambda _: arguments)
    assert commands.wait() == [0, 0], commands.said(0)
    assert f"resumed step {found[0].record.step} " in commands.said(0)
    undisturbed = pretrain.build(
        load_config(pretrain.DEFAULT_CONFIG, options({**values, "run_dir": tmp_path / "whole"}))
    )
    undisturbed.fit()
    ended = load_encoder(tmp_path / "run").state_dict()
    assert largest_difference(undisturbed.modules["target_encoder"].state_dict(), ended) < 1e-5


def test_a_loss_that_is_not_finite_on_one_rank_ends_a_sharded_run_on_all(tmp_path):
    def spoil(engine):
        if rank() == 1:  # infinite, with gradients that are finite
            engine.state.output["loss"] = engine.state.output["loss"] + float("inf")

    def body():
        run = pretrain.build(load_config(None, options({**DEEP, **SHARDED, "run_dir": tmp_path / "run"})))
        run.trainer.add_event_handler(TrainEvents.FORWARD_COMPLETED(once=3), spoil)
        with pytest.raises(GuardStop, match="non-finite loss at optimizer step 2"):
            run.trainer.run(run.data, max_epochs=1)
        run.preemption.close()
        return all(bool(local(value).isfinite().all()) for value in run.modules.state_dict().values())

    assert in_processes(2, tmp_path, body) == [True, True]


def test_shards_start_with_weights_of_another_run(tmp_path):
    train(tmp_path / "first", {**DEEP, "training.epochs": 1})
    values = {**DEEP, "model.init_from": tmp_path / "first", "seed": 5, "training.max_iters": 1, "training.epochs": 1}

    def body():
        return weights(train(tmp_path / "second", {**values, **SHARDED}))

    alone = weights(train(tmp_path / "alone", values))
    assert largest_difference(in_processes(2, tmp_path, body)[0], alone) < 1e-6


class Own(nn.Module):
    """An encoder that says nothing of blocks, with fewer rows than there are ranks in some parameters."""

    def __init__(self, seed=0):
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 8), float(seed)))
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        return self.embed(images).flatten(2).mT + self.token


def own_step(modules, batch):
    return {"loss": modules["encoder"](batch["images"]).square().mean()}


def test_modules_of_ones_own_are_sharded_with_the_weights_of_rank_0_and_probed(tmp_path):
    values = {**NOISE, **SHARDED, "training.epochs": 1, "probe.epochs": 1, "collapse.enabled": "false"}

    def body():
        modules = nn.ModuleDict({"encoder": Own(seed=rank())})
        run = train(tmp_path / "run", values, modules=modules, step=own_step)
        assert is_sharded(run.modules) and not is_sharded(nn.ModuleDict({"encoder": run.initial_encoder}))
        return weights(run), whole(run.modules["encoder"].token).detach()

    (first, token), (_, same_token) = in_processes(2, tmp_path, body)
    assert torch.equal(token, same_token) and torch.equal(first["encoder.token"], token)
    assert float(token.abs().max()) < 0.1  # rank 0 started from 0, rank 1 from 1


def test_what_cannot_be_sharded_is_refused_in_one_line(tmp_path):
    def body():
        shared = nn.Linear(2, 2)
        both = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
        said = "where modules share parameters, as one.0.weight and two.0.weight, got fsdp"
        with pytest.raises(ConfigError, match=said):
            distribute(both, torch.device("cpu"), "fsdp")
        scalar = nn.Module()
        scalar.scale = nn.Parameter(torch.ones(()))
        with pytest.raises(ConfigError, match=r"distributed\.strategy must be ddp for the module scalar, got fsdp: "):
            distribute(nn.ModuleDict({"scalar": scalar}), torch.device("cpu"), "fsdp")

    in_processes(2, tmp_path, body)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "torch.optim.RAdam"])
def test_optimizers_take_shards(tmp_path, optimizer):
    def body():
        modules = distribute(nn.ModuleDict({"encoder": Own()}), torch.device("cpu"), "fsdp")
        made = build_optimizer(optimizer, param_groups(modules), 0.1)
        modules["encoder"](torch.ones(2, 3, 4, 4)).sum().backward()
        made.step()
        return state_of(modules["encoder"])

    found = in_processes(2, tmp_path, body)[0]
    assert not torch.equal(found["token"], torch.zeros(1, 1, 8))


@pytest.mark.slow
def test_torchrun_trains_shards(tmp_path):
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "recipes" / "pretrain.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    everything = {
        **MONITORS,
        "pictures.enabled": "true",
        "logging.report": "true",
        "logging.tensorboard.enabled": "true",
    }
    for strategy in ("ddp", "fsdp"):
        given = options({**DEEP, **everything, "distributed.strategy": strategy, "run_dir": tmp_path / strategy})
        command = [sys.executable, *launch, *given]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr and "terminate called" not in done.stderr, done.stderr
    assert_same_logs(logged(tmp_path / "ddp"), logged(tmp_path / "fsdp"))
    exported = [load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("ddp", "fsdp")]
    assert same_bits(*exported)
    assert len(list((tmp_path / "fsdp" / "figures").iterdir())) == 4 and (tmp_path / "fsdp" / "report.html").exists()
