"""Write the encoder of a run for other projects, with its configuration, normalization and a model card.

    python recipes/export.py --run RUN_DIR --format FORMAT [--output FOLDER] [--checkpoint best] [--module context_encoder]

Formats: safetensors (for hjepa_engine.load_encoder), timm (timm.create_model), huggingface (transformers.AutoModel), onnx
(ONNX Runtime), torch_export (torch.export.load); the last four open without this project. docs/interop.md has examples.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hjepa_engine.config import paths
from hjepa_engine.run.cli import command_parser, run_command


def main(argv: Sequence[str]) -> None:
    """Export, and say where it is."""
    parser = command_parser(__doc__ or "", with_config=False)
    parser.add_argument("--run", type=paths.path_argument, required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument(
        "--format", required=True, help="safetensors, timm, huggingface, onnx or torch_export", metavar="FORMAT"
    )
    parser.add_argument(
        "--output",
        type=paths.path_argument,
        metavar="FOLDER",
        help="a new folder (default: export/FORMAT in the run folder)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best, latest or a name; by default the exported encoder, or the newest checkpoint where there is none",
    )
    parser.add_argument("--module", metavar="NAME", help="target_encoder (default) or context_encoder")
    known = parser.parse_args(argv)
    from hjepa_engine.interop.writing import export_encoder  # torch is imported here: --help does without

    found = export_encoder(known.run, known.format, known.output, checkpoint=known.checkpoint, module=known.module)
    size = f"{found.size / 1e3:.1f} kB" if found.size < 1e6 else f"{found.size / 1e6:.1f} MB"
    print(f"{found.path}: {known.format}, {size}, {found.weights}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
