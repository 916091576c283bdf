"""Handlers: one concern each, attached to engine events."""

from hjepa_engine.checkpoint.retention import RetentionPolicy
from hjepa_engine.handlers.batch_collapse import BatchCollapse
from hjepa_engine.handlers.checkpointer import Checkpointer
from hjepa_engine.handlers.collapse_guard import CollapseGuard
from hjepa_engine.handlers.collapse_monitor import CollapseMonitor
from hjepa_engine.handlers.damaged_images import DamagedImages
from hjepa_engine.handlers.data_position import DataPosition
from hjepa_engine.handlers.early_stopping import EarlyStopping
from hjepa_engine.handlers.encoder_export import EncoderExport
from hjepa_engine.handlers.gpu_stats import GpuStats
from hjepa_engine.handlers.mask_sampler import MaskSampler
from hjepa_engine.handlers.metric_averager import MetricAverager
from hjepa_engine.handlers.metrics_logger import MetricsLogger
from hjepa_engine.handlers.non_finite_guard import NonFiniteGuard
from hjepa_engine.handlers.online_probe import OnlineProbe
from hjepa_engine.handlers.optimizer_step import OptimizerStep
from hjepa_engine.handlers.param_schedule import ParamSchedule
from hjepa_engine.handlers.parameter_histograms import ParameterHistograms
from hjepa_engine.handlers.pictures import Pictures
from hjepa_engine.handlers.preemption import Preemption
from hjepa_engine.handlers.progress_bar import ProgressBar
from hjepa_engine.handlers.step_seed import StepSeed
from hjepa_engine.handlers.step_timing import StepTiming
from hjepa_engine.handlers.target_encoder_ema import TargetEncoderEMA
from hjepa_engine.handlers.throughput import Throughput
from hjepa_engine.handlers.validation import Validation
from hjepa_engine.handlers.weight_check import WeightCheck

__all__ = [
    "BatchCollapse",
    "Checkpointer",
    "CollapseGuard",
    "CollapseMonitor",
    "DamagedImages",
    "DataPosition",
    "EarlyStopping",
    "EncoderExport",
    "GpuStats",
    "MaskSampler",
    "MetricAverager",
    "MetricsLogger",
    "NonFiniteGuard",
    "OnlineProbe",
    "OptimizerStep",
    "ParamSchedule",
    "ParameterHistograms",
    "Pictures",
    "Preemption",
    "ProgressBar",
    "RetentionPolicy",
    "StepSeed",
    "StepTiming",
    "TargetEncoderEMA",
    "Throughput",
    "Validation",
    "WeightCheck",
]
