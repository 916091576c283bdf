"""The report on a run: one HTML file, made from what lies in the run folder."""

from hjepa_engine.report.page import render, reported, write_report
from hjepa_engine.report.reading import RunData, Series, read_run
from hjepa_engine.report.verdict import Verdict, judge

__all__ = ["RunData", "Series", "Verdict", "judge", "read_run", "render", "reported", "write_report"]
