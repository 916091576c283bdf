"""The standard evaluation: heads against references, choices that never read test labels, features of any size."""

import json
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from forkserver import PROGRAM as PROGRAM_BODY
from helpers import NOISE, options
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from test_probe_run import run_folder

from hjepa_engine import load_config
from hjepa_engine.config.schema import Level
from hjepa_engine.data import (
    FeatureBatches,
    FeatureStore,
    build_loader,
    hold_out,
    mean_and_std,
    open_digit_maps,
    open_split,
    sample_share,
    standardize_,
)
from hjepa_engine.data.digit_maps import BACKGROUND, patch_classes
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.metrics.segmentation import accuracy, confusion_matrix, mean_iou
from hjepa_engine.models import build_modules
from hjepa_engine.recipes import evaluate
from hjepa_engine.recipes.common.probe import open_probe_data, probe
from hjepa_engine.recipes.evaluation.evaluation import TASKS, evaluate_run
from hjepa_engine.recipes.evaluation.linear import few_label, linear
from hjepa_engine.recipes.evaluation.merging import merge
from hjepa_engine.recipes.evaluation.neighbors import knn
from hjepa_engine.recipes.evaluation.reading import read_images
from hjepa_engine.recipes.evaluation.sweep import (
    Samples,
    attentive_heads,
    choose_and_judge,
    linear_heads,
    train_heads,
)
from hjepa_engine.recipes.evaluation.task import FALLBACK, Encoder, Setting, Settings
from hjepa_engine.report import write_report
from hjepa_engine.steps import patch_pixels_step, readings_step

CPU = torch.device("cpu")
#: Real digits, 1,438 to learn from and 359 to judge.
DIGITS = {**NOISE, "data.dataset": "digits", "data.image_size": 8, "model.patch_size": 4, "data.batch_size": 256}
LARGE_PATCHES = {"model__patch_size": 8, "model__num_hierarchies": None, "model__levels": "[{pool: 1}, {pool: 2}]"}
QUICK = ["--probe.epochs=1", "--logging.progress_bar=false"]


def settings_for(epochs=100, **changes):
    config = load_config(None, options({**DIGITS, "probe.epochs": epochs}))
    return Settings(config, CPU, **changes)


@pytest.fixture(scope="module")
def digits():
    """Readings of the raw pixels of digits."""
    config = load_config(None, options(DIGITS))
    return read_images(config, Encoder("pixels", None), CPU, open_probe_data(config))


def samples(readings, name="pixels"):
    return [Samples(part[name], part["labels"]) for part in (readings.train, readings.test)]


def heads_for(features):
    return partial(linear_heads, *mean_and_std(features))


# Heads


def test_heads_in_one_pass_are_those_that_sgd_trains_one_by_one():
    """Plain torch.optim.SGD on plain linear layers, with its own learning rate, weight decay and momentum."""
    draw = torch.Generator().manual_seed(0)
    features, labels = 3 + 2 * torch.randn(24, 5, generator=draw), torch.randint(3, (24,), generator=draw)
    settings = [Setting(0.1, 0.0), Setting(0.01, 0.5), Setting(0.5, 0.1)]
    heads, optimizer = linear_heads(*mean_and_std(features), settings, 3)
    for _ in range(7):
        optimizer.zero_grad()
        logits = heads(features)
        (sum(torch.nn.functional.cross_entropy(each, labels) for each in logits) + heads.penalty()).backward()
        optimizer.step()
    standardized = (features - features.mean(0)) / features.std(0)
    for number, setting in enumerate(settings):
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": setting.weight_decay}, {"params": [layer.bias]}]
        alone = torch.optim.SGD(groups, setting.lr, momentum=0.9)
        for _ in range(7):
            alone.zero_grad()
            torch.nn.functional.cross_entropy(layer(standardized), labels).backward()
            alone.step()
        assert torch.allclose(heads(features)[number], layer(standardized), atol=1e-5)


def test_a_linear_probe_agrees_with_scikit_learns_logistic_regression(digits):
    train, test = samples(digits)
    mean, std = mean_and_std(train.features)
    known, asked = ((part.features - mean) / std for part in (train, test))
    for lr, decay in ((1.0, 1e-3), (0.3, 1e-2)):
        # Its penalty is |w|^2 / 2 beside the sum, not the mean, of the losses.
        other = LogisticRegression(C=1 / (decay * len(known)), max_iter=2000).fit(known.numpy(), train.labels.numpy())
        expected = other.score(asked.numpy(), test.labels.numpy())
        found = train_heads(heads_for(train.features), [Setting(lr, decay)], train, test, 10, settings_for(), seed=0)
        assert float((found[0] == test.labels).double().mean()) == pytest.approx(expected, abs=0.005)


def test_the_swept_probe_agrees_with_a_logistic_regression_whose_penalty_is_chosen_alike(digits):
    train, test = samples(digits)
    mean, std = mean_and_std(train.features)
    known, asked = (((part.features - mean) / std).numpy() for part in (train, test))
    settings, scores = settings_for(50, num_seeds=3), []

    def fitted(rows, decay):
        model = LogisticRegression(C=1 / (decay * len(rows)), max_iter=500)
        return model.fit(known[rows], train.labels[rows].numpy())

    for seed in settings.seeds():
        fit, held = hold_out(train.labels, settings.held_out, seed)
        decay = max((1e-3, 1e-2), key=lambda each: fitted(fit, each).score(known[held], train.labels[held].numpy()))
        everything = torch.arange(len(known))
        scores.append(fitted(everything, decay).score(asked, test.labels.numpy()))
    (swept,) = linear(Encoder("pixels", None), digits, settings)
    assert swept.reading == "pixels" and swept.mean == pytest.approx(sum(scores) / 3, abs=0.005)


def test_neighbors_agree_with_scikit_learn(digits):
    train, test = samples(digits)

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    other = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute")
    other.fit(train.features.double().numpy(), train.labels.numpy())
    expected = other.score(test.features.double().numpy(), test.labels.numpy())
    (row,) = knn(Encoder("pixels", None), digits, settings_for())
    assert row.values == [expected] and row.std is None


def test_the_choice_does_not_depend_on_test_labels(digits):
    train, test = samples(digits)
    shuffled = test._replace(labels=test.labels[torch.randperm(len(test.labels))])
    settings = settings_for(2)
    found = [
        choose_and_judge(heads_for(train.features), settings.linear_grid, train, each, 10, settings, seed=3)
        for each in (test, shuffled)
    ]
    assert found[0].setting == found[1].setting and torch.equal(found[0].predictions, found[1].predictions)


def test_the_setting_with_the_most_held_out_samples_right_is_chosen(digits):
    train, test = samples(digits)
    settings, grid = settings_for(3), [Setting(1e-6, 0.0), Setting(0.1, 1e-3), Setting(0.1, 100.0)]
    assert choose_and_judge(heads_for(train.features), grid, train, test, 10, settings, 0).setting == grid[1]


def test_too_few_labels_to_choose_by_take_the_fixed_setting(digits):
    train, test = samples(digits)
    few = train.part(sample_share(train.labels, 1e-9, 0))
    assert torch.bincount(few.own_labels).tolist() == [1] * 10
    settings = settings_for(1)
    judged = choose_and_judge(heads_for(train.features), settings.linear_grid, few, test, 10, settings, 0)
    assert judged.setting == FALLBACK and FALLBACK in settings.linear_grid


def test_seeds_draw_the_labels_and_equal_ones_find_the_same(digits):
    settings = settings_for(5, num_seeds=2, label_shares=(0.01,))
    (row,), (again,) = (few_label(Encoder("pixels", None), digits, settings) for _ in range(2))
    assert row == again and row.task == "1 % of labels" and len(set(row.values)) == 2
    assert 0.3 < row.mean < 0.9 and row.std == pytest.approx(np.std(row.values, ddof=1))


def test_an_attentive_head_finds_the_one_token_that_tells():
    """The class stands in one token at a place that is drawn; its mean with 15 tokens of noise says less."""
    draw = torch.Generator().manual_seed(0)
    labels, tokens = torch.arange(600) % 3, torch.randn(600, 16, 16, generator=draw)
    marked = 6 * torch.eye(16)[labels] + 6 * torch.eye(16)[15]
    tokens[torch.arange(600), torch.randint(16, (600,), generator=draw)] = marked
    train, test = Samples(tokens[:400], labels[:400]), Samples(tokens[400:], labels[400:])
    settings = settings_for(20)
    state = torch.get_rng_state()
    make = partial(attentive_heads, 16, 1, 0)
    judged = choose_and_judge(make, settings.attentive_grid, train, test, 3, settings, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert float((judged.predictions == test.labels).double().mean()) > 0.95


# Choices among samples


def test_a_share_is_held_out_of_every_class():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 2)
    kept, held = hold_out(labels, 0.2, seed=0)
    assert torch.bincount(labels[held], minlength=3).tolist() == [4, 2, 0]
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(32)) and (kept.diff() > 0).all()
    assert not torch.equal(held, hold_out(labels, 0.2, seed=1)[1])


def test_a_share_of_labels_has_every_class():
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 3)
    assert torch.bincount(labels[sample_share(labels, 0.01, 0)]).tolist() == [2, 1, 1]
    assert torch.bincount(labels[sample_share(labels, 0.1, 0)]).tolist() == [20, 10, 1]


def test_batches_of_some_rows_hold_those_alone():
    rows = torch.tensor([1, 4, 7])
    batches = FeatureBatches(torch.arange(10.0)[:, None], torch.arange(10), 2, rows=rows)
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == [1, 4, 7] and len(batches) == 2


# Features in files


def test_mapped_rows_are_those_in_memory(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(n, 3, generator=draw), "labels": torch.arange(n)} for n in (4, 4, 1)]
    found = []
    for limit in (1e9, 0):
        store = FeatureStore(12, limit)
        for batch in batches:
            store.add(batch)
        found.append(store.tensors())
        assert store.is_mapped == (limit == 0) and len(found[-1]["x"]) == 9
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("x", "labels"))
    monkeypatch.setattr("hjepa_engine.data.features._CHUNK", 6)  # two rows at a time
    mean, std = mean_and_std(found[1]["x"])
    torch.testing.assert_close((mean, std), (found[0]["x"].mean(0), found[0]["x"].std(0)))
    assert torch.equal(standardize_(found[1]["x"], mean, std), (found[0]["x"] - mean) / std)


def test_no_file_of_features_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = FeatureStore(3, 0)
    store.add({"x": torch.ones(3, 2)})
    assert store.is_mapped and store.tensors()["x"].sum() == 6 and not list(tmp_path.iterdir())


def test_features_that_do_not_fit_on_the_disk_are_one_line(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"^features take 4\.0 GB, more than probe\.features_in_memory_gb, .*TMPDIR"):
        FeatureStore(10**9, 0).add({"x": torch.ones(1, 1)})


@pytest.mark.parametrize("features", ["mean", "concat"])
def test_a_probe_on_mapped_features_ends_with_the_same_bits(tmp_path, features):
    logs = []
    for limit in ("4", "0"):
        values = {**DIGITS, "probe.epochs": 2, "probe.features": features, "probe.features_in_memory_gb": limit}
        config = load_config(None, options(values))
        folder = tmp_path / limit
        folder.mkdir()
        probe(config, build_modules(config)["target_encoder"], "trained", folder)
        lines = [json.loads(line) for line in (folder / "probe_trained.jsonl").read_text().splitlines()]
        logs.append(
            [{k: v for k, v in line.items() if k in ("train/loss", "val/loss", "val/accuracy")} for line in lines]
        )
    assert logs[0] == logs[1] and len(logs[0]) >= 2


#: Gathers 240 MB of features, standardizes them, trains heads and neighbors, and prints the accuracies.
PROGRAM = """
import resource, sys, torch
from functools import partial
from hjepa_engine import load_config
from hjepa_engine.data import FeatureStore, features, mean_and_std
from hjepa_engine.metrics import knn
from hjepa_engine.recipes.evaluation.sweep import Samples, linear_heads, train_heads
from hjepa_engine.recipes.evaluation.task import Setting, Settings

knn._KNOWN = features._CHUNK = 2**20  # small pieces, of which the allocator may keep several
torch.set_num_threads(1)
def private():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
limit, allowed = float(sys.argv[1]), int(sys.argv[2])
torch.ones(64, 64) @ torch.ones(64, 64)
before = private()
if allowed:  # all that is private to the process; mapped files are not
    used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
store = FeatureStore(15_000, limit)
draw = torch.Generator().manual_seed(0)
centers = torch.randn(4, 4000, generator=draw)
for _ in range(60):
    labels = torch.randint(4, (250,), generator=draw)
    store.add({"x": 0.1 * centers[labels] + torch.randn(250, 4000, generator=draw), "labels": labels})
found = store.tensors()
config = load_config(None, ["--probe.epochs=1", "--probe.batch_size=1000"])
part = Samples(found["x"], found["labels"])
make = partial(linear_heads, *mean_and_std(part.features))
right = train_heads(make, [Setting(0.01, 0.0)], part, part.part(torch.arange(500)), 4, Settings(config, "cpu"), 0)
print((right == part.labels[:500]).double().mean().item())
print(knn.knn_accuracy(found["x"], found["labels"], found["x"][::500], found["labels"][::500]))
print(private() - before, file=sys.stderr)
"""


def test_features_beyond_the_limit_take_no_memory_and_say_the_same(server, tmp_path):
    """240 MB of features in 160 MB of private memory: the system refuses to give more."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(limit, allowed):
        return server.call("program.py", str(limit), str(allowed), folder=tmp_path, body=PROGRAM_BODY)

    mapped, refused, free = run(1e6, 160 * 2**20), run(1e12, 160 * 2**20), run(1e12, 0)
    assert mapped[2] == 0, mapped[1]
    assert refused[2] != 0 and "alloc" in refused[1]
    assert mapped[0] == free[0] and len(free[0].split()) == 2
    assert int(free[1].split()[-1]) > 230e6 > 160e6 > int(mapped[1].split()[-1])


# Readings


def encoder_of(**values):
    config = load_config(None, options({**NOISE, **{key.replace("__", "."): value for key, value in values.items()}}))
    return build_modules(config)["target_encoder"]


def test_readings_are_means_of_blocks_and_cells_of_levels():
    encoder, images = encoder_of(model__depth=3), torch.randn(2, 3, 24, 24)
    levels = [Level(1), Level("image"), Level(1, depth=1 / 3), Level(2), Level(3, depth=2 / 3)]
    found = readings_step(torch.nn.ModuleDict({"encoder": encoder}), {"images": images}, levels)
    with torch.no_grad():
        first, second, last = encoder.features(images, depths=(1 / 3, 2 / 3, 1.0))
    # Levels 0 and 1 are read by the mean token, as is the second one; level 3 has 9 cells of 2 x 2 patches.
    assert list(found) == ["last", "last_3", "level_2", "level_3", "level_4"]
    assert torch.equal(found["last"], last.mean(1)) and torch.equal(found["level_2"], first.mean(1))
    assert torch.equal(found["last_3"], torch.cat([t.mean(1) for t in (first, second, last)], dim=1))
    assert torch.allclose(found["level_3"][0, :16], last.view(2, 6, 6, 16)[0, :2, :2].mean((0, 1)), atol=1e-6)
    assert torch.allclose(found["level_4"][1, -16:], second.view(2, 6, 6, 16)[1, 3:, 3:].mean((0, 1)), atol=1e-6)


def test_patches_of_pixels_stand_in_the_order_of_tokens():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    found = patch_pixels_step(torch.nn.ModuleDict(), {"images": images}, (2, 3))["patches"]
    assert found.shape == (2, 6, 12)
    assert torch.equal(found[1, 4], images[1, :, 2:4, 2:4].flatten())


# Patches and their classes


def test_a_patch_has_the_class_that_covers_most_of_it():
    page = torch.tensor([[[1, 2], [3, 4]]])
    assert patch_classes(page, (2, 2), 5).tolist() == [[1, 2, 3, 4]]
    assert patch_classes(page, (4, 4), 5).view(4, 4).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert patch_classes(page, (1, 1), 5).tolist() == [[1]]  # of equal ones the smallest
    # Of three patches along a side, the middle one is half in each cell.
    assert patch_classes(page, (3, 3), 5).view(3, 3).tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert patch_classes(torch.tensor([[[1, 2], [2, 2]]]), (1, 1), 3).tolist() == [[2]]


def test_pages_show_in_each_cell_a_digit_of_its_class_or_nothing():
    config = load_config(None, options({"data.val_fraction": 0.2})).data
    split = open_digit_maps(config, "val", 0, (4, 4))
    pages, labels = split.images.gather(np.array([[0, index] for index in range(40)]), seed=0)
    digits = open_split(load_config(None, ["--data.dataset=digits"]).data, "val", 0).images
    known = {
        pixels.numpy().tobytes(): int(label) for pixels, label in zip(digits.pixels[:, 0], digits.labels, strict=True)
    }
    cells = pages[:, 0].view(40, 4, 8, 4, 8).transpose(2, 3).reshape(-1, 8, 8)
    for cell, label in zip(cells, labels.flatten().tolist(), strict=True):
        if label == BACKGROUND:
            assert cell.unique().tolist() in ([0], [255])
        else:
            assert label == known.get(cell.numpy().tobytes(), known.get((255 - cell).numpy().tobytes()))
    assert len(labels.unique()) == 11 and split.classes[BACKGROUND] == "background"
    finer = open_digit_maps(config, "val", 0, (8, 8)).images.gather(np.array([[0, 0]]), seed=0)[1]
    assert torch.equal(finer.view(8, 8)[::2, ::2], labels[0].view(4, 4)) and split.images[0][1].shape == (16,)
    batch = next(iter(build_loader(config, split, 0, train=False)))
    assert batch["labels"].shape == (len(batch["images"]), 16)


def test_overlap_and_accuracy_by_hand():
    confusion = confusion_matrix(torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 0, 1]), 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    # 0: 1 of 3; 1: 2 of 5; 2 is nowhere; 3 was predicted once, wrongly
    assert accuracy(confusion) == 3 / 6 and mean_iou(confusion) == pytest.approx((1 / 3 + 2 / 5 + 0) / 3)


# The recipe


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of a tiny run over noise, with other data to transfer to."""
    folder = run_folder(tmp_path_factory.mktemp("evaluated") / "run", **LARGE_PATCHES)
    evaluate.main(["--run", str(folder), "--seeds", "2", "--transfer", "data.dataset=digits", *QUICK])
    return folder


def test_every_task_has_a_figure_of_every_encoder(evaluated):
    record = json.loads((evaluated / "evaluation.json").read_text())
    rows = {(row["task"], row["reading"], row["encoder"], row["metric"]): row for row in record["rows"]}
    tasks = ["linear", "knn", "attentive", "1 % of labels", "10 % of labels", "dense", "transfer"]
    assert list(dict.fromkeys(task for task, *_ in rows)) == tasks
    for task in tasks:
        assert {encoder for found, _, encoder, _ in rows if found == task} == {"trained", "random", "pixels"}
    assert {reading for task, reading, *_ in rows if task == "linear"} == {"last", "level_1", "pixels"}
    assert {metric for task, *_, metric in rows if task == "dense"} == {"patch accuracy", "mean IoU"}
    for (task, *_), row in rows.items():
        assert len(row["values"]) == (1 if task == "knn" else 2) and all(0 <= value <= 1 for value in row["values"])
        assert row["mean"] == pytest.approx(np.mean(row["values"])) and (row["std"] is None) == (task == "knn")
        assert len(row["chosen"]) == (0 if task == "knn" else 2)
    assert record["transfer_data"].startswith("digits, 1438 + 359 images") and record["seeds"] == 2


def test_the_table_is_in_the_folder_and_in_the_report(evaluated):
    table = (evaluated / "evaluation.md").read_text()
    record = json.loads((evaluated / "evaluation.json").read_text())
    row = next(r for r in record["rows"] if r["task"] == "dense" and r["encoder"] == "trained")
    figure = f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}"
    assert f"| dense | patches | patch accuracy | {figure} |" in table and "| knn | last | accuracy |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    page = write_report(evaluated).read_text()
    assert '<section id="evaluation"' in page and figure in page


def test_other_data_has_a_file_of_its_own_and_tasks_can_be_chosen(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    evaluate.main(["--run", str(folder), "--tasks", "knn", "--data.dataset=digits", *QUICK])
    assert {row["task"] for row in json.loads((folder / "evaluation_digits.json").read_text())["rows"]} == {"knn"}
    assert not (folder / "evaluation.json").exists() and "| knn | last |" in capsys.readouterr().out


def test_a_second_call_keeps_other_tasks_and_results_of_other_settings(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    words = ["--run", str(folder), "--seeds", "1", *QUICK, "--tasks"]

    def tasks_in(name):
        return list(dict.fromkeys(row["task"] for row in json.loads((folder / name).read_text())["rows"]))

    evaluate.main([*words, "knn"])
    first = json.loads((folder / "evaluation.json").read_text())["rows"]
    evaluate.main([*words, "linear", "--probe.features_in_memory_gb=1"])
    record = json.loads((folder / "evaluation.json").read_text())
    assert tasks_in("evaluation.json") == ["linear", "knn"] and record["rows"][-len(first) :] == first
    table = (folder / "evaluation.md").read_text()
    assert "of one seed; heads are trained for 1 pass (probe.epochs)" in table and "| knn |" in table
    assert len([row for row in record["rows"] if row["task"] == "linear"]) == 5
    before = (folder / "evaluation.json").read_bytes()
    evaluate.main([*words, "knn", "--seed=7"])
    (other,) = set(folder.glob("evaluation_*.json"))
    assert re.fullmatch(r"evaluation_[0-9a-f]{8}\.json", other.name) and tasks_in(other.name) == ["knn"]
    assert (folder / "evaluation.json").read_bytes() == before and other.with_suffix(".md").is_file()


def test_a_checkpoint_has_a_file_with_its_name():
    row = {"task": "knn"}
    record = {"checkpoint": None, "data": {}, "seeds": 1, "seed": 0, "probe": {}, "transfer_data": None}
    record |= {"weights": "x", "rows": [row]}
    with TemporaryDirectory() as folder:
        path = Path(folder, "evaluation.json")
        assert merge(path, {**record, "checkpoint": "best"}, TASKS)[0] == path
        path.write_text(json.dumps(record))
        assert merge(path, {**record, "checkpoint": "best"}, TASKS)[0].name == "evaluation_best.json"
        (path.parent / "evaluation_best.json").write_text(json.dumps({**record, "checkpoint": "best"}))
        # The run has gone on: what was measured before it did is not mixed with what it is now.
        assert merge(path, {**record, "rows": [{"task": "linear"}]}, TASKS)[1]["rows"] == [{"task": "linear"}, row]
        changed = {**record, "rows": [{"task": "linear"}], "weights": "y"}
        assert merge(path, changed, TASKS) == (path, changed)
        again = {**record, "checkpoint": "best", "seeds": 2}
        assert re.fullmatch(r"evaluation_[0-9a-f]{8}\.json", merge(path, again, TASKS)[0].name)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--tasks", "lineal"],
            "--tasks must be some of linear, knn, attentive, few_label, dense, transfer, got lineal",
        ),
        (["--tasks", "transfer"], r"the task transfer needs other data: --transfer data\.dataset="),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--model.depth=3"], "model.depth is the run's own"),
        (["--transfer", "model.depth=3"], "model.depth is the run's own"),
        (["--data.image_size=[24, 32]", "--tasks", "dense"], "the task dense needs square images"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_leaves_nothing(tmp_path, words, says):
    folder = run_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match=says):
        evaluate.main(["--run", str(folder), *words])
    assert not list(folder.glob("evaluation*"))


@pytest.mark.slow
def test_an_evaluation_is_the_same_on_mapped_features(tmp_path):
    found = []
    for limit in ("4", "0"):
        folder = run_folder(tmp_path / limit, **LARGE_PATCHES, probe__features_in_memory_gb=limit)
        tasks = ["linear", "knn", "attentive", "dense"]
        found.append(evaluate_run(folder, tasks=tasks, overrides=QUICK, num_seeds=1).record["rows"])
    assert found[0] == found[1] and len(found[0]) > 10
