"""The configuration: dataclasses are the single place of every default, range and description."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hjepa_engine.config.monitoring import (
    CollapseConfig,
    GuardConfig,
    LoggingConfig,
    OnlineProbeConfig,
    PicturesConfig,
)
from hjepa_engine.config.ranges import limit_problems, limited
from hjepa_engine.config.validation import problems
from hjepa_engine.errors import ConfigError

Pair = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """One level of the hierarchy; level 0 is the finest."""

    pool: int | Literal["image"] = 1
    """Side of the square of patches whose mean is one target, at least 1; ``image``: the mean of the whole image."""
    depth: float = limited(1.0, above=0, most=1)
    """Share of the target encoder's blocks that the features have passed; 1.0 is after the last norm."""
    weight: float = limited(1.0, least=0)
    """Factor of this level's loss."""

    def __post_init__(self) -> None:
        if self.pool != "image" and (isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1):
            raise ValueError(f"pool must be a positive integer or 'image', got {self.pool!r}")
        for problem in limit_problems(self, ""):
            raise ValueError(problem)


@dataclass
class DataConfig:
    """Images, augmentation and loading."""

    dataset: Literal["digit_pages", "digits", "cifar10", "cifar100", "stl10", "imagefolder", "imagenet", "fake"] = (
        "digit_pages"
    )
    """``digit_pages``: pages of handwritten digits of one class; ``digits``: single ones, both from scikit-learn, nothing to
    download; ``imagenet``: as ``imagefolder``; ``fake``: noise, for timing."""
    data_path: str | None = None
    """Where the data set lies or is downloaded to; ``data`` by default. An image folder has ``train/<class>/*`` and
    ``val/<class>/*`` (or ``test``), or only ``<class>/*``."""
    download: bool = False
    """Fetch CIFAR or STL-10 if it is not there."""
    image_size: int = limited(224, least=1)
    """Height and width of the images in pixels; a multiple of the patch size."""
    batch_size: int = limited(64, least=1)
    """Images of a micro-batch over all processes."""
    num_workers: int = limited(0, least=0)
    """Loader processes; 0 loads in the main one. Does not change the run."""
    pin_memory: bool = True
    """Page-locked batches for faster copies to a GPU; without a GPU there are none."""
    val_fraction: float = limited(0.2, above=0, below=1)
    """Share held out where the data set has no validation split of its own."""
    crop_scale: Pair = limited((0.3, 1.0), above=0, most=1)
    """Smallest and largest area of the random crop, as a share of the image."""
    crop_ratio: Pair = limited((0.75, 1.333), above=0)
    """Smallest and largest width / height of the random crop."""
    horizontal_flip: float = limited(0.0, least=0, most=1)
    """Probability of a mirrored image."""
    color_jitter: float = limited(0.0, least=0, most=1)
    """Strength of random brightness, contrast, saturation and (a quarter of it) hue."""
    random_affine: float = limited(0.0, least=0, most=1)
    """Strength of a random affine map before the crop; at 1: 30 degrees, 20 % shift and scale, 15 degrees shear."""
    max_damaged: float = limited(0.001, least=0, most=1)
    """Share of images that may be unreadable and replaced by others before the run stops."""
    fake_size: int = limited(1024, least=1)
    """Number of ``fake`` images."""

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return 1 if self.dataset in ("digit_pages", "digits") else 3


@dataclass
class PredictorConfig:
    """The predictor, a narrow vision transformer."""

    width: int = limited(384, least=4)
    """Width of its tokens, a multiple of 4 and of ``num_heads``."""
    depth: int = limited(6, least=1)
    """Blocks that all levels share."""
    num_heads: int = limited(12, least=1)
    """Attention heads."""
    mlp_ratio: float = limited(4.0, above=0)
    """Hidden width of a block's MLP over ``width``."""
    level_depth: int = limited(0, least=0)
    """Blocks that each level has of its own, after the shared ones."""


@dataclass
class EMAConfig:
    """The target encoder's momentum: the share of it that an update keeps."""

    momentum: float = limited(0.996, least=0, most=1)
    """At the start (after the warm-up)."""
    momentum_end: float = limited(1.0, least=0, most=1)
    """At the last step; half a cosine leads there."""
    momentum_warmup_epochs: float = limited(0.0, least=0)
    """Epochs in which it rises linearly from 0 to ``momentum``."""


@dataclass
class ModelConfig:
    """Encoders, predictor and hierarchy."""

    encoder_type: str = "vit_small_patch16_224"
    """Any of timm's vision transformers."""
    patch_size: int | None = limited(None, least=1)
    """Side of a patch in pixels; the named encoder's own by default."""
    embed_dim: int | None = limited(None, least=4)
    """Width of the encoder; its own by default."""
    depth: int | None = limited(None, least=1)
    """Blocks of the encoder; its own by default."""
    num_heads: int | None = limited(None, least=1)
    """Attention heads of the encoder; its own by default."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """Fixed sine-cosine positions, or learned ones."""
    drop_path: float = limited(0.0, least=0, below=1)
    """Stochastic depth of the context encoder: probability for the last block, less for earlier ones."""
    layer_scale: float | None = limited(None, above=0)
    """Initial value of layer scale; none by default."""
    class_path: str | None = None
    """Dotted path of a function or class that makes an ``nn.ModuleDict`` of your own instead of H-JEPA's modules; it is
    called with ``init_args``, and with ``config`` where it takes that. Of the keys beside it, only ``encoder`` and ``ema``
    count then, and what the function reads."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""
    encoder: str | None = None
    """Name of the module that is probed, measured and exported; by default the first there is of ``target_encoder``,
    ``encoder`` and ``context_encoder``."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    num_hierarchies: int | None = limited(None, least=1, most=16)
    """Number of levels, which pool 1, 2, 4, ... patches; 3 by default, or as many as there are ``levels``."""
    levels: list[Level] | None = None
    """The levels in detail, finest first, instead of the ones that ``num_hierarchies`` makes."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    @property
    def num_levels(self) -> int:
        """How many levels ``levels`` or ``num_hierarchies`` make."""
        return len(self.levels) if self.levels is not None else self.num_hierarchies or 3


@dataclass
class MaskingConfig:
    """Multi-block masks (I-JEPA)."""

    num_masks: int = limited(4, least=1)
    """Target blocks per image."""
    mask_scale: Pair = limited((0.15, 0.2), above=0, most=1)
    """Smallest and largest area of a target block, as a share of the patch grid."""
    aspect_ratio: Pair = limited((0.75, 1.5), above=0)
    """Smallest and largest height / width of a target block."""
    context_scale: Pair = limited((0.85, 1.0), above=0, most=1)
    """Smallest and largest area of the context block, from which the targets are cut out."""


@dataclass
class LossConfig:
    """The objective."""

    type: str = "smooth_l1"
    """``smooth_l1``, ``mse``, ``huber``, ``cosine``, or the dotted path of a function (prediction, target) -> loss."""
    hierarchy_weights: list[float] | None = limited(None, least=0)
    """One weight per level, finest first; 1 by default. Not together with ``model.levels``, which have their own."""
    variance_weight: float = limited(0.0, least=0)
    """Weight of VICReg's variance term on the mean context token of each image."""
    covariance_weight: float = limited(0.0, least=0)
    """Weight of VICReg's covariance term on the mean context token of each image."""
    sigreg_weight: float = limited(0.0, least=0)
    """Weight of LeJEPA's SIGReg on the mean context token of each image."""


@dataclass
class TrainingConfig:
    """Optimizer, schedules and precision."""

    epochs: int = limited(100, least=1)
    """Passes over the data."""
    max_iters: int | None = limited(None, least=1)
    """End the run after this many micro-batches, inside an epoch if need be; schedules still span all ``epochs``."""
    warmup_epochs: float = limited(10.0, least=0)
    """Linear warm-up of the learning rate from 0, at most ``epochs``."""
    lr: float = limited(1e-3, above=0)
    """Learning rate at the end of the warm-up."""
    min_lr: float = limited(1e-6, least=0)
    """Learning rate at the last step, at most ``lr``."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate gets from ``lr`` to ``min_lr``; ``constant`` stays at ``lr``."""
    level_lrs: list[float] | None = limited(None, above=0)
    """Learning rate of each level's own parameters (head, own blocks), finest first; ``lr`` by default."""
    weight_decay: float = limited(0.05, least=0)
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float | None = limited(None, least=0)
    """Weight decay at the last step, half a cosine leads there; ``weight_decay`` by default."""
    optimizer: str = "adamw"
    """``adamw``, ``sgd``, or the dotted path of a ``torch.optim.Optimizer``."""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer."""
    betas: Pair = limited((0.9, 0.95), least=0, below=1)
    """Of Adam and its like; the first one is SGD's momentum."""
    clip_grad: float | None = limited(None, above=0)
    """Largest L2 norm of all gradients; null: not clipped."""
    accumulation_steps: int = limited(1, least=1)
    """Micro-batches of an optimizer step."""
    use_amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on a CPU and where the GPU has it, else float16 with a gradient scaler."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a non-finite loss or gradient does: end the run, or drop the update (10 in a row end it)."""
    early_stopping: int | None = limited(None, least=1)
    """End the run after this many epochs without a better ``val/loss``; null: never. Such an end has no readings, probes or
    figures of its own, as it is not known beforehand."""
    time_limit: float | None = limited(None, above=0)
    """Save and leave (exit code 75) after this many minutes; null: no limit."""


@dataclass
class CheckpointConfig:
    """When the whole state of a run is saved, which checkpoints stay, and how a run starts."""

    save_frequency: int | None = limited(1, least=1)
    """Epochs between saves; null: not by epochs. The end of a run is always saved."""
    save_every_steps: int | None = limited(None, least=1)
    """Optimizer steps between saves, besides."""
    save_every_minutes: float | None = limited(15.0, above=0)
    """Minutes between saves, besides."""
    keep_last_n: int = limited(2, least=2)
    """Newest checkpoints to keep: one more than needed, should the newest be damaged."""
    keep_best_n: int = limited(1, least=0)
    """Checkpoints with the best ``metric`` to keep."""
    keep_every_epochs: int | None = limited(None, least=1)
    """Keep the checkpoint of every N-th epoch for good; null: none."""
    metric: str = "val/loss"
    """Any logged metric; it counts for a checkpoint that is saved when the metric is new."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``metric`` is better."""
    checkpoint_dir: str | None = None
    """Folder of the checkpoints; ``checkpoints`` in the run folder by default."""
    resume: str = "auto"
    """``auto``: go on from the run folder's newest checkpoint if there is one; ``must``: there has to be one; ``never``: set
    an earlier run in the folder aside and start anew; or the path of a checkpoint (or run) to go on from where the run
    folder has none of its own."""
    init_from: str | None = None
    """Checkpoint, run folder or exported encoder whose weights a new run starts with, as far as names and shapes fit."""
    init_parts: list[str] | None = None
    """Modules that ``init_from`` fills: ``context_encoder``, ``target_encoder``, ``predictor``; all it can by default."""


@dataclass
class ProbeConfig:
    """The linear probe that judges the frozen encoder."""

    enabled: bool = True
    """Judge the encoder at the end of pretraining."""
    features: Literal["mean", "concat"] = "mean"
    """What the probe reads: the mean of the patch tokens, or all of them side by side."""
    labels_per_class: int | None = limited(None, least=1)
    """Labeled images of each class to learn from; all by default."""
    epochs: int = limited(100, least=1)
    """Passes over the features."""
    batch_size: int = limited(256, least=1)
    """Features of a step."""
    lr: float = limited(1e-2, above=0)
    """Learning rate at the start; half a cosine leads to 0."""
    weight_decay: float = limited(1e-2, least=0)
    """Of the linear head (AdamW)."""


@dataclass
class HandlerConfig:
    """A handler of your own."""

    class_path: str
    """Dotted path of a class with ``attach(engine)``."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""


@dataclass
class StepConfig:
    """A step of your own."""

    class_path: str
    """Dotted path of a step, a function (modules, batch, ...), or of a class whose instances are steps."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function, or those of the class."""


@dataclass
class Config:
    """A run. Every value can be given in a YAML file (``--config``) and on the command line (``--training.lr 3e-4``)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    online_probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    step: StepConfig | None = None
    """A step of your own instead of H-JEPA's, ``class_path`` and ``init_args``: docs/steps.md."""
    handlers: list[HandlerConfig] = field(default_factory=list)
    """Handlers of your own, attached after the others: ``class_path`` and ``init_args`` each."""
    run_dir: str | None = None
    """The run folder; ``runs/<logging.experiment_name>`` by default."""
    seed: int = limited(0, least=0)
    """Names all random draws; equal seeds give equal runs."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``."""

    def __post_init__(self) -> None:
        problem = next(problems(self), None)
        if problem:
            raise ConfigError(problem)


def resolve_levels(config: Config) -> tuple[Level, ...]:
    """The levels that ``model`` and ``loss`` ask for."""
    if config.model.levels is not None:
        return tuple(config.model.levels)
    weights = config.loss.hierarchy_weights or [1.0] * config.model.num_levels
    return tuple(Level(2**level, weight=weight) for level, weight in enumerate(weights))
