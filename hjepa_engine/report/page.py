"""The page: what is in which section, the template that it is rendered with, and the file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ignite.distributed as idist
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hjepa_engine.errors import ForceQuit
from hjepa_engine.metrics.glossary import explain
from hjepa_engine.metrics.health import VERDICT_RULES
from hjepa_engine.report import sections
from hjepa_engine.report.answers import answers, commands
from hjepa_engine.report.charts import FRAME
from hjepa_engine.report.numbers import duration, number, when
from hjepa_engine.report.panels import section_charts
from hjepa_engine.report.reading import RunData, read_run
from hjepa_engine.report.verdict import assess
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.utils.files import replace_file

logger = logging.getLogger(__name__)

FILE = "report.html"


def write_report(run: Path, output: Path | None = None, others: Sequence[Path] = ()) -> Path:
    """Write the report on a run, which may be going on; where it is.

    Args:
        run: its folder.
        output: the file; ``report.html`` in the folder by default. Nobody sees it half written.
        others: folders of runs to compare it with.

    Raises:
        ConfigError: one of the folders holds no run.
        OSError: the file cannot be written.
    """
    data, *more = [read_run(path) for path in (run, *others)]
    path = output or run / FILE
    # Names of files may hold bytes that are no text.
    replace_file(path, render(data, more).encode("utf-8", "replace").decode())
    return path


@contextmanager
def write_report_on_exit(folder: RunFolder) -> Iterator[None]:
    """Write the report when a run has ended, however it did; that it cannot be written is no failure of the run."""
    try:
        yield
    except ForceQuit:  # waits for nothing
        raise
    except BaseException:
        _write_quietly(folder)
        raise
    _write_quietly(folder)


def _write_quietly(folder: RunFolder) -> None:
    if idist.get_rank() != 0 or not folder.config.logging.report:
        return
    try:
        write_report(folder.path)
    except Exception as error:
        logger.warning("%s was not written: %s", folder.path / FILE, " ".join(str(error).split()))


def render(run: RunData, others: Sequence[RunData] = (), refresh: int | None = None) -> str:
    """The page as a string that needs nothing else: no network, no other file.

    Args:
        run: what it is about.
        others: runs to compare it with.
        refresh: seconds after which a browser asks for the page again; None: never.
    """
    runs = named([run, *others])
    verdicts = {name: assess(each.series) for name, each in runs.items()}
    charts = section_charts(run)
    titles = {
        "Is it collapsing?": True,
        "Comparison": bool(others),
        **{name: bool(charts[name]) for name in ("Loss", "Collapse")},
        **{"Probes": True, "Evaluation": bool(run.evaluations), "Pictures": True},
        **{name: bool(charts[name]) for name in ("Optimization", "Speed and machine", "Other metrics")},
        **{"Checkpoints": True, "Configuration": True, "Environment": True},
    }
    style, script = (
        Markup(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")
    )
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            written=time.time(),
            sections=[title for title, present in titles.items() if present],
            charts=charts,
            refresh=refresh,
            verdict=(verdict := verdicts[next(iter(runs))]),
            answers=answers(run, verdict),
            commands=commands(run),
            comparison=sections.compare(runs, verdicts) if others else None,
            final_probes=sections.final_probe_rows(run),
            evaluations=sections.evaluations(run),
            online_probes=sections.online_probes(run),
            pictures=sections.pictures(run),
            checkpoints=sections.checkpoint_table(run.checkpoints, run.kept) if run.checkpoints else None,
            best_checkpoint=sections.best_checkpoint(run) if run.checkpoints else "",
            changed=None if run.config is None else sections.changed_keys(run.config),
            environment=sections.environment_rows(run),
            verdict_rules=VERDICT_RULES,
            style=style,
            script=script,
            frame=FRAME,
        )
    )


def _environment() -> Environment:
    """Templates whose values are escaped, and in which a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        anchor=_anchor,
        duration=duration,
        explain=lambda name: term.meaning if (term := explain(name)) else "",
        format_value=sections.format_value,
        number=number,
        sentence=lambda text: f"{text[:1].upper()}{text[1:]}.",
        thousands=lambda value: f"{value:,}",
        when=when,
    )
    return environment


def named(runs: Sequence[RunData]) -> dict[str, RunData]:
    """The runs by names that tell them apart: their own, their folders', or those with a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return dict(zip(names, runs, strict=True))


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalpha() else "-" for letter in title.lower()).strip("-")
