"""The linear probe of a finished or a running run, on its own data or on others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hjepa_engine import Config, load_config, load_encoder
from hjepa_engine.build import build_model
from hjepa_engine.config.overrides import apply_overrides, overridden_keys
from hjepa_engine.data import open_split
from hjepa_engine.data.datasets import UNCHANGING_DATASETS
from hjepa_engine.data.folder import data_root
from hjepa_engine.data.split import Stats
from hjepa_engine.errors import ConfigError
from hjepa_engine.models import ContextEncoder, encoder_name
from hjepa_engine.recipes.common.gathering import ProbeData
from hjepa_engine.recipes.common.probe import evaluate_encoders, open_probe_data
from hjepa_engine.utils.files import replace_file

#: What can be given with a run to probe; all else is the run's own.
_FREE = ("data.", "probe.", "device", "seed", "logging.progress_bar")
_OWN = ("data.in_chans", "data.mean", "data.std")
#: What another data set does not take over from the run's, where it is not given too.
_RESET = {
    "data.dataset": {"data.class_path": "null", "data.hub_name": "null", "data.in_memory": "false"},
    "data.class_path": {"data.init_args": "{}", "data.in_memory": "false"},
    "data.data_path": {"data.hub_name": "null", "data.in_memory": "false"},
    **{key: {"data.in_memory": "false"} for key in ("data.train_dir", "data.val_dir", "data.hub_name")},
}
#: Keys that tell data sets apart.
_IDENTITY = ("dataset", "data_path", "train_dir", "val_dir", "labels", "hub_name", "image_column", "label_column")
#: Said of accuracies over one class.
ONE_CLASS = "all images are of one class: every prediction is right, and these figures mean nothing"


class ProbedRun(NamedTuple):
    """What :func:`probe_run` found."""

    config: Config
    results: dict[str, float]
    """Accuracies, from 0 to 1, by encoder."""
    data: str
    """The images, in words."""
    note: str | None
    """Why the accuracies mean nothing; None: they do."""
    path: Path | None
    """The file with the results; None: there is none."""
    notes: tuple[str, ...] = ()
    """What was resized or left out of an encoder of another project."""


class FrozenRun(NamedTuple):
    """What :func:`open_run` found."""

    before: Config
    """Of the run."""
    config: Config
    """The same with what was given."""
    encoders: dict[str, nn.Module | None]
    """``trained``; ``random``, with its initial weights; ``pixels``, None."""
    data: ProbeData
    """Labeled images."""


def open_run(folder: Path, checkpoint: str | None, overrides: Sequence[str]) -> FrozenRun:
    """The encoders of a run folder that are compared, and images with the channels and the normalization of the run.

    Arguments and errors are those of :func:`probe_run`.
    """
    before, config, trained, random = open_encoder(folder, checkpoint, overrides)
    return FrozenRun(before, config, {"trained": trained, "random": random, "pixels": None}, open_probe_data(config))


def open_encoder(
    folder: Path, checkpoint: str | None, overrides: Sequence[str]
) -> tuple[Config, Config, nn.Module, nn.Module | None]:
    """The configuration of a run, the same with what was given, its trained encoder, and that with initial weights.

    Arguments and errors are those of :func:`probe_run`.
    """
    _refuse_own_keys(overrides)
    saved = folder / "config.yaml"
    if not saved.is_file():
        load_encoder(folder, checkpoint)  # if there is none, that is what to say
    before = load_config(saved)
    config = load_config(saved, [*overrides, *_pinned(folder, before, overrides)])
    random = _initial_encoder(config)
    own = None if before.model.class_path is None else _initial_encoder(before)
    resized = config.data.size != before.data.size
    if resized and own is not None and not isinstance(own, ContextEncoder):
        height, width = before.data.size
        raise ConfigError(
            f"data.image_size must be the run's, {height} x {width}, for an encoder of your own, "
            f"got {config.data.image_size}"
        )
    encoder = load_encoder(folder, checkpoint, own, config.data.size if resized else None)
    return before, config, encoder, random


def probe_run(folder: Path, checkpoint: str | None, overrides: Sequence[str]) -> ProbedRun:
    """Probe the encoder of a run folder, on images with the channels and the normalization of the run.

    Results are written into ``linear_probe.json`` there, those on other data into files of their own.

    Args:
        folder: the run folder.
        checkpoint: see :func:`~hjepa_engine.load_encoder`.
        overrides: command-line overrides of the run's configuration: ``data`` and ``probe``, device, seed, progress bar.

    Raises:
        ConfigError: they name what is the run's own, or ask for images whose size the patches do not divide.
        DataError: the data cannot be opened, or have no labels.
        ExportError: there is no encoder.
    """
    before, config, encoders, data = open_run(folder, checkpoint, overrides)
    path = result_file(folder, before, config)
    log = path.stem.removeprefix("linear_")
    results = evaluate_encoders(config, encoders, folder, config.logging.progress_bar, data, log)
    found = ProbedRun(
        config, results, in_words(config, data), ONE_CLASS if data["probe"].num_classes == 1 else None, path
    )
    record = {
        "probe": asdict(config.probe),
        "checkpoint": checkpoint,
        "data": {**identity_of(config), "description": found.data},
        "accuracy": results,
        "note": found.note,
    }
    try:
        replace_file(path, json.dumps(record) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return found


def _refuse_own_keys(overrides: Sequence[str]) -> None:
    apply_overrides({}, overrides)  # keys that there are not are called that
    for key in overridden_keys(overrides):
        if not key.startswith(_FREE) or key in _OWN:
            raise ConfigError(
                f"{key} is the run's own and cannot be given; what can: data.* (but not in_chans, mean and std), probe.*, "
                "device, seed, logging.progress_bar"
            )


def _pinned(folder: Path, before: Config, overrides: Sequence[str]) -> list[str]:
    """Overrides that keep what is the run's (channels, normalization), and drop what is of its data set alone."""
    given = overridden_keys(overrides)
    mean, std = _stats(folder, before)
    reset = {key: value for cause in given for key, value in _RESET.get(cause, {}).items() if key not in given}
    pinned = {"in_chans": before.data.channels, "mean": list(mean), "std": list(std)}
    reset |= {f"data.{name}": json.dumps(value) for name, value in pinned.items()}
    # Folders of the run that lie among its images are none of them.
    return [f"{key}={value}" for key, value in {**reset, "run_dir": folder}.items()]


def _stats(folder: Path, config: Config) -> Stats:
    """The run's normalization: as it is written down, else that of its own data."""
    try:
        stats = json.loads((folder / "data.json").read_text(encoding="utf-8"))["stats"]
        return tuple(map(float, stats["mean"])), tuple(map(float, stats["std"]))
    except (OSError, ValueError, TypeError, LookupError):
        return open_split(config.data, "train", config.seed).stats


def _initial_encoder(config: Config) -> nn.Module | None:
    modules = build_model(config)
    name = encoder_name(config, modules)
    return None if name is None else modules[name]


def identity_of(config: Config) -> dict[str, Any]:
    """What tells data apart: equal ones have results in the same file."""
    data, values = config.data, asdict(config.data)
    if data.class_path is not None:
        found: dict[str, Any] = {"class_path": data.class_path, "init_args": data.init_args}
    elif data.dataset in UNCHANGING_DATASETS:
        found = {"dataset": data.dataset}
    else:
        found = {name: values[name] for name in _IDENTITY if values[name] is not None}
        if data.hub_name is None:
            found["data_path"] = str(data_root(data).resolve())
    return {**found, "image_size": list(data.size)}


def result_file(folder: Path, before: Config, config: Config, kind: str = "linear_probe") -> Path:
    """``<kind>.json`` for the run's own data; for others their name is added, and a digest where that is taken."""
    own, other = identity_of(before), identity_of(config)
    if own == other:
        return folder / f"{kind}.json"
    names = [str(other.get("class_path") or other["dataset"])]
    names += [Path(str(other[key])).name for key in ("hub_name", "data_path") if key in other]
    if own["image_size"] != other["image_size"]:
        names.append("x".join(map(str, other["image_size"])))
    name = re.sub(r"[^\w.-]+", "_", "_".join([kind, *names]))[:150]
    path = folder / f"{name}.json"
    try:
        taken = json.loads(path.read_text(encoding="utf-8"))["data"]
        taken.pop("description")
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return path
    if taken == other:
        return path
    digest = hashlib.blake2b(json.dumps(other, sort_keys=True).encode(), digest_size=4).hexdigest()
    return folder / f"{name}_{digest}.json"


def in_words(config: Config, data: ProbeData) -> str:
    """The images of a probe."""
    identity, (height, width) = identity_of(config), config.data.size
    where = identity.get("hub_name") or identity.get("data_path")
    name = f"{identity.get('class_path') or identity['dataset']}{f' in {where}' if where else ''}"
    name += "".join(f", {key} {identity[key]}" for key in ("train_dir", "val_dir") if key in identity)
    train, val = (len(data[split].images) for split in ("probe", "val"))
    classes = data["probe"].num_classes
    return f"{name}, {train} + {val} images of {classes} class{'' if classes == 1 else 'es'}, {height} x {width} pixels"
