"""Extraction: what is in a shard, and that a killed one ends with the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_probe_run import image_folder, run_folder

from hjepa_engine import load_config, load_encoder
from hjepa_engine.data import build_loader, open_split
from hjepa_engine.errors import ConfigError, DataError
from hjepa_engine.export import save_encoder
from hjepa_engine.interop.writing import export_encoder
from hjepa_engine.models import encoder_arguments
from hjepa_engine.recipes import extract

EXTRACT = "hjepa_engine.recipes.extract:main"
QUIET = "--logging.progress_bar=false"


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run", model__depth=2)


def words_for(run, output, *more):
    return ["--run", str(run), "--output", str(output), QUIET, *more]


def contents(folder):
    """Every file by its path in the folder, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder, split="val"):
    """All rows of a split: tensors by name, and the lines of the index."""
    shards = sorted((folder / split).iterdir())
    parts = [load_file(shard / "features.safetensors") for shard in shards]
    lines = [json.loads(line) for shard in shards for line in (shard / "index.jsonl").read_text().splitlines()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, lines


def test_shards_hold_what_the_encoder_says_of_each_image_in_order(run, tmp_path):
    extract.main(words_for(run, tmp_path / "out", "--shard_images=12", "--data.batch_size=5", "--layers", "1", "2"))
    found, lines = read(tmp_path / "out")
    config = load_config(run / "config.yaml", ["--data.mean=[0.1, 0.2, 0.3]", "--data.std=[0.4, 0.5, 0.6]"])
    split = open_split(config.data, "val", config.seed)
    (batch,) = build_loader(config.data, split, 0, train=False)
    encoder = load_encoder(run)
    first, second = (tokens.mean(1) for tokens in encoder.features(batch["images"], depths=(0.5, 0.9)))
    torch.testing.assert_close(found["last"], encoder(batch["images"]).mean(1))
    torch.testing.assert_close(found["block_1"], first)
    torch.testing.assert_close(found["block_2"], second)  # before the last norm
    assert [line["index"] for line in lines] == list(range(40))
    assert [line["label"] for line in lines] == batch["labels"].tolist()
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == [f"shard_{n:05d}" for n in range(4)]


def test_patches_of_levels_are_cells_and_npy_files_hold_the_same(run, tmp_path):
    more = ["--features=patches", "--levels", "--splits", "val"]
    extract.main(words_for(run, tmp_path / "one", *more))
    extract.main(words_for(run, tmp_path / "other", *more, "--format=npy"))
    found, _ = read(tmp_path / "one")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "last": (40, 36, 16),
        "level_0": (40, 36, 16),
        "level_1": (40, 9, 16),
    }
    torch.testing.assert_close(found["level_1"][:, 0], found["last"].view(40, 6, 6, 16)[:, :2, :2].mean((1, 2)))
    shard = tmp_path / "other" / "val" / "shard_00000"
    for name, tensor in found.items():
        assert np.array_equal(np.load(shard / f"{name}.npy"), tensor.numpy())
    assert not (tmp_path / "other" / "train").exists()


def test_an_exported_encoder_reads_a_folder_with_its_own_normalization(run, tmp_path):
    config = load_config(run / "config.yaml")
    stats = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    description = {"encoder": encoder_arguments(config), "stats": stats}
    save_encoder(load_encoder(run), tmp_path / "export", description)
    images = image_folder(tmp_path / "cats")
    more = ["--data", str(images), "--output"]
    extract.main(["--encoder", str(tmp_path / "export"), QUIET, *more, str(tmp_path / "one")])
    extract.main(["--run", str(run), QUIET, *more, str(tmp_path / "other")])
    found, lines = read(tmp_path / "one", "train")
    assert torch.equal(found["last"], read(tmp_path / "other", "train")[0]["last"])
    assert [line["label"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[0]["name"].endswith("cats/train/cat/0.png")
    record = json.loads((tmp_path / "one" / "extraction.json").read_text())
    assert record["classes"] == ["cat", "dog"] and record["stats"] == stats


def test_encoders_of_other_layouts_are_read_and_images_must_be_named(run, tmp_path):
    images = image_folder(tmp_path / "cats")
    words = [QUIET, "--splits=val", f"--data={images}", "--output"]
    extract.main(["--run", str(run), *words, str(tmp_path / "own")])
    wanted, _ = read(tmp_path / "own")
    for kind in ("timm", "huggingface"):
        place = export_encoder(run, kind, tmp_path / kind).path
        extract.main(["--encoder", str(place), *words, str(tmp_path / f"of_{kind}")])
        torch.testing.assert_close(read(tmp_path / f"of_{kind}")[0]["last"], wanted["last"])
    with pytest.raises(ConfigError, match=r"give --data or --data\.dataset"):
        extract.main(["--encoder", str(run / "encoder"), QUIET, "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kept", ["false", "true"])
def test_damaged_images_are_left_out_and_the_index_says_so(run, tmp_path, kept):
    """Also where a run keeps images in memory: one pass over them reads files."""
    images = image_folder(tmp_path / "cats")
    (images / "train" / "cat" / "1.png").write_bytes(b"broken")
    more = ["--data", str(images), "--shard_images=2", "--data.max_damaged=0.5", "--splits", "train"]
    more += ["--data.in_memory", kept]
    extract.main(words_for(run, tmp_path / "out", *more))
    found, lines = read(tmp_path / "out", "train")
    assert [line["index"] for line in lines] == [0, 2, 3, 4, 5, 6, 7] and len(found["last"]) == 7


def test_a_killed_extraction_goes_on_and_ends_with_the_bytes_of_one_that_was_not(server, run, tmp_path):
    more = ["--shard_images=6", "--data.batch_size=2", "--data.fake_size=300", "--features=patches"]
    extract.main(words_for(run, tmp_path / "whole", *more))
    output = tmp_path / "killed"
    kills = 0
    for wanted in (3, 20, 60):  # of 100 shards
        child = server.start(words_for(run, output, *more), tmp_path / f"stderr_{wanted}", EXTRACT)
        child.until(lambda wanted=wanted: len(list(output.glob("*/shard_*"))) >= wanted)
        os.kill(child.pid, signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        there = contents(output)
        # What is there under its own name is whole.
        whole = contents(tmp_path / "whole")
        assert all(
            whole[name] == data
            for name, data in there.items()
            if not name.rpartition("/")[2].startswith(".") and "/." not in name
        )
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*/shard_*")}
    assert kills == 3 and len(kept) >= 60
    (output / "train" / ".shard_00099.1").mkdir(exist_ok=True)  # a leaf of one that was killed
    extract.main(words_for(run, output, *more))
    assert contents(output) == contents(tmp_path / "whole") and len(contents(output)) == 201
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # those that were there were not written again
    assert not list(output.glob("*/.shard*"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layers", "3"], "--layers must be from 1 to 2, the blocks of the encoder, got 3"),
        (["--shard_images=0"], "--shard_images must be at least 1, got 0"),
        (["--encoder", "x"], "one of --run and --encoder must be given"),
        (["--model.depth=1"], "model.depth is the run's own"),
    ],
)
def test_what_cannot_be_extracted_is_one_line_and_leaves_nothing(run, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        extract.main(words_for(run, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_features_or_files_is_refused(run, tmp_path):
    extract.main(words_for(run, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds other features: dtype, shard_images differ; give a new folder"):
        extract.main(words_for(run, tmp_path / "out", "--dtype=float16", "--shard_images=3"))
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="--output must be a new folder or one that"):
        extract.main(words_for(run, run))


def test_a_shard_that_is_not_whole_is_done_again_and_a_whole_folder_is_called_complete(run, tmp_path, capsys):
    for kind, file in (("safetensors", "features.safetensors"), ("npy", "last.npy")):
        words = words_for(run, tmp_path / kind, f"--format={kind}", "--shard_images=10", "--splits=val", "--layers=1")
        extract.main(words)
        whole = contents(tmp_path / kind)
        assert "val: 4 shards written into" in capsys.readouterr().out
        shards = sorted((tmp_path / kind / "val").iterdir())
        (shards[0] / "index.jsonl").unlink()
        os.truncate(shards[1] / file, (shards[1] / file).stat().st_size - 5)
        os.truncate(shards[2] / "index.jsonl", (shards[2] / "index.jsonl").stat().st_size - 5)
        extract.main(words)
        assert "val: 3 shards written into" in capsys.readouterr().out and contents(tmp_path / kind) == whole
        (shards[3] / file).unlink()
        extract.main(words)
        assert "val: 1 shard written into" in capsys.readouterr().out and contents(tmp_path / kind) == whole
        extract.main(words)
        assert "val: complete, nothing to do in" in capsys.readouterr().out and contents(tmp_path / kind) == whole


def test_a_second_extraction_into_a_folder_that_is_in_use_is_one_line(run, tmp_path):
    program = "import sys; from pathlib import Path; from hjepa_engine.recipes.common.shards import locked\n"
    program += "with locked(Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"1\n"
        with pytest.raises(DataError, match=f"out is in use by process {child.pid} on ") as raised:
            extract.main(words_for(run, tmp_path / "out"))
        assert raised.value.exit_code == 3 and list(contents(tmp_path / "out")) == [".extraction.lock"]
        child.stdin.close()
        assert child.wait(20) == 0
    assert contents(tmp_path / "out") == {}
    extract.main(words_for(run, tmp_path / "out"))


def test_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hjepa_engine.recipes.common.shards.write_file", full)
    with pytest.raises(DataError, match=r"shard_00000 cannot be written: No space left on device"):
        extract.main(words_for(run, tmp_path / "out"))
