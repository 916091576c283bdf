"""What is computed faster than it reads: attention kernels, the predictor's last block, mixed precision."""

import copy

import pytest
import torch
from helpers import NOISE, options, tiny_config
from timm.models.vision_transformer import Block

from hjepa_engine import load_config
from hjepa_engine.build import build_masks, build_step
from hjepa_engine.devices import fix_precision
from hjepa_engine.models import attention, build_modules
from hjepa_engine.models.attention import attentions, choose_kernel, is_fused_faster, run_queries
from hjepa_engine.recipes import pretrain
from hjepa_engine.run.measured import recall
from hjepa_engine.utils import arithmetic


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_queries_alone_get_what_the_whole_block_gives_them(groups, fused, monkeypatch):
    monkeypatch.setattr(attention, "is_fused_faster", lambda tokens, length: fused)
    torch.manual_seed(0)
    block = Block(16, 2, qkv_bias=True)
    context, queries = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, groups, 4, 16, requires_grad=True)
    weight = torch.randn(2, groups, 4, 16)
    inputs = [context, queries, *block.parameters()]

    sequence = torch.cat([context.repeat_interleave(groups, 0), queries.flatten(0, 1)], dim=1)
    whole = block(sequence)[:, 5:].unflatten(0, (2, groups))
    alone = run_queries(block, context, queries)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (alone, whole)), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("level_depth", [0, 2])
@pytest.mark.parametrize("targets", ["independent", "joint"])
def test_the_predictor_computes_one_sequence_per_block_or_one_per_image(depth, level_depth, targets):
    config = tiny_config(
        model__predictor__depth=depth,
        model__predictor__level_depth=level_depth,
        model__predictor__targets=targets,
        model__levels="[{pool: 1}, {pool: 2}, {pool: image}]",
        model__num_hierarchies="null",
    )
    modules = build_modules(config)
    predictor, grid = modules["predictor"], modules["context_encoder"].grid
    masks = build_masks(config, grid).sample(2, seed=1)
    context = torch.randn(*masks.context_idx.shape, 16)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    tokens = predictor.embed(context) + predictor._positions(
        2 * (masks.context_idx // grid[1]), 2 * (masks.context_idx % grid[1])
    )
    queries = [predictor._level_queries(number, masks, 2) for number in range(3)]

    def run(parts):
        """Levels' queries, each (B, cells, P), in one sequence behind the context: what the levels' heads make of them."""
        sequence = torch.cat([tokens, *parts.values()], dim=1)
        for block in predictor.blocks:
            sequence = block(sequence)
        seen, *own = sequence.split([tokens.shape[1], *(part.shape[1] for part in parts.values())], dim=1)
        results = {}
        for level, part in zip(parts, own, strict=True):
            sequence = torch.cat([seen, part], dim=1)
            for block in predictor.level_blocks[level]:
                sequence = block(sequence)
            results[level] = predictor.heads[level](predictor.norm(sequence[:, seen.shape[1] :]))
        return results

    if targets == "joint":
        expected = [
            found.view(*query.shape[:3], -1)
            for found, query in zip(
                run({number: query.flatten(1, 2) for number, query in enumerate(queries)}).values(),
                queries,
                strict=True,
            )
        ]
    else:
        blocks = [run({0: queries[0][:, block], 1: queries[1][:, block]}) for block in range(4)]
        expected = [torch.stack([found[level] for found in blocks], dim=1) for level in (0, 1)]
        expected.append(run({2: queries[2][:, 0]})[2][:, None])
    for one, other in zip(predictor(context, masks), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_kernels_are_chosen_by_type_length_and_gradients():
    tokens = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused_faster(tokens, 64) and not is_fused_faster(tokens, 576) and is_fused_faster(tokens, 2000)
        with torch.no_grad():
            assert not is_fused_faster(tokens, 64) and is_fused_faster(tokens, 576)
    assert is_fused_faster(tokens, 64) and not is_fused_faster(tokens, 16)
    assert is_fused_faster(torch.zeros(1, device="meta"), 16)


def test_an_encoder_gives_the_same_with_either_kernel():
    encoder = build_modules(tiny_config(model__depth=3))["context_encoder"]
    images = torch.randn(2, 3, 24, 24)
    layers = attentions(encoder)
    assert len(layers) == 3
    choose_kernel(layers, torch.zeros(1, 1000, 16))
    assert all(layer.fused_attn for layer in layers)
    found = encoder(images)
    assert not layers[0].fused_attn or encoder.num_patches > 32
    for layer in layers:
        layer.fused_attn = not layer.fused_attn
    tokens = encoder.vit._pos_embed(encoder.vit.patch_embed(images))
    for block in encoder.vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(encoder.vit.norm(tokens), found, atol=1e-5, rtol=1e-5)


def test_mixed_precision_stays_near_float32_in_loss_and_gradients():
    """bfloat16 has 8 bits of precision: the loss within 1 %, the gradient's direction within a cosine of 0.99."""
    config = tiny_config(model__embed_dim=64, model__depth=4, model__predictor__width=32, model__predictor__depth=2)
    modules, step = build_modules(config), build_step(config)
    masks = build_masks(config, modules["context_encoder"].grid).sample(16, seed=0)
    batch = {"images": torch.randn(16, 3, 24, 24), "masks": masks}

    def found(dtype):
        own = copy.deepcopy(modules)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = step(own, batch)
        outputs["loss"].backward()
        assert outputs["loss"].dtype == torch.float32
        gradients = [parameter.grad for parameter in own.parameters() if parameter.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        return outputs["loss"].detach(), torch.cat([gradient.flatten() for gradient in gradients])

    (loss, gradient), (rounded_loss, rounded) = found(None), found(torch.bfloat16)
    assert abs(rounded_loss / loss - 1) < 0.01
    assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.99
    assert abs(rounded.norm() / gradient.norm() - 1) < 0.05


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [({"avx512_bf16"}, (True, "bfloat16")), ({"avx2"}, (False, "auto")), ({"bf16"}, (True, "bfloat16"))],
)
def test_precision_follows_the_instructions_of_the_cpu(flags, chosen, monkeypatch):
    monkeypatch.setattr(arithmetic, "cpu_flags", lambda: frozenset(flags))
    training = fix_precision(load_config(None, ["--device=cpu"])).training
    assert (training.use_amp, training.amp_dtype) == chosen


def test_a_run_keeps_its_precision_on_another_machine(tmp_path, monkeypatch):
    values = {
        **NOISE,
        "training.use_amp": "auto",
        "run_dir": tmp_path,
        "training.max_iters": 2,
        "probe.enabled": "false",
    }
    config = load_config(None, options(values))
    monkeypatch.setattr(arithmetic, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    run = pretrain.build(config)
    assert run.trainer.amp_dtype == torch.bfloat16
    run.fit()
    monkeypatch.setattr(arithmetic, "cpu_flags", lambda: frozenset())
    assert pretrain.build(config).trainer.amp_dtype == torch.bfloat16
    assert recall(config).training.amp_dtype == "bfloat16"
