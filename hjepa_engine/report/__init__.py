"""The report on a run: one HTML file, made from what lies in the run folder."""

from hjepa_engine.report.page import render, write_report, write_report_on_exit
from hjepa_engine.report.reading import RunData, Series, read_run
from hjepa_engine.report.verdict import Verdict, assess

__all__ = ["RunData", "Series", "Verdict", "assess", "read_run", "render", "write_report_on_exit", "write_report"]
