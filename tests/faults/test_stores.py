"""Runs over every store of data that are killed and stopped inside an epoch: the same command completes them."""

import io
import os
import signal

import numpy as np
import pytest
from helpers import mostly_slow
from PIL import Image
from witness import checkpoints_of, command, is_same, outcome, strays_in, witnessed

from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.recipes import pretrain

CLASSES = ["cat", "dog"]
OWN = """
import numpy as np


class Labeled(list):
    classes = ("cat", "dog")


def noise(split):
    generator = np.random.default_rng(split == "val")
    images = generator.integers(0, 256, ({"train": 40, "val": 16}[split], 24, 30, 3), dtype=np.uint8)
    return Labeled((image, index % 2) for index, image in enumerate(images))
"""


def noise(number, seed):
    """PNG files of noise."""
    for pixels in np.random.default_rng(seed).integers(0, 256, (number, 24, 30, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield buffer.getvalue()


def tables():
    import datasets  # here, as this module is imported by the runs too

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for seed, (name, number) in enumerate({"train": 40, "validation": 16}.items()):
        images = [{"bytes": content, "path": None} for content in noise(number, seed)]
        columns = {"image": images, "label": [index % 2 for index in range(number)]}
        yield name, datasets.Dataset.from_dict(columns, features)


def saved(root):
    import datasets

    datasets.DatasetDict(dict(tables())).save_to_disk(root / "set")


def arrow(root):
    (root / "set").mkdir()
    for name, table in tables():
        table.save_to_disk(root / name)
        (root / name / "data-00000-of-00001.arrow").rename(root / "set" / f"x-{name}-00000-of-00001.arrow")


def parquet(root):
    (root / "set").mkdir()
    for name, table in tables():
        table.to_parquet(root / "set" / f"{name}-00000-of-00001.parquet")


def images(root, name="set"):
    for seed, (split, number) in enumerate({"train": 40, "validation": 16}.items()):
        for index, content in enumerate(noise(number, seed)):
            path = root / name / split / CLASSES[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def packed(root):
    from hjepa_engine.recipes.pack import main as pack

    images(root, "files")
    pack([str(root / "files"), str(root / "set")])


def own(root):
    (root / "own_noise.py").write_text(OWN)


FOLDER = {"data__dataset": "huggingface", "data__data_path": "set"}
#: How a store is made, and the options of a run over it.
STORES = {
    "saved": (saved, FOLDER),
    "arrow": (arrow, FOLDER),
    "parquet": (parquet, FOLDER),
    "images": (images, FOLDER),
    "packed": (packed, {**FOLDER, "data__dataset": "packed"}),
    "in_memory": (packed, {**FOLDER, "data__dataset": "packed", "data__in_memory": True}),
    "class_path": (own, {"data__class_path": "own_noise.noise"}),
}


def offline(argv):
    """A child's body: a run without a network whose library ``datasets`` keeps its cache in ``argv[0]``."""
    os.environ |= {"HF_HOME": argv[0], "HF_HUB_OFFLINE": "1"}
    pretrain.main(argv[1:])


# Those left out are opened as saved, and converted as parquet; batches out of memory are resumed elsewhere, too.
@pytest.mark.parametrize("store", mostly_slow(STORES, ("saved", "parquet", "packed", "class_path")))
def test_a_run_over_any_store_that_is_killed_and_stopped_inside_epochs_ends_with_the_same_bits(server, tmp_path, store):
    make, values = STORES[store]
    make(tmp_path)

    def start(run, **changes):
        arguments = command(tmp_path / run, **values, **changes)
        stderr = tmp_path / f"{run}.err"
        return server.start([str(tmp_path / "home"), *arguments], stderr, f"{__name__}:offline", folder=tmp_path)

    def started_until(iteration):
        """A run with loader processes; it is inside the epoch, behind ``iteration`` and a checkpoint."""
        child = start("run", data__num_workers=2, pause=0.3)
        child.until(lambda: trained(run) >= iteration)
        child.until(lambda: newest(run) == iteration - iteration % 4)
        return child

    run = tmp_path / "run"
    child = started_until(8)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert newest(run) == 8
    child = started_until(13)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75, child.said
    assert "resumed step 8 (iteration 8 of 15)" in child.printed
    assert newest(run) in (13, 14)
    child = start("run")
    assert child.wait() == 0, child.said
    whole = start("whole")
    assert whole.wait() == 0, whole.said
    assert is_same(outcome(run), outcome(tmp_path / "whole"))
    assert checkpoints_of(run)[1] == [] and strays_in(run) == [] and server.orphans(10) == []


def trained(run):
    return max((record["iteration"] for record in witnessed(run, "trained")), default=0)


def newest(run):
    """The iteration of the newest checkpoint."""
    return next((checkpoint.record.iteration for checkpoint in list_checkpoints(run / "checkpoints")), None)
