"""The configuration: a key's default, type, range, description and whether it may change stand at its field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema, model_validator

from hjepa_engine.config.fields import (
    BelowOne,
    Count,
    NonNegative,
    Pair,
    PathString,
    Positive,
    Share,
    ShareOrNone,
    section,
    setting,
    values_of,
)
from hjepa_engine.config.monitoring import (
    CollapseConfig,
    GuardConfig,
    LoggingConfig,
    OnlineProbeConfig,
    PicturesConfig,
)
from hjepa_engine.config.validation import broken_rules
from hjepa_engine.errors import ConfigError


@section(frozen=True)
class Level:
    """One level of the hierarchy; level 0 is the finest."""

    pool: Annotated[int, WithJsonSchema({"type": "integer", "minimum": 1})] | Literal["image"] = 1
    """Side of the square of patches whose mean is one target, at least 1; ``image``: the mean of the whole image."""
    depth: float = setting(1.0, ge=0, le=1)
    """Share of the target encoder's blocks that the features have passed; 1.0 is after the last norm, 0 before all blocks:
    the pixels of each patch, normalized (MAE, arXiv:2111.06377). With 0, ``pool`` is 1."""
    weight: float = setting(1.0, ge=0)
    """Factor of this level's loss."""

    def __post_init__(self) -> None:
        if self.pool != "image" and self.pool < 1:
            raise ValueError(f"pool must be a positive integer or 'image', got {self.pool!r}")
        if self.depth == 0 and self.pool != 1:
            raise ValueError(f"pool must be 1 where depth is 0, got {self.pool!r}")


@section()
class DataConfig:
    """Images, augmentation and loading."""

    dataset: Literal[
        "digit_pages",
        "digits",
        "cifar10",
        "cifar100",
        "stl10",
        "imagefolder",
        "imagenet",
        "packed",
        "huggingface",
        "fake",
        "passed",
    ] = "digit_pages"
    """``digit_pages``: pages of handwritten digits of one class; ``digits``: single ones, both from scikit-learn, nothing to
    download; ``imagenet``: as ``imagefolder``; ``packed``: what ``recipes/pack.py`` makes;
    ``huggingface``: what the library ``datasets`` reads; ``fake``: noise, for timing; ``passed``: what was passed to
    ``build(config, data=(train, val))``."""
    class_path: str | None = None
    """Dotted path of a function or class that makes a map-style data set of your own, instead of ``dataset``."""
    init_args: dict[str, Any] = setting(dict)
    """Its arguments."""
    data_path: PathString | None = setting(None, on_resume="allow")
    """Where the data set lies or is downloaded to; ``data`` by default. docs/data.md says how an image folder is read."""
    train_dir: str | None = setting(None, on_resume="allow")
    """Folder of the training images, in ``data_path`` or anywhere; a folder ``train`` or ``training`` by default, or all."""
    val_dir: str | None = setting(None, on_resume="allow")
    """Folder of the validation images; ``val``, ``valid``, ``validation``, ``test`` or ``testing`` by default. Without one,
    ``val_fraction`` of the training images is held out, by their paths."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """Classes of an image folder. ``folders``: the top folders of a split; ``none``: there are none; ``auto``: the top
    folders, if there are several, all images are in them, and none of them has several folders of images."""
    hub_name: str | None = setting(None, on_resume="allow")
    """Name of a ``huggingface`` data set on the hub, such as ``ylecun/mnist``, instead of ``data_path``."""
    image_column: str | None = None
    """Column of a ``huggingface`` data set with the images; the one of that type by default."""
    label_column: str | None = None
    """Its column with the labels; the one with named classes by default, if there is one."""
    download: bool = setting(False, on_resume="allow")
    """Fetch CIFAR or STL-10 if it is not there."""
    image_size: Count | Pair[Count] = 32
    """Height and width of the images in pixels, a multiple of the patch size: one number, or ``[H, W]``."""
    in_chans: int | None = setting(None, ge=1)
    """Channels of the images; null: 1 for the digits, else 3. With 1, color becomes gray; with 3, gray is repeated; an alpha
    channel counts only with 4. Other numbers must be the images' own."""
    max_pixels: int = setting(178_956_970, ge=1, on_resume="allow")
    """Largest number of pixels to decode; larger JPEG and JPEG 2000 files are decoded at a reduced size, others are damaged
    images."""
    mean: Literal["auto"] | list[ShareOrNone] | None = setting(None, on_resume="elsewhere")
    """Mean of each channel, subtracted from pixels from 0 to 1. ``auto``: measured on 1,024 training images when the run
    starts, and kept by the run; null: the data set's own (ImageNet's for folders, CIFAR's up to 32 pixels), or as ``auto``
    where it has none."""
    std: Literal["auto"] | list[Share] | None = setting(None, on_resume="elsewhere")
    """Standard deviation of each channel, by which they are divided then; as ``mean``."""
    batch_size: int = setting(64, ge=1)
    """Images of a micro-batch over all processes."""
    num_workers: int = setting(0, ge=0, on_resume="allow")
    """Loader processes; 0 loads in the main one. Does not change the run."""
    pin_memory: bool = setting(True, on_resume="allow")
    """Page-locked batches for faster copies to a GPU; without a GPU there are none."""
    in_memory: bool = False
    """Decode all image files once, when a run starts, and crop whole batches out of memory (docs/data.md). The images must
    have one size and 8 bits, and none may be damaged."""
    on_device: bool = setting(False, on_resume="allow")
    """Keep a data set that lies in memory (digits, CIFAR, STL-10, or ``in_memory``) on the device of the run."""
    val_fraction: float = setting(0.2, gt=0, lt=1)
    """Share held out where the data set has no validation split of its own."""
    crop_scale: Pair[Share] = setting((1.0, 1.0))
    """Smallest and largest area of the random crop, as a share of the image."""
    crop_ratio: Pair[Positive] = setting((1.0, 1.0))
    """Smallest and largest width / height of the random crop."""
    horizontal_flip: float = setting(0.0, ge=0, le=1)
    """Probability of a mirrored image."""
    color_jitter: float = setting(0.0, ge=0, le=1)
    """Strength of random brightness, contrast, saturation and (a quarter of it) hue."""
    random_affine: float = setting(0.0, ge=0, le=1)
    """Strength of a random affine map after the crop; at 1: 30 degrees, 20 % shift and scale, 15 degrees shear."""
    rand_augment: int = setting(0, ge=0)
    """Operations of RandAugment for each image, after the crop (arXiv:1909.13719, with torchvision's operations); for 1 or 3
    channels, whose values are rounded to 8 bits."""
    rand_augment_magnitude: int = setting(9, ge=0, le=30)
    """Their magnitude in torchvision's 31 steps; at 0 some still change an image."""
    max_damaged: float = setting(0.001, ge=0, le=1, on_resume="allow")
    """Share of a split's images that may be unreadable; more stop the run, and with ``in_memory`` one does."""
    allow_growth: bool = setting(False, on_resume="allow")
    """Let a run go on, at the start of an epoch, with data that has more images than before."""
    fake_size: int = setting(1024, ge=1)
    """Number of ``fake`` images."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.in_chans or self._own_channels

    @property
    def measures_stats(self) -> bool:
        """Whether the mean or the standard deviation of the channels is measured."""
        has_own = self.channels == self._own_channels
        return any(given == "auto" or (given is None and not has_own) for given in (self.mean, self.std))

    @property
    def _own_channels(self) -> int:
        return 1 if self.class_path is None and self.dataset in ("digit_pages", "digits") else 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@section()
class PredictorConfig:
    """The predictor, a narrow vision transformer."""

    width: int = setting(48, ge=4)
    """Width of its tokens, a multiple of 4 and of ``num_heads``."""
    depth: int = setting(1, ge=1)
    """Blocks that all levels share."""
    num_heads: int = setting(4, ge=1)
    """Attention heads."""
    mlp_ratio: float = setting(4.0, gt=0)
    """Hidden width of a block's MLP over ``width``."""
    level_depth: int = setting(0, ge=0)
    """Blocks that each level has of its own, after the shared ones."""
    init: Literal["xavier", "trunc_normal"] = "xavier"
    """Weights of its linear layers at the start, as ``model.init``; with ``trunc_normal``, the loss of a narrow predictor
    stays on a plateau for longer."""
    targets: Literal["independent", "joint"] = "independent"
    """``independent``: each target block of an image is predicted on its own (I-JEPA); ``joint``: all of them in one
    sequence, so that the context is read once (V-JEPA, arXiv:2404.08471)."""


@section()
class EMAConfig:
    """The target encoder's momentum: the share of it that an update keeps."""

    momentum: float = setting(0.98, ge=0, le=1)
    """At the start, and during the warm-up."""
    momentum_end: float = setting(0.996, ge=0, le=1)
    """At the end of the run."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How it gets there: by half a cosine (BYOL), or linearly (I-JEPA)."""
    momentum_warmup_epochs: float = setting(0.0, ge=0)
    """Epochs before the schedule begins; they hold ``momentum``, or lead to it from ``momentum_start``."""
    momentum_start: float | None = setting(None, ge=0, le=1)
    """At the first step, where the warm-up is to lead linearly from here to ``momentum``: a lower one lets the target forget
    its random initial weights sooner."""


@section()
class ModelConfig:
    """Encoders, predictor and hierarchy."""

    encoder_type: str = "vit_tiny_patch16_224"
    """Any of timm's vision transformers; where it is given, the four keys below are null by default."""
    patch_size: int | None = setting(8, ge=1)
    """Side of a patch in pixels; null: the named encoder's own."""
    embed_dim: int | None = setting(64, ge=4)
    """Width of the encoder; null: its own."""
    depth: int | None = setting(3, ge=1)
    """Blocks of the encoder; null: its own."""
    num_heads: int | None = setting(4, ge=1)
    """Attention heads of the encoder; null: its own."""
    pos_embed: Literal["sincos", "learned"] = "learned"
    """Fixed sine-cosine positions, or learned ones."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes tokens of pixels: a linear map of each patch, or overlapping 3 x 3 convolutions (arXiv:2106.14881), which
    need fewer images and epochs; hidden patches are blanked before them, and ``patch_size`` is a power of two."""
    init: Literal["xavier", "trunc_normal"] = "trunc_normal"
    """Weights of the blocks' linear layers at the start. ``xavier``: at the scale of each layer's width (Glorot and Bengio;
    MAE); ``trunc_normal``: of standard deviation 0.02 (I-JEPA), with which a narrow encoder is nearly linear at first."""
    patch_init: Literal["uniform", "trunc_normal"] = "uniform"
    """Weights of the patch embedding (``stem: patch``) at the start: torch's own, or of standard deviation 0.02 (I-JEPA),
    little for small patches."""
    drop_path: float = setting(0.0, ge=0, lt=1)
    """Stochastic depth of the context encoder: probability for the last block, less for earlier ones."""
    layer_scale: float | None = setting(None, gt=0)
    """Initial value of layer scale; none by default."""
    class_path: str | None = None
    """Dotted path of a function or class that makes an ``nn.ModuleDict`` of your own instead of H-JEPA's modules; it is
    called with ``init_args``, and with ``config`` where it takes that. Of the keys beside it, only ``encoder`` and ``ema``
    count then, and what the function reads."""
    init_args: dict[str, Any] = setting(dict)
    """Its arguments."""
    encoder: str | None = None
    """Name of the module that is probed, measured and exported; by default the first there is of ``target_encoder``,
    ``encoder`` and ``context_encoder``."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    num_hierarchies: int | None = setting(None, ge=1, le=16)
    """Number of levels, which pool 1, 2, 4, ... patches; by default there are two, single patches and the whole image."""
    levels: list[Level] | None = None
    """The levels in detail, finest first, instead of the ones that ``num_hierarchies`` makes."""
    norm_eps: float | None = setting(None, gt=0)
    """What the encoder's layer norms add to the variance; null: its own, 1e-6."""
    init_from: PathString | None = setting(None, on_resume="allow")
    """Weights that a new run starts with: a run, checkpoint or export of this project (as far as names and shapes fit),
    Meta's I-JEPA checkpoint, a folder of Hugging Face's ``IJepaModel``, a file of a plain timm vision transformer, or
    ``timm/NAME`` from the local cache; docs/interop.md says how they are read."""
    init_parts: list[str] | None = setting(None, on_resume="allow")
    """Modules that ``init_from`` fills: ``context_encoder``, ``target_encoder``, ``predictor``; all it can by default.
    A ``target_encoder`` that is not named starts as a copy of a ``context_encoder`` that is."""
    predictor: PredictorConfig = setting(PredictorConfig)
    ema: EMAConfig = setting(EMAConfig, on_resume="elsewhere")

    @property
    def num_levels(self) -> int:
        """How many levels ``levels`` or ``num_hierarchies`` make."""
        return len(self.levels) if self.levels is not None else self.num_hierarchies or 2

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_named_encoder(cls, given: Any) -> Any:
        """Another encoder comes in its own sizes, not in those of the default one."""
        values = values_of(given)
        sizes = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
        return {**sizes, **values} if "encoder_type" in values else given


@section()
class MaskingConfig:
    """Which patches are seen, and which are predicted."""

    type: Literal["blocks", "random"] = "blocks"
    """``blocks``: I-JEPA's, a few target blocks and the patches around them; ``random``: single patches anywhere, and all
    others are targets (MAE, arXiv:2111.06377); of the keys below, only ``context_keep`` counts then, and
    ``model.predictor.targets`` is ``joint``."""
    num_masks: int = setting(1, ge=1)
    """Target blocks per image."""
    mask_scale: Pair[Share] = setting((0.4, 0.6))
    """Smallest and largest area of a target block, as a share of the patch grid."""
    aspect_ratio: Pair[Positive] = setting((0.75, 1.5))
    """Smallest and largest height / width of a target block."""
    context_scale: Pair[Share] = setting((0.85, 1.0))
    """Smallest and largest area of the context block, from which the targets are cut out."""
    context_keep: Pair[Share] | None = None
    """Smallest and largest share of the patch grid that the context encoder sees, drawn once per step; null: for
    ``blocks`` what their shapes leave in most images (docs/masks.md), for ``random`` a quarter."""


@section()
class LossConfig:
    """The objective."""

    type: str = "smooth_l1"
    """``smooth_l1``, ``mse``, ``huber``, ``cosine``, or the dotted path of a function (prediction, target) -> loss."""
    hierarchy_weights: list[NonNegative] | None = setting(None)
    """One weight per level, finest first; 1 by default. Not together with ``model.levels``, which have their own."""
    variance_weight: float = setting(0.0, ge=0)
    """Weight of VICReg's variance term on the mean context token of each image."""
    covariance_weight: float = setting(0.0, ge=0)
    """Weight of VICReg's covariance term on the mean context token of each image."""
    sigreg_weight: float = setting(0.0, ge=0)
    """Weight of LeJEPA's SIGReg on the mean context token of each image."""


@section()
class TrainingConfig:
    """Optimizer, schedules and precision."""

    epochs: int = setting(20, ge=1, on_resume="extend")
    """Passes over the data."""
    max_iters: int | None = setting(None, ge=1, on_resume="extend")
    """End the run after this many micro-batches, inside an epoch if need be; schedules still span all ``epochs``."""
    warmup_epochs: float = setting(2.0, ge=0, on_resume="elsewhere")
    """Linear warm-up of the learning rate, at most ``epochs``: all of them by default where there are fewer."""
    start_lr: float = setting(0.0, ge=0, on_resume="elsewhere")
    """Learning rate from which the warm-up rises, at most ``lr``; the first step is already one step above it.
    0 without ``warmup_epochs``."""
    lr: float = setting(1e-3, gt=0, on_resume="elsewhere")
    """Learning rate at the end of the warm-up."""
    min_lr: float = setting(0.0, ge=0, on_resume="elsewhere")
    """Learning rate at the last step, at most ``lr``."""
    lr_schedule: Literal["cosine", "linear", "constant"] = setting("cosine", on_resume="elsewhere")
    """How the learning rate gets from ``lr`` to ``min_lr``; ``constant`` stays at ``lr``."""
    level_lrs: list[Positive] | None = setting(None, on_resume="elsewhere")
    """Learning rate of each level's own parameters (head, own blocks), finest first; ``lr`` by default."""
    weight_decay: float = setting(0.05, ge=0, on_resume="elsewhere")
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float | None = setting(None, ge=0, on_resume="elsewhere")
    """Weight decay at the last step, half a cosine leads there; ``weight_decay`` by default."""
    optimizer: str = "adamw"
    """``adamw``, ``sgd``, or the dotted path of a ``torch.optim.Optimizer``."""
    optimizer_args: dict[str, Any] = setting(dict)
    """Further arguments of the optimizer; ``fused`` is true by default where torch has a fused implementation."""
    betas: Pair[BelowOne] = setting((0.9, 0.95))
    """Of Adam and its like; the first one is SGD's momentum."""
    clip_grad: float | None = setting(None, gt=0, on_resume="elsewhere")
    """Largest L2 norm of all gradients; null: not clipped."""
    accumulation_steps: int = setting(1, ge=1)
    """Micro-batches of an optimizer step."""
    use_amp: Literal["auto"] | bool = "auto"
    """Mixed precision: parameters, target encoder, reductions and losses stay in float32. ``auto``: where the CPU or the
    GPU has instructions for it; a run keeps what was chosen when it started."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """With ``use_amp: true``, ``auto``: bfloat16 on a CPU and where the GPU has it, else float16 with a gradient scaler."""
    compile: bool = False
    """Compile encoders and predictor with ``torch.compile``, which takes minutes at the start. Without a working compiler
    the run goes on without, and says so."""
    non_finite: Literal["stop", "skip"] = setting("stop", on_resume="elsewhere")
    """What a non-finite loss or gradient does: end the run, or drop the update (10 in a row end it)."""
    early_stopping: int | None = setting(None, ge=1, on_resume="extend")
    """End the run after this many epochs without a better ``val/loss``; null: never. Such an end has no readings, probes or
    figures of its own, as it is not known beforehand."""
    time_limit: float | None = setting(None, gt=0, on_resume="allow")
    """Save and leave (exit code 75) after this many minutes; null: no limit."""

    @model_validator(mode="before")
    @classmethod
    def _warmup_of_short_run(cls, given: Any) -> Any:
        """The default warm-up is no longer than the run."""
        values = values_of(given)
        if type(values.get("epochs")) is int and values["epochs"] < cls.warmup_epochs:
            return {"warmup_epochs": values["epochs"], **values}
        return given


@section()
class DistributedConfig:
    """Several processes: docs/scaling.md."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: every process has the whole model; ``fsdp``: parameters, gradients, moments and target encoder lie in shards
    over the processes, for models that do not fit on one GPU. With one process they are the same."""
    timeout: float | None = setting(None, gt=0)
    """Minutes that a process waits for the others, before the run ends and names who did not come; null: torch's own (30 on
    CPUs, 10 on GPUs)."""
    weight_check_every: int | None = setting(50, ge=1)
    """Optimizer steps between comparisons of the weights of all processes, bit by bit; null: never. Under ``fsdp`` there is
    nothing to compare: of each weight there is one copy."""


@section()
class CheckpointConfig:
    """When the whole state of a run is saved, which checkpoints stay, and how a run starts."""

    save_frequency: int | None = setting(1, ge=1)
    """Epochs between saves; null: not by epochs. The end of a run is always saved."""
    save_every_steps: int | None = setting(None, ge=1)
    """Optimizer steps between saves, besides."""
    save_every_minutes: float | None = setting(15.0, gt=0)
    """Minutes between saves, besides."""
    keep_last_n: int = setting(2, ge=2)
    """Newest checkpoints to keep: one more than needed, should the newest be damaged."""
    keep_best_n: int = setting(1, ge=0)
    """Checkpoints with the best ``metric`` to keep."""
    keep_every_epochs: int | None = setting(None, ge=1)
    """Keep the checkpoint of every N-th epoch for good; null: none."""
    metric: str = "val/loss"
    """Any logged metric; it counts for a checkpoint that is saved when the metric is new."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``metric`` is better."""
    checkpoint_dir: PathString | None = None
    """Folder of the checkpoints; ``checkpoints`` in the run folder by default."""
    resume: PathString = "auto"
    """``auto``: go on from the run folder's newest checkpoint if there is one; ``must``: there has to be one; ``never``: set
    an earlier run in the folder aside and start anew; or the path of a checkpoint (or run) to go on from where the run
    folder has none of its own."""


@section()
class ProbeConfig:
    """The linear probe that measures the frozen encoder."""

    enabled: bool = True
    """Measure the encoder at the end of pretraining."""
    features: Literal["mean", "concat"] = "mean"
    """What the probe reads: the mean of the patch tokens, or all of them side by side."""
    labels_per_class: int | None = setting(None, ge=1)
    """Labeled images of each class to learn from; all by default."""
    epochs: int = setting(100, ge=1)
    """Passes over the features."""
    batch_size: int = setting(256, ge=1)
    """Features of a step."""
    lr: float = setting(1e-2, gt=0)
    """Learning rate at the start; half a cosine leads to 0."""
    weight_decay: float = setting(1e-2, ge=0)
    """Of the linear head (AdamW)."""
    features_in_memory_gb: float = setting(4.0, ge=0)
    """Memory for the features of one split, in 1e9 bytes; more are kept in a file in TMPDIR that is mapped into memory."""


@section()
class HandlerConfig:
    """A handler of your own."""

    class_path: str
    """Dotted path of a class with ``attach(engine)``."""
    init_args: dict[str, Any] = setting(dict)
    """Its arguments."""


@section()
class StepConfig:
    """A step of your own."""

    class_path: str
    """Dotted path of a step, a function (modules, batch, ...), or of a class whose instances are steps."""
    init_args: dict[str, Any] = setting(dict)
    """Further arguments of the function, or those of the class."""


@section()
class Config:
    """A run. Every value can be given in a YAML file (``--config``) and on the command line (``--training.lr 3e-4``)."""

    data: DataConfig = setting(DataConfig)
    model: ModelConfig = setting(ModelConfig)
    masking: MaskingConfig = setting(MaskingConfig, on_resume="elsewhere")
    loss: LossConfig = setting(LossConfig, on_resume="elsewhere")
    training: TrainingConfig = setting(TrainingConfig)
    distributed: DistributedConfig = setting(DistributedConfig, on_resume="allow")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, on_resume="allow")
    logging: LoggingConfig = setting(LoggingConfig, on_resume="allow")
    collapse: CollapseConfig = setting(CollapseConfig, on_resume="allow")
    guard: GuardConfig = setting(GuardConfig, on_resume="allow")
    probe: ProbeConfig = setting(ProbeConfig, on_resume="extend")
    online_probe: OnlineProbeConfig = setting(OnlineProbeConfig, on_resume="allow")
    pictures: PicturesConfig = setting(PicturesConfig, on_resume="allow")
    step: StepConfig | None = None
    """A step of your own instead of H-JEPA's, ``class_path`` and ``init_args``: docs/steps.md."""
    handlers: list[HandlerConfig] = setting(list, on_resume="allow")
    """Handlers of your own, attached after the others: ``class_path`` and ``init_args`` each."""
    run_dir: PathString | None = setting(None, on_resume="allow")
    """The run folder; ``runs/<logging.experiment_name>`` by default."""
    seed: int = setting(0, ge=0)
    """Names all random draws; equal seeds give equal runs."""
    device: str = setting("auto", on_resume="allow")
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``."""

    def __post_init__(self) -> None:
        rule = next(broken_rules(self), None)
        if rule:
            raise ConfigError(rule)


def resolve_levels(config: Config) -> tuple[Level, ...]:
    """The levels that ``model`` and ``loss`` ask for."""
    if config.model.levels is not None:
        return tuple(config.model.levels)
    weights = config.loss.hierarchy_weights or [1.0] * config.model.num_levels
    pools: list[int | Literal["image"]] = [1, "image"]
    if config.model.num_hierarchies is not None:
        pools = [2**level for level in range(config.model.num_hierarchies)]
    return tuple(Level(pool, weight=weight) for pool, weight in zip(pools, weights, strict=True))
