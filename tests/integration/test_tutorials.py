"""The tutorials run from their first cell to their last, and show pictures."""

import jupytext
import pytest
from helpers import ROOT
from nbclient import NotebookClient

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_shows_pictures(page, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(page)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    printed = " ".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert all(words in printed for words in EXPECTED[page.stem]), printed


EXPECTED = {
    "first_run": (
        *("'trained'", "a function does, too", "GuardStop: collapse/target_std", "more than 50 % below its best"),
        *("a momentum nearer to 1", "'stopped'"),
    ),
    "own_step": ("3 classes (circle, cross, square)", "trained", "torch.Size([6, 16, 48])"),
}
