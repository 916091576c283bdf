"""A run folder as data, even if files are missing, damaged or being written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hjepa_engine.build import build_policy
from hjepa_engine.checkpoint.folder import checkpoint_folders, list_checkpoints
from hjepa_engine.checkpoint.retention import RetentionPolicy
from hjepa_engine.checkpoint.storage import Checkpoint
from hjepa_engine.config.loading import load_config
from hjepa_engine.config.schema import Config
from hjepa_engine.errors import CheckpointError, ConfigError

_SIGNS_OF_A_RUN = ("metrics.jsonl", "status.json", "config.yaml")
_NOT_METRICS = ("step", "epoch", "time")
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Series(NamedTuple):
    """A metric over optimizer steps, in the order of the file; what was not finite is NaN."""

    steps: list[int]
    values: list[float]

    def finite(self) -> Series:
        """The finite values alone."""
        kept = [(step, value) for step, value in zip(*self, strict=True) if math.isfinite(value)]
        return Series([step for step, _ in kept], [value for _, value in kept])


class Picture(NamedTuple):
    """A PNG file, named ``<name>_<step>.png``."""

    name: str
    step: int
    path: Path


class FinalProbe(NamedTuple):
    """A linear probe after training."""

    accuracy: dict[str, float]
    """From 0 to 1, by what it was trained on."""
    data: str
    """Which images, and what else differs from the probe at the end of the run."""
    is_own: bool
    """Whether they are the run's own images."""


@dataclass(frozen=True)
class RunData:
    """The data of a report on one run."""

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    """As in ``status.json``; empty where there is none."""
    environment: dict[str, Any] = field(default_factory=dict)
    """As in ``environment.json``."""
    config: Config | None = None
    """None where there is none, or none that this version can read."""
    config_text: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    """Metrics by name."""
    spectra: dict[str, dict[int, Series]] = field(default_factory=dict)
    """Shares of the singular values over their ranks, by name and optimizer step."""
    step: int = 0
    """Of the last record, or of the status if that is later."""
    epoch: int = 0
    times: tuple[float, float] | None = None
    """Of the first and the last record, in seconds since 1970."""
    pictures: list[Picture] = field(default_factory=list)
    """In the order of their names and steps."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    """Newest first."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Why each is kept, by its name."""
    probes: list[FinalProbe] = field(default_factory=list)
    """Linear probes: at the end of the run, then those that were run by hand."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Records of ``recipes/evaluate.py``, that of the run's own images first."""

    @property
    def probe(self) -> dict[str, float]:
        """Accuracies of the linear probe on the run's own data: ``trained``, ``random``, ``pixels``."""
        return next((probe.accuracy for probe in self.probes if probe.is_own), {})

    @property
    def name(self) -> str:
        """Of the run: ``logging.experiment_name``, or of its folder."""
        return self.config.logging.experiment_name if self.config else self.path.resolve().name

    @property
    def state(self) -> str:
        """``running``, ``done``, ``stopped``, ``preempted`` or ``unknown``."""
        return str(self.status.get("state", "unknown"))


def read_run(path: Path) -> RunData:
    """Read a run folder; the run may be going on.

    Raises:
        ConfigError: it is no run folder.
    """
    try:
        is_run = any((path / name).is_file() for name in _SIGNS_OF_A_RUN)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not is_run:
        what = "has none of " + ", ".join(_SIGNS_OF_A_RUN) if path.is_dir() else "is no folder"
        raise ConfigError(f"{path} is no run folder: it {what}")
    status, records = _read_object(path / "status.json"), _read_records(path / "metrics.jsonl")
    config_text, config = _read_text(path / "config.yaml"), None
    with suppress(ConfigError, OSError, ValueError):
        config = load_config(path / "config.yaml")
    series, spectra = collect(records)
    times = [float(record["time"]) for record in records if isinstance(record.get("time"), (int, float))]
    checkpoints = _read_checkpoints(path)
    policy = build_policy(config) if config else RetentionPolicy()
    return RunData(
        path,
        status,
        _read_object(path / "environment.json"),
        config,
        config_text,
        series,
        spectra,
        max([_whole(status.get("step")), *(_whole(record.get("step")) for record in records)]),
        max([0, *(_whole(record.get("epoch")) for record in records)]),
        (times[0], times[-1]) if times else None,
        _find_pictures(path),
        checkpoints,
        policy([checkpoint.record for checkpoint in checkpoints]),
        _read_probes(path, status),
        [record for file in sorted(path.glob("evaluation*.json")) if (record := _read_object(file))],
    )


def collect(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Series], dict[str, dict[int, Series]]]:
    """The numbers of all records by name, and the spectra by name and step."""
    series: dict[str, Series] = {}
    spectra: dict[str, dict[int, Series]] = {}
    for record in records:
        step = _whole(record.get("step"))
        for name, value in record.items():
            if name in _NOT_METRICS:
                continue
            if value is None or isinstance(value, (int, float)):
                steps, values = series.setdefault(name, Series([], []))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
            elif isinstance(value, dict) and _is_numbers(value.get("rank")) and _is_numbers(value.get("share")):
                spectra.setdefault(name, {})[step] = Series(value["rank"], value["share"])
    return series, spectra


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_object(path: Path) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(_read_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``; the last line of a run that is going on may be half written."""
    records = []
    for line in _read_text(path).splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def _find_pictures(path: Path) -> list[Picture]:
    """Those in ``figures/``, and those of ``media/`` that have another name."""
    found: list[Picture] = []
    for folder in ("figures", "media"):
        names = {picture.name for picture in found}
        for file in sorted((path / folder).glob("*.png")):
            match = re.fullmatch(r"(.+)_(\d{8,})\.png", file.name)
            if match and not any(match[1] == name or match[1].endswith(f"_{name}") for name in names):
                found.append(Picture(match[1], int(match[2]), file))
    return found


def read_picture(path: Path) -> bytes | None:
    """The bytes of a PNG file; None where it is gone, or not written to its end."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if data.startswith(_PNG_START) and data.endswith(_PNG_END) else None


def _read_checkpoints(path: Path) -> list[Checkpoint]:
    with suppress(CheckpointError, OSError):
        for folder in checkpoint_folders(path):
            if found := list_checkpoints(folder):
                return found
    return []


def _read_probes(path: Path, status: Mapping[str, Any]) -> list[FinalProbe]:
    """Of the end of the run, and of those that were run by hand, whose data and settings may differ."""
    found = [FinalProbe(_accuracies(status.get("results")), "the run's own", True)]
    for file in sorted(path.glob("linear_probe*.json"), key=lambda file: file.stem):
        record = _read_object(file)
        data, settings = (value if isinstance(value := record.get(key), dict) else {} for key in ("data", "probe"))
        parts = [str(data.get("description", "the run's own"))]
        if settings.get("features") == "concat":
            parts.append("concatenated tokens")
        if labels := settings.get("labels_per_class"):
            parts.append(f"{labels} labels per class")
        if checkpoint := record.get("checkpoint"):
            parts.append(f"checkpoint {checkpoint}")
        if note := record.get("note"):
            parts.append(str(note))
        is_own = file.name == "linear_probe.json"
        found.append(FinalProbe(_accuracies(record.get("accuracy")), "; ".join(parts), is_own))
    return [probe for probe in found if probe.accuracy]


def _accuracies(results: Any) -> dict[str, float]:
    values = results.items() if isinstance(results, dict) else ()
    return {name: float(value) for name, value in values if isinstance(value, (int, float))}
