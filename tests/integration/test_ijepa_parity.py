"""A run with one level is I-JEPA (arXiv:2301.08243): beside a loop of its own, written with plain tensors, step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config
from ignite.engine import Events

from hjepa_engine import TrainEvents
from hjepa_engine.recipes.pretrain import build

HEADS, GRID, PATCH, EPOCHS, BATCHES, WARMUP = 2, 6, 4, 3, 5, 1
TOTAL = EPOCHS * BATCHES
SETTINGS = {
    "model__levels": "[{pool: 1}]",
    "model__num_hierarchies": None,
    "model__depth": 2,
    "model__patch_init": "trunc_normal",
    "model__predictor__init": "trunc_normal",
    "model__predictor__depth": 2,
    "model__ema__momentum": 0.9,
    "model__ema__momentum_end": 1.0,
    "model__ema__schedule": "linear",
    "training__epochs": EPOCHS,
    "training__warmup_epochs": WARMUP,
    "training__start_lr": 2e-3,
    "training__lr": 1e-2,
    "training__min_lr": 1e-6,
    "training__weight_decay": 0.04,
    "training__weight_decay_end": 0.4,
    "training__betas": "[0.9, 0.999]",
    "training__clip_grad": None,
    # A fused kernel rounds otherwise, and Adam makes much of that where gradients are near 0.
    "training__optimizer_args": "{fused: false, foreach: false}",
    "logging__log_frequency": 1,
    "probe__enabled": "false",
}


def norm(tokens, weights, name):
    return F.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def linear(tokens, weights, name):
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block(tokens, weights, name):
    count, length, width = tokens.shape
    mixed = linear(norm(tokens, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv")
    query, key, value = mixed.view(count, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    attention = (query @ key.transpose(-2, -1) / math.sqrt(width // HEADS)).softmax(dim=-1)
    found = (attention @ value).transpose(1, 2).reshape(count, length, width)
    tokens = tokens + linear(found, weights, f"{name}.attn.proj")
    hidden = F.gelu(linear(norm(tokens, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
    return tokens + linear(hidden, weights, f"{name}.mlp.fc2")


def places(width):
    """Sines and cosines of columns, then of rows."""
    rows = []
    for patch in range(GRID * GRID):
        row = []
        for place in (patch % GRID, patch // GRID):
            angles = [place / 10_000 ** (4 * number / width) for number in range(width // 4)]
            row += [*map(math.sin, angles), *map(math.cos, angles)]
        rows.append(row)
    return torch.tensor(rows)


def pick(tokens, indices):
    return torch.stack([row[chosen] for row, chosen in zip(tokens, indices, strict=True)])


def encode(weights, images, context=None):
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    kernel = weights["vit.patch_embed.proj.weight"].flatten(1)
    tokens = patches @ kernel.T + weights["vit.patch_embed.proj.bias"] + places(len(kernel))
    if context is not None:
        tokens = pick(tokens, context)
    for number in range(2):
        tokens = block(tokens, weights, f"vit.blocks.{number}")
    return norm(tokens, weights, "vit.norm")


def predict(weights, context, context_idx, target_idx):
    width = weights["mask_token"].shape[-1]
    table = places(width)
    found = []
    seen = linear(context, weights, "embed") + table[context_idx]
    for number in range(target_idx.shape[1]):
        queries = weights["mask_token"].view(width) + table[target_idx[:, number]]
        tokens = torch.cat([seen, queries], dim=1)
        for layer in range(2):
            tokens = block(tokens, weights, f"blocks.{layer}")
        tokens = norm(tokens, weights, "norm")[:, seen.shape[1] :]
        found.append(linear(tokens, weights, "heads.0"))
    return torch.stack(found, dim=1)


class Recorder:
    """What a run does, step by step."""

    def __init__(self):
        self.batches, self.losses, self.gradients, self.rates, self.features = [], [], [], [], []

    def attach(self, engine):
        self.start = {name: each.detach().clone() for name, each in engine.modules.state_dict().items()}
        engine.add_event_handler(Events.ITERATION_STARTED, self.note_batch)
        engine.add_event_handler(TrainEvents.GRADIENTS_READY, self.note_gradients)
        engine.add_event_handler(TrainEvents.METRICS_READY, self.note_results)

    def note_batch(self, engine):
        self.batches.append((engine.state.batch["images"], engine.state.batch["masks"]))

    def note_gradients(self, engine):
        named = engine.modules.named_parameters()
        self.gradients.append({name: each.grad.clone() for name, each in named if each.grad is not None})

    def note_results(self, engine):
        names = ("train/lr", "train/weight_decay", "train/ema_momentum")
        self.rates.append([engine.state.metrics[name] for name in names])
        output = engine.state.output
        self.losses.append(output["loss"].item())
        self.features.append((output["context_tokens"], output["target_tokens"], output["predictions"][0]))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    recorder = Recorder()
    run = build(tiny_config(**SETTINGS, run_dir=tmp_path_factory.mktemp("run")), handlers=[recorder])
    run.fit()
    recorder.end = {name: each.detach().clone() for name, each in run.modules.state_dict().items()}
    assert len(recorder.losses) == TOTAL
    return recorder


def part(state, name):
    return {key.removeprefix(f"{name}."): each for key, each in state.items() if key.startswith(f"{name}.")}


def test_rates_decay_and_momentum_are_ijepas_at_every_step(recorded):
    warmup = WARMUP * BATCHES
    for step, (lr, decay, momentum) in enumerate(recorded.rates):
        update = step + 1  # I-JEPA's schedulers step before they are read, its momentum is read first
        if update < warmup:
            expected = 2e-3 + (1e-2 - 2e-3) * update / warmup
        else:
            expected = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * (update - warmup) / (TOTAL - warmup))) / 2
        assert lr == pytest.approx(expected, abs=1e-12)
        assert decay == pytest.approx(0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * update / TOTAL)) / 2, abs=1e-12)
        assert momentum == pytest.approx(0.9 + 0.1 * step / TOTAL, abs=1e-12)


def test_loss_features_and_gradients_are_ijepas_at_every_step(recorded):
    """Both sides go on from their own weights: a difference anywhere would grow."""
    context_encoder, predictor = (
        {name: each.clone().requires_grad_("pos_embed" not in name) for name, each in part(recorded.start, one).items()}
        for one in ("context_encoder", "predictor")
    )
    target_encoder = {name: each.detach().clone() for name, each in context_encoder.items()}
    trained = {"context_encoder": context_encoder, "predictor": predictor}
    named = [(f"{one}.{name}", w) for one, found in trained.items() for name, w in found.items() if w.requires_grad]
    decayed = [w for name, w in named if "bias" not in name and w.ndim != 1]
    free = [w for name, w in named if "bias" in name or w.ndim == 1]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False)
    for step, (images, masks) in enumerate(recorded.batches):
        lr, decay, momentum = recorded.rates[step]
        with torch.no_grad():
            features = encode(target_encoder, images)
            whole = F.layer_norm(features, features.shape[-1:])
            targets = torch.stack([pick(whole, masks.target_idx[:, n]) for n in range(masks.target_idx.shape[1])], 1)
        context = encode(context_encoder, images, masks.context_idx)
        predictions = predict(predictor, context, masks.context_idx, masks.target_idx)
        loss = F.smooth_l1_loss(predictions, targets)
        loss.backward()
        assert recorded.losses[step] == pytest.approx(loss.item(), abs=1e-6)
        for ours, theirs in zip(recorded.features[step], (context, features, predictions), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
        assert recorded.gradients[step].keys() == {name for name, _ in named}
        for name, weight in named:
            assert torch.allclose(recorded.gradients[step][name], weight.grad, atol=1e-6), (step, name)
        for group in optimizer.param_groups:
            group["lr"] = lr
        groups[0]["weight_decay"] = optimizer.param_groups[0]["weight_decay"] = decay
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in context_encoder.items():
                target_encoder[name].mul_(momentum).add_((1 - momentum) * weight)
    for one, found in (*trained.items(), ("target_encoder", target_encoder)):
        for name, weight in part(recorded.end, one).items():
            assert torch.allclose(weight, found[name], atol=1e-4), (one, name)


def test_initial_weights_are_ijepas(recorded):
    """Linear layers, the patch embedding and the mask token: a normal distribution of 0.02, cut off at twice that."""
    for one in ("context_encoder", "predictor"):
        for name, weight in part(recorded.start, one).items():
            if name.endswith(".bias"):
                assert not weight.any(), name
            elif "norm" in name:
                assert (weight == 1).all(), name
            elif "pos_embed" not in name:
                assert weight.abs().max() <= 0.04, name
                # Cutting at two standard deviations leaves 0.88 of one.
                assert weight.std().item() == pytest.approx(0.0176, rel=0.5 if weight.numel() < 100 else 0.12), name
    start = recorded.start
    assert torch.equal(start["context_encoder.vit.pos_embed"][0], places(16))
    assert not any("level_embed" in name for name in start)
    for name, weight in part(start, "target_encoder").items():
        assert torch.equal(weight, start[f"context_encoder.{name}"])
