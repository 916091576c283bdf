"""Image folders that recipes/pack.py has packed."""

import errno
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from resuming import RICH, assert_same, outcome, train

from hjepa_engine.config.schema import DataConfig
from hjepa_engine.data import open_split, packing
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.recipes.pack import main


def folder(root, number=20, splits=("train", "val"), size=(30, 24), ending="png"):
    """Images of noise in two classes; image i of a class is of one value."""
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(number // 2):
                seed = index + 100 * len(split + name)
                pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:03}.{ending}")
    return root


def config(path, kind="packed", **values):
    return DataConfig(dataset=kind, data_path=str(path), batch_size=4, **values)


def pixels_of(split):
    found = [split.images[index] for index in range(len(split.images))]
    return [(np.asarray(image).tobytes(), label) for image, label in found]


@pytest.mark.parametrize("splits", [("train", "val"), ("",)])
@pytest.mark.parametrize("workers", [0, 2])
def test_packed_images_are_those_of_the_folder_in_their_order_and_split(tmp_path, splits, workers):
    source = folder(tmp_path / "src", 60, splits, size=(200, 150))
    main([str(source), str(tmp_path / "dst"), "--shard_mb", "1", "--workers", str(workers)])
    assert len(list((tmp_path / "dst").glob("train-*.arrow"))) > 1
    for name in ("train", "val"):
        packed, files = open_split(config(tmp_path / "dst"), name), open_split(config(source, "imagefolder"), name)
        assert packed.classes == files.classes == ("cat", "dog")
        assert pixels_of(packed) == pixels_of(files)
        assert files.name_of(3).endswith(packed.name_of(3))


def test_a_run_on_packed_images_has_the_bits_of_one_on_the_folder_and_resumes_inside_an_epoch(tmp_path):
    source = folder(tmp_path / "src", 20)
    main([str(source), str(tmp_path / "dst")])
    values = {**RICH, "training.epochs": 2}
    files = {**values, "data.dataset": "imagefolder", "data.data_path": str(source)}
    packed = {**values, "data.dataset": "packed", "data.data_path": str(tmp_path / "dst")}
    whole = outcome(train(tmp_path / "files", files))
    assert_same(outcome(train(tmp_path / "packed", packed)), whole)
    train(tmp_path / "halves", packed, stop=7)
    assert_same(outcome(train(tmp_path / "halves", {**packed, "data.num_workers": 1})), whole)


def test_larger_images_are_made_smaller_and_smaller_ones_keep_their_bytes(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    gradient = np.add.outer(np.arange(200), np.arange(300))
    Image.fromarray((gradient // 2).astype(np.uint8)).convert("RGB").save(source / "a.jpg", quality=95)
    Image.fromarray((gradient * 100).astype(np.uint16)).save(source / "b.png")
    Image.new("RGB", (300, 40)).save(source / "c.png")
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.new("RGB", (300, 200)).save(source / "d.jpg", exif=upright)
    main([str(source), str(tmp_path / "dst"), "--size", "50"])
    rows = datasets.Dataset.from_file(str(tmp_path / "dst" / "train-00000.arrow"))
    a, b, c, d = (row["image"] for row in rows)
    assert (a.format, a.size, b.format, b.mode, b.size) == ("JPEG", (75, 50), "PNG", "I;16", (75, 50))
    assert abs(np.asarray(b).astype(int)[25, 37] - (102 + 150) * 100) < 600
    assert abs(np.asarray(a).astype(int)[25, 37, 0] - (102 + 150) // 2) < 4
    raw = rows.cast_column("image", datasets.Image(decode=False))[2]["image"]
    assert c.size == (300, 40) and raw["bytes"] == (source / "c.png").read_bytes()
    assert d.size == (50, 75)


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


def test_damaged_files_are_listed_and_not_packed(tmp_path, capsys):
    source = folder(tmp_path / "src")
    damage(source / "train" / "cat" / "003.png")
    main([str(source), str(tmp_path / "dst")])
    assert "packed 39 images" in (out := capsys.readouterr().out) and "1 damaged ones are listed in" in out
    assert (tmp_path / "dst" / "damaged.txt").read_text().startswith("train/cat/003.png: ")
    assert len(open_split(config(tmp_path / "dst"), "train").images) == 19
    for path in source.rglob("*.png"):
        damage(path)
    with pytest.raises(DataError, match=r"all 40 images are damaged: see .*damaged\.txt"):
        main([str(source), str(tmp_path / "all")])


def test_packing_that_was_stopped_anywhere_goes_on_with_the_same_result(tmp_path, monkeypatch):
    source = folder(tmp_path / "src", 60, size=(200, 150))
    damage(source / "train" / "dog" / "025.png")
    command = [str(source), str(tmp_path / "dst"), "--shard_mb", "1"]
    write, shards = packing._write_shard, []

    def stop(*args):
        shards.append(args[3].name)
        if len(shards) % 2 == 0:  # as if killed while it is written
            (tmp_path / "dst" / f".{args[3].name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(packing, "_write_shard", stop)
    for _ in range(20):
        try:
            main(command)
            break
        except KeyboardInterrupt:
            with pytest.raises(DataError, match="packing was not finished"):
                open_split(config(tmp_path / "dst"), "train")
    assert len(set(shards)) > 4
    monkeypatch.undo()
    main([str(source), str(tmp_path / "whole"), "--shard_mb", "1"])
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == names
    for name in names:
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    source = folder(tmp_path / "src")

    def fail(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.arrow_writer.ArrowWriter.finalize", fail)
        with pytest.raises(DataError, match=r"dst.*: No space left on device"):
            main([str(source), str(tmp_path / "dst")])
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["pack.json"]
    main([str(source), str(tmp_path / "dst")])


def test_what_does_not_fit_together_is_refused_by_name(tmp_path):
    source = folder(tmp_path / "src")
    main([str(source), str(tmp_path / "dst")])
    main([str(source), str(tmp_path / "dst")])  # nothing left to do
    with pytest.raises(ConfigError, match=r"--size must be None, with which .* was begun, got 20"):
        main([str(source), str(tmp_path / "dst"), "--size", "20"])
    with pytest.raises(ConfigError, match=r"DST must be neither in SRC nor around it"):
        main([str(source), str(source / "packed")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(ConfigError, match=r"must be empty, or begun by the same command, but holds letter\.txt"):
        main([str(source), str(tmp_path / "full")])
    with pytest.raises(ConfigError, match=r"--quality must be from 1 to 95, got 0"):
        main([str(source), str(tmp_path / "new"), "--quality", "0"])
    Image.new("RGB", (9, 9)).save(source / "train" / "cat" / "new.png")
    with pytest.raises(ConfigError, match=r"SRC has other images than when .* was begun"):
        main([str(source), str(tmp_path / "dst")])


def test_a_packed_folder_that_is_not_as_it_was_packed_is_refused(tmp_path):
    main([str(folder(tmp_path / "src")), str(tmp_path / "dst")])
    with (tmp_path / "dst" / "train-00000.arrow").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train-00000\.arrow has \d+ bytes, had \d+ when it was packed"):
        open_split(config(tmp_path / "dst"), "train")
    assert json.loads((tmp_path / "dst" / "pack.json").read_text())["damaged"] == 0
    (tmp_path / "dst" / "train-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"dst: .*train-00000\.arrow"):
        open_split(config(tmp_path / "dst"), "train")
    with pytest.raises(DataError, match=r"no packed images: there is no pack\.json"):
        open_split(config(tmp_path / "src"), "train")
