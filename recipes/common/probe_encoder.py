"""The linear probe of an encoder that is no run's: of another project, or an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hjepa_engine import Config, load_config
from hjepa_engine.config.overrides import apply_overrides, overridden_keys
from hjepa_engine.errors import ConfigError
from hjepa_engine.interop.building import arguments_of, plan_encoder
from hjepa_engine.interop.reading import read_source
from hjepa_engine.interop.source import IMAGENET, Source
from hjepa_engine.models import TargetEncoder
from hjepa_engine.recipes.common.probe import evaluate_encoders, open_probe_data
from hjepa_engine.recipes.common.probe_run import ONE_CLASS, ProbedRun, in_words
from hjepa_engine.utils.files import replace_file
from hjepa_engine.utils.rng import derive_seed

#: What can be given with an encoder to probe; all else is its own, or of training.
_FREE = ("data.", "probe.", "device", "seed", "logging.progress_bar", "model.num_heads")

#: The sizes of the configuration's own encoder have no say.
_NO_SIZES = ("--model.patch_size=null", "--model.embed_dim=null")


def probe_encoder(place: str, overrides: Sequence[str], output: Path | None = None) -> ProbedRun:
    """Probe an encoder, with its own normalization and image size where they are known and not given.

    Args:
        place: see :func:`~hjepa_engine.interop.reading.read_source`.
        overrides: command-line overrides of the defaults: ``data`` and ``probe``, device, seed, progress bar, and
            ``model.num_heads`` where a file does not say.
        output: folder for ``linear_probe.json`` and the logs of the probes; None: nothing is written.

    Raises:
        CheckpointError: there is no encoder.
        ConfigError: the overrides name something else, or images whose size the patches do not divide.
        DataError: the data cannot be opened, or have no labels.
    """
    config, source, encoder, notes = open_foreign(place, overrides, _FREE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        untrained = TargetEncoder(**encoder.arguments).requires_grad_(False).eval()
    encoders = {"trained": encoder, "random": untrained, "pixels": None}
    data = open_probe_data(config)
    path = None if output is None else output / "linear_probe.json"
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written to: {error.strerror}") from error
    results = evaluate_encoders(config, encoders, output, config.logging.progress_bar, data)
    note = ONE_CLASS if data["probe"].num_classes == 1 else None
    found = ProbedRun(config, results, in_words(config, data), note, path, notes)
    if path is not None:
        record = {"probe": asdict(config.probe), "encoder": source.where, "data": found.data, "accuracy": results}
        replace_file(path, json.dumps({**record, "note": note, "notes": list(notes)}) + "\n")
    return found


class Foreign(NamedTuple):
    """What :func:`open_foreign` found."""

    config: Config
    source: Source
    encoder: TargetEncoder
    notes: tuple[str, ...]
    """What was left out or resized, in words."""


def open_foreign(place: str, overrides: Sequence[str], free: tuple[str, ...]) -> Foreign:
    """An encoder that is no run's, and a configuration of images with its channels, normalization and size.

    Args:
        place: see :func:`~hjepa_engine.interop.reading.read_source`.
        overrides: command-line overrides of the defaults.
        free: how the keys begin that can be given.

    Raises:
        CheckpointError: there is no encoder.
        ConfigError: the overrides name something else, or images whose size the patches do not divide.
    """
    given = _checked(overrides, free)
    source = read_source(place)
    weights = source.parts.get("target_encoder", {})
    first = [name for name in weights if name.startswith("vit.patch_embed.proj") and weights[name].ndim == 4]
    patches = weights[first[0]] if first else torch.empty(1, 3, 1, 1)  # of a conv stem, its first convolution
    # What is given for each channel is checked against the encoder's.
    asked = load_config(None, [*_NO_SIZES, f"--data.in_chans={patches.shape[1]}", *overrides])
    resized = asked.data.size if "data.image_size" in given else None
    arguments = arguments_of(source, resized, asked.model.num_heads if "model.num_heads" in given else None)
    config = _with_own(source, arguments, overrides, given)
    own = arguments.get("patch_size", patches.shape[2:])
    for side, patch in zip(config.data.size, [own, own] if isinstance(own, int) else own, strict=True):
        if side % patch:
            size = " x ".join(map(str, config.data.size))
            raise ConfigError(
                f"data.image_size must be a multiple of the patches of {source.where} ({patch}), got {size}"
            )
    encoder, plan = plan_encoder(source, arguments)
    plan.apply()
    return Foreign(config, source, encoder, plan.notes)


def _checked(overrides: Sequence[str], free: tuple[str, ...]) -> list[str]:
    apply_overrides({}, overrides)  # keys that there are not are called that
    given = overridden_keys(overrides)
    for key in given:
        if not key.startswith(free) or key == "data.in_chans":
            known = ", ".join(f"{key}*" if key.endswith(".") else key for key in free)
            raise ConfigError(
                f"{key} is the encoder's own or of training, and cannot be given; what can: "
                f"{known.replace('data.*', 'data.* (but not in_chans)')}"
            )
    return given


def _with_own(source: Source, arguments: Mapping[str, Any], overrides: Sequence[str], given: Sequence[str]) -> Config:
    """The configuration with what is the encoder's own: channels, and what was not given of normalization and size."""
    size, channels = arguments["img_size"], arguments.get("in_chans", 3)
    own = {"data.in_chans": channels, "data.image_size": [size, size] if isinstance(size, int) else list(size)}
    stats = source.stats or IMAGENET
    if any(len(values) != channels for values in stats):  # of ImageNet, or of the encoder that this one was made from
        if not {"data.mean", "data.std"} <= set(given):
            raise ConfigError(
                f"data.mean and data.std must be given: {source.where} does not say how its images are normalized"
            )
    else:
        own |= {"data.mean": list(stats[0]), "data.std": list(stats[1])}
    # The last one counts: what was given stays.
    return load_config(None, [*_NO_SIZES, *(f"--{key}={json.dumps(value)}" for key, value in own.items()), *overrides])
