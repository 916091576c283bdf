"""Image folders as people have them: what is read, what is left out, what is refused."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import open_split
from hjepa_engine.data.folder import PathList
from hjepa_engine.data.scan import scan_folder
from hjepa_engine.errors import DataError

PIXEL = Image.new("RGB", (2, 2), (200, 100, 50))


def make(root, *paths):
    """Files by their paths; ``a/{0..3}.png`` are four; images where the name is one of an image."""
    for path in paths:
        first, brace, rest = path.partition("{")
        names = [path]
        if brace:
            numbers, _, rest = rest.partition("}")
            low, high = map(int, numbers.split(".."))
            names = [f"{first}{number}{rest}" for number in range(low, high + 1)]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if name.lower().endswith((".png", ".jpg", ".gif", ".jfif", ".webp", ".jpeg")):
                PIXEL.save(root / name, format="PNG")
            elif name.endswith("/"):
                (root / name).mkdir()
            else:
                (root / name).write_text("no image")
    return root


def opened(root, **settings):
    config = DataConfig(dataset="imagefolder", data_path=str(root), **settings)
    return open_split(config, "train"), open_split(config, "val")


SPLIT = "train/cat/{0..3}.png", "train/dog/{0..1}.png"

#: Files, settings; images to train on and to validate; classes; a part of a note or of what is left out.
READ = {
    "classes": (["cat/{0..9}.png", "dog/{0..9}.png"], {}, 20, ["cat", "dog"], "chosen by their paths"),
    "train, val": ([*SPLIT, "val/cat/0.png", "val/dog/0.png"], {}, (6, 2), ["cat", "dog"], ""),
    "Training, Test": (["Training/cat/{0..3}.png", "Training/dog/0.png", "Test/cat/0.png", "Test/dog/0.png"], {}, (5, 2),
        ["cat", "dog"], ""),
    "TRAIN, VALID": (["TRAIN/a/0.png", "TRAIN/b/0.png", "VALID/a/0.png", "VALID/b/0.png"], {}, (2, 2), ["a", "b"], ""),
    "validation": ([*SPLIT, "validation/cat/0.png", "validation/dog/0.png"], {}, (6, 2), ["cat", "dog"], ""),
    "testing": ([*SPLIT, "testing/cat/0.png", "testing/dog/{0..1}.png"], {}, (6, 3), ["cat", "dog"], ""),
    "val before test": ([*SPLIT, "test/cat/{0..4}.png", "val/cat/0.png", "val/dog/0.png"], {}, (6, 2), ["cat", "dog"],
        "5 images in test left out: train and val are used"),
    "only train": ([*SPLIT], {}, 6, ["cat", "dog"], "chosen by their paths"),
    "unlabeled test": ([*SPLIT, "test/{0..8}.png"], {}, 6, ["cat", "dog"], "left out: they have no labels"),
    "test of one folder": ([*SPLIT, "test/images/{0..8}.png"], {}, 6, ["cat", "dog"], "left out: they have no labels"),
    "a class missing in val": ([*SPLIT, "val/cat/{0..1}.png"], {}, (6, 2), ["cat", "dog"],
        "no validation images of 1 of 2 classes: dog"),
    "an empty class in val": ([*SPLIT, "val/cat/0.png", "val/dog/readme.txt"], {}, (6, 1), ["cat", "dog"],
        "no validation images of 1 of 2 classes: dog"),
    "a further class in val": ([*SPLIT, "val/cat/0.png", "val/dog/0.png", "val/eel/{0..2}.png"], {}, (6, 2), ["cat", "dog"],
        "3 validation images in eel left out: not a class to train on"),
    "an empty class": (["cat/{0..5}.png", "dog/{0..5}.png", "eel/"], {}, 12, ["cat", "dog"], ""),
    "folders beside train": ([*SPLIT, "extra/{0..2}.png"], {}, 6, ["cat", "dog"],
        "3 images in extra left out: train is used"),
    "images beside train": ([*SPLIT, "logo.png"], {}, 6, ["cat", "dog"], "1 image beside the folders left out"),
    "tiny-imagenet": (["train/n01/images/{0..3}.png", "train/n02/images/{0..3}.png", "val/images/{0..3}.png",
        "val/val_annotations.txt", "train/n01/n01_boxes.txt"], {}, 8, ["n01", "n02"], "left out: they have no labels"),
    "flat": (["{0..19}.jpg"], {}, 20, [], "no labels: 20 images in no folder of a class"),
    "flat train and val": (["train/{0..5}.jpg", "val/{0..2}.jpg"], {}, (6, 3), [], "no labels"),
    "one folder": (["photos/{0..19}.jpg"], {}, 20, [], "no labels"),
    "nested": (["2021/01/{0..4}.jpg", "2021/02/{0..4}.jpg", "2022/07/{0..4}.jpg"], {}, 15, [],
        "no labels: images are in folders of folders (2021/02)"),
    "other depths": (["a/{0..4}.jpg", "b/c/{0..4}.jpg"], {}, 10, [], "no labels: images are in folders of different depth"),
    "a stray image": (["cat/{0..4}.png", "dog/{0..4}.png", "logo.png"], {}, 11, [],
        "1 image in no folder of a class (logo.png"),
    "a stray image, folders": (["cat/{0..4}.png", "dog/{0..4}.png", "logo.png"], {"labels": "folders"}, 10, ["cat", "dog"],
        "1 image directly in"),
    "nested, folders": (["2021/01/{0..4}.jpg", "2021/02/{0..4}.jpg", "2022/07/{0..4}.jpg"], {"labels": "folders"}, 15,
        ["2021", "2022"], ""),
    "classes, none": (["cat/{0..9}.png", "dog/{0..9}.png"], {"labels": "none"}, 20, [], ""),
    "wrapped": (["images/cat/{0..4}.png", "images/dog/{0..4}.png", "LICENSE"], {}, 10, ["cat", "dog"], ""),
    "wrapped twice": (["data/set/train/a/{0..4}.png", "data/set/train/b/0.png", "data/set/val/a/0.png"], {}, (6, 1),
        ["a", "b"], ""),
    "dirs by key": (["x/a/{0..4}.png", "x/b/0.png", "y/a/0.png", "z/b/0.png"], {"train_dir": "x", "val_dir": "y"}, (6, 1),
        ["a", "b"], "no validation images of 1 of 2 classes: b"),
    "val by key": (["a/{0..4}.png", "b/0.png", "held/a/0.png", "held/b/0.png"], {"val_dir": "held"}, (6, 2), ["a", "b"], ""),
    "train by key": (["x/a/{0..4}.png", "x/b/{0..4}.png", "test/q.png"], {"train_dir": "x"}, 10, ["a", "b"], ""),
    "all by key": (["cat/{0..4}.png", "test/{0..4}.png"], {"train_dir": "."}, 10, ["cat", "test"], ""),
    "hidden": (["cat/{0..4}.png", "dog/{0..4}.png", "cat/._0.png", ".ipynb_checkpoints/0.png", "cat/.DS_Store", "Thumbs.db",
        "__MACOSX/cat/0.png", "dog/.ipynb_checkpoints/1.png"], {}, 10, ["cat", "dog"], ""),
    "other kinds": (["cat/{0..4}.png", "dog/{0..4}.png", "cat/{0..7}.txt", "{0..3}.MP4"], {}, 10, ["cat", "dog"], ".txt 8"),
    "any case and format": (["a/0.JPG", "a/1.Jpeg", "a/2.GIF", "b/3.jfif", "b/4.WebP"], {}, 5, ["a", "b"], ""),
    "odd names": (["kätzchen/ß {0..3}.png", "犬/{0..3}.png", "b [1]/{0..1}.png"], {}, 10, ["b [1]", "kätzchen", "犬"], ""),
    "another run": (["cat/{0..4}.png", "dog/{0..4}.png", "runs/one/figures/{0..3}.png", "runs/one/config.yaml",
        "runs/one/status.json"], {}, 10, ["cat", "dog"], "runs/one is left out: it is the folder of a run"),
}  # fmt: skip

#: Files, settings, the line.
REFUSED = {
    "nothing": ([], {}, "holds no images"),
    "no images": (["a/{0..3}.txt", "b.mp4"], {}, r"holds no images; 5 files of other kinds: 4 \.txt, 1 \.mp4"),
    "one image": (["a/0.png"], {}, "must hold at least 2 images, to train on and to validate, got 1"),
    "test without train": (["cat/{0..3}.png", "test/{0..3}.png"], {}, "has a folder test but none named train or training"),
    "two trains": (["train/a/0.png", "training/a/0.png"], {}, "several folders for one split: train, training; name one"),
    "two cases": ([*SPLIT, "val/cat/0.png", "VAL/cat/0.png"], {}, "several folders for one split: .*data.val_dir"),
    "other classes": ([*SPLIT, "val/ant/0.png", "val/bee/0.png"], {}, r"none of the classes .*\(cat, dog\), but ant, bee"),
    "empty val by key": ([*SPLIT, "y/readme.txt"], {"val_dir": "y"}, r"data\.val_dir .*/y holds no images; 1 file of other"),
    "no such train": ([*SPLIT], {"train_dir": "x"}, r"data\.train_dir .*/x is no folder"),
    "folders of a flat set": (["{0..3}.png"], {"labels": "folders"}, r"data\.labels must be none or auto"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_folder_is_read(tmp_path, name):
    paths, settings, number, classes, note = READ[name]
    train, val = opened(make(tmp_path / "set", *paths), **settings)
    counts = len(train.images), len(val.images)
    if isinstance(number, int):
        assert sum(counts) == number and min(counts) >= 1
        assert {train.name_of(i) for i in range(counts[0])}.isdisjoint(val.name_of(i) for i in range(counts[1]))
    else:
        assert counts == number
    assert train.classes == val.classes == tuple(classes)
    told = [*train.contents.notes, *(f"{kind} {count}" for kind, count in train.contents.left_out.items())]
    assert not note or any(note in line for line in told), told
    for split in (train, val):
        for index in range(len(split.images)):
            image, label = split.images[index]
            assert (label == -1) if not classes else f"/{classes[label]}/" in split.name_of(index)
            assert image.size == (2, 2)
        assert sum(count for count, _ in split.contents.folders.values()) == len(split.images)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_is_refused_in_one_line(tmp_path, name):
    paths, settings, line = REFUSED[name]
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=line) as caught:
        opened(make(tmp_path / "set", *paths), **settings)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"data.data_path {tmp_path}/none does not exist"):
        opened(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=f"data.data_path {tmp_path}/file is a file, it must be a folder"):
        opened(tmp_path / "file")


def test_links_are_followed_once_and_loops_multiply_nothing(tmp_path):
    root = make(tmp_path / "set", "cat/{0..3}.png", "dog/{0..3}.png")
    make(tmp_path / "elsewhere", "{0..2}.png")
    (root / "cat" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "up").symlink_to(tmp_path)
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "linked.png").symlink_to(root / "cat" / "0.png")
    (root / "dog" / "broken.png").symlink_to(root / "none.png")
    scan = scan_folder(root)
    assert len(scan.files) == 4 + 4 + 3 + 1
    assert sorted(scan.notes) == [
        "again is a link to a folder that is read already",
        "cat/loop is a link to a folder that is read already",
        "dog/broken.png cannot be read: No such file or directory",
        "up is a link to a folder that is read already",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    root = make(tmp_path / "set", "cat/{0..3}.png", "dog/{0..3}.png")
    (root / "dog").chmod(0)
    assert scan_folder(root).notes == ["dog cannot be read: Permission denied"]


def test_excluded_folders_are_no_data(tmp_path):
    root = make(tmp_path, "cat/{0..3}.png", "dog/{0..3}.png", "runs/mine/preview/{0..5}.png")
    scan = scan_folder(root, {root / "runs" / "mine": "it is this run's"})
    assert len(scan.files) == 8 and scan.notes == ["runs/mine is left out: it is this run's"]


def test_what_was_validation_stays_validation_when_images_are_added(tmp_path):
    root = make(tmp_path, "cat/{0..39}.png", "dog/{0..39}.png")

    def held():
        val = opened(root)[1]
        return {val.name_of(index) for index in range(len(val.images))}

    before = held()
    assert 8 <= len(before) <= 24
    make(root, "cat/{40..79}.png", "ant/{0..9}.png", "cat/0a.png")
    after = held()
    assert before < after
    assert {name for name in after - before if "ant" not in name} <= {
        str(root / "cat" / f"{number}.png") for number in [*range(40, 80), "0a"]
    }


def test_another_seed_holds_out_other_images(tmp_path):
    root = make(tmp_path, "cat/{0..39}.png", "dog/{0..39}.png")
    config = DataConfig(dataset="imagefolder", data_path=str(root))
    names = [
        {split.name_of(index) for index in range(len(split.images))}
        for split in (open_split(config, "val", seed) for seed in (0, 0, 1))
    ]
    assert names[0] == names[1] != names[2]


def test_a_tiny_folder_has_an_image_on_each_side(tmp_path):
    root = make(tmp_path, "a.png", "b.png")
    for fraction in (0.001, 0.999):
        assert [len(split.images) for split in opened(root, val_fraction=fraction)] == [1, 1]


def test_folder_images_travel_to_loader_processes(tmp_path):
    train, _ = opened(make(tmp_path, "cat/{0..9}.png", "dog/{0..9}.png"))
    again = pickle.loads(pickle.dumps(train))
    assert [again.name_of(i) for i in range(len(again.images))] == [train.name_of(i) for i in range(len(train.images))]
    assert np.array_equal(np.asarray(again.images[0][0]), np.asarray(PIXEL))


def test_a_list_of_paths_gives_them_back():
    paths = ["a/b.png", "", "ä/犬 ß.jpg", os.fsdecode(b"bad\xff.png")]
    assert [PathList(paths)[index] for index in range(4)] == paths


def test_a_pipe_named_like_an_image_is_left_out(tmp_path):
    make(tmp_path, "cat/{0..3}.png", "dog/{0..3}.png")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    scan = scan_folder(tmp_path)
    assert len(scan.files) == 8
    assert scan.notes == ["cat/pipe.jpg is left out: it is a pipe, a socket or a device"]


@pytest.mark.parametrize(
    ("paths", "says", "is_said"),
    [
        (["{0..9}.png"], "data.labels folders takes", False),  # there are no folders to take
        (["x/b/0.png", "x/c/{0..4}.png", "y/b/0.png"], "data.labels folders takes", True),
        (["Train_set/cat/{0..4}.png", "Train_set/dog/0.png", "test_set/cat/0.png"],
         "folders that may be splits (Train_set, test_set) are read as any other; data.train_dir and", True),
        (["2021/latest/{0..4}.png", "2021/contest/0.png", "2022/latest/0.png"], "folders that may be splits", False),
    ],
)  # fmt: skip
def test_hints_fit_what_is_there(tmp_path, paths, says, is_said):
    train, _ = opened(make(tmp_path, *paths))
    assert not train.num_classes
    assert any(says in note for note in train.contents.notes) == is_said
