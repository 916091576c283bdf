"""Several processes are one: the same losses, weights and validation, however the batches are split."""

import json

import pytest
from helpers import tiny_config
from processes import in_processes

from hjepa_engine.recipes.pretrain import build

REGULARIZED = {f"loss__{name}_weight": 0.1 for name in ("variance", "covariance", "sigreg")}


def trained(processes, folder, **settings):
    """Metrics of each record, and the weights of every rank, of a run of so many processes."""
    folder.mkdir()
    config = tiny_config(run_dir=folder / "run", probe__enabled="false", collapse__enabled="false", **settings)

    def body():
        run = build(config)
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


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_regularizers_are_of_the_whole_batch(tmp_path, processes):
    settings = {**REGULARIZED, "training__optimizer": "sgd", "training__lr": 0.1}
    (one, alone), (several, weights) = (
        trained(number, tmp_path / str(number), **settings) for number in (1, processes)
    )
    assert {"train/loss_variance", "train/loss_covariance", "train/loss_sigreg"} <= {
        key for each in one for key in each
    }
    assert_same_losses(one, several, 2e-5)
    for each in weights:
        assert max((each[name] - value).abs().max() for name, value in alone[0].items()) < 1e-5
