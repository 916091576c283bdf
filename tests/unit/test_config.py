"""The configuration: strict, typed, one line per mistake, and no key without an effect."""

import hashlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from ignite.engine import Events
from PIL import Image
from processes import in_processes
from torch import nn

from hjepa_engine import Config, dump_config, load_config
from hjepa_engine.build import build_step
from hjepa_engine.checkpoint.folder import list_checkpoints
from hjepa_engine.config.options import json_schema, list_options
from hjepa_engine.config.parsing import parse_yaml
from hjepa_engine.config.schema import Level, ModelConfig, resolve_levels
from hjepa_engine.data import FeatureStore, build_loader, open_split
from hjepa_engine.devices import choose_device
from hjepa_engine.errors import ConfigError, RunError
from hjepa_engine.handlers import BatchCollapse, CollapseMonitor, OnlineProbe, WeightCheck
from hjepa_engine.models import build_modules
from hjepa_engine.recipes.common import build as parts
from hjepa_engine.recipes.common import run as runs
from hjepa_engine.recipes.common.probe import probe, read_features
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.run.folder import RunFolder
from hjepa_engine.run.other_data import accepted_changes
from hjepa_engine.utils.sharding import is_sharded

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))

# Two epochs of two batches of eight 24 x 24 images on a 6 x 6 grid, one of the four steps warming up.
TINY = """
data: {dataset: fake, fake_size: 16, image_size: 24, batch_size: 8, crop_scale: [0.3, 1], crop_ratio: [0.75, 1.333]}
model:
  encoder_type: vit_tiny_patch16_224
  patch_size: 4
  embed_dim: 16
  depth: 2
  num_heads: 2
  pos_embed: sincos
  predictor: {width: 8, depth: 1, num_heads: 2}
  ema: {momentum: 0.996, momentum_end: 1.0}
masking: {num_masks: 4, mask_scale: [0.15, 0.2]}
training: {epochs: 2, warmup_epochs: 0.5, lr: 1e-2, min_lr: 1e-6}
logging: {progress_bar: false}
probe: {enabled: false, epochs: 1}
pictures: {enabled: false}
device: cpu
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


# Reading and writing


def test_without_a_file_each_key_has_its_default():
    assert load_config() == Config()


def test_a_dumped_configuration_reads_back_as_it_was(tmp_path, tiny):
    overrides = [
        "--model.levels=[{pool: 1}, {pool: 2, depth: 0.5, weight: 0.25}, {pool: image}]",
        "--training.optimizer_args={eps: 1e-12, amsgrad: true}",
        "--handlers=[{class_path: a.B, init_args: {names: [x, 'null', '1']}}]",
        "--logging.experiment_name=1e-3",
        "--logging.wandb.tags=['true', b]",
        "--training.min_lr=1e-30",
        "--seed=9007199254740993",
    ]
    config = load_config(tiny, overrides)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)
    assert config.model.levels[2] == Level("image") and config.logging.experiment_name == "1e-3"
    assert config.seed == 9007199254740993


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("overrides", [["--training.lr", "3e-4"], ["--training.lr=3e-4"], ["training.lr=3e-4"]])
def test_overrides_come_in_three_spellings(tiny, overrides):
    config = load_config(tiny, overrides)
    assert config.training.lr == 3e-4 and config.training.epochs == 2


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tiny):
    config = load_config(tiny, ["--training.lr=0.1", "--training.epochs=7", "--training.lr=0.2"])
    assert (config.training.lr, config.training.epochs, config.model.embed_dim) == (0.2, 7, 16)


def test_strings_on_the_command_line_need_no_quotes(tiny):
    config = load_config(tiny, ["--run_dir=1", "--logging.experiment_name=true", "--data.data_path=/tmp/a = b"])
    assert (config.run_dir, config.logging.experiment_name, config.data.data_path) == ("1", "true", "/tmp/a = b")
    assert load_config(tiny, ["--run_dir=null"]).run_dir is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1", -1),
        ("+3", 3),
        ("010", 10),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("~", None),
        (".inf", float("inf")),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(text, value):
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_a_file_builds_on_another_section_by_section(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "first.yaml").write_text(
        "training: {epochs: 7, lr: 0.1, optimizer_args: {eps: 1, amsgrad: true}}\n"
        "model: {predictor: {width: 8, depth: 3, num_heads: 2}, levels: [{pool: 1}, {pool: 2}]}\nseed: 4"
    )
    (tmp_path / "second.yaml").write_text("base: far/first.yaml\ntraining: {epochs: 8, warmup_epochs: 1}")
    path = tmp_path / "third.yaml"
    path.write_text(
        "base: second.yaml\ntraining: {lr: 0.2, optimizer_args: {eps: 2}}\n"
        "model: {predictor: {depth: 4}, levels: [{pool: image}]}"
    )
    config = load_config(path, ["--seed=5"])
    training, predictor = config.training, config.model.predictor
    assert (training.epochs, training.warmup_epochs, training.lr, config.seed) == (8, 1, 0.2, 5)
    assert (predictor.width, predictor.depth) == (8, 4)
    assert training.optimizer_args == {"eps": 2} and config.model.levels == [Level("image")]
    assert "base" not in dump_config(config)


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("other.yaml", "base other.yaml: base must not lead back to the file it stands in, got 'run.yaml'"),
        ("run.yaml", "base must not lead back to the file it stands in, got 'run.yaml'"),
        ("nowhere.yaml", "base nowhere.yaml: cannot be read: No such file or directory"),
        ("twice.yaml", "base twice.yaml: no valid YAML: seed is given twice, again in line 2"),
        ("3", "base must be the path of a YAML file, got 3"),
        ("", "base must be the path of a YAML file, got None"),
        ("fast.yaml", "training.lr must be a number, got 'fast'"),
    ],
)
def test_a_base_that_cannot_be_built_on_is_one_line(tmp_path, base, says):
    (tmp_path / "other.yaml").write_text("base: run.yaml")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2")
    (tmp_path / "fast.yaml").write_text("training: {lr: fast}")
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {base}\ntraining: {{epochs: 20}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {says}"


def test_the_schema_for_editors_takes_shipped_files_and_refuses_mistakes():
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(validator.schema)
    for path in CONFIGS:
        validator.validate(parse_yaml(path.read_text()))
    for text in (
        "training: {lrr: 1}",
        "training: {lr: 0}",
        "training: {lr: fast}",
        "base: 3",
        "data: {dataset: digit}",
    ):
        assert not validator.is_valid(parse_yaml(text)), text
    training = validator.schema["$defs"]["TrainingConfig"]["properties"]
    assert training["lr"]["description"] == "Learning rate at the end of the warm-up."


def test_the_configuration_and_the_command_line_import_nothing_heavy():
    program = "import sys, hjepa_engine, hjepa_engine.config, hjepa_engine.run.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch", "ignite", "numpy", "torchvision", "timm", "tqdm", "matplotlib", "wandb"}
    assert not heavy & set(done.stdout.split())


def test_public_names_are_imported_when_they_are_asked_for():
    import hjepa_engine

    assert set(hjepa_engine.__all__) <= set(dir(hjepa_engine))
    assert all(hasattr(hjepa_engine, name) for name in hjepa_engine.__all__)
    with pytest.raises(AttributeError, match="module 'hjepa_engine' has no attribute 'create_trainr'"):
        hjepa_engine.create_trainr  # noqa: B018


def test_levels_are_powers_of_two_weighted_as_asked():
    config = load_config(None, ["--model.num_hierarchies=3", "--loss.hierarchy_weights=[1, 0.5, 0.1]"])
    assert resolve_levels(config) == (Level(1, weight=1.0), Level(2, weight=0.5), Level(4, weight=0.1))


def test_levels_are_patches_and_the_whole_image_by_default():
    assert resolve_levels(Config()) == (Level(1), Level("image"))
    config = load_config(None, ["--loss.hierarchy_weights=[1, 0.5]"])
    assert resolve_levels(config) == (Level(1, weight=1.0), Level("image", weight=0.5))


def test_the_defaults_are_the_embedded_default_run():
    """A file that says only ``training: {epochs: 1}`` trains it, in seconds."""
    shipped, config = load_config(ROOT / "recipes" / "configs" / "digit_pages.yaml"), Config()
    for section in ("data", "masking", "loss", "training", "checkpoint", "guard"):
        assert getattr(config, section) == getattr(shipped, section), section
    assert replace(config.model, levels=shipped.model.levels) == shipped.model
    assert resolve_levels(config) == resolve_levels(shipped)


@pytest.mark.parametrize(("training", "warmup"), [("{epochs: 1}", 1.0), ("{epochs: 2}", 2.0), ("{lr: 1}", 2.0)])
def test_the_default_warmup_is_no_longer_than_the_run(tmp_path, training, warmup):
    (tmp_path / "run.yaml").write_text(f"training: {training}")
    assert load_config(tmp_path / "run.yaml").training.warmup_epochs == warmup


def test_another_encoder_has_its_own_sizes_unless_they_are_given(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {encoder_type: vit_base_patch16_224, embed_dim: 32}")
    for config in (
        load_config(tmp_path / "base.yaml"),
        Config(model=ModelConfig(encoder_type="vit_base_patch16_224", embed_dim=32)),
    ):
        model = config.model
        assert (model.patch_size, model.embed_dim, model.depth, model.num_heads) == (None, 32, None, None)
    assert Config().model.embed_dim == 64


def test_every_option_is_described():
    options = list(list_options())
    assert len(options) > 60 and all(option.description and option.type for option in options)


# Mistakes

MALFORMED = [
    # typing errors
    ("unknown key training.lrr, did you mean training.lr?", "training: {lrr: 1}"),
    ("unknown key trainin", "trainin: {lr: 1}"),
    ("unknown key lr, did you mean", "lr: 1"),
    ("unknown key model.predictor.widht", "model: {predictor: {widht: 8}}"),
    ("unknown key model.levels[1].pol", "model: {levels: [{pool: 1}, {pol: 2}]}"),
    ("unknown key 1", "1: 2"),
    ("data.dataset must be digit_pages, digits, cifar10", "data: {dataset: digit}"),
    ("training.lr_schedule", "training: {lr_schedule: cosin}"),
    # types
    ("training.lr must be a number, got 'fast'", "training: {lr: fast}"),
    ("training.lr must be a number, got True", "training: {lr: true}"),
    ("training.epochs must be an integer, got 1.5", "training: {epochs: 1.5}"),
    ("training.epochs must be an integer, got '10'", "training: {epochs: '10'}"),
    ("training.use_amp must be auto, true or false, got 'yes'", "training: {use_amp: yes}"),
    ("training.use_amp must be auto, true or false, got 1", "training: {use_amp: 1}"),
    ("training.betas must be a list of 2 numbers", "training: {betas: 0.9}"),
    ("training.betas must be a list of 2 numbers", "training: {betas: [0.9, 0.95, 0.99]}"),
    ("training.betas[1] must be a number", "training: {betas: [0.9, x]}"),
    ("training.optimizer_args must be a mapping", "training: {optimizer_args: [1]}"),
    ("training must be a section", "training: 3"),
    ("training must be a section", "training:"),
    ("model.predictor must be a section", "model: {predictor: [1]}"),
    ("logging.wandb.tags must be a list of strings", "logging: {wandb: {tags: a}}"),
    ("loss.hierarchy_weights[1] must be a number", "loss: {hierarchy_weights: [1, null, 1]}"),
    ("handlers[0].class_path must be given", "handlers: [{init_args: {}}]"),
    ("handlers must be a list of sections with keys class_path, init_args", "handlers: {class_path: a.B}"),
    ("handlers[0].init_args must be a mapping", "handlers: [{class_path: a.B, init_args: {1: 2}}]"),
    ("model.levels[0].pool must be", "model: {levels: [{pool: half}]}"),
    ("seed must be an integer below 2**63", "seed: " + 400 * "9"),
    ("training.lr must be a number below 2**63", "training: {lr: " + 400 * "9" + "}"),
    # ranges
    ("training.lr must be above 0, got -0.001", "training: {lr: -1e-3}"),
    ("training.lr must be above 0", "training: {lr: .nan}"),
    ("training.lr must be above 0", "training: {lr: .inf}"),
    ("training.epochs must be at least 1, got 0", "training: {epochs: 0}"),
    ("training.betas must be at least 0 and below 1", "training: {betas: [0.9, 1.0]}"),
    ("training.accumulation_steps must be at least 1", "training: {accumulation_steps: 0}"),
    ("training.clip_grad must be above 0", "training: {clip_grad: 0}"),
    ("data.batch_size must be at least 1", "data: {batch_size: 0}"),
    ("data.num_workers must be at least 0", "data: {num_workers: -1}"),
    ("data.val_fraction must be above 0 and below 1", "data: {val_fraction: 1.0}"),
    ("data.crop_scale must be above 0 and at most 1", "data: {crop_scale: [0.5, 1.5]}"),
    ("model.ema.momentum must be at least 0 and at most 1", "model: {ema: {momentum: 1.5}}"),
    ("model.drop_path must be at least 0 and below 1", "model: {drop_path: 1}"),
    ("model.levels[1].depth must be at least 0 and at most 1", "model: {levels: [{pool: 1}, {depth: -0.1}]}"),
    ("model.levels[1].pool must be 1 where depth is 0, got 2", "model: {levels: [{pool: 1}, {pool: 2, depth: 0}]}"),
    ("model.levels[0].weight must be at least 0", "model: {levels: [{weight: -1}]}"),
    ("model.levels[0].pool must be", "model: {levels: [{pool: 0}]}"),
    ("masking.mask_scale must be above 0 and at most 1", "masking: {mask_scale: [0.1, 1.2]}"),
    ("masking.num_masks must be at least 1", "masking: {num_masks: 0}"),
    ("masking.context_keep must be above 0 and at most 1", "masking: {context_keep: [0, 0.2]}"),
    ("loss.hierarchy_weights must be at least 0", "loss: {hierarchy_weights: [1, -1, 1]}"),
    ("loss.sigreg_weight must be at least 0", "loss: {sigreg_weight: -0.1}"),
    ("seed must be at least 0", "seed: -1"),
    ("logging.log_frequency must be at least 1", "logging: {log_frequency: 0}"),
    # one key against another
    ("training.warmup_epochs must be at most training.epochs (5), got 6", "training: {epochs: 5, warmup_epochs: 6}"),
    ("model.ema.momentum_warmup_epochs must be at most training.epochs", "model: {ema: {momentum_warmup_epochs: 21}}"),
    ("training.min_lr must be at most training.lr", "training: {lr: 1e-3, min_lr: 1e-2}"),
    ("data.image_size must be a multiple of model.patch_size (5), got 32", "model: {patch_size: 5}"),
    ("model.predictor.width must be a multiple of 4 and of num_heads (3)", "model: {predictor: {width: 8, num_heads: 3}}"),
    ("model.embed_dim must be a multiple of 4, got 18", "model: {embed_dim: 18}"),
    ("masking.aspect_ratio must be ordered", "masking: {aspect_ratio: [1.5, 0.75]}"),
    ("data.crop_ratio must be ordered", "data: {crop_ratio: [2, 1]}"),
    ("loss.hierarchy_weights must have one value per level (2), got 3", "loss: {hierarchy_weights: [1, 1, 1]}"),
    ("training.level_lrs must have one value per level (2), got 1", "training: {level_lrs: [1e-3]}"),
    ("loss.hierarchy_weights must weight at least one level above 0", "loss: {hierarchy_weights: [0, 0]}"),
    ("model.levels must weight at least one level above 0", "model: {levels: [{weight: 0}]}"),
    ("loss.hierarchy_weights must be null where", "{model: {levels: [{pool: 1}]}, loss: {hierarchy_weights: [1]}}"),
    ("model.num_hierarchies must be the number of", "model: {num_hierarchies: 2, levels: [{pool: 1}]}"),
    ("model.levels must name at least one level", "model: {levels: []}"),
    ("logging.experiment_name", "logging: {experiment_name: a/b}"),
    ("logging.experiment_name", "logging: {experiment_name: '..'}"),
    ("device must be auto, cpu, cuda", "device: gpu"),
    # YAML itself
    ("lr is given twice, again in line 3", "training:\n  lr: 1\n  lr: 2"),
    ("training is given twice", "training: {lr: 1}\ntraining: {lr: 2}"),
    ("aliases are not allowed (line 2)", "seed: &s 1\ndata: {batch_size: *s}"),
    ("tag '!thing'", "seed: !thing 1"),
    ("python/object/apply:os.system", "seed: !!python/object/apply:os.system ['exit 7']"),
    ("no valid YAML", "training: {use_amp: !!bool x}"),
    ("no valid YAML", "seed: !!timestamp x"),
    ("keys must be strings", "[a, b]: 1"),
    ("no valid YAML", "training: {lr: 1"),
    ("no valid YAML", "a: b: c"),
    ("no valid YAML", "\tseed: 1"),
    ("no valid YAML", "seed: 1\n---\nseed: 2"),
    ("no valid YAML: nested too deeply", "seed: " + 3000 * "["),
    ("must hold keys and values, got [1, 2]", "[1, 2]"),
    ("must hold keys and values, got 'seed'", "seed"),
    ("unknown key <<", "<<: {seed: 1}"),
]  # fmt: skip


def short(text):
    return text[:40].replace("\n", " ")


@pytest.mark.parametrize(("says", "text"), MALFORMED, ids=[short(text) for _, text in MALFORMED])
def test_a_malformed_file_is_one_line_that_names_the_key(tmp_path, says, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message
    assert len(message) < len(str(path)) + 300 and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("says", "overrides"),
    [
        ("training.lr needs a value", ["--training.lr"]),
        ("unexpected argument 'fast'", ["fast"]),
        ("unknown key trainin.lr", ["--trainin.lr", "1"]),
        ("unknown key training.lr.x", ["--training.lr.x=1"]),
        ("training.lr must be a number, got 'fast'", ["--training.lr=fast"]),
        ("training.lr must be a number, got None", ["--training.lr="]),
        ("training must be a section", ["--training=3"]),
        ("training.betas: no valid YAML", ["--training.betas", "[0.9"]),
        ("training.lr: no valid YAML: aliases", ["--training.lr", "*x"]),
        ("seed must be an integer, got '--training.lr'", ["--seed", "--training.lr"]),
        ("training.epochs must be at least 1", ["--training.epochs=0"]),
    ],
)
def test_a_malformed_override_is_one_line_that_names_the_key(tiny, says, overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_of_a_section_that_is_none_names_the_section(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("training: 3")
    with pytest.raises(ConfigError, match="training must be a section with keys, got 3"):
        load_config(path, ["--training.lr=1"])


RANDOM_MASKS = ("--masking.type=random", "--model.predictor.targets=joint")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00seed", b"seed: \x00"])
def test_a_file_that_cannot_be_read_is_one_line_with_its_path(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_values_set_in_python_are_checked_too():
    from hjepa_engine.config.schema import TrainingConfig

    with pytest.raises(ConfigError, match=r"training\.lr must be above 0"):
        Config(training=TrainingConfig(lr=-1.0))
    with pytest.raises(ConfigError, match=r"^pool must be an integer or image, got True$"):
        Level(pool=True)
    with pytest.raises(ConfigError, match=r"^pool must be a positive integer or 'image', got 0$"):
        Level(pool=0)
    with pytest.raises(ConfigError, match=r"^unknown key training\.lrr, did you mean training\.lr\?$"):
        TrainingConfig(lrr=1.0)
    with pytest.raises(ConfigError, match=r"^training\.epochs must be an integer, got '3'$"):
        replace(Config().training, epochs="3")


STOPPING = "hjepa_engine.handlers.EarlyStopping"
# What only the parts themselves can refuse: still before anything is created.
UNBUILDABLE = [
    ("model.encoder_type vit_tny", ["--model.encoder_type=vit_tny"]),
    ("model.encoder_type resnet18", ["--model.encoder_type=resnet18"]),
    ("multiple of the patch size 16 x 16, got 24", ["--model.patch_size=null"]),
    ("model.num_heads must divide model.embed_dim (20), got 3", ["--model.embed_dim=20", "--model.num_heads=3"]),
    ("masking: the context must not be empty, but mask_scale", ["--masking.context_scale=[0.1, 0.2]"]),
    ("masking: target blocks must fit", ["--masking.mask_scale=[0.9, 1.0]"]),
    ("masking.context_keep must be at most 0.", ["--masking.context_keep=[0.2, 0.9]"]),
    ("masking.context_keep must keep at least one", ["--masking.context_keep=[0.001, 0.1]"]),
    ("masking.context_keep must keep 1 to 35 of 36", [*RANDOM_MASKS, "--masking.context_keep=[0.5, 0.99]"]),
    ("training.optimizer: unknown optimizer 'adam'", ["--training.optimizer=adam"]),
    ("training.optimizer: 'torch.optim.Nope' cannot be imported", ["--training.optimizer=torch.optim.Nope"]),
    ("training.optimizer: optimizer 'torch.nn.Linear' must be", ["--training.optimizer=torch.nn.Linear"]),
    ("training.optimizer: optimizer 'adamw' does not take epsilon", ["--training.optimizer_args={epsilon: 1}"]),
    ("loss.type must be smooth_l1, mse, huber, cosine or a dotted path, got 'l3'", ["--loss.type=l3"]),
    ("loss.type: 'no.such.loss' cannot be imported", ["--loss.type=no.such.loss"]),
    ("handlers[0].class_path: 'no.Such' cannot be imported", ["--handlers=[{class_path: no.Such}]"]),
    ("handlers[0].class_path: torch.nn.Linear must have a method attach", ["--handlers=[{class_path: torch.nn.Linear}]"]),
    ("handlers[0].init_args: ", [f"--handlers=[{{class_path: {STOPPING}, init_args: {{patienc: 1}}}}]"]),
    ("handlers[0].init_args: patience must", [f"--handlers=[{{class_path: {STOPPING}, init_args: {{patience: 0}}}}]"]),
    ("device must exist: cuda:99", ["--device=cuda:99"]),
    ("device must be auto", ["--device=cuda:x"]),
]  # fmt: skip


@pytest.mark.parametrize(("says", "overrides"), UNBUILDABLE, ids=[" ".join(words)[:60] for _, words in UNBUILDABLE])
def test_what_does_not_fit_together_is_refused_before_anything_is_created(tiny, tmp_path, says, overrides):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        build(load_config(tiny, [*overrides, f"--run_dir={run_dir}"]))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not run_dir.exists()


@pytest.mark.parametrize("overrides", [[], ["--training.epochs=3"]])
def test_an_error_of_a_file_names_it_and_one_of_the_command_line_does_not(tmp_path, overrides):
    path = tmp_path / "run.yaml"
    for text, says in (
        (None, "cannot be read: No such file or directory"),
        ("training: [", "no valid YAML"),
        ("training: {lr: -1}", "training.lr must be above 0, got -1"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {says}')}"):
            load_config(path, overrides)
    assert load_config(path, ["--training.lr=0.1", *overrides]).training.lr == 0.1  # and the key may be put right there
    path.write_text("training: {lr: -1, epochs: 0}")  # the second error is the file's own
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: training.epochs must be at least 1, got 0"):
        load_config(path, ["--training.lr=0.1"])
    path.write_text("training: {lr: 0.1}")
    with pytest.raises(ConfigError, match=r"^training\.lr must be above 0, got -2"):
        load_config(path, ["--training.lr=-2", *overrides])
    path.write_text("model: {predictor: 3}")
    with pytest.raises(ConfigError, match=r"^model\.predictor must be a section"):
        load_config(path, ["--model.predictor.width=8", *overrides])


def test_the_command_ends_with_code_2_one_line_and_nothing_created(tmp_path, tiny):
    (tmp_path / "bad.yaml").write_text("training:\n  lr: 1\n  lr: 2\n")
    cases = {
        "unknown key training.lrr, did you mean training.lr?": ["--training.lrr", "1"],
        "lr is given twice, again in line 3": ["--config", str(tmp_path / "bad.yaml")],
        "masking: the context must not be empty": ["--config", str(tiny), "--masking.context_scale", "[0.1, 0.2]"],
    }
    recipe, environment = ROOT / "recipes" / "pretrain.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for number, words in enumerate(cases.values()):
        folder = tmp_path / f"case_{number}"
        folder.mkdir()
        command = [sys.executable, str(recipe), *words]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    for number, (says, process) in enumerate(zip(cases, running, strict=True)):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert says in err and err.count("\n") == 1 and "Traceback" not in err
        assert out == "" and list((tmp_path / f"case_{number}").iterdir()) == []


# No key is dead


@dataclass
class Tools:
    """What observations may use."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]


@dataclass
class Effect:
    """Changing the key ``to`` this must change what ``observe`` sees, as ``says`` puts it in words."""

    says: str
    to: str
    observe: Callable[[Config, Tools], Any]
    with_: tuple[str, ...] = ()
    becomes: Any = None


def nan_loss(prediction, target):
    return prediction.sum() * float("nan")


class Recorder:
    """A handler of one's own."""

    seen: list[tuple[str, int]] = []

    def __init__(self, name: str = "x") -> None:
        self.name = name

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.COMPLETED, lambda: self.seen.append((self.name, engine.state.iteration)))


def own_modules(width=3):
    return nn.ModuleDict({"body": nn.Linear(1, width)})


def own_data(size=12, split="train"):
    return [np.zeros((24, 24, 3), np.uint8)] * size


def own_step(modules, batch):
    return {"loss": modules["body"](batch["images"][:, 0, 0, :1]).square().mean()}


def num_parameters(config, tools):
    return sum(parameter.numel() for parameter in build(config).modules.parameters())


def measured_encoders(config, tools):
    return sorted(build(config).handler(CollapseMonitor).evaluator.modules)


def measured_outputs(config, tools):
    return build(config).handler(BatchCollapse).outputs


def module_names(config, tools):
    return sorted(build(config).modules)


def loader(config, split="train"):
    return build_loader(config.data, open_split(config.data, split, config.seed), config.seed, train=True)


def views(config, tools):
    return next(iter(loader(config)))["images"].flatten().tolist()


def batch_shape(config, tools):
    return tuple(next(iter(loader(config)))["images"].shape)


def finished(config, tools):
    """A whole run: what ended it, and the run itself."""
    run, end = build(config), "done"
    try:
        run.fit()
    except RunError as error:
        end = type(error).__name__
    return run, end


def trained(config, tools):
    """A digest of all weights after four steps."""
    run, end = finished(config, tools)
    assert end == "done"
    digest = hashlib.sha256()
    for tensor in run.modules.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def compiled(config, tools):
    """Whether modules are compiled when the run is built."""
    asked = []
    tools.monkeypatch.setattr(parts, "compile_modules", lambda modules, device: asked.append(list(modules)))
    build(config)
    return asked == [["context_encoder", "target_encoder", "predictor"]]


def ending(config, tools):
    run, end = finished(config, tools)
    return end, run.trainer.state.iteration


def group_timeout(config, tools):
    given = []

    def group(device, timeout):
        given.append(timeout)
        raise KeyboardInterrupt

    tools.monkeypatch.setattr(runs, "process_group", group)
    with pytest.raises(KeyboardInterrupt):
        runs.run_to_end(config, build)
    return given[0]


def sharded(config, tools):
    tools.folder.mkdir(exist_ok=True)
    return in_processes(2, tools.folder, lambda: is_sharded(parts.build_trainer(config).modules))


def weight_checks(config, tools):
    return build(config).handler(WeightCheck).every


def rolled_back(config, tools):
    """How a run ends, how often it was rolled back, and what its learning rates are multiplied by then."""
    run, end = finished(config, tools)
    return end, run.guard.rollbacks, run.guard.lr_multiplier


def files(config, tools):
    finished(config, tools)
    return sorted({str(path.relative_to(tools.folder)).split(".")[0] for path in tools.folder.rglob("*")})


def kept(config, tools):
    """Optimizer steps of the checkpoints that a run leaves, the newest first."""
    finished(config, tools)
    return [checkpoint.record.step for checkpoint in list_checkpoints(RunFolder(config).checkpoint_path)]


def set_aside(config, tools):
    """Whether the same run again has moved the first one out of its way."""
    finished(config, tools)
    finished(config, tools)
    return (RunFolder(config).path / "previous_1").is_dir()


def started_from(config, tools):
    """A digest of all weights of a run that may start from those of another one, in the folder ``source``."""
    plain = replace(config.model, init_from=None, init_parts=None)
    source = replace(config, run_dir=str(tools.folder / "source"), seed=7, model=plain)
    tools.monkeypatch.chdir(tools.folder)
    finished(source, tools)
    return trained(config, tools)


def reports(config, tools):
    finished(config, tools)
    return [path.name for path in RunFolder(config).path.glob("*.html")]


def records(config, tools):
    finished(config, tools)
    path = RunFolder(config).path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def histograms(config, tools):
    """Steps whose records have histograms, and the groups of these."""
    finished(config, tools)
    lines = [json.loads(line) for line in (RunFolder(config).path / "metrics.jsonl").read_text().splitlines()]
    watched = ("gradients", "parameters")
    return {(line["step"], group) for line in lines for name in line if (group := name.split("/")[0]) in watched}


def drawn(config, tools):
    """Steps of the figures that a run leaves, and how many images the last one of masks has."""
    finished(config, tools)
    paths = sorted((RunFolder(config).path / "figures").glob("masks_*.png"))
    heights = [Image.open(path).height for path in paths]  # 108 pixels of titles, 202 of each row
    return [int(path.stem[-8:]) for path in paths], [(height - 108) // 202 for height in heights[-1:]]


def shapes(config, tools):
    return {name: tuple(tensor.shape) for name, tensor in build_modules(config).state_dict().items()}


def grid(config, tools):
    return build_modules(config)["context_encoder"].grid


def heads(config, tools):
    modules = build_modules(config)
    return modules["context_encoder"].vit.blocks[0].attn.num_heads, modules["predictor"].blocks[0].attn.num_heads


def trainable(config, tools):
    return {name for name, parameter in build_modules(config).named_parameters() if parameter.requires_grad}


def saved_tensors(config, tools):
    modules, number = build_modules(config), []
    pictures = torch.zeros(2, 3, 24, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: number.append(1) or tensor, lambda tensor: tensor):
        modules["context_encoder"](pictures)
    return len(number)


def wandb_calls(config, tools):
    calls = []

    class FakeRun:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: calls.append(arguments) or FakeRun()
    fake.Settings = lambda **arguments: None
    fake.setup = lambda settings: None
    tools.monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        tools.monkeypatch.delenv(name, raising=False)
    tools.monkeypatch.setenv("HOME", str(tools.folder))
    finished(config, tools)
    return [[call[name] for name in ("project", "entity", "tags", "mode")] for call in calls]


def pictures_of(config, tools):
    """Numbers of training and validation images of a folder; there are two."""
    for folder, paths in (
        ("data", ["cat/0", "cat/1", "dog/0", "dog/1", "dog/2"]),
        ("other", ["0", "1", "2"]),
    ):
        for number, path in enumerate(paths):
            (tools.folder / folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tools.folder / folder / f"{path}.png")
    path = tools.folder / (Path(config.data.data_path).name if config.data.data_path else "data")
    data = replace(config.data, data_path=str(path))
    train, val = (open_split(data, split) for split in ("train", "val"))
    return [len(train.images), len(val.images), *train.classes]


TABLE = ("--data.dataset=huggingface", "--data.data_path=data")


def table_rows(config, tools):
    """A pixel of an image and the classes, of a table with two columns of images; or why it is not opened."""
    import datasets

    def table(**values):
        columns = {name: [Image.new("RGB", (8, 8), (value, 0, 0))] * 20 for name, value in values.items()}
        features = {name: datasets.Image() for name in values} | {"label": datasets.Value("string")}
        return datasets.Dataset.from_dict({**columns, "label": ["a", "b"] * 10}, datasets.Features(features))

    table(image=1, other=9).save_to_disk(tools.folder / "data")
    tools.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tools.monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": table(image=200)})
    try:
        split = open_split(config.data, "train")
    except ConfigError as error:
        return str(error)
    return split.images[0][0].getpixel((0, 0))[0], split.classes


def growth(config, tools):
    """Of a run's data by one image."""
    old, new = (
        {name: {"images": size, "folders": {}, "classes": [], "fingerprint": str(size)} for name in ("train", "val")}
        for size in (4, 5)
    )
    try:
        return "grown" if accepted_changes(old, new, "run", config.data.allow_growth) else "equal"
    except RunError:
        return "refused"


def downloads(config, tools):
    calls = []

    def fetch(*args, **kwargs):
        calls.append(args[0])
        raise RuntimeError("no network in a test")

    tools.monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with pytest.raises(RunError):
        open_split(config.data, "train")
    return len(calls)


def damage(config, tools):
    """How a run over 120 images ends, of which two cannot be read."""
    folder = tools.folder / "damaged" / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    for image in range(150):
        Image.new("RGB", (8, 8), (image, 0, 0)).save(folder / f"{image}.png")
    for image in range(0, 150, 25):
        (folder / f"{image}.png").write_bytes(b"broken")
    return finished(config, tools)[1]


def too_large(config, tools):
    """Names of unreadable images among 20 small ones and one of 16 x 16 pixels."""
    folder = tools.folder / "large" / "train" / "cat"
    folder.mkdir(parents=True)
    for image in range(21):
        Image.new("RGB", (16, 16) if image == 1 else (8, 8), (image, 0, 0)).save(folder / f"{image}.png")
    lines = [line for _ in range(3) for batch in loader(config) for line in batch["damaged"]]
    return {Path(line.partition(": ")[0]).name for line in lines}


def stderr(config, tools):
    tools.capsys.readouterr()
    finished(config, tools)
    return bool(tools.capsys.readouterr().err)


def moved(config, tools):
    """Whether images are moved to the memory of the loader's device."""
    split = open_split(config.data, "train", config.seed)
    return build_loader(config.data, split, config.seed, train=True).split is not split


def pinned(config, tools):
    split = open_split(config.data, "train", config.seed)
    return build_loader(config.data, split, config.seed, train=True, device=torch.device("cuda")).processes.pin_memory


def features(config, tools):
    (train, _), (val, _), _ = read_features(config, build_modules(config)["target_encoder"], torch.device("cpu"))
    return tuple(train.shape), tuple(val.shape)


def in_files(config, tools):
    """Whether the features of a probe are memory-mapped."""
    stores = []

    class Store(FeatureStore):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            stores.append(self)

    tools.monkeypatch.setattr("hjepa_engine.recipes.common.gathering.FeatureStore", Store)
    features(config, tools)
    return stores[0].is_mapped


def probed(config, tools):
    folder = tools.folder / "probe"
    folder.mkdir(exist_ok=True)
    probe(config, None, "pixels", folder)
    lines = [json.loads(line) for line in (folder / "probe_pixels.jsonl").read_text().splitlines()]
    (folder / "probe_pixels.jsonl").unlink()
    last = {name: value for line in lines for name, value in line.items()}
    return [last[name] for name in ("epoch", "step", "train/lr", "train/loss")]


def probes(config, tools):
    """Steps at which a whole run is probed."""
    finished(config, tools)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "probe/knn" in line]


def probed_online(config, tools):
    """What the first probe of a run says, and of how many images."""
    run = build(config)
    started = [handler for handler, _, _ in run.trainer._event_handlers[Events.STARTED]]
    probe = next(h.__self__ for h in started if isinstance(getattr(h, "__self__", None), OnlineProbe))
    probe.probe(run.trainer)
    return len(probe.train.labels), len(probe.val.labels), dict(run.trainer.state.metrics)


def collapse_of(config, tools, what="target"):
    """Steps of a run with a reading of collapse, and what the last one has of the target encoder."""
    finished(config, tools)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if f"collapse/{what}_std" in line}
    last = found[max(found)] if found else {}
    return list(found), [key for key in ("rank", "alpha_req", "lidar") if f"collapse/{what}_{key}" in last]


def collapse_images(config, tools):
    """How many images collapse is measured on."""
    started = [handler for handler, _, _ in build(config).trainer._event_handlers[Events.STARTED]]
    return next(len(h.__self__.images.labels) for h in started if isinstance(h.__self__, CollapseMonitor))


def own_handlers(config, tools):
    Recorder.seen.clear()
    finished(config, tools)
    return list(Recorder.seen)


def device(config, tools):
    try:
        return str(choose_device(config.device))
    except ConfigError as error:
        return str(error)


def loss_terms(config, tools):
    run, _ = finished(config, tools)
    return sorted(name for name in run.trainer.state.metrics if name.startswith("train/loss"))


def loss_value(config, tools):
    from hjepa_engine.build import build_masks

    masks = build_masks(config, (6, 6)).sample(4, 0)
    pictures = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return build_step(config)(build_modules(config), {"images": pictures, "masks": masks})["loss"].item()


def system_metrics(config, tools):
    run, _ = finished(config, tools)
    return sorted(name for name in run.trainer.state.metrics if name.startswith("system/"))


ME = __name__
TENSORBOARD = ("--logging.tensorboard.enabled=true",)
WANDB = ("--logging.wandb.enabled=true",)
PICTURES = ("--pictures.enabled=true",)
EVERY_STEP = ("--checkpoint.save_every_steps=1", "--logging.log_frequency=1")
LAST_ONLY = (*EVERY_STEP, "--checkpoint.keep_best_n=0")
# The learning rate is smallest in the first step, which warms up, and largest in the second.
WARM_UP = (*EVERY_STEP, "--training.lr_schedule=linear", "--training.warmup_epochs=1", "--training.min_lr=6e-3")
BY_RATE = (*WARM_UP, "--checkpoint.metric=train/lr")
ALL = ("--checkpoint.keep_last_n=9",)
# It is 0.996 in the first step, and more in the second.
MOMENTUM_IS_WRONG = "{metric: train/ema_momentum, above: 0.996, readings: 1"
ROLLBACK = (*EVERY_STEP, f"--guard.rules=[{MOMENTUM_IS_WRONG}, action: rollback}}]")
# Two have the 2304 tokens of a reading.
LARGE_BATCHES = (
    "--data.image_size=48",
    "--data.fake_size=96",
    "--data.batch_size=48",
    "--logging.log_frequency=1",
)
STUCK = ("--training.lr=1e-30", "--training.min_lr=0", "--training.weight_decay=0", "--model.ema.momentum=1")
ONLINE = ("--online_probe.every=1", "--data.dataset=digits", "--data.image_size=8", "--data.batch_size=256")
SMALL_DIGITS = ("--data.dataset=digits", "--data.image_size=8", "--data.batch_size=256")

FOLDER = ("--data.dataset=imagefolder",)
EFFECTS = {
    "data.dataset": Effect("digits are gray", "digits", batch_shape, becomes=(8, 1, 24, 24)),
    "data.class_path": Effect("other images", f"{ME}.own_data", lambda c, t: len(loader(c).split.images), becomes=12),
    "data.init_args": Effect(
        "more of them", "{size: 20}", lambda c, t: len(loader(c).split.images), (f"--data.class_path={ME}.own_data",), 20
    ),
    "data.data_path": Effect("another folder's images", "other", pictures_of, FOLDER, [2, 1]),
    "data.train_dir": Effect("part of the images", "dog", pictures_of, FOLDER, [2, 1]),
    "data.val_dir": Effect("validates on named images", "dog", pictures_of, FOLDER, [2, 3]),
    "data.labels": Effect("no classes", "none", pictures_of, FOLDER, [4, 1]),
    "data.hub_name": Effect("the hub is asked", "a/b", table_rows, TABLE, becomes=(200, ())),
    "data.image_column": Effect("another image", "other", table_rows, TABLE, becomes=(9, ())),
    "data.label_column": Effect(
        "there are classes", "label", table_rows, (*TABLE, "--data.image_column=other"), becomes=(9, ("a", "b"))
    ),
    "data.download": Effect("torchvision fetches", "true", downloads, ("--data.dataset=cifar10",), 1),
    "data.image_size": Effect("larger images", "32", batch_shape, becomes=(8, 3, 32, 32)),
    "data.in_chans": Effect("color becomes gray", "1", batch_shape, becomes=(8, 1, 24, 24)),
    "data.max_pixels": Effect(
        "one is too large", "100", too_large, ("--data.dataset=imagefolder", "--data.data_path=large"), {"1.png"}
    ),
    "data.mean": Effect("darker", "[0.9, 0.9, 0.9]", views),
    "data.std": Effect("more contrast", "[0.1, 0.1, 0.1]", views),
    "data.batch_size": Effect("fewer images in a batch", "4", batch_shape, becomes=(4, 3, 24, 24)),
    "data.num_workers": Effect("the loader has workers", "2", lambda c, t: loader(c).processes.num_workers, becomes=2),
    "data.in_memory": Effect("files are not read again", "true", lambda c, t: loader(c).processes is None, becomes=True),
    "data.on_device": Effect("the loader's images have been moved", "true", moved, ("--data.dataset=digits",), becomes=True),
    "data.pin_memory": Effect("the loader does not pin", "false", pinned, becomes=False),
    "data.val_fraction": Effect(
        "more are held out", "0.5", lambda c, t: len(open_split(c.data, "val").images), ("--data.dataset=digits",), 898
    ),
    "data.crop_scale": Effect("other crops", "[0.1, 0.2]", views),
    "data.crop_ratio": Effect("other crops", "[0.5, 0.6]", views),
    "data.horizontal_flip": Effect("mirrored images", "1.0", views),
    "data.color_jitter": Effect("other colors", "0.5", views),
    "data.random_affine": Effect("turned images", "0.5", views),
    "data.rand_augment": Effect("other operations", "2", views),
    "data.rand_augment_magnitude": Effect("stronger ones", "20", views, ("--data.rand_augment=2",)),
    "data.max_damaged": Effect(
        "the run goes on",
        "0.5",
        damage,
        ("--data.dataset=imagefolder", "--data.data_path=damaged", "--data.batch_size=25"),
        "done",
    ),
    "data.allow_growth": Effect("a run goes on with more images", "true", growth, becomes="grown"),
    "data.fake_size": Effect("more images", "40", lambda c, t: len(loader(c).reader), becomes=40),
    "model.encoder_type": Effect("CLIP's has a norm before its blocks", "vit_base_patch16_clip_224", shapes),
    "model.patch_size": Effect("fewer patches", "8", grid, becomes=(3, 3)),
    "model.embed_dim": Effect("wider tokens", "24", shapes),
    "model.depth": Effect("more blocks", "3", shapes),
    "model.num_heads": Effect("more heads", "4", heads, becomes=(4, 2)),
    "model.pos_embed": Effect("positions are trained", "learned", trainable),
    "model.stem": Effect("convolutions", "conv", num_parameters),
    "model.init": Effect("larger weights", "xavier", trained),
    "model.patch_init": Effect("smaller weights", "trunc_normal", trained),
    "model.drop_path": Effect("blocks are dropped in training", "0.9", trained),
    "model.layer_scale": Effect("blocks have a scale", "0.1", shapes),
    "model.norm_eps": Effect("norms of tokens with less contrast", "1e-2", trained),
    "model.activation_checkpointing": Effect("less is kept for the backward pass", "true", saved_tensors),
    "model.class_path": Effect("other modules", f"{ME}.own_modules", module_names, becomes=["body"]),
    "model.init_args": Effect("wider ones", "{width: 5}", num_parameters, (f"--model.class_path={ME}.own_modules",), 10),
    "model.encoder": Effect("another one is probed", "predictor", lambda c, t: build(c).encoder, becomes="predictor"),
    "model.num_hierarchies": Effect("more heads", "3", shapes),
    "model.levels": Effect("more levels", "[{pool: 1}, {pool: 2}, {pool: image}]", shapes),
    "model.predictor.width": Effect("wider predictor", "12", shapes),
    "model.predictor.depth": Effect("more blocks", "2", shapes),
    "model.predictor.num_heads": Effect("more heads", "4", heads, becomes=(2, 4)),
    "model.predictor.mlp_ratio": Effect("wider MLPs", "2", shapes),
    "model.predictor.init": Effect("smaller weights", "trunc_normal", trained),
    "model.predictor.targets": Effect("blocks see each other", "joint", trained),
    "model.predictor.level_depth": Effect("levels have blocks of their own", "1", shapes),
    "model.ema.momentum": Effect("another target encoder", "0.5", trained),
    "model.ema.momentum_end": Effect("another target encoder", "0.5", trained),
    "model.ema.schedule": Effect("another target encoder", "linear", trained),
    "model.ema.momentum_warmup_epochs": Effect("another target encoder", "1", trained),
    "model.ema.momentum_start": Effect(
        "another target encoder", "0.5", trained, ("--model.ema.momentum_warmup_epochs=1",)
    ),
    "masking.type": Effect("other masks", "random", trained, RANDOM_MASKS[1:]),
    "masking.num_masks": Effect("other masks", "2", trained),
    "masking.mask_scale": Effect("other masks", "[0.3, 0.35]", trained),
    "masking.aspect_ratio": Effect("other masks", "[2, 2.5]", trained),
    "masking.context_scale": Effect("other masks", "[0.5, 0.6]", trained),
    "masking.context_keep": Effect("fewer patches are seen", "[0.1, 0.1]", trained),
    "loss.type": Effect("another distance", "mse", loss_value),
    "loss.hierarchy_weights": Effect("another sum", "[1, 0.5]", loss_value),
    "loss.variance_weight": Effect("one more term", "0.5", loss_terms),
    "loss.covariance_weight": Effect("one more term", "0.5", loss_terms),
    "loss.sigreg_weight": Effect("one more term", "0.5", loss_terms),
    "training.epochs": Effect("a longer run", "3", ending, becomes=("done", 6)),
    "training.max_iters": Effect("a shorter run", "3", ending, becomes=("done", 3)),
    "training.warmup_epochs": Effect("other learning rates", "1.5", trained),
    "training.start_lr": Effect("a larger first step", "5e-3", trained, WARM_UP),
    "training.lr": Effect("larger steps", "2e-2", trained),
    "training.min_lr": Effect("a larger last step", "5e-3", trained),
    "training.lr_schedule": Effect("larger last steps", "constant", trained),
    "training.level_lrs": Effect("other heads", "[1e-2, 1e-3]", trained),
    "training.weight_decay": Effect("smaller weights", "0.5", trained),
    "training.weight_decay_end": Effect("smaller weights", "0.5", trained),
    "training.optimizer": Effect("other steps", "sgd", trained),
    "training.optimizer_args": Effect("other steps", "{eps: 1e-2}", trained),
    "training.betas": Effect("other steps", "[0.5, 0.6]", trained),
    "training.clip_grad": Effect("shorter gradients", "1e-3", trained, ("--training.optimizer=sgd",)),
    "training.accumulation_steps": Effect("fewer steps", "2", trained),
    "training.use_amp": Effect("rounded numbers", "true", trained, ("--training.use_amp=false",)),
    "training.amp_dtype": Effect(
        "another type",
        "float16",
        lambda c, t: build(c).trainer.amp_dtype,
        ("--training.use_amp=true",),
        torch.float16,
    ),
    "training.compile": Effect("is said to be compiled", "true", compiled, becomes=True),
    "training.non_finite": Effect("the run goes on", "skip", ending, (f"--loss.type={ME}.nan_loss",), ("done", 4)),
    "training.early_stopping": Effect("ends in epoch 2", "1", ending, ("--training.epochs=4", *STUCK), ("done", 4)),
    "training.time_limit": Effect("leaves after a step", "1e-9", ending, becomes=("Preempted", 1)),
    "distributed.strategy": Effect("modules are in shards", "fsdp", sharded, becomes=[True, True]),
    "distributed.timeout": Effect("the group waits for less", "0.5", group_timeout, becomes=0.5),
    "distributed.weight_check_every": Effect("more often", "7", weight_checks, becomes=7),
    "checkpoint.save_frequency": Effect("every other epoch", "2", kept, ("--training.epochs=4", *ALL), [8, 4]),
    "checkpoint.save_every_steps": Effect("every step", "1", kept, ALL, [4, 3, 2, 1]),
    "checkpoint.save_every_minutes": Effect("every step", "1e-9", kept, ALL, [4, 3, 2, 1]),
    "checkpoint.keep_last_n": Effect("three are left", "3", kept, LAST_ONLY, [4, 3, 2]),
    "checkpoint.keep_best_n": Effect("the best one is not kept", "0", kept, BY_RATE, [4, 3]),
    "checkpoint.keep_every_epochs": Effect("the end of each epoch is kept", "1", kept, LAST_ONLY, [4, 3, 2]),
    "checkpoint.metric": Effect("another one is best", "train/lr", kept, WARM_UP, [4, 3, 1]),
    "checkpoint.mode": Effect("the largest is best", "max", kept, BY_RATE, [4, 3, 2]),
    "checkpoint.checkpoint_dir": Effect("they are elsewhere", "elsewhere", files),
    "checkpoint.resume": Effect("the first run is set aside", "never", set_aside, becomes=True),
    "model.init_from": Effect("other weights at the start", "source", started_from),
    "model.init_parts": Effect("fewer of them", "[predictor]", started_from, ("--model.init_from=source",)),
    "logging.experiment_name": Effect("another folder", "b", lambda c, t: str(RunFolder(c).path), ("--run_dir=null",)),
    "logging.log_dir": Effect("event files elsewhere", "elsewhere", files, TENSORBOARD),
    "logging.log_frequency": Effect("a record each step", "1", records, becomes=[1, 2, 3, 4]),
    "logging.progress_bar": Effect("lines on stderr", "true", stderr, becomes=True),
    "logging.system_metrics": Effect("nothing is read of the host", "false", system_metrics, becomes=[]),
    "logging.watch": Effect(
        "histograms of weights",
        "parameters",
        histograms,
        ("--logging.log_frequency=1", "--logging.watch_frequency=2"),
        {(2, "parameters"), (4, "parameters")},
    ),
    "logging.watch_frequency": Effect(
        "histograms once in a while",
        "4",
        histograms,
        ("--logging.log_frequency=2", "--logging.watch=all"),
        {(4, "gradients"), (4, "parameters")},
    ),
    "logging.report": Effect("no page about the run", "false", reports, becomes=[]),
    "logging.wandb.enabled": Effect("a run over there", "true", wandb_calls, becomes=[["hjepa", None, [], "offline"]]),
    "logging.wandb.project": Effect("named so", "p", wandb_calls, WANDB, [["p", None, [], "offline"]]),
    "logging.wandb.entity": Effect("named so", "e", wandb_calls, WANDB, [["hjepa", "e", [], "offline"]]),
    "logging.wandb.tags": Effect("tagged so", "[a, b]", wandb_calls, WANDB, [["hjepa", None, ["a", "b"], "offline"]]),
    "logging.wandb.mode": Effect("asked for so", "online", wandb_calls, WANDB, [["hjepa", None, [], "online"]]),
    "logging.tensorboard.enabled": Effect("event files", "true", files),
    "collapse.enabled": Effect("nothing is measured", "false", collapse_of, becomes=([], [])),
    "collapse.every": Effect("at every window's end", "1", collapse_of, becomes=([0, 2, 4], ["rank"])),
    "collapse.images": Effect("fewer than the 16 there are", "10", collapse_images, becomes=10),
    "collapse.batch_every": Effect(
        "two readings", "1", lambda c, t: collapse_of(c, t, "batch_target")[0], LARGE_BATCHES, [2, 4]
    ),
    "collapse.modules": Effect("one encoder is measured", "{x: context_encoder}", measured_encoders, becomes=["x"]),
    "collapse.outputs": Effect("another output is", "{x: y}", measured_outputs, becomes={"x": "y"}),
    "collapse.alpha_req": Effect("one more", "true", collapse_of, becomes=([0, 4], ["rank", "alpha_req"])),
    "collapse.lidar_views": Effect("one more", "2", collapse_of, becomes=([0, 4], ["rank", "lidar"])),
    "guard.rules": Effect("ends the run", f"[{MOMENTUM_IS_WRONG}, action: stop}}]", ending, EVERY_STEP, ("GuardStop", 2)),
    "guard.lr_factor": Effect("a smaller rate", "0.1", rolled_back, ROLLBACK, ("GuardStop", 2, 0.1**2)),
    "guard.max_rollbacks": Effect("ends sooner", "1", rolled_back, ROLLBACK, ("GuardStop", 1, 0.5)),
    "pictures.enabled": Effect("figures of the last step", "true", drawn, becomes=([4], [4])),
    "pictures.every": Effect("figures at every epoch's end", "1", drawn, PICTURES, ([2, 4], [4])),
    "pictures.images": Effect("figures of fewer images", "1", drawn, PICTURES, ([4], [1])),
    "probe.enabled": Effect("three accuracies", "true", lambda c, t: len(build(c).fit()), becomes=3),
    "probe.features": Effect("tokens side by side", "concat", features, becomes=((16, 36 * 16), (16, 36 * 16))),
    "probe.labels_per_class": Effect("one of each class", "1", lambda c, t: features(c, t)[0][0]),
    "probe.epochs": Effect("twice the steps", "2", lambda c, t: probed(c, t)[0], SMALL_DIGITS, 2),
    "probe.batch_size": Effect("fewer steps", "1438", lambda c, t: probed(c, t)[1], SMALL_DIGITS, 1),
    "probe.lr": Effect("other losses", "1e-3", lambda c, t: probed(c, t)[3], SMALL_DIGITS),
    "probe.weight_decay": Effect("other losses", "10", lambda c, t: probed(c, t)[3], SMALL_DIGITS),
    "probe.features_in_memory_gb": Effect("features are in a file", "0", in_files, becomes=True),
    "online_probe.every": Effect("three probes", "1", probes, becomes=[0, 2, 4]),
    "online_probe.train_images": Effect("fewer to learn from", "100", lambda c, t: probed_online(c, t)[0], ONLINE, 100),
    "online_probe.val_images": Effect("fewer to judge on", "100", lambda c, t: probed_online(c, t)[1], ONLINE, 100),
    "online_probe.neighbors": Effect("others vote", "1", lambda c, t: probed_online(c, t)[2]["probe/knn"], ONLINE),
    "online_probe.temperature": Effect("other weights", "10", lambda c, t: probed_online(c, t)[2]["probe/knn"], ONLINE),
    "online_probe.linear_epochs": Effect(
        "no linear head", "0", lambda c, t: sorted(probed_online(c, t)[2]), ONLINE, ["probe/knn"]
    ),
    "step": Effect(
        "another step", f"{{class_path: {ME}.own_step}}", lambda c, t: build(c).trainer.step.func, becomes=own_step
    ),
    "handlers": Effect(
        "one's own class is attached",
        f"[{{class_path: {ME}.Recorder, init_args: {{name: mine}}}}]",
        own_handlers,
        becomes=[("mine", 4)],
    ),
    "run_dir": Effect("another folder", "elsewhere", lambda c, t: str(RunFolder(c).path), becomes="elsewhere"),
    "seed": Effect("other weights", "1", trained),
    "device": Effect("another device, or none such", "cuda:15", device),
}  # fmt: skip


def test_the_table_of_effects_knows_every_key():
    """A new key needs an entry above that shows what it does."""
    assert EFFECTS.keys() == {option.key for option in list_options()}


@pytest.fixture(scope="module")
def unchanged():
    """What has been observed without any change, by observation: most keys share one."""
    return {}


@pytest.mark.parametrize("key", [option.key for option in list_options()])
def test_no_key_is_dead(key, tiny, tmp_path, monkeypatch, capsys, unchanged):
    effect = EFFECTS[key]

    def observe(name, *change):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        tools = Tools(folder, monkeypatch, capsys)
        return effect.observe(load_config(tiny, ["--run_dir=run", *effect.with_, *change]), tools)

    same = (effect.observe, effect.with_)
    if same not in unchanged:
        unchanged[same] = observe("before")
    before, after = unchanged[same], observe("after", f"--{key}={effect.to}")
    assert before != after, f"{key} is dead: {effect.says} was expected"
    if effect.becomes is not None:
        assert after == effect.becomes


def test_equal_configurations_train_to_equal_weights(tiny, tmp_path, monkeypatch, capsys):
    """Else every digest above would differ by itself."""
    tools = Tools(tmp_path, monkeypatch, capsys)
    first, second = (trained(load_config(tiny, [f"--run_dir={tmp_path / name}"]), tools) for name in "ab")
    assert first == second
