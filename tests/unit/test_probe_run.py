"""The linear probe of a run folder: what can be given, on which images, where the results are."""

import json
import logging

import numpy as np
import pytest
import torch
from helpers import NOISE, options
from PIL import Image

from hjepa_engine import dump_config, load_config, load_encoder
from hjepa_engine.data import open_split
from hjepa_engine.data.split import UNLABELED
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.export import save_encoder
from hjepa_engine.models import build_modules, encoder_arguments
from hjepa_engine.recipes import linear_probe
from hjepa_engine.recipes.common import probe_run as module
from hjepa_engine.recipes.common.probe import open_probe_data, read_features
from hjepa_engine.recipes.common.probe_run import probe_run
from hjepa_engine.report import write_report

QUICK = {**NOISE, "probe.epochs": 1, "data.batch_size": 40}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
CAN = "what can: data.* (but not in_chans, mean and std), probe.*, device, seed, logging.progress_bar"


def run_folder(folder, **values):
    """A run folder with an exported encoder, as if a run had ended there; its normalization is not the data set's."""
    config = load_config(None, options({**QUICK, **{key.replace("__", "."): value for key, value in values.items()}}))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    channels = config.data.channels
    (folder / "data.json").write_text(json.dumps({"stats": {"mean": MEAN[:channels], "std": STD[:channels]}}))
    save_encoder(build_modules(config)["target_encoder"], folder / "encoder", {"encoder": encoder_arguments(config)})
    return folder


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run")


def image_folder(root, classes=("cat", "dog"), side=24):
    for split, number in (("train", 4), ("val", 2)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.full((side, side), 40 + 100 * label + index, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def on_folder(root):
    return ["--data.dataset=imagefolder", f"--data.data_path={root}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.depth", "1"),
        ("model.encoder_type", "vit_small_patch16_224"),
        ("masking.num_masks", "3"),
        ("loss.type", "mse"),
        ("training.lr", "0.1"),
        ("step", "{class_path: a.b}"),
        ("run_dir", "x"),
        ("logging.log_frequency", "3"),
        ("data.in_chans", "1"),
        ("data.mean", "[0.5, 0.5, 0.5]"),
        ("data.std", "auto"),
    ],
)
def test_what_belongs_to_the_run_is_refused(run, key, value):
    for words in ([f"--{key}", value], [f"{key}={value}"]):
        with pytest.raises(ConfigError) as error:
            probe_run(run, None, words)
        assert str(error.value) == f"{key} is the run's own and cannot be given; {CAN}"
    assert not list(run.glob("linear_probe*"))


def test_other_images_are_not_kept_in_memory_unless_asked_for(tmp_path):
    run = run_folder(tmp_path / "run", data__in_memory=True)
    folder = image_folder(tmp_path / "cats")
    Image.new("L", (30, 24)).save(folder / "train" / "dog" / "1.png")
    assert set(probe_run(run, None, []).results) == set(probe_run(run, None, on_folder(folder)).results)
    with pytest.raises(DataError, match=r"data\.in_memory needs images of one size .*dog/1\.png: 24 x 30 pixels"):
        probe_run(run, None, [*on_folder(folder), "--data.in_memory=true"])
    run = run_folder(tmp_path / "of_files", data__dataset="imagefolder", data__data_path=folder, data__in_memory=True)
    assert probe_run(run, None, ["--data.train_dir=train", "--data.val_dir=val"]).results


def test_a_key_that_there_is_not_is_called_unknown(run):
    with pytest.raises(ConfigError, match="unknown key model"):
        probe_run(run, None, ["--model.dept=1"])


def test_on_the_images_of_the_run_the_results_are_in_linear_probe_json(run):
    words = ["--probe.labels_per_class=2", "--seed=1", "--device=cpu", "--logging.progress_bar=false"]
    found = probe_run(run, None, words)
    assert found.path == run / "linear_probe.json"
    record = json.loads(found.path.read_text())
    assert record["accuracy"] == found.results and set(found.results) == {"trained", "random", "pixels"}
    assert record["data"] == {
        "dataset": "fake",
        "image_size": [24, 24],
        "description": "fake, 40 + 40 images of 10 classes, 24 x 24 pixels",
    }
    assert (record["probe"]["labels_per_class"], record["checkpoint"], record["note"]) == (2, None, None)
    assert (run / "probe_trained.jsonl").is_file()


def test_another_data_set_has_a_file_of_its_own_and_pixels_as_the_run_has_them(run, tmp_path, capsys):
    probe_run(run, None, [])
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    folder = image_folder(tmp_path / "my cats")
    linear_probe.main(["--run", str(run), *on_folder(folder)])
    path = run / "linear_probe_imagefolder_my_cats.json"
    described = f"imagefolder in {folder}, 8 + 4 images of 2 classes, 24 x 24 pixels"
    assert f"\ndata: {described}\nresults: {path}\n" in capsys.readouterr().out
    assert json.loads(path.read_text())["data"]["description"] == described
    assert before == {path: path.read_bytes() for path in before}


def test_channels_and_normalization_are_those_of_the_run(tmp_path):
    folder = run_folder(tmp_path / "run", data__dataset="digits")  # gray; noise is in color
    found = probe_run(folder, None, ["--data.dataset=fake"])
    assert found.path == folder / "linear_probe_fake.json"
    assert (found.config.data.channels, found.config.data.mean, found.config.data.std) == (1, MEAN[:1], STD[:1])
    assert open_split(found.config.data, "val").stats == (tuple(MEAN[:1]), tuple(STD[:1]))


def test_what_lies_in_the_folder_of_the_run_is_no_data(tmp_path):
    root = image_folder(tmp_path / "data") / "train"
    folder = run_folder(root / "run")
    (folder / "figures").mkdir()
    Image.new("L", (24, 24)).save(folder / "figures" / "masks_00000001.png")
    found = probe_run(folder, None, on_folder(root))
    assert "of 2 classes" in found.data


def test_the_normalization_of_a_run_that_has_not_noted_it_is_that_of_its_own_images(tmp_path):
    folder = run_folder(tmp_path / "run", data__image_size=48)  # ImageNet's numbers; CIFAR's up to 32 pixels
    (folder / "data.json").write_text("{")
    found = probe_run(folder, None, [*on_folder(image_folder(tmp_path / "data")), "--data.image_size=24"])
    assert found.config.data.mean == [0.485, 0.456, 0.406]


def test_folders_of_the_same_name_do_not_overwrite_each_other(run, tmp_path):
    first, second = (on_folder(image_folder(tmp_path / name / "pets")) for name in ("one", "two"))
    paths = [probe_run(run, None, words).path for words in (first, second, first, second)]
    assert paths[0] == paths[2] == run / "linear_probe_imagefolder_pets.json"
    assert paths[1] == paths[3] != paths[0] and paths[1].name.startswith("linear_probe_imagefolder_pets_")
    for path, name in zip(paths[:2], ("one", "two"), strict=True):
        assert json.loads(path.read_text())["data"]["data_path"] == str(tmp_path / name / "pets")


def test_another_data_set_does_not_take_over_the_class_path_of_the_run(tmp_path):
    folder = run_folder(tmp_path / "run", data__class_path=f"{__name__}.Samples", data__init_args="{labels: [0, 1]}")
    assert probe_run(folder, None, []).path == folder / "linear_probe.json"
    assert probe_run(folder, None, ["--data.dataset=fake"]).path == folder / "linear_probe_fake.json"
    found = probe_run(folder, None, [f"--data.class_path={__name__}.Other"])
    assert found.path == folder / f"linear_probe_{__name__}.Other.json"


@pytest.mark.parametrize("size", ["48", "[24, 32]"])
def test_images_of_another_size_are_read_with_interpolated_positions(tmp_path, monkeypatch, size):
    folder = run_folder(tmp_path / "run", model__pos_embed="learned")
    probed = {}
    original = module.evaluate_encoders
    monkeypatch.setattr(module, "evaluate_encoders", lambda *args: probed.update(args[1]) or original(*args))
    found = probe_run(folder, None, [f"--data.image_size={size}"])
    height, width = found.config.data.size
    assert found.path == folder / f"linear_probe_fake_{height}x{width}.json"
    assert probed["trained"].grid == probed["random"].grid == (height // 4, width // 4)
    expected = load_encoder(folder, img_size=(height, width))
    torch.testing.assert_close(probed["trained"].vit.pos_embed, expected.vit.pos_embed, rtol=0, atol=0)


@pytest.mark.parametrize("patch_size", [4, None])
def test_a_size_that_the_patches_do_not_divide_is_one_line(tmp_path, patch_size):
    sizes = {} if patch_size else dict.fromkeys(("model__patch_size", "model__embed_dim", "model__num_heads"))
    folder = run_folder(tmp_path / "run", data__image_size=32, **sizes)
    with pytest.raises(ConfigError, match=r"^data.image_size must be a multiple of .*, got 42"):
        probe_run(folder, None, ["--data.image_size=42"])


class Samples:
    """Gray images, one for each label."""

    classes = ("a", "b")

    def __init__(self, labels, split="train", classes=2):
        self.labels, self.classes = labels, ("a", "b")[:classes]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return np.full((24, 24, 3), 10 * index, np.uint8), self.labels[index]


class Other(Samples):
    def __init__(self, split="train"):
        super().__init__([0, 1, 1])


def on_samples(labels, classes=2):
    return [f"--data.class_path={__name__}.Samples", f"--data.init_args={{labels: {labels}, classes: {classes}}}"]


@pytest.mark.parametrize(
    ("labels", "classes", "reason"),
    [
        ([0, 1], 0, "the images have no labels"),
        ([UNLABELED, UNLABELED], 2, "none of the 2 probe images has one"),
    ],
)
def test_images_without_labels_cannot_be_probed(run, labels, classes, reason):
    with pytest.raises(DataError) as error:
        probe_run(run, None, on_samples(labels, classes))
    assert str(error.value) == f"a linear probe needs labels: {reason}"
    assert not list(run.glob("linear_probe*"))


def test_a_probe_leaves_out_images_without_a_label(run, caplog):
    config = load_config(run / "config.yaml", on_samples([0, UNLABELED, 1, 1]))
    with caplog.at_level(logging.WARNING):
        train, val, classes = read_features(config, None, torch.device("cpu"), open_probe_data(config))
    assert train[1].tolist() == val[1].tolist() == [0, 1, 1] and classes == 2
    assert caplog.messages[0] == "1 of 4 probe images have no label: the probe leaves them out"


def test_of_one_class_it_is_said_that_the_figures_mean_nothing(run, tmp_path, capsys):
    folder = image_folder(tmp_path / "one", classes=("cat",))
    linear_probe.main(["--run", str(run), *on_folder(folder), "--data.labels=folders"])
    assert f"note: {module.ONE_CLASS}\n" in capsys.readouterr().out
    record = json.loads((run / "linear_probe_imagefolder_one.json").read_text())
    assert record["note"] == module.ONE_CLASS and record["accuracy"]["trained"] == 1
    assert module.ONE_CLASS in write_report(run).read_text()


def test_one_label_of_several_classes_is_a_warning(run, caplog):
    with caplog.at_level(logging.WARNING):
        assert probe_run(run, None, on_samples([1, 1])).note is None
    assert "all images have the same label: the accuracy of a linear probe means nothing" in caplog.messages


def test_the_report_shows_the_probes_of_all_data_sets(run, tmp_path):
    (run / "status.json").write_text(json.dumps({"state": "done", "results": {"trained": 0.125}}))
    probe_run(run, None, ["--probe.labels_per_class=3"])
    folder = image_folder(tmp_path / "a&b")
    probe_run(run, None, on_folder(folder))
    page = write_report(run).read_text()
    assert '<td>the run&#39;s own</td><td class="number">12.5 %</td>' in page
    assert "<td>fake, 40 + 40 images of 10 classes, 24 x 24 pixels; 3 labels per class</td>" in page
    assert f"<td>imagefolder in {folder}, 8 + 4 images of 2 classes, 24 x 24 pixels</td>".replace("&", "&amp;") in page
