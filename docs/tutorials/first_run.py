# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A first run
#
# Pretrain on pages of digits, look at it, measure it, write a handler, then break the run and watch the guard. About
# a minute on two CPU cores, nothing is downloaded. `jupytext --to ipynb docs/tutorials/first_run.py` makes a notebook
# of this file.

# %%
import json
import logging
from pathlib import Path

import matplotlib.pyplot as plt
from ignite.engine import Events
from PIL import Image

from hjepa_engine import TrainEvents, load_config
from hjepa_engine.recipes import pretrain
from hjepa_engine.report import assess, read_run

QUIET = ["logging.progress_bar=false", "probe.epochs=5", "data.num_workers=0"]


def config(name, *more):
    """The default run, shorter."""
    short = ["training.epochs=2", "training.warmup_epochs=1", "collapse.every=25", "online_probe.every=2"]
    return load_config(pretrain.DEFAULT_CONFIG, [*short, *QUIET, f"run_dir=runs/{name}", *more])


# %% [markdown]
# ## Train
#
# `build` makes all parts and writes nothing; `fit` trains, and measures the frozen encoder with a linear probe.

# %%
run = pretrain.build(config("first"))
results = run.fit()
{name: f"{100 * accuracy:.1f} %" for name, accuracy in results.items()}

# %% [markdown]
# These are two epochs; the default has twenty. What the model saw and had to predict, at both levels:

# %%
Image.open(sorted(Path("runs/first/figures").glob("masks_*.png"))[-1])

# %% [markdown]
# ## Is it healthy?
#
# The report `runs/first/report.html` says so in words, and shows every curve. The same from Python; after two epochs
# there may be warning signs, such as a kNN accuracy below that of the random encoder.

# %%
data = read_run(Path("runs/first"))
verdict = assess(data.series)
print(verdict.level, "-", verdict.headline, *verdict.reasons, sep="\n")


# %%
def draw(names, runs):
    """Curves of some metrics, one picture for each."""
    _, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 2.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for run in runs:
            series = read_run(Path("runs", run)).series.get(name)
            if series:
                axis.plot(*series, label=run)
        axis.set_title(name)
    axes[0].legend()
    plt.show()


NAMES = ("train/loss", "collapse/target_rank_share", "collapse/target_std")
draw(NAMES, ["first"])


# %% [markdown]
# ## A handler
#
# A class with `attach`, which adds its methods to events. Tensors are in `engine.state.output`; a float in
# `engine.state.metrics` is logged by whatever logs. This one measures how far the encoders are apart.


# %%
class EncoderDistance:
    """Distance of both encoders' weights, once per log interval.

    Listens to: ``TrainEvents.LOG_INTERVAL_COMPLETED``.
    Writes: ``engine.state.metrics["train/encoder_distance"]``.
    """

    def attach(self, engine):
        engine.add_event_handler(TrainEvents.LOG_INTERVAL_COMPLETED, self.measure)

    def measure(self, engine):
        context, target = engine.modules["context_encoder"], engine.modules["target_encoder"]
        pairs = zip(context.parameters(), target.parameters(), strict=True)
        squares = sum((first - second).square().sum() for first, second in pairs)
        engine.state.metrics["train/encoder_distance"] = squares.sqrt().item()


short = config("handler", "training.max_iters=40", "logging.log_frequency=10", "probe.enabled=false")
run = pretrain.build(short, handlers=[EncoderDistance()])
run.trainer.add_event_handler(Events.COMPLETED, lambda: print("a function does, too"))
run.fit()
draw(("train/encoder_distance", "train/grad_norm"), ["handler"])

# %% [markdown]
# ## Break it
#
# With a learning rate fifty times as high and without a moving average, features collapse. The loss does not show it:
# after 50 steps it is *lower* than the healthy run's, because predicting a constant is easy. A guard that watches the
# standard deviation ends the run.

# %%
for library in ("hjepa_engine", "ignite"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
rule = "guard.rules=[{metric: collapse/target_std, drop: 0.5, readings: 1, action: stop}]"
broken = config(
    "broken", "training.lr=0.05", "training.weight_decay=0", "model.ema.momentum=0", "model.ema.momentum_end=0", rule
)
try:
    pretrain.build(broken).fit()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
draw(NAMES, ["first", "broken"])

# %%
verdict = assess(read_run(Path("runs/broken")).series)
print(verdict.level, "-", verdict.headline, *verdict.advice, sep="\n")
json.loads(Path("runs/broken/status.json").read_text())["state"]
