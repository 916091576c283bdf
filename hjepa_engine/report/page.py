"""The page: its frame, the order of its parts, and the file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ignite.distributed as idist

from hjepa_engine.errors import ForceQuit
from hjepa_engine.report.markup import Markup, duration, element, join
from hjepa_engine.report.panels import section_charts
from hjepa_engine.report.reading import RunData, read_run
from hjepa_engine.report.sections import (
    checkpoint_section,
    comparison_section,
    config_section,
    environment_section,
    picture_section,
    probe_section,
    verdict_section,
    when,
)
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


def render(run: RunData, others: Sequence[RunData] = ()) -> str:
    """The page as a text that needs nothing else: no network, no other file."""
    runs = named([run, *others])
    verdicts = {name: assess(each.series) for name, each in runs.items()}
    charts = {
        name: [element("div", *drawn, class_="charts")] if drawn else [] for name, drawn in section_charts(run).items()
    }
    sections: dict[str, Sequence[str]] = {
        "Is it collapsing?": [verdict_section(verdicts[next(iter(runs))])],
        "Comparison": comparison_section(runs, verdicts) if others else [],
        "Loss": charts["Loss"],
        "Collapse": charts["Collapse"],
        "Probes": [*probe_section(run), *charts["Probes"]],
        "Pictures": picture_section(run),
        "Optimization": charts["Optimization"],
        "Speed and machine": charts["Speed and machine"],
        "Other metrics": charts["Other metrics"],
        "Checkpoints": checkpoint_section(run),
        "Configuration": config_section(run),
        "Environment": environment_section(run),
    }
    present = {title: parts for title, parts in sections.items() if parts}
    links = [element("a", title, href=f"#{_anchor(title)}") for title in present]
    body = [
        _header(run),
        element("nav", join(links, " ")),
        *(
            element("section", element("h2", title), *parts, id=_anchor(title), aria_label=title)
            for title, parts in present.items()
        ),
    ]
    return _frame(f"{run.name}: report", body)


def named(runs: Sequence[RunData]) -> dict[str, RunData]:
    """The runs by names that tell them apart: their own, their folders', or those with a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for place, name in enumerate(names, 1)]
    return dict(zip(names, runs, strict=True))


def _header(run: RunData) -> Markup:
    facts = [f"step {run.step:,}", f"epoch {run.epoch}"]
    if run.times:
        first, last = run.times
        facts += [f"{duration(last - first)} from the first to the last record", f"last record {when(last)}"]
    reason = str(run.status.get("reason") or "")
    code = run.status.get("exit_code")
    said = f"{reason} (exit code {code})" if reason and code else reason
    state = element("span", run.state, class_=f"state {run.state}")
    return element(
        "header",
        element("h1", run.name),
        element("p", join([state, *facts], " · ")),
        element("p", said) if said else Markup(""),
        element("p", f"{run.path}, report written {when(time.time())}", class_="note"),
    )


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalpha() else "-" for letter in title.lower()).strip("-")


def _frame(title: str, body: Sequence[Markup]) -> str:
    style, script = (
        Markup(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    ]
    page = element(
        "html", element("head", *head), element("body", element("main", *body), element("script", script)), lang="en"
    )
    return f"<!doctype html>\n{page}\n"
