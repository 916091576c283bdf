"""The report: what it reads, what it says, and that it is one file that needs nothing else."""

import base64
import configparser
import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import ROOT, save_state, tiny_config
from jinja2 import UndefinedError

from hjepa_engine import Config, TrainEvents, dump_config, load_config
from hjepa_engine.errors import ForceQuit, GuardStop
from hjepa_engine.metrics.health import (
    ADVICE,
    COLLAPSED_SCALE,
    COLLAPSED_SHARE,
    DISAGREEMENT,
    FALLEN_SHARE,
    LOW_SCALE,
)
from hjepa_engine.recipes import checkpoints, report
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.report import assess, read_run, write_report, write_report_on_exit
from hjepa_engine.report.charts import Line, chart, log_ticks, thin, ticks
from hjepa_engine.report.page import _environment
from hjepa_engine.report.reading import Series, collect
from hjepa_engine.run.cli import run_command
from hjepa_engine.run.folder import RunFolder

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SECTIONS = ["Is it collapsing?", "Loss", "Collapse", "Probes", "Pictures", "Optimization", "Speed and machine"]
SECTIONS_AT_END = ["Checkpoints", "Configuration", "Environment"]
EMPTY_ELEMENTS = ("meta", "img", "line", "path", "circle", "rect")


class Page(HTMLParser):
    """A parsed page: its texts, tags with attributes, and what it would load."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.open, self.headings, self.charts, self.cells = [], [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["style"], ["script"]):
            return
        self.texts.append(data)
        for name, found in (("h2", self.headings), ("figcaption", self.charts), ("td", self.cells)):
            if self.open[-1:] == [name]:
                found.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    @property
    def links(self):
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background")
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]

    @property
    def curves(self):
        """The points of every curve, by the name of the curve."""
        return [
            (attributes["aria-label"], [point.split(":") for point in attributes["data-points"].split()])
            for tag, attributes in self.tags
            if tag == "path" and "data-points" in attributes
        ]


def page_of(run, *others):
    return Page(write_report(run, others=others).read_text(encoding="utf-8"))


def write_run(folder, records=(), status=None, config=None, end="\n"):
    """A run folder with these records."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": 0, "epoch": 0, "time": 1000.0, **record}) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    if config is not None:
        (folder / "config.yaml").write_text(dump_config(config))
    return folder


def over(**metrics):
    """Series whose values are at the steps 0, 100, 200, ..."""
    names = {name.replace("__", "/"): values for name, values in metrics.items()}
    return {name: Series([100 * n for n in range(len(values))], list(values)) for name, values in names.items()}


HEALTHY = {
    "collapse__target_rank_share": [0.43, 0.33, 0.27],
    "collapse__target_std": [0.92, 0.9, 0.9],
    "collapse__target_norm": [7.9, 7.9, 8.0],
    "collapse__context_rank_share": [0.43, 0.3, 0.25],
    "collapse__context_std": [0.92, 0.88, 0.91],
    "collapse__batch_target_rank_share": [0.43, 0.35, 0.29],
    "train__loss": [0.8, 0.6, 0.5],
    "probe__knn": [0.4, 0.6, 0.7],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a real run with an online probe and its linear probe."""
    folder = tmp_path_factory.mktemp("report") / "run"
    config = tiny_config(
        run_dir=folder,
        logging__experiment_name="tiny & <quick>",
        logging__report="true",
        collapse__every=4,
        collapse__images=8,
        collapse__batch_every=2,
        online_probe__every=1,
        online_probe__train_images=16,
        online_probe__val_images=8,
        online_probe__linear_epochs=1,
        probe__epochs=1,
    )
    build(config).fit()
    return folder


# The page


def test_a_finished_run_has_left_a_report_with_all_sections(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert [name for name in page.headings if name != "Other metrics"] == [*SECTIONS, *SECTIONS_AT_END]
    assert "tiny & <quick>" in page.texts and "done" in page.texts
    for title in ("Loss", "Loss of each level", "Rank share", "Standard deviation", "Norm of centered features"):
        assert title in page.charts
    for title in ("Accuracy of probes", "Learning rate", "Gradient norm", "Images per second", "Spectrum: target"):
        assert title in page.charts
    assert {"trained encoder", "random encoder", "raw pixels", "kNN"} <= set(page.cells)
    assert {path.name for path in (finished / "checkpoints").glob("epoch_*")} <= set(page.cells)
    assert any("latest" in cell for cell in page.cells)
    assert "torch" in page.text and "fake_size" in page.text


def test_every_record_of_a_short_run_is_a_point_of_a_curve(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [[str(r["step"]), f"{r['train/loss']:.4g}"] for r in records if "train/loss" in r]
    assert dict(page_of(finished).curves)["training"] == logged and len(logged) > 2


def test_every_logged_number_is_in_a_chart_or_a_table(finished):
    run, page = read_run(finished), page_of(finished)
    drawn = {tuple(map(tuple, points)) for _, points in page.curves}
    for name, series in run.series.items():
        points = tuple((str(step), f"{value:.4g}") for step, value in zip(*series, strict=True))
        elsewhere = re.fullmatch(r"probe/linear(_\w+)?|collapse/\w+_rank(_level_\d)?", name)
        assert bool(elsewhere) != (points in drawn) or points in drawn, name


def test_the_page_loads_nothing_and_names_no_address(finished):
    source = write_report(finished, others=[finished]).read_text(encoding="utf-8")
    assert not re.search(r"(?i)\b(?:https?|ftp|wss?|file)://", source) and "//" not in re.sub(
        r"base64,[\w+/=]+|^\s*//.*$", "", re.sub(r"(?s)<pre>.*?</pre>|<code>.*?</code>", "", source), flags=re.M
    )
    assert "@import" not in source and "url(" not in source
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in Page(source).links)
    anchors = {attributes["id"] for tag, attributes in Page(source).tags if tag == "section"}
    assert {link[1:] for link in Page(source).links if link.startswith("#")} == anchors


def test_every_drawing_has_a_title_and_a_view_box(finished):
    page = page_of(finished)
    drawings = [index for index, (tag, attributes) in enumerate(page.tags) if tag == "svg" and "role" in attributes]
    assert len(drawings) > 10
    for index in drawings:
        assert page.tags[index + 1][0] == "title" and page.tags[index][1]["viewbox"]


def test_names_and_paths_are_escaped(tmp_path):
    bad = '"><script>alert(1)<!--&amp;'
    folder = tmp_path / "<b>&'run'"
    config = load_config(None, [f"--logging.experiment_name={json.dumps(bad)}"])
    write_run(folder, [{bad: 1.0, "train/loss": 0.5}], {"state": bad, "step": 1, "reason": bad}, config)
    (folder / "figures").mkdir()
    (folder / "figures" / "<i>x&_00000001.png").write_bytes(PIXEL)
    (folder / "environment.json").write_text(json.dumps({bad: [bad], "packages": {bad: bad}}))
    (folder / "checkpoints").mkdir()
    save_state(folder / "checkpoints", {}, 1, metric=bad, reasons=[bad])
    page = page_of(folder, folder)
    tags = {tag for tag, _ in page.tags}
    assert "b" in tags and "i" not in tags  # b: of numbers in legends
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(bad) >= 8 and "<i>x&, step 1" in page.texts
    assert any("<b>&'run'" in text for text in page.texts)


def test_a_file_name_that_is_no_text_does_not_stop_the_report(tmp_path):
    run = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    (run / "figures").mkdir()
    (run / "figures" / os.fsdecode(b"\xff_00000001.png")).write_bytes(PIXEL)
    assert "?, step 1" in page_of(run).texts


def test_a_template_that_asks_for_what_is_not_there_is_an_error():
    with pytest.raises(UndefinedError, match="missing"):
        _environment().from_string("{{ missing }}").render()


def test_the_templates_are_package_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    folder, patterns = (
        ROOT / "hjepa_engine" / "report",
        setup["options.package_data"]["hjepa_engine.report"].split(", "),
    )
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert shipped == {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"} != set()


# What lies in the folder


def test_a_line_that_is_half_written_is_left_out(tmp_path):
    run = write_run(
        tmp_path / "run", [{"train/loss": 0.5}, {"step": 1, "train/loss": 0.4}], end='\n{"step": 2, "train/lo'
    )
    assert read_run(run).series["train/loss"] == ([0, 1], [0.5, 0.4])
    assert dict(page_of(run).curves)["training"] == [["0", "0.5"], ["1", "0.4"]]


def test_a_run_that_goes_on_is_reported_with_the_step_it_is_at(tmp_path):
    status = {"state": "running", "step": 50, "exit_code": None, "reason": "", "results": {}, "checkpoint": None}
    run = write_run(tmp_path / "run", [{"step": 70, "epoch": 2, "train/loss": 0.5}], status)
    page = page_of(run)
    assert "running" in page.texts and "step 70 · epoch 2" in page.text
    (run / "metrics.jsonl").unlink()
    assert "step 50 · epoch 0" in page_of(run).text


def test_a_run_can_be_read_at_any_time_while_it_is_written(tmp_path):
    """At every save point of a real run, with checkpoints being pruned by another thread, there is a whole page."""
    seen = []
    length = {"training__epochs": 1, "training__warmup_epochs": 0, "checkpoint__save_every_steps": 1}
    run = build(tiny_config(run_dir=tmp_path / "run", probe__enabled="false", **length))

    class Reader:
        def attach(self, engine):
            engine.add_event_handler(TrainEvents.CHECKPOINT_READY, self.read)

        def read(self, engine):
            seen.append(page_of(tmp_path / "run").headings)

    Reader().attach(run.trainer)
    run.fit()
    assert len(seen) >= 4 and all(headings[-3:] == SECTIONS_AT_END for headings in seen)


def test_values_that_were_not_finite_break_the_curve_and_are_marked(tmp_path):
    losses = [0.9, None, None, 0.7, 0.6]
    run = write_run(tmp_path / "run", [{"step": n, "train/loss": loss} for n, loss in enumerate(losses)])
    page = page_of(run)
    paths = [attributes for tag, attributes in page.tags if tag == "path"]
    (curve,) = [attributes["d"] for attributes in paths if attributes.get("aria-label") == "training"]
    assert re.sub(r"[^ML]", "", curve) == "MML"
    assert sum(attributes["class"] == "cross" for attributes in paths) == 2
    assert "nan" not in curve


@pytest.mark.parametrize("values", [[None], [None, None], [0.0], [5.0, 5.0], [-1e-30, 1e30], [3e38, -3e38]])
def test_any_values_make_a_chart(tmp_path, values):
    run = write_run(
        tmp_path / "run", [{"step": n, "train/loss": v, "train/grad_norm": v} for n, v in enumerate(values)]
    )
    page = page_of(run)
    numbers = " ".join(a["d"] for tag, a in page.tags if tag == "path") + " ".join(
        f"{a['y1']} {a['y2']}" for tag, a in page.tags if tag == "line"
    )
    assert "Loss" in page.charts and "nan" not in numbers and "inf" not in numbers


def test_an_empty_run_has_a_report(tmp_path):
    page = page_of(write_run(tmp_path / "run", end=""))
    assert "cannot tell" in page.texts and "unknown" in page.texts


def test_files_that_are_damaged_are_left_out(tmp_path):
    run = write_run(
        tmp_path / "run", [{"train/loss": 1.0}, {"step": "x", "time": None, "epoch": [], "a": "text", "b": [1]}]
    )
    for name in ("status.json", "environment.json", "linear_probe.json"):
        (run / name).write_text('{"state": ')
    (run / "config.yaml").write_text("training: {epochs: 3\n")
    (run / "figures").mkdir()
    (run / "figures" / "masks_00000001.png").write_bytes(PIXEL[:-4])
    (run / "figures" / "masks.png").write_bytes(PIXEL)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": 2, "train/loss": 0.5}\n')
    page = page_of(run)
    assert dict(page.curves)["training"] == [["0", "1"], ["2", "0.5"]]
    assert "No pictures yet." in page.texts and "config.yaml is of another version." in page.texts
    assert "training: {epochs: 3" in page.text


def test_pictures_are_embedded_the_newest_open_and_earlier_ones_folded(tmp_path):
    run = write_run(tmp_path / "run")
    for folder, name in (("figures", "masks"), ("media", "figures_masks"), ("media", "mine")):
        (run / folder).mkdir(exist_ok=True)
        for step in range(0, 70, 10):
            (run / folder / f"{name}_{step:08d}.png").write_bytes(PIXEL)
    page = page_of(run)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    titles = [f"{name}, step {step}" for name in ("masks", "mine") for step in (60, 0, 20, 40)]
    assert [attributes["alt"] for attributes in pictures] == titles
    assert base64.b64decode(pictures[0]["src"].partition(",")[2]) == PIXEL


def test_checkpoints_are_listed_with_what_keeps_them(tmp_path):
    run = write_run(tmp_path / "run", config=load_config(None, ["--checkpoint.keep_best_n=1"]))
    (run / "checkpoints").mkdir()
    for iteration, score in ((1, 0.2), (2, 0.5), (3, 0.4)):
        save_state(run / "checkpoints", {}, iteration, score)
    page = page_of(run)
    assert [cell for cell in page.cells if cell in ("latest", "last 2", "best")] == ["latest", "last 2", "best"]
    assert "Best by val/loss (min): epoch_0001_step_00000001." in page.texts


def test_the_command_lists_checkpoints_as_the_report_does(tmp_path, capsys):
    run = write_run(tmp_path / "run", config=load_config(None, ["--checkpoint.keep_best_n=1"]))
    (run / "checkpoints").mkdir()
    for iteration, score in ((1, 0.2), (2000, 0.5), (3000, 0.4)):
        save_state(run / "checkpoints", {}, iteration, score)
    checkpoints.main(["--run", str(run)])
    listed = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    cells = page_of(run).cells
    first = cells.index("epoch_3000_step_00003000")
    assert [cell for line in listed[1:] for cell in line] == cells[first : first + 24] and len(listed) == 4


def test_the_probe_table_says_which_checkpoint_was_best(tmp_path):
    records = [{"step": step, "probe/knn": knn} for step, knn in ((0, 0.3), (2, 0.8), (3, 0.6))]
    run = write_run(tmp_path / "run", records, {"state": "done", "results": {"trained": 0.5, "random": 0.25}})
    (run / "checkpoints").mkdir()
    save_state(run / "checkpoints", {}, 3)
    assert "not kept" in page_of(run).cells
    save_state(run / "checkpoints", {}, 2)
    cells = page_of(run).cells
    assert cells[cells.index("kNN") :][:5] == ["kNN", "0.3", "0.8", "0.6", "epoch_0002_step_00000002"]
    assert "50.0 %" in cells and "25.0 %" in cells
    # A probe by hand may have had other settings: it stands in for a result that the run does not have.
    (run / "linear_probe.json").write_text(json.dumps({"accuracy": {"trained": 0.75}}))
    assert "50.0 %" in page_of(run).cells
    (run / "status.json").write_text(json.dumps({"state": "done", "results": {}}))
    assert "75.0 %" in page_of(run).cells


def test_the_configuration_begins_with_what_differs_from_the_defaults(tmp_path):
    config = load_config(None, ["--training.lr", "0.0123", "--seed", "7"])
    cells = page_of(write_run(tmp_path / "run", config=config))
    codes = re.findall(r"<code>(.*?)</code>", (tmp_path / "run" / "report.html").read_text())
    assert codes[1:] == ["training.lr", "0.0123", "seed", "7"]  # behind the command to go on with
    assert f"{Config().training.lr}" in cells.cells


def test_thousands_of_records_make_a_small_file_in_which_a_spike_stays(tmp_path):
    losses = [1 + math.sin(step / 500) / 10 for step in range(20_000)]
    losses[12_345] = 77.0
    records = [
        {"step": n, "train/loss": loss, "train/grad_norm": loss, "train/lr": loss} for n, loss in enumerate(losses)
    ]
    run = write_run(tmp_path / "run", records)
    points = dict(page_of(run).curves)["training"]
    assert ["12345", "77"] in points and len(points) <= 303 and points[0][0] == "0" and points[-1][0] == "19999"
    assert (run / "report.html").stat().st_size < 100_000


def test_thinning_keeps_the_ends_the_extremes_and_one_of_what_is_not_finite():
    values = [float(n % 7) for n in range(1000)]
    values[500] = math.nan
    steps, kept = thin(Series(list(range(1000)), values), 30)
    assert len(steps) <= 33 and steps[0] == 0 and steps[-1] == 999 and 500 in steps and steps == sorted(steps)
    assert min(v for v in kept if v == v) == 0 and max(v for v in kept if v == v) == 6
    short = Series([1, 2], [3.0, 4.0])
    assert thin(short) is short


def test_ticks_are_round_and_few():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] or ticks(0, 1) == [0, 0.5, 1.0]
    assert ticks(-0.003, 0.011) == [0, 0.005, 0.01] and ticks(0, 100_000) == [0, 50_000, 100_000]
    assert log_ticks(1e-5, 1) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0] and log_ticks(1, 20) == [1, 2, 5, 10, 20]
    for low, high in ((0, 3), (17, 18), (-5, 1e9), (0.99, 0.996), (1e-9, 2e-9)):
        assert 2 <= len(ticks(low, high)) <= 6 and all(low <= tick <= high for tick in ticks(low, high))


def test_a_chart_is_logarithmic_only_where_values_spread_and_are_positive():
    def drawn(*values):
        return chart("Loss", [Line("a", Series(list(range(len(values))), list(values)))], log=True)

    assert drawn(1.0, 0.01).note == "logarithmic scale" and drawn(1.0, 0.1).note == ""
    assert drawn(1.0, 0.0, 0.001).note == drawn(1.0, -1.0).note == ""
    assert chart("Loss", [Line("a", Series([], []))]) is None
    many = chart("GPUs", [Line(f"{n}", Series([0], [1.0])) for n in range(10)])
    assert len(many.curves) == 8 and many.note == "2 more not drawn"


def test_spectra_are_told_from_other_objects():
    records = [
        {"step": 5, "a/spectrum": {"rank": [1, 2], "share": [0.9, 0.1]}},
        {"step": 6, "a/histogram": {"counts": [1], "edges": [0, 1]}, "text": "x", "odd": {"rank": "x", "share": [1]}},
    ]
    assert collect(records) == ({}, {"a/spectrum": {5: ([1, 2], [0.9, 0.1])}})


# Comparison


def test_runs_are_compared_in_one_chart_and_side_by_side(tmp_path):
    first = write_run(
        tmp_path / "a",
        [{"step": n, "train/loss": 1.0 / (n + 1), "val/loss": 2.0 + n} for n in range(3)],
        {"state": "done"},
        load_config(None, ["--logging.experiment_name=one", "--training.lr=0.001"]),
    )
    second = write_run(
        tmp_path / "b",
        [{"step": n, "train/loss": 3.0 / (n + 1)} for n in range(4)],
        {"state": "running"},
        load_config(None, ["--logging.experiment_name=two", "--training.lr=0.002", "--training.epochs=99"]),
    )
    page = page_of(first, second)
    assert page.headings[1] == "Comparison"
    curves = dict(page.curves)
    assert len(curves["one"]) == 3 and len(curves["two"]) == 4
    compared = page.cells[page.cells.index("Verdict") :]
    assert compared[compared.index("Training loss") :][:3] == ["Training loss", "0.3333", "0.75"]
    assert compared[compared.index("Validation loss") :][:3] == ["Validation loss", "4", "-"]
    assert "Validation loss" not in page.charts and " best 2" in page.texts  # one run alone is no comparison
    source = (first / "report.html").read_text()
    differing = source.split("Keys that differ")[1].split("</table>")[0]
    rows = [re.findall(r"<code>(.*?)</code>", row) for row in differing.split("<tr>")[2:]]
    assert sorted(rows) == [
        ["logging.experiment_name", "one", "two"],
        ["training.epochs", str(Config().training.epochs), "99"],
        ["training.lr", "0.001", "0.002"],
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / name / "run" for name in "ab"]
    for path in paths:
        write_run(path, [{"train/loss": 1.0}], config=Config())
    page = page_of(*paths)
    assert {"run (1)", "run (2)"} <= set(dict(page.curves))


# The command


@pytest.fixture
def command(capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            run_command(report.main, [str(word) for word in argv])
        captured = capsys.readouterr()
        return captured.out, captured.err, stop.value.code or 0

    return run


def test_the_command_writes_where_it_is_told_to(tmp_path, command):
    first, second = (write_run(tmp_path / name, [{"train/loss": 1.0}]) for name in "ab")
    assert command("--run", first) == (f"{first / 'report.html'}\n", "", 0)
    out, _, code = command("--run", first, "--compare", second, second, "--output", tmp_path / "x.html")
    assert (out, code) == (f"{tmp_path / 'x.html'}\n", 0) and "Comparison" in Page(
        (tmp_path / "x.html").read_text()
    ).headings


@pytest.mark.parametrize("which", ["missing", "empty", "file", "compared"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, command, which):
    run = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    words = ["--run", run, "--compare", tmp_path / "nothing"] if which == "compared" else ["--run", tmp_path / which]
    out, err, code = command(*words)
    assert (out, code) == ("", 2) and len(err.splitlines()) == 1 and "is no run folder" in err
    assert not (run / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path, command):
    run = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    _, err, code = command("--run", run, "--output", tmp_path / "none" / "x.html")
    assert code == 2 and len(err.splitlines()) == 1 and "cannot be written" in err


# At the end of a run


def with_report(folder):
    return tiny_config(run_dir=folder, logging__report="true")


@pytest.mark.parametrize("error", [GuardStop("the loss is not finite"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_a_report_too(tmp_path, error):
    folder = RunFolder(with_report(write_run(tmp_path / "run", [{"train/loss": None}])))
    with pytest.raises(type(error)), write_report_on_exit(folder):
        raise error
    assert "broken" in Page((folder.path / "report.html").read_text()).texts


def test_no_report_where_it_is_off_or_nothing_is_waited_for(tmp_path):
    run = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    with write_report_on_exit(RunFolder(tiny_config(run_dir=run, logging__report="false"))):
        pass
    with pytest.raises(ForceQuit), write_report_on_exit(RunFolder(with_report(run))):
        raise ForceQuit
    assert not (run / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    folder = RunFolder(with_report(tmp_path / "nothing"))
    with write_report_on_exit(folder):
        pass
    assert "report.html was not written" in caplog.text


# The verdict


def test_a_healthy_run_is_healthy():
    verdict = assess(over(**HEALTHY))
    assert verdict.level == "healthy"
    assert verdict.reasons == [
        "The target encoder's rank share is 0.27 at step 200: 0.43 at step 0, lowest 0.27 at step 200; its features keep "
        "98 % of their standard deviation.",
        "kNN accuracy went from 0.4 (random encoder) to 0.7, best 0.7 at step 200.",
    ]


def test_rollbacks_are_said_whatever_else_is():
    assert any("rolled the run back 2 times" in r for r in assess(over(**HEALTHY, train__rollbacks=[1, 2])).reasons)
    assert not any("rolled" in reason for reason in assess(over(**HEALTHY)).reasons)


def test_a_real_run_of_the_default_configuration_is_healthy():
    """Readings of ``recipes/pretrain.py --training.epochs 6 --collapse.every 100 --online_probe.every 1``."""
    share = [0.4271, 0.4736, 0.4182, 0.3329, 0.2973, 0.2818, 0.2725]
    std = [0.9165, 0.907, 0.9066, 0.8958, 0.8914, 0.8966, 0.9016]
    knn = [0.82, 0.786, 0.825, 0.843, 0.844, 0.826, 0.8]
    verdict = assess(over(collapse__target_rank_share=share, collapse__target_std=std, probe__knn=knn))
    assert verdict.level == "healthy"


def test_a_real_run_without_momentum_is_collapsed_though_its_rank_rises_at_first():
    """Readings of ``recipes/pretrain.py --model.ema.momentum 0 --model.ema.momentum_end 0 --training.epochs 8``."""
    share = [0.4271, 0.5806, 0.593, 0.389, 0.333, 0.2845, 0.283, 0.286, 0.2868]
    std = [0.9165, 0.1634, 0.0937, 0.098, 0.12, 0.1136, 0.114, 0.1115, 0.111]
    loss = [0.8041, 0.4243, 0.0217, 0.0157, 0.0081, 0.3936, 0.0085, 0.008, 0.0079]
    for end in range(2, 10):
        figures = {"collapse__target_rank_share": share, "collapse__target_std": std, "train__loss": loss}
        verdict = assess(over(**{name: values[:end] for name, values in figures.items()}))
        assert verdict.level == "collapsed" and "next to constant over images" in verdict.reasons[0]
        assert end == 6 or any("easier to predict" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (
            {"collapse__target_rank_share": [0.43, 0.2, COLLAPSED_SHARE * 0.9]},
            "watch",
            "the kNN accuracy is still above",
        ),
        (
            {"collapse__target_rank_share": [0.43, 0.2, COLLAPSED_SHARE * 0.9], "probe__knn": [0.4, 0.5, 0.4]},
            "collapsed",
            "target encoder's rank share is 0.018",
        ),
        ({"collapse__context_rank_share": [0.43, 0.2, 0.0], "probe__knn": []}, "collapsed", "context encoder's rank"),
        ({"collapse__target_std": [1.0, 0.5, COLLAPSED_SCALE * 0.8]}, "collapsed", "keep 16 % of their size"),
        ({"collapse__target_norm": [8.0, 0.5, 0.0]}, "collapsed", "keep 0 % of their size"),
        ({"collapse__target_std": [1.0, 0.5, LOW_SCALE * 0.9]}, "watch", "keep 45 % of their size"),
        ({"collapse__target_rank_share": [0.43, 0.2, 0.43 * FALLEN_SHARE * 0.9]}, "watch", "27 % of its start"),
        ({"collapse__target_rank_share": [0.43, 0.2, 0.43 * FALLEN_SHARE * 0.9]}, "watch", "how collapse begins"),
        ({"collapse__target_rank_share": [0.06, 0.05, 0.04]}, "watch", "from 0.06 to 0.04"),
        ({"collapse__target_rank_share_level_1": [0.4, 0.2, 0.01]}, "watch", "Level 1 of the target"),
        ({"collapse__batch_target_rank_share": [0.4, 0.2, 0.27 / DISAGREEMENT * 0.9]}, "watch", "Rank shares disagree"),
        ({"probe__knn": [0.4, 0.5, 0.3]}, "watch", "below the 0.4 of the random encoder"),
        ({"probe__knn": [0.4, 0.8, 0.6]}, "watch", "fallen from 0.8 at step 100 to 0.6"),
        ({"train__loss": [0.8, math.nan, 0.5]}, "watch", "train/loss was not finite once at step 100"),
        ({"train__loss": [0.8, math.nan, math.nan]}, "broken", "train/loss has not been finite since step 100"),
        ({"collapse__target_rank_share": [0.43, 0.3, math.nan]}, "broken", "since step 200"),
        ({"collapse__target_rank_share": [0.43]}, "cannot tell", "after step 0"),
        ({"collapse__target_rank_share": []}, "cannot tell", "collapse.enabled"),
    ],
)
def test_what_is_wrong_is_said(change, level, words):
    verdict = assess(over(**{**HEALTHY, **change}))
    assert verdict.level == level
    assert words in " ".join([verdict.headline, *verdict.reasons])


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({}, []),
        ({"collapse__target_norm": [8.0, 0.5, 0.0]}, ["collapse/"]),
        ({"train__loss": [0.8, math.nan, math.nan]}, ["train/"]),
        ({"probe__knn": [0.4, 0.8, 0.6]}, ["probe/"]),
        ({"probe__knn": [0.4, 0.8, 0.6], "collapse__target_norm": [8.0, 0.5, 0.0]}, ["collapse/", "probe/"]),
    ],
)
def test_the_report_gives_the_advice_that_guards_give(tmp_path, change, groups):
    figures = {**HEALTHY, **change}
    verdict = assess(over(**figures))
    assert verdict.advice == [ADVICE[group] for group in groups]
    names = {name.replace("__", "/"): values for name, values in figures.items()}
    records = [{"step": 100 * n, **{name: values[n] for name, values in names.items()}} for n in range(3)]
    page = page_of(write_run(tmp_path / "run", json.loads(json.dumps(records).replace("NaN", "null"))))
    assert ("What usually helps" in page.texts) == bool(groups)
    assert all(f"{ADVICE[group][1:]}." in page.text for group in groups)


def test_without_any_metric_nothing_can_be_told():
    verdict = assess({})
    assert (verdict.level, verdict.evidence) == ("cannot tell", [])


def test_the_evidence_has_the_first_the_lowest_the_highest_and_the_newest_value():
    (found,) = assess(over(train__loss=[3.0, math.nan, 1.0, 2.0])).evidence
    assert (found.first, found.lowest, found.highest, found.now) == (3.0, 1.0, 3.0, 2.0)
    assert (found.first_step, found.lowest_step, found.highest_step, found.now_step) == (0, 200, 0, 300)


# Documentation and browser


def test_the_program_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    for name in ("my", "other"):
        write_run(tmp_path / "runs" / name, [{"train/loss": 1.0}])
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert (tmp_path / "my.html").is_file()


CHECK = """
<script>
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width - 12, clientY: box.top + 20}));
const parts = [...document.querySelectorAll("main > *, main > * > *")];
const wide = parts.filter((part) => part.getBoundingClientRect().right > innerWidth + 1);
parent.document.body.dataset.found = JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.length,
  dark: matchMedia("(prefers-color-scheme: dark)").matches, page: getComputedStyle(document.body).backgroundColor,
  at: plot.parentElement.querySelector("figcaption").innerText,
  pictures: [...document.images].every((image) => image.naturalWidth > 0),
});
</script>"""
#: A window is at least 500 pixels wide: a telephone is a frame in it.
FRAME = '<meta name="color-scheme" content="light dark"><iframe width="{width}" height="2300" srcdoc="{page}">'


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_page_without_errors_or_scrolling_sideways(finished, tmp_path, theme, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    other = (
        tmp_path / "a name that is long enough to be wider than the telephone it is shown on, or so one should think"
    )
    shutil.copytree(finished, other)
    (other / "figures").mkdir(exist_ok=True)
    (other / "figures" / "mine_00000001.png").write_bytes(PIXEL)
    path = write_report(other, tmp_path / "page.html", [finished])
    page = path.read_text(encoding="utf-8").replace("</body>", f"{CHECK}</body>")
    path.write_text(FRAME.format(width=width, page=html.escape(page)) if width < 500 else page, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", path.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = re.findall(r'<body[^>]* data-found="(.*?)"', answer.stdout)[0]
    found = json.loads(text.replace("&quot;", '"'))
    assert found["dark"] == (theme == "dark") and found["page"] == (
        "rgb(20, 23, 26)" if found["dark"] else "rgb(246, 247, 248)"
    )
    assert found["inner"] == width and found["scroll"] <= width and found["wide"] == 0
    assert found["at"].endswith(" at step 10") and found["pictures"]
    assert "CONSOLE" not in answer.stderr
