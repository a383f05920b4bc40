"""Save models in one environment, and load them as remote code in another one, where the package cannot be imported.

    python tests/check_remote_code.py save FOLDER
    OTHER_ENVIRONMENT/bin/python tests/check_remote_code.py load FOLDER

`make test-lowest` and `make test-colab` do this in both directions, with the newest versions on the other side. Pixel values and
logits have to be equal up to rounding, for the other torch may add in another order.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file


ENCODER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}


class Blocked:
    """Hides the package, where it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "segmenter_hf":
            raise ImportError("the package is hidden here")


def save(folder: Path) -> None:
    """Save one model of each kind with what it gives for an image."""
    from segmenter_hf import (
        SegmenterConfig,
        SegmenterForSemanticSegmentation,
        SegmenterImageProcessor,
        SetrConfig,
        SetrForSemanticSegmentation,
    )

    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    models = {
        "mask": SegmenterForSemanticSegmentation(SegmenterConfig(num_hidden_layers=2, num_labels=3, **ENCODER)),
        "linear": SegmenterForSemanticSegmentation(
            SegmenterConfig(num_hidden_layers=2, decoder_type="linear", num_labels=1, **ENCODER)
        ),
        "rotary": SegmenterForSemanticSegmentation(
            SegmenterConfig(num_hidden_layers=2, position_embedding_type="rotary", key_bias=False, **ENCODER)
        ),
        "pup": SetrForSemanticSegmentation(SetrConfig(num_hidden_layers=4, decoder_hidden_size=8, **ENCODER)),
    }
    processor = SegmenterImageProcessor(size={"shortest_edge": 32}, window_size=32, window_stride=24, patch_size=8)
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        Image.fromarray(pixels).save(folder / name / "image.png")
        inputs = processor(Image.fromarray(pixels))
        with torch.no_grad():
            logits = model(**inputs).logits
        expected = {"pixel_values": inputs["pixel_values"].contiguous(), "logits": logits.contiguous()}
        save_file(expected, folder / name / "expected.safetensors")
    print(f"saved with transformers {transformers.__version__}, torch {torch.__version__}: {', '.join(models)}")


def load(folder: Path) -> None:
    """Load each model as remote code and compare what it gives."""
    sys.meta_path.insert(0, Blocked())
    paths = sorted(expected.parent for expected in folder.glob("*/expected.safetensors"))
    assert paths, f"nothing was saved in {folder}"
    for path in paths:
        model = transformers.AutoModelForSemanticSegmentation.from_pretrained(path, trust_remote_code=True).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        expected = load_file(path / "expected.safetensors")
        inputs = processor(Image.open(path / "image.png"))
        with torch.no_grad():
            logits = model(**inputs).logits
        difference = (logits - expected["logits"]).abs().max().item()
        torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
        print(
            f"{path.name}: largest difference of the logits {difference:.1e}, "
            f"transformers {transformers.__version__}, torch {torch.__version__}"
        )


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
