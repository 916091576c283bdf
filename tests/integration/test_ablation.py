"""recipes/ablation.py: real runs in processes of their own, and tables checked by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from hjepa_engine.config import load_config
from hjepa_engine.errors import ConfigError, RunError
from hjepa_engine.recipes import ablation
from hjepa_engine.recipes.common import comparison
from hjepa_engine.recipes.common.comparison import Result

SMALL = """
base: base.yaml
seeds: [0, 1]
variants:
  one_level: {model.levels: [{pool: 1}]}
  two_levels: {}
"""
BASE = """
data: {dataset: digits, image_size: 8, batch_size: 256}
model: {patch_size: 4, embed_dim: 8, depth: 1, num_heads: 2, predictor: {width: 8, depth: 1, num_heads: 2}}
masking: {num_masks: 1, mask_scale: [0.25, 0.35]}
training: {max_iters: 2, warmup_epochs: 0}
logging: {progress_bar: false, report: false}
pictures: {enabled: false}
collapse: {images: 16}
probe: {epochs: 1}
"""


def test_help_is_there_before_torch_is():
    program = "import sys, hjepa_engine.recipes.ablation; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded


@pytest.mark.slow
def test_a_second_call_trains_only_what_is_missing(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL.replace("[0, 1]", "[0]").replace("  two_levels: {}\n", ""))
    ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs")])
    first = (tmp_path / "runs" / "one_level_0" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    (tmp_path / "plan.yaml").write_text(SMALL.replace("[0, 1]", "[0]"))
    ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs"), "--jobs", "2"])
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/config.yaml")) == ["one_level_0", "two_levels_0"]
    assert (tmp_path / "runs" / "one_level_0" / "metrics.jsonl").stat().st_mtime_ns == first
    printed = capsys.readouterr().out
    assert (tmp_path / "runs" / "ablation.md").read_text() in printed
    assert len([line for line in printed.splitlines() if line.startswith(("| one_level", "| two_levels"))]) == 2
    assert (tmp_path / "runs" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_of_another_configuration_is_not_taken_for_the_variants(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL.replace("[0, 1]", "[0]").replace("  two_levels: {}\n", ""))
    ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs")])
    (tmp_path / "base.yaml").write_text(BASE.replace("embed_dim: 8", "embed_dim: 16"))
    with pytest.raises(RunError, match="no run came to its end"):
        ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs")])
    assert "one_level_0: exit code 2, see one_level_0.log" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_were_measured_otherwise_are_refused_and_a_probe_is_repeated(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL)
    given = [
        str(tmp_path / "plan.yaml"),
        "--output",
        str(tmp_path / "runs"),
        "--variants",
        "two_levels",
        "--seeds",
        "3",
    ]
    ablation.main(given)
    with pytest.raises(
        ConfigError, match=r"two_levels_3 was trained with other readings: collapse\.images was 16, is 8"
    ):
        ablation.main([*given, "--collapse.images", "8"])
    first = (tmp_path / "runs" / "two_levels_3" / "probe_trained.jsonl").read_text()
    ablation.main([*given, "--probe.epochs", "2"])
    assert len((tmp_path / "runs" / "two_levels_3" / "probe_trained.jsonl").read_text()) > len(first)


PLANS = sorted((Path(__file__).parents[2] / "recipes" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_plan_that_comes_along_is_one(path):
    """The configuration of every variant is checked."""
    plan = ablation.read_plan(path)
    assert plan.base.parent.samefile(path.parent.parent / "configs") and len(plan.variants) > 1


def result(variant, seed, trained, **readings):
    curves = {f"collapse/target_{name}": ([1, 2], [0.0, value]) for name, value in readings.items()}
    return Result(variant, seed, {"trained": trained, "random": 0.25, "pixels": 0.2}, 1.5, curves)


def test_the_table_has_means_and_sample_deviations_by_hand():
    done = [("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.4), ("b", 1, 0.75), ("c", 2, 0.3), ("c", 1, 0.7)]
    rows = comparison.table([result(*one) for one in done], [0, 1, 2]).splitlines()
    assert rows[0] == "| variant | linear probe | seeds 0, 1, 2 | from `a` | random encoder | minutes |"
    assert rows[2] == "| a | 60.0 ± 14.1 | 50.0, 70.0, - |  | 25.0 | 1.5 |"
    assert rows[3] == "| b | 57.5 ± 24.7 | 40.0, 75.0, - | -10.0, +5.0, - | 25.0 | 1.5 |"
    assert rows[4] == "| c | 50.0 ± 28.3 | -, 70.0, 30.0 | -, +0.0, - | 25.0 | 1.5 |"
    assert comparison.table([result("a", 4, 0.5)], [4]).splitlines()[2] == "| a | 50.0 | 50.0 |  | 25.0 | 1.5 |"


def test_rank_correlations_by_hand():
    values = [(0.1, 3.0, 9.0), (0.2, 2.0, 1.0), (0.3, 1.0, 10.0), (0.4, 0.5, 11.0)]
    runs = [result("a", seed, x, norm=norm, rank=rank) for seed, (x, norm, rank) in enumerate(values)]
    # Ranks of rank: 2 1 3 4, differences to 1 2 3 4: 1 1 0 0; 1 - 6 * 2 / (4 * 15) = 0.8.
    found = comparison.rank_correlations([*runs, result("b", 0, 0.9)])
    assert found == {"collapse/target_norm": pytest.approx(-1.0), "collapse/target_rank": pytest.approx(0.8)}
    assert list(found) == ["collapse/target_norm", "collapse/target_rank"]


def test_correlation_in_the_course_of_a_run_by_hand():
    probe = ([0, 10, 20, 30], [0.1, 0.2, 0.4, 0.3])
    rising = ([0, 5, 15, 25], [9.0, 1.0, 2.0, 3.0])  # 1, 2, 3 against 0.2, 0.4, 0.3: differences 0, 1, 1
    falling = ([10, 20, 30], [3.0, 1.0, 2.0])
    runs = [
        Result("a", seed, {}, 1, {"probe/online_linear": probe, "rank": one})
        for seed, one in ((0, rising), (1, falling))
    ]
    assert comparison.correlation_within(runs[:1], "rank") == pytest.approx(0.5)
    assert comparison.correlation_within(runs, "rank") == pytest.approx((0.5 - 1.0) / 2)
    assert comparison.correlation_within(runs, "other") is None


def test_keys_of_the_command_line_are_for_all_variants_which_override_them(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL)
    given = ["--training.lr", "0.5", "--model.levels=[{pool: image}]"]
    plan = ablation.read_plan(tmp_path / "plan.yaml", given)
    configs = [load_config(plan.base, plan.arguments(name)) for name in plan.variants]
    assert [config.training.lr for config in configs] == [0.5, 0.5]
    assert [config.model.levels[0].pool for config in configs] == [1, "image"]


def test_variants_and_seeds_of_the_command_line_are_chosen_in_their_order(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL + "  3: {}\n  wrong: {model.level: 1}\n")  # 3 is a name in YAML, too
    plan = ablation.read_plan(tmp_path / "plan.yaml", (), ["3", "one_level", "3"], [5, 4])
    assert list(plan.variants) == ["3", "one_level"] and plan.seeds == [5, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variants", "one_level", "three"], "^--variants must be some of one_level, two_levels, got three"),
        (["--seeds", "1", "1"], r"^--seeds must be different ones, got \[1, 1\]"),
        (["--seeds", "-1"], r"^--seeds must be integers of at least 0, got \[-1\]"),
        (["--seed", "3"], "variant one_level: seed must not be given: seeds are those of FILE, or of --seeds"),
        (["--run_dir=x"], "run_dir must not be given: run folders lie in --output"),
        (["--checkpoint.checkpoint_dir", "x"], "checkpoint.checkpoint_dir must be None, got 'x': each run has a"),
        (["--checkpoint={resume: never}"], "checkpoint.resume must be 'auto', got 'never': the same command"),
        (["--probe.enabled", "false"], "probe.enabled must be True, got False: the tables are of the probe"),
        (["--training.lrr", "1"], "^unknown key training.lrr"),
        (["--training.lr", "1e-5"], "variant one_level: training.min_lr must be at most .*1e-05"),
    ],
)
def test_a_wrong_key_of_the_command_line_is_one_line_and_trains_nothing(tmp_path, given, message):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(SMALL.replace("{model.levels: [{pool: 1}]}", "{training.min_lr: 1.0e-4}"))
    with pytest.raises(ConfigError, match=message):
        ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs"), *given])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]", "must have base"),
        ("[1, 2]", "must have base"),
        (SMALL.replace("[0, 1]", "[-1]"), r"seeds must be integers of at least 0, got \[-1\]"),
        (SMALL.replace("[0, 1]", "[]"), "seeds must be integers"),
        (SMALL.replace("one_level:", "../out:"), "variants must map names of letters"),
        (SMALL.replace("model.levels", "model.level"), "variant one_level: unknown key model.level"),
        (SMALL.replace("model.levels: [{pool: 1}]", "probe: {enabled: false}"), "probe.enabled must be True"),
        (SMALL.replace("model.levels: [{pool: 1}]", "seed: 4"), "variant one_level: seed must not be given"),
        (SMALL.replace("base.yaml", "none.yaml"), "none.yaml"),
    ],
)
def test_a_wrong_plan_is_one_line_and_trains_nothing(tmp_path, text, message):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ablation.main([str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "runs")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
