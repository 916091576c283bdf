"""The first screen of a report, explanations under its charts, and the page that follows a run."""

import contextlib
import json
import re
import shlex
import threading
import urllib.error
import urllib.request

import pytest
from helpers import tiny_config
from test_report import HEALTHY, over, write_run

from hjepa_engine.errors import ConfigError
from hjepa_engine.recipes import report
from hjepa_engine.report.answers import answers, commands
from hjepa_engine.report.page import render
from hjepa_engine.report.panels import section_charts
from hjepa_engine.report.reading import read_run
from hjepa_engine.report.serving import make_server
from hjepa_engine.report.verdict import assess
from hjepa_engine.run.cli import run_command

DONE = {"state": "done", "results": {"trained": 0.724, "random": 0.21, "pixels": 0.18}}


def answers_of(folder):
    run = read_run(folder)
    return {each.question: each for each in answers(run, assess(run.series))}


def test_the_first_screen_says_how_good_the_run_is_beside_its_baselines(tmp_path):
    found = answers_of(write_run(tmp_path / "run", [{"train/loss": 1.0}], DONE))["How good is it?"]
    assert found.answer == "72.4 %"
    assert (
        found.detail
        == "Accuracy of the linear probe of the frozen encoder; a random encoder 21.0 %, raw pixels 18.0 %."
    )


def test_while_there_is_no_final_probe_the_newest_reading_of_one_is_said(tmp_path):
    records = [{"step": 0, "probe/knn": 0.2}, {"step": 1500, "probe/knn": 0.45}]
    found = answers_of(write_run(tmp_path / "run", records, {"state": "running"}))["How good is it?"]
    assert found.answer == "45.0 %"
    assert found.detail == "Accuracy of the probe (kNN) at step 1,500; before training 20.0 %."


def test_what_is_not_known_is_said(tmp_path):
    found = answers_of(write_run(tmp_path / "run", [{"train/loss": 1.0}]))
    assert [each.answer for each in found.values()] == ["cannot tell", "not measured", "none"]


def test_the_verdict_colors_its_card_and_the_checkpoints_are_named(tmp_path):
    from hjepa_engine.recipes.pretrain import build

    config = tiny_config(run_dir=tmp_path / "run", probe__enabled="false", collapse__enabled="false")
    build(config).fit()
    found = answers_of(tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("epoch_*"))
    assert found["Which checkpoint?"].answer in names and "val/loss" in found["Which checkpoint?"].detail
    series = over(**HEALTHY)
    run = read_run(tmp_path / "run")
    card = answers(run, assess(series))[0]
    assert (card.answer, card.level) == ("healthy", "healthy")
    page = (render(run)).replace("\n", " ")
    assert page.index('class="answers"') < page.index("<nav")
    assert f"<code>hjepa evaluate --run {tmp_path}/run</code>" in page


def test_commands_to_go_on_are_those_of_the_runs_state_and_can_be_pasted(tmp_path):
    folder = write_run(tmp_path / "my run", [{"train/loss": 1.0}], {"state": "preempted"}, config=tiny_config())
    (found,) = commands(read_run(folder))
    assert shlex.split(found.text) == [
        *("hjepa", "pretrain", "--config", str(folder / "config.yaml")),
        *("--run_dir", str(folder)),
    ]
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    assert [each.purpose for each in commands(read_run(folder))] == ["Watch"]
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    assert [each.purpose for each in commands(read_run(folder))] == ["Evaluate", "Export"]


def test_every_chart_of_known_metrics_says_what_it_shows(tmp_path):
    names = ("train/loss", "val/loss_level_0", "collapse/target_std", "train/grad_norm", "system/cpu_share")
    run = read_run(write_run(tmp_path / "run", [dict.fromkeys((*names, "train/mine"), 1.0)]))
    notes = {chart.title: chart.note for charts in section_charts(run).values() for chart in charts}
    assert len(notes) == 6 and notes.pop("train/mine") == ""
    assert all(len(note) > 10 for note in notes.values())
    assert notes["Gradient norm"] == "L2 norm of all gradients before clipping"


@pytest.fixture
def serve():
    """Serve a run; a function that fetches a path of the page: status and text."""
    with contextlib.ExitStack() as stack:

        def start(folder, port=0):
            server = stack.enter_context(make_server(folder, port=port))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)

            def get(path="/"):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}{path}") as answer:
                        return answer.status, answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, error.read().decode()

            get.port = server.server_address[1]
            return get

        yield start


def test_a_served_report_follows_the_run_until_it_is_done(tmp_path, serve):
    folder = write_run(tmp_path / "run", [{"step": 1, "train/loss": 1.0}], {"state": "running"})
    get = serve(folder)
    code, page = get()
    assert code == 200 and '<meta http-equiv="refresh" content="10"/>' in page and "step 1 " in page
    write_run(folder, [{"step": 1, "train/loss": 1.0}, {"step": 77, "train/loss": 0.5}], {"state": "done"})
    code, page = get("/?again")
    assert code == 200 and "refresh" not in re.sub(r"(?s)<script>.*", "", page) and "step 77 " in page
    assert get("/config.yaml")[0] == 404  # nothing but the page
    assert not (folder / "report.html").exists()


def test_a_run_that_has_gone_is_said_and_the_server_goes_on(tmp_path, serve):
    folder = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    get = serve(folder)
    folder.rename(tmp_path / "elsewhere")
    code, text = get()
    assert code == 500 and str(folder) in text and len(text.splitlines()) == 1
    (tmp_path / "elsewhere").rename(folder)
    assert get()[0] == 200


@pytest.mark.parametrize("port", ["taken", 70000])
def test_a_port_that_cannot_be_had_is_one_line_and_exit_code_2(tmp_path, serve, capsys, port):
    folder = write_run(tmp_path / "run", [{"train/loss": 1.0}])
    number = serve(folder).port if port == "taken" else port
    with pytest.raises(SystemExit) as stop:
        run_command(report.main, ["--run", str(folder), "--serve", "--port", str(number)])
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and said.startswith(f"--port {number} cannot be listened on: ") and said.count("\n") == 1
    )


def test_only_a_run_can_be_served(tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        make_server(tmp_path / "nothing")
