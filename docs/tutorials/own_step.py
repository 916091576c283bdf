# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Your own step, with your own images
#
# A masked autoencoder (MAE, arXiv:2111.06377) on a folder of images. Checkpoints, exact resume, probes, collapse
# metrics and the report come along. About a minute on two CPU cores.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

from hjepa_engine import load_config, load_encoder
from hjepa_engine.recipes.examples.mae import build_modules, mae_step
from hjepa_engine.recipes.pretrain import build
from hjepa_engine.report import read_run

# %% [markdown]
# ## Images
#
# Any folder will do: `photos/train/CLASS/*.jpg`, or without classes. These are drawn here, so that nothing has to be
# downloaded: three shapes in random colors, places and sizes.

# %%
random = np.random.default_rng(0)
DRAW = {"circle": "ellipse", "square": "rectangle", "cross": None}
for name, method in DRAW.items():
    folder = Path("shapes", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(150):
        ground, ink = (tuple(map(int, random.integers(low, low + 110, 3))) for low in (0, 140))
        image = Image.new("RGB", (32, 32), ground)
        size = int(random.integers(10, 22))
        x, y = (int(value) for value in random.integers(1, 31 - size, 2))
        pen = ImageDraw.Draw(image)
        if method:
            getattr(pen, method)((x, y, x + size, y + size), fill=ink)
        else:
            pen.line((x, y, x + size, y + size), fill=ink, width=3)
            pen.line((x, y + size, x + size, y), fill=ink, width=3)
        image.save(folder / f"{number:03}.png")

_, axes = plt.subplots(1, 9, figsize=(9, 1.2))
for axis, path in zip(axes, sorted(Path("shapes").glob("*/00[0-2].png")), strict=True):
    axis.imshow(Image.open(path))
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A step
#
# A step is a function of modules and a batch that returns a dict with `loss`. `mae_step` in `recipes/examples/mae.py`
# hides three quarters of the patches and draws them; here is the whole wiring:

# %%
config = load_config(
    None,
    [
        *(
            "data.dataset=imagefolder",
            "data.data_path=shapes",
            "data.image_size=32",
            "data.batch_size=32",
            "data.num_workers=0",
        ),
        *("model.encoder_type=vit_tiny_patch16_224", "model.patch_size=8", "model.embed_dim=48", "model.depth=2"),
        *("model.num_heads=4", "training.epochs=15", "training.warmup_epochs=2", "training.lr=2e-3"),
        *(
            "online_probe.every=5",
            "collapse.every=50",
            "collapse.outputs={context: context_tokens}",
            "pictures.enabled=false",
        ),
        *(
            "logging.experiment_name=shapes",
            "logging.log_frequency=10",
            "logging.progress_bar=false",
            "probe.epochs=20",
        ),
    ],
)
run = build(config, step=mae_step, modules=build_modules)
print(run.describe())
{name: f"{100 * accuracy:.1f} %" for name, accuracy in run.fit().items()}

# %% [markdown]
# Trained, random and pixels are linear probes: how well a linear classifier tells the three shapes apart.

# %%
series = read_run(Path("runs/shapes")).series
_, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
for axis, name in zip(axes, ("train/loss", "probe/knn", "collapse/target_rank_share"), strict=True):
    axis.plot(*series[name], marker=".")
    axis.set_title(name)
plt.show()

# %% [markdown]
# ## What it draws
#
# The decoder's pixels are normalized per patch, so contrast is not that of the image.

# %%
modules = run.modules.eval()
batch = next(iter(run.val_data))
images = batch["images"][:6]
with torch.no_grad():
    torch.manual_seed(0)
    visible = torch.rand(len(images), 16).argsort(dim=1)[:, :4]
    drawn = modules["decoder"](modules["encoder"](images, visible), visible)
    drawn = torch.nn.functional.fold(drawn.mT, (32, 32), 8, stride=8)
seen = torch.zeros(len(images), 16).scatter(1, visible, 1.0).view(-1, 1, 4, 4)
seen = images * torch.nn.functional.interpolate(seen, scale_factor=8)

_, axes = plt.subplots(3, len(images), figsize=(9, 4.6))
for row, pictures in zip(axes, (images, seen, drawn), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        low, high = picture.min(), picture.max()
        axis.imshow(((picture - low) / (high - low)).permute(1, 2, 0).numpy())
        axis.axis("off")
plt.show()

# %% [markdown]
# ## Use it
#
# The trained weights go into an encoder like the one that was trained; tokens are (B, N, D).

# %%
encoder = load_encoder("runs/shapes", encoder=build_modules(config)["encoder"])
with torch.no_grad():
    print(encoder(images).shape)
