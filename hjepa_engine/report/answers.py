"""The first screen of a report: is it healthy, how good is it, which checkpoint, what to do next."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from hjepa_engine.report import sections
from hjepa_engine.report.reading import RunData
from hjepa_engine.report.verdict import Verdict


class Answer(NamedTuple):
    """A question, its answer in a few words, and a sentence more."""

    question: str
    answer: str
    detail: str
    level: str = ""
    """Of a verdict, for its color."""


class Command(NamedTuple):
    """A command to go on with, and what it does."""

    purpose: str
    text: str


def answers(run: RunData, verdict: Verdict) -> list[Answer]:
    """What a reader wants to know first."""
    return [Answer("Is it healthy?", verdict.level, verdict.headline, verdict.level), _quality(run), _checkpoint(run)]


def _quality(run: RunData) -> Answer:
    question = "How good is it?"
    if "trained" in run.probe:
        others = {"random": "a random encoder", "pixels": "raw pixels"}
        known = [f"{words} {100 * run.probe[key]:.1f} %" for key, words in others.items() if key in run.probe]
        detail = f"linear probe of the frozen encoder; {', '.join(known)}" if known else "linear probe"
        return Answer(question, f"{100 * run.probe['trained']:.1f} %", f"Accuracy of the {detail}.")
    if probes := sections.online_probes(run):
        probe = probes[-1]
        before = f"before training {100 * probe.first[0]:.1f} %" if probe.first[1] == 0 else ""
        detail = "; ".join(filter(None, [f"Accuracy of the probe ({probe.title}) at step {probe.newest[1]:,}", before]))
        return Answer(question, f"{100 * probe.newest[0]:.1f} %", f"{detail}.")
    return Answer(question, "not measured", "No probe has run: hjepa evaluate measures the encoder.")


def _checkpoint(run: RunData) -> Answer:
    question = "Which checkpoint?"
    if not run.checkpoints:
        return Answer(question, "none", "Nothing has been saved yet.")
    newest = run.checkpoints[0].record.name
    best = sections.best_record(run)
    if best is None:
        return Answer(question, newest, "The newest; none has a score yet.")
    if best.name == newest:
        return Answer(question, newest, f"The newest, and the best by {run.checkpoints[0].metric}.")
    return Answer(question, best.name, f"The best by {run.checkpoints[0].metric}; the newest is {newest}.")


def commands(run: RunData) -> list[Command]:
    """What can be done next with the run, as it can be pasted into a shell."""
    path = shlex.quote(str(run.path))
    found = []
    if run.state not in ("done", "running") and run.config_text:
        config = shlex.quote(str(run.path / "config.yaml"))
        found.append(Command("Go on", f"hjepa pretrain --config {config} --run_dir {path}"))
    if run.state == "running":
        found.append(Command("Watch", f"hjepa report --run {path} --serve"))
    if run.checkpoints or run.state == "done":
        found.append(Command("Evaluate", f"hjepa evaluate --run {path}"))
        is_plain = run.config is None or (run.config.model.stem, run.config.model.class_path) == ("patch", None)
        found.append(Command("Export", f"hjepa export --run {path} --format {'timm' if is_plain else 'safetensors'}"))
    return found
