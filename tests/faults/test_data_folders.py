"""Image folders through the real command: what it prints, and the exit code."""

import json

import numpy as np
import pytest
from helpers import TINY, logged, options
from PIL import Image

SHORT = options({**TINY, "data.dataset": "imagefolder", "data.batch_size": 4, "training.max_iters": 1})
NO_PROBE = ["--probe.enabled=false"]


def make(root, **folders):
    """Folders of images: ``cat=4`` is ``cat/0.png`` to ``cat/3.png``; ``_`` in a name stands for ``/``."""
    for name, number in folders.items():
        folder = root / name.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(number):
            pixels = np.random.default_rng(index).integers(0, 256, (30, 26, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def cut(root, *paths):
    for path in paths:
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: len(content) // 2])


def scan(root):
    """16 bits of gray: values beyond 255."""
    folder = make(root, cat=6, dog=6)
    for index in range(6):
        Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30)).save(folder / "cat" / f"{index}.png")


def floats(root):
    make(root, cat=6, dog=6)
    for path in root.glob("*/*.png"):
        Image.fromarray(np.full((30, 30), 700.0, np.float32)).save(path.with_suffix(".tif"))
        path.unlink()


#: How the folder is made, options, the exit code, and what is printed (to the other stream if it fails).
CASES = {
    "classes": (lambda root: make(root, cat=9, dog=9), [], 0, "of 2 classes (cat, dog) to train on"),
    "Training and Test": (lambda root: make(root, Training_cat=4, Training_dog=4, Test_cat=2, Test_dog=1), [], 0,
        "data: 8 images of 2 classes (cat, dog) to train on, 3 images to validate"),
    "flat": (lambda root: make(root, **{".": 20}), [], 0, "images without labels to train on"),
    "unlabeled test": (lambda root: make(root, train_a=8, train_b=8, test=9), [], 0, "9 images in"),
    "class missing": (lambda root: make(root, train_a=4, train_b=4, val_a=2), [], 0,
        "no validation images of 1 of 2 classes: b"),
    "other files": (lambda root: [make(root, a=9, b=9), (root / "x.txt").touch(), (root / "a" / "y.mp4").touch()], [], 0,
        "left out: 2 files of other kinds: 1 .mp4, 1 .txt"),
    "hidden": (lambda root: [make(root, a=9, b=9), make(root, **{".ipynb_checkpoints": 5})], [], 0, "of 2 classes (a, b)"),
    "16 bits": (scan, [], 0, "of 2 classes (cat, dog)"),
    "test without train": (lambda root: make(root, cat=4, dog=4, test=4), [], 3, "none named train or training"),
    "other classes": (lambda root: make(root, train_a=4, train_b=4, val_c=2, val_d=2), [], 3, "none of the classes"),
    "no images": (lambda root: [make(root, cat=0), (root / "cat" / "a.txt").write_text("x")], [], 3,
        "holds no images; 1 file of other kinds: 1 .txt"),
    "missing": (lambda root: None, [], 3, "does not exist"),
    "too few": (lambda root: make(root, a=2, b=2), [], 3, "data.batch_size"),
    "floats": (floats, [], 3, "could not be read"),
    "damaged": (lambda root: [make(root, train_a=8, train_b=8, val_a=9, val_b=9), cut(root, "train/a/0.png")],
        ["--training.max_iters=4"], 3, "data.max_damaged"),
    "damaged validation": (
        lambda root: [make(root, train_a=8, train_b=8, val_a=9, val_b=9), cut(root, *(f"val/a/{i}.png" for i in range(7)))],
        ["--training.max_iters=4"], 3, "data.max_damaged"),
    "damage allowed": (lambda root: [make(root, train_a=8, train_b=8, val_a=9, val_b=9), cut(root, "val/a/0.png")],
        ["--data.max_damaged=0.2", "--training.max_iters=4"], 0, "run folder:"),
    "oblong": (lambda root: make(root, a=9, b=9), ["--data.image_size=[16,32]"], 0, "on 4 x 8 patches"),
    "a size that patches do not divide": (lambda root: make(root, a=9, b=9), ["--data.image_size=[16,30]"], 2,
        "data.image_size must be a multiple of"),
    "variables": (lambda root: make(root, a=9, b=9), ["--data.data_path=$NO_SUCH/x"], 2, "there is no $NO_SUCH"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_command_reads_or_refuses_a_folder(tmp_path, server, name):
    prepare, more, code, says = CASES[name]
    prepare(tmp_path / "set")
    out, err, found = server.call(*SHORT, *NO_PROBE, "--data.data_path=set", "--run_dir=run", *more, folder=tmp_path)
    assert found == code, (out, err)
    assert says in (err.splitlines()[-1] if code else out), (out, err)
    assert "Traceback" not in err


def test_a_run_on_images_without_labels_ends_well_and_says_what_probes_need(tmp_path, server):
    make(tmp_path / "set", **{".": 20})
    arguments = (*SHORT, "--data.data_path=set", "--run_dir=run", "--online_probe.every=1", "--training.max_iters=4")
    _, err, code = server.call(*arguments, folder=tmp_path)
    assert code == 0, err
    assert "no linear probe, which needs labels of several classes: no labels: 20 images in no folder of a class" in err
    assert "no online probe" in err and "data.labels" not in err  # there are no folders to take as classes
    assert json.loads((tmp_path / "run" / "status.json").read_text())["results"] == {}


def test_a_metric_of_probes_is_refused_without_labels(tmp_path, server):
    make(tmp_path / "set", **{".": 20})
    more = ("--checkpoint.metric=probe/knn", "--checkpoint.mode=max", "--online_probe.every=1")
    _, err, code = server.call(*SHORT, *more, "--data.data_path=set", "--run_dir=run", folder=tmp_path)
    assert code == 3 and "checkpoint.metric must not be a probe's, got probe/knn: no labels" in err.splitlines()[-1]


def test_pictures_of_a_run_inside_the_data_are_no_data(tmp_path, server):
    make(tmp_path / "set", cat=9, dog=9)
    arguments = (*SHORT, *NO_PROBE, "--data.data_path=.", "--pictures.enabled=true", "--training.max_iters=4")
    for more in ([], ["--training.max_iters=6", "--training.epochs=3"]):
        out, err, code = server.call(*arguments, "--run_dir=runs/one", *more, folder=tmp_path / "set")
        assert code == 0, err
        assert "of 2 classes (cat, dog)" in out
    assert "runs/one is left out: this run writes there" in out
    assert list((tmp_path / "set" / "runs" / "one").rglob("*.png"))


def test_data_inside_the_run_folder_are_refused(tmp_path, server):
    make(tmp_path / "run" / "set", cat=9, dog=9)
    _, err, code = server.call(*SHORT, "--data.data_path=run/set", "--run_dir=run", folder=tmp_path)
    assert code == 2 and "must not be in the run folder" in err.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["set"]


def test_paths_of_a_run_are_absolute_in_its_configuration(tmp_path, server):
    make(tmp_path / "set", cat=9, dog=9)
    _, err, code = server.call(*SHORT, *NO_PROBE, "--data.data_path=set", "--run_dir=run", folder=tmp_path)
    assert code == 0, err
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"data_path: {tmp_path}/set" in text and f"run_dir: {tmp_path}/run" in text


def two_tones(root, val):
    """Dark cats and bright dogs, so that pixels tell them apart; ``val`` has indices of validation images by class."""
    for split, indices in (("train", {"cat": range(8), "dog": range(8)}), ("val", val)):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for index in indices[name]:
                # Dog 0 of the validation is as dark as a cat: one of the readable images is told wrongly.
                first = 0 if (split, name, index) == ("val", "dog", 0) else 156 * number
                pixels = (
                    np.random.default_rng([number, index]).integers(first, first + 100, (30, 26, 3)).astype(np.uint8)
                )
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_where_14_of_20_validation_images_are_damaged_accuracy_is_of_the_6_others(tmp_path, server):
    cut(two_tones(tmp_path / "set", {"cat": range(10), "dog": range(10)}),
        *(f"val/{name}/{index}.png" for name in ("cat", "dog") for index in range(3, 10)))  # fmt: skip
    two_tones(tmp_path / "six", {"cat": range(3), "dog": range(3)})
    arguments = (*SHORT, "--training.max_iters=4", "--online_probe.every=1", "--probe.epochs=20")
    results, logs = [], []
    for name, allowed in (("set", 0.7), ("six", 0.0)):
        more = (f"--data.data_path={name}", f"--data.max_damaged={allowed}", f"--run_dir=run_{name}")
        _, err, code = server.call(*arguments, *more, folder=tmp_path)
        assert code == 0, err
        results.append(json.loads((tmp_path / f"run_{name}" / "status.json").read_text())["results"])
        logs.append(logged(tmp_path / f"run_{name}"))
    assert results[0] == results[1] and results[0]["pixels"] == pytest.approx(5 / 6)
    knn = [[line["probe/knn"] for line in log if "probe/knn" in line] for log in logs]
    assert knn[0] == knn[1] != []
    damaged = [{line["val/damaged"] for line in log if "val/damaged" in line} for log in logs]
    assert damaged == [{14.0}, set()]


def test_where_14_of_20_validation_images_are_damaged_and_fewer_are_allowed_the_run_ends(tmp_path, server):
    cut(two_tones(tmp_path / "set", {"cat": range(10), "dog": range(10)}),
        *(f"val/{name}/{index}.png" for name in ("cat", "dog") for index in range(3, 10)))  # fmt: skip
    more = ("--data.data_path=set", "--data.max_damaged=0.69", "--run_dir=run", "--training.max_iters=4")
    _, err, code = server.call(*SHORT, *NO_PROBE, *more, folder=tmp_path)
    says = "14 of 20 validation images could not be read, more than data.max_damaged 0.69 allows; one of them: "
    assert code == 3 and err.splitlines()[-1].startswith(says), err
