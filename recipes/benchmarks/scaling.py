"""Calculate, not measure: time and memory of a pretraining step on many GPUs, for DDP and FSDP.

    python recipes/benchmarks/scaling.py                                      # 80 GB, 8 GPUs a node, fast network
    python recipes/benchmarks/scaling.py --memory 24 --tflops 165 --within 20 --between 10   # a smaller kind

Parameters are counted in the modules that a run would build, tokens in the masks that it would sample. The rest is
arithmetic on the assumptions that the program prints.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hjepa_engine import load_config
from hjepa_engine.build import build_masks
from hjepa_engine.models import build_modules

#: timm's name and side of a patch, of the encoders of I-JEPA (arXiv:2301.08243; its ViT-g has patches of 16).
ENCODERS = {
    "ViT-L/16": ("vit_large_patch16_224", 16),
    "ViT-H/14": ("vit_huge_patch14_224", 14),
    "ViT-g/14": ("vit_giant_patch14_224", 14),
}
GPUS = [8, 16, 32, 64, 128, 256]
_BUCKET = 25 * 2**20  # of DDP


class Machine(NamedTuple):
    """What is assumed of GPUs and network."""

    memory: float = 80.0
    """GB of a GPU, of which nine tenths can be used."""
    tflops: float = 989.0
    """Dense peak in bfloat16, in 1e12 a second."""
    utilization: float = 0.4
    """Share of the peak that a step reaches."""
    within: float = 360.0
    """GB/s that a ring of the GPUs of one node moves."""
    between: float = 320.0
    """GB/s between two nodes, over all their network cards."""
    per_node: int = 8
    """GPUs of a node."""
    hop: float = 2.0
    """Microseconds from a GPU to the next one."""


class Stack(NamedTuple):
    """Equal blocks of a vision transformer."""

    depth: int
    width: int
    hidden: int
    """Of the MLP."""
    parameters: int
    """Of one block."""

    def kept(self, small: int = 2) -> int:
        """Bytes for each token that a block keeps for its backward pass, with fused attention.

        Two inputs of norms in float32; in the type of the products, of ``small`` bytes: what norms put out (2 D), queries,
        keys and values (3 D), what attention puts out (D), and the MLP before and after its activation (2 H).

        >>> Stack(1, 4, 16, 0).kept(), Stack(1, 4, 16, 0).kept(small=4)
        (144, 256)
        """
        return 8 * self.width + small * (6 * self.width + 2 * self.hidden)

    def flops(self, sequences: int, length: float) -> float:
        """Floating-point operations of the forward pass of all blocks."""
        tokens = sequences * length
        return self.depth * (2 * self.parameters * tokens + 4 * self.width * length * tokens)


class Model(NamedTuple):
    """An H-JEPA with one level, and the mean number of tokens of an image."""

    encoder: Stack
    predictor: Stack
    encoder_size: int
    trained: int
    """Parameters of context encoder and predictor."""
    patches: int
    context: float
    """Tokens that the context encoder sees."""
    targets: int
    """Target blocks, each predicted on its own."""
    of_target: float
    """Tokens of a target block."""

    @property
    def activations(self) -> float:
        """Bytes for each image: kept for the backward pass, and one block's of the target encoder."""
        sequences = self.targets * (self.context + self.of_target)
        trained = self.encoder.depth * self.encoder.kept() * self.context
        trained += self.predictor.depth * self.predictor.kept() * sequences
        return trained + self.encoder.kept() * self.patches

    @property
    def flops(self) -> float:
        """Of a step for each image: three times the forward pass of what is trained, once the target encoder's."""
        context = self.encoder.flops(1, self.context)
        predictor = self.predictor.flops(self.targets, self.context + self.of_target)
        return 3 * (context + predictor) + self.encoder.flops(1, self.patches)


def model_of(name: str) -> Model:
    """The model with an encoder of :data:`ENCODERS`, 224 pixels, I-JEPA's masks, a predictor of 384 x 12."""
    encoder, patch = ENCODERS[name]
    options = [f"--model.encoder_type={encoder}", f"--model.patch_size={patch}", "--model.levels=[{pool: 1}]"]
    options += ["--model.predictor.width=384", "--model.predictor.depth=12", "--model.predictor.num_heads=12"]
    options += ["--data.image_size=224", "--masking.num_masks=4", "--masking.mask_scale=[0.15, 0.2]"]
    config = load_config(None, [*options, "--model.pos_embed=sincos"])
    with torch.device("meta"):
        modules = build_modules(config)
    sizes = {name: sum(each.numel() for each in module.parameters()) for name, module in modules.items()}
    grid = (224 // patch, 224 // patch)
    masks = build_masks(config, grid)
    drawn = [masks.sample(1, 0, step) for step in range(200)]
    context, of_target = (
        sum(each.shape[-1] for each in tensors) / len(drawn)
        for tensors in ([masks.context_idx for masks in drawn], [masks.target_idx for masks in drawn])
    )
    context_encoder: Any = modules["context_encoder"]
    predictor: Any = modules["predictor"]
    stacks = _stack(context_encoder.vit.blocks), _stack(predictor.blocks)
    trained = sizes["context_encoder"] + sizes["predictor"]
    return Model(*stacks, sizes["context_encoder"], trained, grid[0] * grid[1], context, 4, of_target)


def _stack(blocks: Any) -> Stack:
    first = blocks[0].mlp.fc1
    return Stack(
        len(blocks), first.in_features, first.out_features, sum(each.numel() for each in blocks[0].parameters())
    )


class Cost(NamedTuple):
    """Of a step on one of the GPUs."""

    fixed: float
    """GB that do not depend on the batch."""
    micro: int
    """Images of a micro-batch; 0: none fits."""
    steps: int
    """Micro-batches of an optimizer step."""
    activations: float
    """GB of a micro-batch."""
    exchanged: float
    """GB that a GPU sends in an optimizer step."""
    computing: float
    """Seconds."""
    exchanging: float
    """Seconds."""

    @property
    def seconds(self) -> float:
        """Of an optimizer step, if all exchange is hidden behind computing as far as it can be."""
        return max(self.computing, self.exchanging)


def cost(model: Model, machine: Machine, strategy: str, gpus: int, batch: int) -> Cost:
    """Of an optimizer step of ``batch`` images over ``gpus``."""
    states = 16 * model.trained + 4 * model.encoder_size  # weights, gradients, two moments; target encoder
    # DDP has a copy of the gradients in its buckets; FSDP two blocks that are gathered, and the gradient of one.
    fixed = states + 4 * model.trained if strategy == "ddp" else states / gpus + 3 * 4 * model.encoder.parameters
    images = max(1, batch // gpus)
    micro = images
    while micro and fixed + micro * model.activations > 0.9e9 * machine.memory:
        micro //= 2
    steps = -(-images // micro) if micro else 0
    others = (gpus - 1) / gpus
    if strategy == "ddp":
        exchanged = 2 * others * 4 * model.trained
        delays = 4 * model.trained / _BUCKET * 2 * math.log2(gpus)  # a tree, up and down
    else:  # weights for both passes and of the target encoder, and gradients, in each micro-batch
        exchanged = steps * others * 4 * (3 * model.trained + model.encoder_size)
        calls = 4 * (model.encoder.depth + 1) + 3 * (model.predictor.depth + 1)
        delays = steps * calls * gpus  # a ring
    speed = machine.within if gpus <= machine.per_node else min(machine.within, machine.between)
    computing = images * model.flops / (1e12 * machine.tflops * machine.utilization)
    exchanging = exchanged / (1e9 * speed) + 1e-6 * machine.hop * delays
    return Cost(
        fixed / 1e9,
        micro,
        steps,
        micro * model.activations / 1e9,
        exchanged / 1e9,
        computing,
        exchanging if micro else 0,
    )


def rows(name: str, model: Model, machine: Machine, counts: Sequence[int], batch: int) -> list[str]:
    """Lines of the table."""
    lines = []
    for gpus in counts:
        for strategy in ("ddp", "fsdp"):
            found = cost(model, machine, strategy, gpus, batch)
            head = f"| {name} | {gpus} | {strategy} | {found.fixed:.1f} |"
            if not found.micro:
                lines.append(f"{head} none fits | | | | | |")
                continue
            lines.append(
                f"{head} {found.micro} x {found.steps} | {found.activations:.1f} | {found.exchanged:.1f} | "
                f"{1e3 * found.computing:.0f} | {1e3 * found.exchanging:.0f} | {1e3 * found.seconds:.0f} |"
            )
    return lines


def main() -> None:
    """Print assumptions and tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for field, value in Machine()._asdict().items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--models", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--batch", type=int, default=2048, help="images of an optimizer step over all GPUs")
    given = vars(parser.parse_args())
    names, counts, batch = given.pop("models"), given.pop("gpus"), given.pop("batch")
    machine = Machine(**given)
    models = {name: model_of(name) for name in names}
    print(", ".join(f"{field} {value:g}" for field, value in machine._asdict().items()) + f"; batch {batch}\n")
    print("| model | encoder | trained | context | targets | activations | step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        print(
            f"| {name} | {model.encoder_size / 1e6:.0f} M | {model.trained / 1e6:.0f} M | {model.context:.0f} of "
            f"{model.patches} tokens | {model.targets} x {model.of_target:.0f} | "
            f"{model.activations / 1e6:.0f} MB an image | {model.flops / 1e12:.2f} TFLOP an image |"
        )
    print(
        "\n| model | GPUs | strategy | states GB | images | activations GB | sent GB | computing ms | sending ms | step ms |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        print("\n".join(rows(name, model, machine, counts, batch)))


if __name__ == "__main__":
    main()
