"""Marks of tests whose subject needs a later version than the package itself."""

import pytest
import torch
import transformers
from packaging.version import Version


TORCH = Version(torch.__version__)
needs_export = pytest.mark.skipif(Version("2.10") > TORCH, reason="the export with open sizes needs torch 2.10")
needs_compile = pytest.mark.skipif(Version("2.11") > TORCH, reason="compilation needs torch 2.11")
READS_IMAGES_ALONE = Version(transformers.__version__) >= Version("5.18")
needs_auto_classes = pytest.mark.skipif(
    not READS_IMAGES_ALONE,
    reason="transformers before 5.18 has `AutoImageProcessor` only where torchvision is installed",
)
needs_precision = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this torch has no `torch.backends.mkldnn.matmul.fp32_precision`",
)
