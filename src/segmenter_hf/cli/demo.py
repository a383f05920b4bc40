"""Serve a web page that segments images in the browser. Needs Gradio: `pip install segmenter-hf[demo]`.

    segmenter-hf demo --model_name_or_path outputs/my_model outputs/segmenter-b

Without a model the one of `make demo` is shown; where there is none it is trained first, which takes some minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..training import run
from .errors import cli_main
from .parsing import build_parser, parse_arguments


@dataclass
class Arguments:
    """Which models to show, and where."""

    _argument_group_name = "page"

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Directories or Hub names of models to choose from on the page."}
    )
    output_dir: str = field(
        default="outputs/demo/model",
        metadata={"help": "Directory of the model that is shown, or trained, by default."},
    )
    max_image_pixels: int = field(default=50_000_000, metadata={"help": "Larger images are refused."})
    device: str | None = field(default=None, metadata={"help": "Device of the models; a GPU where there is one."})
    runtime: Literal["torch", "onnxruntime", "openvino"] = field(
        default="torch",
        metadata={"help": "What runs the networks; others than torch run what `segmenter-hf export` wrote."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for other machines too."})
    port: int | None = field(default=None, metadata={"help": "Port to listen on; the first free one from 7860."})


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    (args,) = parse_arguments(build_parser("demo", __doc__, [Arguments]), argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {args.port}.")
    from ..demo.app import WORKER, build_page, launch_page, load_models, train_scenes_model  # needs the extra

    is_there = all((Path(args.output_dir) / name).is_file() for name in ("config.json", "model.safetensors"))
    if not args.model_name_or_path and not is_there and args.runtime == "torch":
        print(
            f"There is no model in {args.output_dir} yet: training a small one on drawn street scenes, some minutes."
        )
        train_scenes_model(Path(run.__file__).parent / "demo.json", args.output_dir)
    models = load_models(args.model_name_or_path or [args.output_dir], args.device, args.runtime)
    try:
        launch_page(build_page(models, args.max_image_pixels), server_name=args.host, server_port=args.port)
    finally:
        # After the image it is at: torch aborts a process that ends meanwhile.
        WORKER.shutdown(cancel_futures=True)
