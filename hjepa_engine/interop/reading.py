"""Weights from whatever a path or a name leads to."""

from __future__ import annotations

from pathlib import Path

from hjepa_engine.checkpoint.storage import MANIFEST
from hjepa_engine.config.paths import is_timm_name
from hjepa_engine.interop import huggingface, meta, own, timm
from hjepa_engine.interop.source import ACCEPTED, Source, read_json, read_pickle, refuse

#: What is in a run folder, a folder of checkpoints, a checkpoint or an export.
_OF_RUNS = (MANIFEST, "status.json", "checkpoints", "encoder", huggingface.WEIGHTS)


def read_source(place: str) -> Source:
    """The weights that a path, or ``timm/NAME``, leads to.

    Nothing in a file is run, and nothing is downloaded. Collective: with several processes, all must call it.

    Raises:
        CheckpointError: there are none, or they are damaged; the message names the first key that is wrong.
    """
    if is_timm_name(place):
        return timm.read_timm_name(place)
    path = Path(place)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _in_file(path)
    raise refuse(place, f"there is no such file or folder; {ACCEPTED}")


def _in_folder(folder: Path) -> Source:
    if not (folder / MANIFEST).exists() and (folder / huggingface.CONFIG).is_file():
        config = read_json(folder / huggingface.CONFIG)
        if "model_type" in config:
            return huggingface.read_huggingface(folder, config)
        if "architecture" in config:
            return timm.read_timm_folder(folder, config)
    elif (folder / huggingface.INDEX).is_file() and not (folder / MANIFEST).exists():
        raise refuse(folder / huggingface.CONFIG, "is missing: it says whose weights lie beside it")
    if not any((folder / name).exists() for name in _OF_RUNS) and not any(folder.glob("epoch_*")):
        held = ", ".join(sorted(item.name for item in folder.iterdir())[:5]) or "nothing"
        raise refuse(folder, f"holds no checkpoint and no encoder, but {held}; {ACCEPTED}")
    return own.read_own(folder)


def _in_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        if path.name == huggingface.WEIGHTS and (path.parent / huggingface.CONFIG).is_file():
            return _in_folder(path.parent)
        return timm.read_timm_file(path)
    if path.suffix == ".json":
        raise refuse(path, f"is no file of weights; {ACCEPTED}")
    found = read_pickle(path)
    return meta.read_meta(path, found) if meta.is_meta(found) else timm.read_timm_file(path, found)
