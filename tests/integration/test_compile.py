"""``training.compile``: the same run in fewer kernels. Slow: a compiler takes minutes."""

import subprocess
import sys

import pytest
import torch
from helpers import NOISE, ROOT, options, tiny_config
from ignite.engine import Events
from processes import free_port
from resuming import assert_same, outcome, train

from hjepa_engine import load_encoder
from hjepa_engine.devices import compile_modules
from hjepa_engine.models import build_modules

VALUES = {
    **NOISE,
    "training.compile": "true",
    "model.depth": 2,
    "model.drop_path": 0.2,
    "model.activation_checkpointing": "true",
    "model.predictor.depth": 2,
    "data.batch_size": 4,
    "data.fake_size": 40,
    "checkpoint.save_every_steps": 4,
    "probe.enabled": "false",
}


class CountGraphs:
    """Number of graphs that have been compiled, after every iteration."""

    counts = []

    def attach(self, engine):
        from torch._dynamo.utils import counters  # takes seconds

        self.counts.clear()
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: self.counts.append(counters["stats"]["unique_graphs"])
        )


@pytest.mark.slow
def test_a_compiled_run_compiles_once_keeps_its_names_and_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", VALUES, handlers=[CountGraphs])
    counts = CountGraphs.counts[:]
    assert len(counts) == 20, counts
    assert counts[9] == counts[1] > 0 and counts[19] == counts[10], (
        counts
    )  # the epoch's end evaluates, without gradients
    plain = build_modules(tiny_config(model__depth=2, model__predictor__depth=2))
    assert list(whole.modules.state_dict()) == list(plain.state_dict())
    train(tmp_path / "halves", VALUES, stop=7)
    assert_same(outcome(train(tmp_path / "halves", VALUES)), outcome(whole))


@pytest.mark.slow
def test_two_compiled_processes_equal_one(tmp_path):
    """Started by torchrun: a forked process cannot use its parent's compiler."""
    # Drop path draws by rank, and Adam makes much of rounding where a gradient is near 0.
    plain = {"model.drop_path": 0.0, "training.optimizer": "sgd", "training.lr": 0.1, "training.clip_grad": 0.5}
    values = {**VALUES, **plain, "training.max_iters": 4}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    recipe = ["recipes/pretrain.py", *options({**values, "run_dir": tmp_path / "two"})]
    done = subprocess.run([sys.executable, *launch, *recipe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train(tmp_path / "one", values)
    two = load_encoder(tmp_path / "two").state_dict()
    for name, tensor in one.modules["target_encoder"].state_dict().items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_computes_what_an_ordinary_one_does():
    config = tiny_config(model__depth=2, model__predictor__depth=2)
    plain, compiled = build_modules(config), build_modules(config)
    assert compile_modules(compiled, torch.device("cpu"))
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(
        compiled["context_encoder"](images), plain["context_encoder"](images), atol=1e-5, rtol=1e-4
    )


def test_without_a_compiler_the_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before is found
    modules = build_modules(tiny_config())
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        torch._dynamo.reset()
        assert not compile_modules(modules, torch.device("cpu"))
    said = [record.getMessage() for record in caplog.records if record.name == "hjepa_engine.devices"]
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("training.compile: no compiler works here, the run goes on without")
    modules["context_encoder"](torch.randn(1, 3, 24, 24))
