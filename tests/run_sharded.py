"""In each of two processes: a model that FSDP 2 shares out gives, as a gathered copy, the logits of the whole one."""

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from segmenter_hf import SegmenterForSemanticSegmentation
from segmenter_hf.training.trainer import gathered_copy

from .tiny_models import tiny_scenes_config


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = SegmenterForSemanticSegmentation(tiny_scenes_config()).eval()
    pixel_values = torch.randn(1, 3, 32 + 8 * rank, 40)
    with torch.no_grad():
        expected = model(pixel_values).logits
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.segmenter.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    copy = gathered_copy(model)
    assert type(copy) is SegmenterForSemanticSegmentation
    with torch.no_grad():
        for _ in range(1 + rank):  # as often as it likes
            assert torch.equal(copy(pixel_values).logits, expected)
    print(f"equal in process {rank}", flush=True)
    torch.distributed.destroy_process_group()
