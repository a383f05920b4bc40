"""The page of `segmenter-hf demo` as a Hugging Face Space."""

import os
from pathlib import Path

from segmenter_hf.demo.app import build_page, launch_page, load_models


names = os.environ.get("MODELS", str(Path(__file__).parent / "model")).split()
page = build_page(load_models(names))

if __name__ == "__main__":
    launch_page(page)
