"""Probes while a run goes on: right by hand, without a trace in the training, and the best checkpoint by any of them."""

import contextlib
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import NOISE, TINY, options, same_bits, weights_of
from ignite.engine import Events
from processes import in_processes
from resuming import RICH, outcome, train
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from hjepa_engine import TrainEvents, create_evaluator, create_trainer, load_config, load_encoder
from hjepa_engine.checkpoint.folder import find_checkpoint
from hjepa_engine.config.schema import Config, ProbeConfig
from hjepa_engine.data import open_split
from hjepa_engine.data.fixed_subset import FixedImageSubset
from hjepa_engine.errors import CheckpointError, ConfigError
from hjepa_engine.handlers import OnlineProbe
from hjepa_engine.metrics import knn
from hjepa_engine.metrics.knn import knn_accuracy
from hjepa_engine.models import build_modules
from hjepa_engine.recipes import pretrain
from hjepa_engine.recipes.common.heads import standardized, train_head
from hjepa_engine.steps import feature_step
from hjepa_engine.utils.rng import derive_seed

CPU = torch.device("cpu")
#: 3 epochs of 5 iterations over real digits, with a probe after every other one.
DIGITS = {
    **TINY,
    "model.pos_embed": "learned",
    "data.dataset": "digits",
    "data.image_size": 16,
    "data.batch_size": 256,
    "training.epochs": 3,
    "training.lr": 3e-2,
    "probe.enabled": "false",
    "online_probe.every": 2,
    "online_probe.train_images": 300,
    "online_probe.val_images": 150,
    "online_probe.linear_epochs": 2,
}
#: 3 epochs of 5 iterations over noise, with dropout and augmentation, and a probe after each.
PROBED = {**RICH, "online_probe.every": 1, "online_probe.train_images": 30, "online_probe.linear_epochs": 2}
#: 4 epochs of 4 iterations over noise, whose classes are told apart by chance, now better, now worse.
CHANCE = {
    **NOISE,
    "data.fake_size": 64,
    "data.batch_size": 16,
    "training.epochs": 4,
    "training.lr": 2e-2,
    "probe.enabled": "false",
    "online_probe.every": 1,
    "online_probe.linear_epochs": 2,
}


def log_of(folder, name):
    """(step, value) of every line of the log that has such a metric."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def online_probe_of(run):
    handlers = run.trainer._event_handlers[Events.STARTED]
    return next(h.__self__ for h, _, _ in handlers if isinstance(getattr(h, "__self__", None), OnlineProbe))


# Nearest neighbors


def directions(*cosines):
    """Unit vectors (n, 2) with these cosines to the first axis."""
    return torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])


def test_neighbors_vote_with_the_exponential_of_their_similarity():
    known, labels = directions(1.0, 0.6, 0.6, -1.0), torch.tensor([0, 1, 1, 2])
    asked = directions(1.0)
    # e^2 = 7.39 against 2 e^1.2 = 6.64; e^1 = 2.72 against 2 e^0.6 = 3.64
    assert knn_accuracy(known, labels, asked, torch.tensor([0]), 3, temperature=0.5) == 1
    assert knn_accuracy(known, labels, asked, torch.tensor([1]), 3, temperature=1.0) == 1
    assert knn_accuracy(known, labels, asked, torch.tensor([0]), 1, temperature=1.0) == 1
    both, wanted = torch.cat([asked, directions(-0.9)]), torch.tensor([0, 1])
    assert knn_accuracy(known, labels, both, wanted, 1) == 0.5


def test_lengths_of_features_mean_nothing():
    known, labels = 1e-3 * directions(1.0, 0.6, 0.6), torch.tensor([0, 1, 1])
    known[1:] *= 1e6
    assert knn_accuracy(known, labels, 7 * directions(1.0), torch.tensor([0]), 3, temperature=0.5) == 1


def test_ties_are_broken_by_the_order_of_samples_and_of_classes(monkeypatch):
    same, asked = directions(0.5, 0.5, 0.5, 0.5, 0.5), directions(1.0)
    assert knn_accuracy(same, torch.tensor([3, 1, 1, 2, 2]), asked, torch.tensor([3]), 1) == 1
    assert knn_accuracy(same, torch.tensor([2, 2, 1, 1, 3]), asked, torch.tensor([1]), 4) == 1
    # More equal ones than a sorting network keeps in order by chance.
    many = torch.ones(500, 2)
    assert knn_accuracy(many, torch.tensor([4] * 2 + [1] * 498), many[:9], torch.full((9,), 4), 3) == 1
    monkeypatch.setattr(knn, "_KNOWN", 2 * 7)
    assert knn_accuracy(many, torch.tensor([4] * 2 + [1] * 498), many[:9], torch.full((9,), 4), 3) == 1


def test_a_small_temperature_does_not_overflow():
    known, labels = directions(0.99, 0.98, 0.98), torch.tensor([1, 0, 0])
    assert knn_accuracy(known, labels, directions(1.0), torch.tensor([1]), 3, temperature=1e-6) == 1


def test_more_neighbors_than_samples_are_all_of_them():
    known, labels = directions(1.0, 0.9, 0.9), torch.tensor([0, 1, 1])
    assert knn_accuracy(known, labels, directions(1.0), torch.tensor([1]), 50, temperature=10.0) == 1


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (200, 0.3)])
def test_scikit_learn_agrees_however_the_samples_are_cut(monkeypatch, neighbors, temperature):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (800,), generator=draw)
    features = torch.randn(7, 6, generator=draw)[labels] + 1.5 * torch.randn(800, 6, generator=draw)
    known, asked = features[:500], features[500:]

    def weights(distances):
        return np.exp((1 - distances) / temperature)

    other = KNeighborsClassifier(neighbors, weights=weights, metric="cosine", algorithm="brute")
    expected = other.fit(known.double().numpy(), labels[:500].numpy()).score(
        asked.double().numpy(), labels[500:].numpy()
    )
    assert 0.3 < expected < 0.9
    found = knn_accuracy(known, labels[:500], asked, labels[500:], neighbors, temperature)
    assert found == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(knn, "_SIMILARITIES", 3499)  # 6 samples at a time, 0 left over of 300
    assert knn_accuracy(known, labels[:500], asked, labels[500:], neighbors, temperature) == found
    monkeypatch.setattr(knn, "_SIMILARITIES", 1)
    assert knn_accuracy(known, labels[:500], asked, labels[500:], neighbors, temperature) == found
    monkeypatch.setattr(knn, "_SIMILARITIES", 2**22)
    monkeypatch.setattr(knn, "_KNOWN", 6 * 7)  # 7 training samples at a time, 3 left over of 500
    assert knn_accuracy(known, labels[:500], asked, labels[500:], neighbors, temperature) == found


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("neighbors and temperature must be positive, got 0 and 0.07", {"neighbors": 0}),
        ("neighbors and temperature must be positive, got 20 and 0", {"temperature": 0}),
        ("neighbors and temperature must be positive", {"temperature": math.nan}),
        (r"training samples must be features \(n, F\)", {"labels": torch.zeros(2).long()}),
        ("training samples must be", {"features": torch.zeros(0, 4), "labels": torch.zeros(0).long()}),
        ("validation samples must be", {"val_features": torch.zeros(2, 2, 4)}),
        ("validation samples must be", {"val_features": torch.zeros(0, 4), "val_labels": torch.zeros(0).long()}),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(says, change):
    zeros = {"features": torch.zeros(3, 4), "labels": torch.zeros(3).long()}
    zeros |= {"val_features": torch.zeros(2, 4), "val_labels": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=says):
        knn_accuracy(**{**zeros, **change})


# The linear head


def clusters(number, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    return 5 * torch.eye(4)[labels] + 0.1 * torch.randn(number, 4, generator=draw), labels


def test_a_head_learns_what_can_be_separated_and_no_more_than_there_is():
    settings = ProbeConfig(epochs=10, batch_size=16, lr=0.1)
    train_set, val_set = standardized(clusters(64), clusters(40, 1))
    assert train_head(train_set, val_set, 4, settings, 0, CPU) == 1
    wrong = val_set[0], (val_set[1] + 1) % 4
    assert train_head(train_set, wrong, 4, settings, 0, CPU) == 0


def test_features_are_standardized_by_the_training_samples_and_constant_ones_stay():
    draw = torch.Generator().manual_seed(0)
    features = torch.cat([3 + 2 * torch.randn(50, 3, generator=draw), torch.full((50, 1), 7.0)], dim=1)
    (found, _), (judged, _) = standardized((features, torch.zeros(50)), (features[:5] + 1, torch.zeros(5)))
    assert torch.allclose(found.mean(dim=0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(found[:, :3].std(dim=0), torch.ones(3)) and torch.equal(found[:, 3], torch.zeros(50))
    assert torch.allclose(judged[:, 3], torch.ones(5))
    assert torch.allclose(judged[:, :3], found[:5, :3] + 1 / features[:, :3].std(dim=0), atol=1e-5)


def test_heads_are_equal_and_draw_from_nobodys_generator():
    draw = torch.Generator().manual_seed(0)
    hard = torch.randn(90, 4, generator=draw), torch.randint(3, (90,), generator=draw)
    found = []
    for outside in (1, 2):
        torch.manual_seed(outside), random.seed(outside), np.random.seed(outside)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        found.append([train_head(hard, hard, 3, ProbeConfig(epochs=n, batch_size=7), 0, CPU) for n in (1, 2, 5)])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert found[0] == found[1]


# The handler


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("probed") / "run", DIGITS)


def by_hand(config, encoder):
    """Both accuracies, from what the encoder says of the images."""
    found = []
    for split, name, count in (("probe", "train", 300), ("val", "val", 150)):
        source, seed = open_split(config.data, split, config.seed), derive_seed(config.seed, "probe images", name)
        images = FixedImageSubset(config.data, source, count, seed=seed)
        with torch.no_grad():
            means = torch.cat([encoder(batch["images"]).mean(dim=1) for batch in images])
        found.append((means, images.labels))
    head = train_head(*standardized(*found), 10, replace(config.probe, epochs=2), config.seed, CPU)
    return knn_accuracy(*found[0], *found[1]), head


def test_probes_come_before_the_first_step_every_so_many_epochs_and_after_the_last_one(probed):
    steps = [step for step, _ in log_of(probed.folder.path, "probe/knn")]
    assert steps == [0, 10, 15]
    assert [step for step, _ in log_of(probed.folder.path, "probe/online_linear")] == steps


def test_the_first_probe_is_of_the_random_encoder_and_the_last_one_of_the_trained_target_encoder(probed):
    config, folder = probed.config, probed.folder.path
    curves = [[value for _, value in log_of(folder, f"probe/{name}")] for name in ("knn", "online_linear")]
    wanted = [by_hand(config, encoder) for encoder in (build_modules(config)["target_encoder"], load_encoder(folder))]
    for place, accuracies in zip((0, -1), wanted, strict=True):
        assert [curve[place] for curve in curves] == pytest.approx(accuracies, abs=1e-12)
    assert len({*wanted, by_hand(config, probed.modules["context_encoder"].eval())}) == 3
    assert min(curves[0]) > 0.2  # ten classes: chance is 0.1


def test_no_gradient_reaches_an_encoder_that_could_take_one():
    encoder = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.Dropout(0.5)).train()
    before, seen = weights_of(encoder), []

    def judge(known, judged):
        seen.append((known[0].requires_grad, known[0].grad_fn, encoder.training))
        return train_head(*standardized(known, judged), 4, ProbeConfig(epochs=3), 0, CPU)

    draw = torch.Generator().manual_seed(0)
    batches = [{"images": torch.randn(20, 3, 4, 4, generator=draw), "labels": torch.arange(20) % 4}]
    evaluator = create_evaluator(feature_step, nn.ModuleDict({"encoder": encoder}))
    OnlineProbe(evaluator, batches, batches, {"mine": judge}).attach(
        trainer := create_trainer(lambda modules, batch: {}, nn.ModuleDict())
    )
    state = torch.get_rng_state()
    trainer.run(batches, max_epochs=2)
    assert seen == [(False, None, True)] * 3 and 0 <= trainer.state.metrics["probe/mine"] <= 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert same_bits(weights_of(encoder), before) and torch.equal(torch.get_rng_state(), state)
    assert evaluator.state.output is None and not evaluator._event_handlers[Events.ITERATION_COMPLETED]


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        OnlineProbe(create_evaluator(feature_step, nn.ModuleDict()), [], [], {}, every=0)


def modules_of(run):
    return {name: tensor for name, tensor in outcome(run)[1].items() if name.startswith("modules")}


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    run = train(tmp_path_factory.mktemp("rich") / "run", PROBED)
    return run, outcome(run)


def test_a_probed_run_trains_to_the_bits_of_one_that_is_not(rich, tmp_path):
    plain, (_, tensors, *_) = train(tmp_path / "plain", RICH), rich[1]
    probed_modules = {name: tensor for name, tensor in tensors.items() if name.startswith("modules")}
    assert len(probed_modules) > 10 and same_bits(modules_of(plain), probed_modules)
    assert not log_of(plain.folder.path, "probe/knn") and len(log_of(rich[0].folder.path, "probe/knn")) == 4


def assert_same(found, expected):
    assert found[0] == expected[0] and found[2:] == expected[2:] and same_bits(found[1], expected[1])


@pytest.mark.parametrize("stop", [3, 5])
def test_a_probed_run_that_is_stopped_goes_on_with_the_same_bits_and_probes(rich, tmp_path, stop):
    train(tmp_path / "run", PROBED, stop=stop)
    assert_same(outcome(train(tmp_path / "run", PROBED)), rich[1])


def ask_in_probe(run, epoch):
    """Request a stop while the features of an epoch's probe are read."""

    def request(evaluator):
        if run.trainer.state.epoch == epoch:
            run.preemption.request("asked")

    online_probe_of(run).evaluator.add_event_handler(Events.ITERATION_STARTED, request)


def test_a_stop_in_the_middle_of_a_probe_leaves_at_once_and_repeats_the_probe(rich, tmp_path):
    for _ in range(2):
        stopped = train(tmp_path / "run", PROBED, stop=2, ask=ask_in_probe)
        assert stopped.trainer.state.iteration == 10
        assert find_checkpoint(tmp_path / "run", "latest").record[1:5] == (10, 10, 1, False)
        assert len(log_of(tmp_path / "run", "probe/knn")) == 2
    assert_same(outcome(train(tmp_path / "run", PROBED)), rich[1])


def test_two_processes_get_the_figures_of_one(rich, tmp_path):
    def body():
        run = pretrain.build(load_config(None, options({**PROBED, "run_dir": str(tmp_path / "run")})))
        found = []
        run.trainer.add_event_handler(
            TrainEvents.LOG_METRICS,
            lambda engine: found.append({n: v for n, v in engine.state.metrics.items() if n.startswith("probe/")}),
        )
        with contextlib.redirect_stderr(None):
            run.fit()
        return found

    first, second = in_processes(2, tmp_path, body)
    alone = {f"probe/{name}": log_of(rich[0].folder.path, f"probe/{name}")[0][1] for name in ("knn", "online_linear")}
    assert first == second and first[0] == pytest.approx(alone, abs=1e-7) and first[-1].keys() == alone.keys()


# The best checkpoint


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("probe/knn", "max"), ("probe/online_linear", "max"), ("collapse/target_rank", "max")],
)
def test_the_best_checkpoint_is_the_one_with_the_best_logged_value(tmp_path, caplog, metric, mode):
    weights = {}

    class Witness:
        def attach(self, engine):
            engine.add_event_handler(
                TrainEvents.EPOCH_FINALIZED,
                lambda: weights.update({engine.state.optimizer_step: weights_of(engine.modules["target_encoder"])}),
            )

    # No reading of collapse is due before the run ends; the metric asks for one at each epoch's end.
    values = {**CHANCE, "checkpoint.metric": metric, "checkpoint.mode": mode, "collapse.every": 100}
    train(tmp_path / "run", values, (Witness,))
    logged = {step: value for step, value in log_of(tmp_path / "run", metric) if step in weights}
    assert list(logged) == [4, 8, 12, 16]
    expected = min(logged, key=lambda step: (logged[step] if mode == "min" else -logged[step], step))
    record = find_checkpoint(tmp_path / "run", "best").record
    assert (record.step, record.score) == (expected, logged[expected])
    assert same_bits(weights_of(load_encoder(tmp_path / "run", checkpoint="best")), weights[expected])
    assert not any(same_bits(weights[expected], other) for step, other in weights.items() if step != expected)
    assert "counts as best" not in caplog.text


def test_epochs_without_a_probe_have_no_score(tmp_path):
    values = {**CHANCE, "checkpoint.metric": "probe/knn", "checkpoint.mode": "max", "online_probe.every": 3}
    values |= {"checkpoint.keep_last_n": 9, "online_probe.linear_epochs": 0}
    run = train(tmp_path / "run", values)
    index = json.loads((run.folder.checkpoint_path / "index.json").read_text())
    scores = {record["step"]: record["score"] for record in index["checkpoints"]}
    logged = dict(log_of(tmp_path / "run", "probe/knn"))
    assert scores == {4: None, 8: None, 12: logged[12], 16: logged[16]}
    assert not log_of(tmp_path / "run", "probe/online_linear")


class Once:
    """A metric that is measured inside an epoch alone."""

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.LOG_METRICS, self.write)

    def write(self, engine):
        if engine.state.iteration == 2:
            engine.state.metrics["mine/figure"] = 1.0


def test_a_metric_that_is_new_at_no_save_is_named_when_the_run_ends(tmp_path, caplog):
    train(tmp_path / "run", {**RICH, "checkpoint.metric": "mine/figure"}, (Once,))
    assert caplog.text.count("checkpoint.metric mine/figure was new at no save: no checkpoint counts as best") == 1
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path / "run", "best")


IMPOSSIBLE = [
    ("online_probe.every must be given where checkpoint.metric is probe/knn, got None", {"online_probe.every": None}),
    ("checkpoint.save_frequency must be given", {"checkpoint.save_frequency": None}),
    (
        "online_probe.every must be a multiple or divisor of save_frequency (2) where checkpoint.metric is probe/knn, got 3",
        {"online_probe.every": 3, "checkpoint.save_frequency": 2},
    ),
    (
        "online_probe.linear_epochs must be at least 1 where checkpoint.metric is probe/online_linear, got 0",
        {"checkpoint.metric": "probe/online_linear", "online_probe.linear_epochs": 0},
    ),
    ("must be measured during training", {"checkpoint.metric": "probe/linear"}),
    ("must be measured at an epoch's end", {"checkpoint.metric": "collapse/batch_target_rank"}),
    (
        "collapse.enabled must be true where checkpoint.metric is collapse/target_rank, got False",
        {"checkpoint.metric": "collapse/target_rank", "collapse.enabled": "false"},
    ),
    ("collapse.alpha_req must be true", {"checkpoint.metric": "collapse/target_alpha_req"}),
    ("collapse.lidar_views must be at least 2", {"checkpoint.metric": "collapse/context_lidar"}),
    (
        "checkpoint.save_frequency must be given where checkpoint.metric is collapse/target_rank, got None",
        {"checkpoint.metric": "collapse/target_rank", "checkpoint.save_frequency": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("says", "change"), IMPOSSIBLE, ids=[says[:50] for says, _ in IMPOSSIBLE])
def test_a_metric_that_no_checkpoint_could_have_is_refused(says, change):
    with pytest.raises(ConfigError) as caught:
        load_config(None, options({"checkpoint.metric": "probe/knn", "online_probe.every": 1, **change}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("every", "save"), [(1, 1), (5, 1), (1, 5), (2, 6), (6, 2)])
def test_a_probe_that_meets_saves_is_allowed_as_a_metric(every, save):
    values = {"checkpoint.metric": "probe/knn", "checkpoint.mode": "max"}
    values |= {"online_probe.every": every, "checkpoint.save_frequency": save}
    assert isinstance(load_config(None, options(values)), Config)
