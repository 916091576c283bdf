import copy
import dataclasses
import math

import pytest
import torch
from helpers import (
    LinearModel,
    largest_difference,
    linear_step,
    linear_trainer,
    noise_batches,
    pretraining,
    rows,
    same_bits,
    tiny_config,
    weights_of,
)
from ignite.engine import Events
from torch import nn

from hjepa_engine import TrainEvents, create_trainer
from hjepa_engine.handlers import NonFiniteGuard, OptimizerStep, ParamSchedule, TargetEncoderEMA
from hjepa_engine.models import build_modules
from hjepa_engine.optim import build_optimizer, param_groups
from hjepa_engine.schedules import CosineScheduler, HierarchicalScheduler, LinearScheduler
from hjepa_engine.utils.gradients import clip_gradients, gradient_norm

# Adam divides by the gradient's size: with its usual eps, gradients that are nothing but rounding become whole steps.
OPTIMIZERS = {"sgd": (0.1, {}), "adamw": (1e-3, {"eps": 1e-3})}


def record(run, value, event=TrainEvents.OPTIMIZER_STEPPED):
    """What ``value(engine)`` is at each ``event``."""
    seen = []
    run.trainer.add_event_handler(event, lambda engine: seen.append(value(engine)))
    return seen


@pytest.mark.parametrize("clip_grad", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_micro_batches_train_like_the_batch_they_make_up(optimizer, clip_grad):
    lr, arguments = OPTIMIZERS[optimizer]
    settings = {"optimizer": optimizer, "lr": lr, "clip_grad": clip_grad, "epochs": 3}
    config = tiny_config(**{f"training__{name}": value for name, value in settings.items()})
    config.training.optimizer_args = arguments
    # 20 images are five micro-batches of four: windows of 2, 2 and 1.
    whole = pretraining(config, data=noise_batches([8, 8, 4]))
    cut = pretraining(
        dataclasses.replace(config, training=dataclasses.replace(config.training, accumulation_steps=2)),
        data=noise_batches([4] * 5),
    )
    seen = {}
    for name, run in (("whole", whole), ("cut", cut)):
        seen[name] = {
            "norm": record(run, lambda engine: engine.state.output["grad_norm"].item()),
            "lr": record(run, lambda engine, run=run: [group["lr"] for group in run.optimizer.param_groups]),
            "decay": record(run, lambda engine, run=run: run.optimizer.param_groups[0]["weight_decay"]),
            "momentum": record(run, lambda engine, run=run: run.ema.param_groups[0]["momentum"]),
        }
        before = run.weights
        run.run()
        assert largest_difference(before, run.weights) > 1e-3  # it did train
    assert cut.trainer.state.optimizer_step == whole.trainer.state.optimizer_step == 9
    assert cut.trainer.state.iteration == 15
    assert seen["cut"].pop("norm") == pytest.approx(seen["whole"].pop("norm"), rel=1e-4)
    assert seen["cut"] == seen["whole"]  # schedules are written once per optimizer step
    assert largest_difference(whole.weights, cut.weights) < 1e-6


def test_micro_batches_see_the_masks_of_the_batch_they_make_up():
    whole = pretraining(tiny_config(), data=noise_batches([8, 8, 4]))
    cut = pretraining(tiny_config(training__accumulation_steps=2), data=noise_batches([4] * 5))
    masks = [
        record(run, lambda engine: engine.state.batch["masks"], Events.ITERATION_COMPLETED) for run in (whole, cut)
    ]
    whole.run(max_epochs=1)
    cut.run(max_epochs=1)
    joined = [masks[1][0:2], masks[1][2:4], masks[1][4:5]]
    for large, small in zip(masks[0], joined, strict=True):
        assert torch.equal(large.context_idx, torch.cat([part.context_idx for part in small]))
        assert torch.equal(large.target_idx, torch.cat([part.target_idx for part in small]))
        assert {large.block} == {part.block for part in small}
    assert not torch.equal(masks[1][0].target_idx, masks[1][1].target_idx)


def test_the_target_encoder_moves_once_per_optimizer_step():
    config = tiny_config(training__accumulation_steps=3, model__ema__momentum_end=0.9)
    run = pretraining(config, data=noise_batches([4] * 5))
    target, moved = run.trainer.modules["target_encoder"], []
    last = weights_of(target)

    def look():
        nonlocal last
        now = weights_of(target)
        moved.append(not same_bits(last, now))
        last = now

    run.trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, look)
    run.run(max_epochs=2)
    assert moved == [False, False, True, False, True, False, False, True, False, True]


def test_the_gradient_is_the_mean_over_the_micro_batches_really_in_the_window():
    trainer, _ = linear_trainer(accumulation_steps=2)
    trainer.run(rows((2, 0), (4, 0), (0, 5)))
    # weight = (1, 1) - mean of (2, 0) and (4, 0) - (0, 5)
    assert trainer.modules["model"].weight.tolist() == [-2.0, -4.0]
    assert trainer.state.optimizer_step == 2


def test_a_run_that_ends_inside_a_window_still_steps():
    trainer, _ = linear_trainer(accumulation_steps=4)
    trainer.run(rows(*[(2, 0)] * 4, (3, 0), (9, 0), (9, 0)), max_iters=6)
    # Windows of 4 and of 2: 1 - 2 - (3 + 9) / 2
    assert trainer.modules["model"].weight.tolist() == [-7.0, 1.0]
    assert trainer.state.optimizer_step == 2
    assert trainer.modules["model"].weight.grad is None


def test_the_gradient_norm_is_that_of_all_parameters_before_clipping():
    trainer, _ = linear_trainer(accumulation_steps=2, clip_grad=1.0)
    trainer.run(rows((6, 0), (0, 8)))
    assert trainer.state.output["grad_norm"].item() == 5.0  # of (3, 4)


def test_clipping_bounds_the_update_and_keeps_its_direction():
    trainer, _ = linear_trainer(clip_grad=1.0)
    trainer.run(rows((30, 40)))
    assert trainer.modules["model"].weight.tolist() == pytest.approx([1 - 0.6, 1 - 0.8], abs=1e-6)
    small, _ = linear_trainer(clip_grad=1.0)
    small.run(rows((0.3, 0.4)))
    assert small.modules["model"].weight.tolist() == pytest.approx([0.7, 0.6])


def test_gradients_are_unclipped_when_they_are_announced():
    trainer, _ = linear_trainer(clip_grad=1.0)
    seen = []
    trainer.add_event_handler(
        TrainEvents.GRADIENTS_READY, lambda engine: seen.extend(engine.modules["model"].weight.grad.tolist())
    )
    trainer.run(rows((30, 40)))
    assert seen == [30.0, 40.0]


def test_an_update_that_a_handler_refuses_moves_nothing():
    trainer, handler = linear_trainer()
    scheduled, stepped = [], []
    ParamSchedule(handler.optimizer, "lr", lambda step: float(step + 1)).attach(trainer)

    def refuse(engine):
        engine.state.skip_update = engine.state.iteration == 2

    trainer.add_event_handler(TrainEvents.GRADIENTS_READY, refuse)
    trainer.add_event_handler(TrainEvents.LOSS_READY, lambda: scheduled.append(handler.optimizer.param_groups[0]["lr"]))
    trainer.add_event_handler(TrainEvents.OPTIMIZER_STEPPED, lambda engine: stepped.append(engine.state.iteration))
    trainer.run(rows((1, 0), (1000, 1000), (1, 0)))
    assert scheduled == [1.0, 2.0, 2.0]
    assert stepped == [1, 3]
    assert (trainer.state.optimizer_step, trainer.state.skipped_updates) == (2, 1)
    assert trainer.modules["model"].weight.tolist() == [1 - 1 - 2, 1.0]


def fp16_trainer(init_scale, batches, momentum=0.5, extra=()):
    """A scaled run of a linear model whose target follows it; the values seen at every iteration's end."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    trainer, handler = linear_trainer(scaler=scaler)
    target = LinearModel().requires_grad_(False)
    ema = TargetEncoderEMA(trainer.modules["model"], target, momentum)
    ema.attach(trainer)
    ParamSchedule(handler.optimizer, "lr", lambda step: float(step + 1)).attach(trainer)
    for other in extra:
        other.attach(trainer)
    seen = []

    def look(engine):
        weight = engine.modules["model"].weight.tolist()
        lr = handler.optimizer.param_groups[0]["lr"]
        seen.append((weight, target.weight.tolist(), lr, engine.state.optimizer_step, scaler.get_scale()))

    trainer.add_event_handler(TrainEvents.ITERATION_FINALIZED, look)
    trainer.run(batches)
    return trainer, handler, seen


@pytest.mark.parametrize("extra", [(), (NonFiniteGuard(scaled=True),)], ids=["alone", "guarded"])
def test_an_overflow_moves_neither_weights_nor_target_nor_schedules_and_lowers_the_scale(extra):
    # 2 ** 127 * 3 overflows, then 2 ** 126 * 3 does not (the largest float32 is just under 2 ** 128).
    trainer, _, seen = fp16_trainer(2.0**127, rows((3, 0), (3, 0), (0, 3)), extra=extra)
    assert seen == [
        ([1.0, 1.0], [1.0, 1.0], 1.0, 0, 2.0**126),
        ([-2.0, 1.0], [-0.5, 1.0], 1.0, 1, 2.0**126),
        ([-2.0, -5.0], [-1.25, -2.0], 2.0, 2, 2.0**126),
    ]
    assert trainer.state.skipped_updates == 1


def test_the_scale_falls_until_the_gradients_fit():
    _, handler, seen = fp16_trainer(2.0**127, rows(*[(40, 0)] * 8))
    assert [step for _, _, _, step, _ in seen] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert handler.scaler.get_scale() == 2.0**122  # 2 ** 122 * 40 is under 2 ** 128
    saved = handler.state_dict()
    _, restored = linear_trainer(scaler=torch.amp.GradScaler("cpu"))
    restored.load_state_dict(saved)
    assert restored.scaler.get_scale() == 2.0**122
    assert restored.state_dict() == saved


def test_the_measured_and_clipped_gradient_is_the_unscaled_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer, _ = linear_trainer(accumulation_steps=2, clip_grad=2.5, scaler=scaler)
    trainer.run(rows((6, 0), (0, 8)))
    assert trainer.state.output["grad_norm"].item() == 5.0
    assert trainer.modules["model"].weight.tolist() == pytest.approx([1 - 1.5, 1 - 2.0], abs=1e-5)


def test_an_infinite_gradient_skips_one_step_of_a_pretraining_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    config = tiny_config(training__use_amp="true", training__amp_dtype="float16", training__warmup_epochs=0)
    run = pretraining(config, data=noise_batches([4] * 3), scaler=scaler, amp_dtype=torch.float16)
    parameter = next(p for p in run.trainer.modules["predictor"].parameters() if p.requires_grad)

    def poison(parameter):  # within the backward pass, before gradients are unscaled
        if run.trainer.state.iteration == 2:
            parameter.grad.fill_(math.inf)

    parameter.register_post_accumulate_grad_hook(poison)
    seen = []
    run.trainer.add_event_handler(
        TrainEvents.ITERATION_FINALIZED,
        lambda engine: seen.append(
            (run.weights, engine.state.optimizer_step, run.optimizer.param_groups[0]["lr"], scaler.get_scale())
        ),
    )
    before = run.weights
    run.run(max_epochs=1)
    assert [step for _, step, _, _ in seen] == [1, 1, 2]
    assert [scale for *_, scale in seen] == [256.0, 128.0, 128.0]
    assert not same_bits(before, seen[0][0])
    assert same_bits(seen[0][0], seen[1][0])
    assert not same_bits(seen[1][0], seen[2][0])
    assert seen[1][2] == run.handlers["lr"].schedule(1)
    assert seen[2][2] == seen[1][2]
    assert all(tensor.isfinite().all() for tensor in run.weights.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_nearly_like_full_precision(dtype):
    config = tiny_config(training__warmup_epochs=0, training__optimizer="sgd", training__lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if dtype == torch.float16 else None
    full = pretraining(config)
    mixed = pretraining(config, amp_dtype=dtype, scaler=scaler)
    start, losses = full.weights, []
    for run in (full, mixed):
        losses.append(record(run, lambda engine: engine.state.output["loss"].item()))
        run.run()
    assert len(losses[0]) == len(losses[1]) == 10
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert 0 < largest_difference(full.weights, mixed.weights) < 0.1 * largest_difference(start, full.weights)
    assert {tensor.dtype for tensor in mixed.weights.values()} == {torch.float32}


def test_groups_without_decay_keep_weight_decay_0_while_the_others_follow_the_schedule():
    run = pretraining(tiny_config(training__weight_decay=0.04, training__weight_decay_end=0.4))
    seen = record(run, lambda engine: {g["name"]: g["weight_decay"] for g in run.optimizer.param_groups})
    run.run()
    assert len(seen) == 10
    for step, groups in enumerate(seen):
        expected = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * (step + 1) / 10)) / 2
        for name, value in groups.items():
            assert value == (0.0 if name.endswith("no_decay") else pytest.approx(expected, rel=1e-12)), (step, name)
    assert {name.rpartition("/")[2] for name in seen[0]} == {"decay", "no_decay"}
    assert seen[-1]["shared/decay"] == 0.4


def test_biases_and_one_dimensional_parameters_and_positions_are_not_decayed():
    modules = build_modules(tiny_config(model__pos_embed="learned", model__predictor__level_depth=1))
    groups = param_groups(modules, 0.1)
    names = {id(p): name for name, p in modules.named_parameters()}
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["decay"] else 0.0)
        for parameter in group["params"]:
            is_weight = parameter.ndim > 1 and "pos_embed" not in names[id(parameter)]
            if not group["decay"] and is_weight:
                assert any(word in names[id(parameter)] for word in ("token", "embed")), names[id(parameter)]
            elif group["decay"]:
                assert is_weight, names[id(parameter)]
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in modules.named_parameters() if p.requires_grad)
    assert not any(name.startswith("target_encoder") for name in grouped)
    assert {group["level"] for group in groups} == {None, 0, 1}


def test_a_schedule_writes_its_exact_value_before_every_step():
    trainer, handler = linear_trainer(accumulation_steps=2)
    schedule = CosineScheduler(1.0, 0.1, epochs=2, steps_per_epoch=3, warmup_epochs=1)
    ParamSchedule(handler.optimizer, "lr", schedule, metric="train/lr").attach(trainer)
    seen, logged = [], []
    trainer.add_event_handler(TrainEvents.LOSS_READY, lambda: seen.append(handler.optimizer.param_groups[0]["lr"]))
    trainer.add_event_handler(
        TrainEvents.METRICS_READY, lambda engine: logged.append(engine.state.metrics.get("train/lr"))
    )
    trainer.run(rows(*[(0, 0)] * 5), max_epochs=2)
    third = 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2
    by_step = [1 / 3, 2 / 3, 1.0, third, 0.1 + 0.9 * (1 + math.cos(2 * math.pi / 3)) / 2, 0.1]
    windows = [2, 2, 1, 2, 2, 1]
    assert seen == pytest.approx([lr for lr, size in zip(by_step, windows, strict=True) for _ in range(size)])
    assert logged == pytest.approx(by_step)  # what the step has used, not what comes next


def test_a_schedule_is_written_into_groups_that_a_loaded_state_has_replaced():
    trainer, handler = linear_trainer()
    ParamSchedule(handler.optimizer, "lr", LinearScheduler(1.0, 0.0, 1, 5)).attach(trainer)
    saved = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=77.0).state_dict()
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda engine: handler.optimizer.load_state_dict(saved)
    )
    seen = []
    trainer.add_event_handler(TrainEvents.LOSS_READY, lambda: seen.append(handler.optimizer.param_groups[0]["lr"]))
    trainer.run(rows(*[(0, 0)] * 5))
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_schedule_has_nothing_to_restore():
    schedule = ParamSchedule(torch.optim.SGD(LinearModel().parameters(), 1.0), "lr", LinearScheduler(1.0, 0.0, 1, 5))
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})
    assert ParamSchedule.simulate_values(2, schedule=LinearScheduler(1.0, 0.0, 1, 5)) == [
        [0, 0.8],
        [1, pytest.approx(0.6)],
    ]


def test_every_level_has_a_learning_rate_of_its_own():
    run = pretraining(tiny_config(training__level_lrs="[2e-3, 5e-4]", training__lr_schedule="linear"))
    assert isinstance(run.handlers["level_lr"].schedule, HierarchicalScheduler)
    seen = record(run, lambda engine: {group["level"]: group["lr"] for group in run.optimizer.param_groups})
    run.run()
    warmup = [update / 5 for update in range(1, 6)]
    for step, share in enumerate(warmup):
        assert seen[step] == pytest.approx({None: 1e-3 * share, 0: 2e-3 * share, 1: 5e-4 * share})
    assert seen[9] == pytest.approx({None: 1e-6, 0: 1e-6, 1: 1e-6})


@pytest.mark.parametrize(
    ("name", "cls", "settings"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.8}),
        ("torch.optim.RAdam", torch.optim.RAdam, {"betas": (0.8, 0.9)}),
        ("torch.optim.Adagrad", torch.optim.Adagrad, {}),
    ],
)
def test_optimizers_are_built_by_name_or_path(name, cls, settings):
    modules = nn.ModuleDict({"model": nn.Linear(2, 2)})
    optimizer = build_optimizer(name, param_groups(modules, 0.1), 0.5, (0.8, 0.9))
    assert type(optimizer) is cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    for key, value in settings.items():
        assert optimizer.param_groups[0][key] == value


def test_optimizer_arguments_are_passed_on_and_win():
    groups = param_groups(nn.ModuleDict({"model": nn.Linear(2, 2)}))
    optimizer = build_optimizer("sgd", groups, 0.5, (0.8, 0.9), momentum=0.3, nesterov=True)
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.3, True)


def test_an_optimizer_is_fused_where_it_can_be_and_nothing_else_was_asked_for():
    groups = param_groups(nn.ModuleDict({"model": nn.Linear(2, 2)}))

    def is_fused(name, **arguments):
        return build_optimizer(name, copy.deepcopy(groups), 0.1, **arguments).param_groups[0].get("fused")

    assert is_fused("adamw") and is_fused("sgd") and is_fused("torch.optim.Adam")
    assert not is_fused("torch.optim.RAdam")
    assert not is_fused("adamw", fused=False) and not is_fused("adamw", foreach=True)
    assert not is_fused("adamw", capturable=True)
    groups[0]["params"] = [nn.Parameter(torch.ones(2, 2, device="meta"))]
    assert not is_fused("adamw")


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, math.nan])
def test_gradients_are_measured_and_clipped_as_by_torchs_functions(scale):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 3, 4))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape)
    ours = [parameter.grad.clone() for parameter in parameters]
    norm = gradient_norm(ours)
    clip_gradients(ours, norm, 0.3)
    expected = nn.utils.clip_grad_norm_(parameters, 0.3)
    assert torch.equal(norm.view(torch.int32), expected.view(torch.int32))
    torch.testing.assert_close(ours, [parameter.grad for parameter in parameters], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamv", {}, "unknown optimizer 'adamv', did you mean adamw; known: adamw, sgd or a dotted path"),
        ("torch.optim.Adamm", {}, "torch.optim has no Adamm"),
        ("no_such_module.Adam", {}, "'no_such_module.Adam' cannot be imported"),
        ("torch.nn.Linear", {}, "optimizer 'torch.nn.Linear' must be a torch.optim.Optimizer"),
        ("sgd", {"speed": 1}, "optimizer 'sgd' does not take speed; it takes"),
    ],
)
def test_unknown_optimizers_and_arguments_are_refused(name, arguments, message):
    groups = param_groups(nn.ModuleDict({"model": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=message):
        build_optimizer(name, groups, 0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"clip_grad": 0.0}, "clip_grad must be positive or None, got 0.0"),
    ],
)
def test_impossible_settings_are_refused_when_the_handler_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptimizerStep(torch.optim.SGD(LinearModel().parameters(), 1.0), **arguments)


def test_a_loss_that_reaches_no_parameter_is_an_error():
    modules = nn.ModuleDict({"model": LinearModel(), "other": LinearModel()})
    trainer = create_trainer(linear_step, modules)
    OptimizerStep(torch.optim.SGD(modules["other"].parameters(), 1.0)).attach(trainer)
    with pytest.raises(RuntimeError, match="the loss reaches none of the optimizer's parameters"):
        trainer.run(rows((1, 0)))
