"""SETR checkpoints of mmsegmentation and of the authors' repository become models that compute what the systems compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from segmenter_hf import SetrForSemanticSegmentation
from segmenter_hf.conversion.convert import convert_checkpoint
from segmenter_hf.models.window_geometry import Axis, merge_matrix


FIXTURES = Path(__file__).parents[1] / "fixtures" / "mmseg"
DECODER_TYPES = ("naive", "pup", "mla")
TEXT = """
model = dict(
    backbone=dict({backbone}, img_size=64, num_heads=2, drop_rate=0.0),
    decode_head=dict({head}),
    auxiliary_head=[{auxiliary}])
test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(42, 42))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [dict(type='LoadAnnotations', reduce_zero_label=True)]
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2048, 512))]
"""


def assert_equal_to_golden(got: torch.Tensor, golden: np.ndarray) -> None:
    """To 1e-4; where the golden is kept as float16, to its rounding and 1e-4 as well."""
    rounding = np.spacing(np.abs(golden)) / 2 if golden.dtype == np.float16 else 0
    assert (np.abs(got.numpy() - golden.astype(np.float64)) <= 1e-4 + rounding).all()


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@torch.no_grad()
def test_logits_of_all_heads_are_those_of_mmsegmentation(decoder_type, tmp_path) -> None:
    folder = FIXTURES / f"setr_{decoder_type}"
    output_dir = convert_checkpoint(folder / "checkpoint.pth", tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    assert isinstance(model, SetrForSemanticSegmentation)
    arrays = np.load(folder / "expected.npz")
    for batch in ("0", "1"):
        pixel_values = torch.from_numpy(arrays[f"pixel_values_{batch}"]).float()
        outputs = model(pixel_values, output_auxiliary_logits=True)
        assert_equal_to_golden(outputs.logits, arrays[f"head_logits_{batch}"])
        goldens = sorted(name for name in arrays if name.startswith("aux") and name.endswith(batch))
        for logits, name in zip(outputs.auxiliary_logits, goldens, strict=True):
            assert_equal_to_golden(logits, arrays[name])
        upsampled = F.interpolate(outputs.logits, size=pixel_values.shape[-2:], mode="bilinear")
        assert_equal_to_golden(upsampled, arrays[f"logits_{batch}"])


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@torch.no_grad()
def test_windows_through_processor_and_model_merge_to_the_logits_of_mmsegmentation(decoder_type, tmp_path) -> None:
    folder = FIXTURES / f"setr_{decoder_type}"
    output_dir = convert_checkpoint(folder / "checkpoint.pth", tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    arrays = np.load(folder / "expected.npz")
    processor = AutoImageProcessor.from_pretrained(
        output_dir, window_size=64, window_stride=42, do_resize=False, do_rescale=False, do_normalize=False
    )
    inputs = processor(torch.from_numpy(arrays["slide_pixel_values"][0]).float())
    outputs = model(**inputs)
    starts = inputs["window_offsets"][:, 4].tolist()
    rows, columns = outputs.logits.shape[-2:]
    row_matrix = torch.from_numpy(merge_matrix(Axis((0,), 64, 64, rows, 64, 64)))
    column_matrix = torch.from_numpy(merge_matrix(Axis(tuple(starts), 64, 64, columns, 90, 90)))
    merged = row_matrix @ torch.cat(list(outputs.logits.double()), -1) @ column_matrix.T
    assert_equal_to_golden(merged, arrays["slide_logits"][0])

    golden = torch.from_numpy(arrays["slide_logits"][0]).float()
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    torch.testing.assert_close(result.segmentation_scores, golden.softmax(0), rtol=0, atol=5e-3)
    top = golden.topk(2, dim=0).values
    is_tie = top[0] - top[1] < 5e-3
    assert ((result.segmentation == golden.argmax(0)) | is_tie).all()


def test_what_the_checkpoint_says_becomes_configuration_and_processor(tmp_path) -> None:
    expected = {
        "naive": (1, 1, 4, 2, 1, 4, True),
        "pup": (4, 3, 2, 2, 3, 4, True),
        "mla": (2, 3, 4, 0, 1, 1, False),
    }
    for decoder_type, fields in expected.items():
        output_dir = convert_checkpoint(FIXTURES / f"setr_{decoder_type}" / "checkpoint.pth", tmp_path / decoder_type)
        config = AutoModelForSemanticSegmentation.from_pretrained(output_dir).config
        assert (config.model_type, config.decoder_type) == ("setr", decoder_type)
        assert fields == (
            config.decoder_num_convs,
            config.decoder_kernel_size,
            config.decoder_upsample_factor,
            config.auxiliary_num_convs,
            config.auxiliary_kernel_size,
            config.auxiliary_upsample_factor,
            config.use_class_token,
        )
        assert (config.out_indices, config.auxiliary_loss_weight) == ([0, 1, 2, 3], 0.4)
        assert (config.layer_norm_eps, config.position_embedding_interpolation) == (1e-6, "bilinear")
        assert not config.use_final_layer_norm
        assert config.id2label[5] == "class_5"
        assert config.provenance["source"] == "open-mmlab/mmsegmentation"
        processor = AutoImageProcessor.from_pretrained(output_dir)
        assert (processor.window_size, processor.window_stride) == (512, 341)
        assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("decoder_type", "change", "message"),
    [
        ("naive", lambda state: state.pop("decode_head.norm.weight"), "nothing for `decode_head.layernorm.weight`"),
        ("pup", lambda state: state.pop("auxiliary_head.1.up_convs.1.0.conv.weight"), "auxiliary_heads.1.convs.1"),
        (
            "mla",
            lambda state: state.pop("neck.mla.feat_extract.3.bn.running_var"),
            "neck.convs.3.batch_norm.running_var",
        ),
        ("mla", lambda state: state.update({"neck.extra": torch.ones(2)}), "`neck.extra`"),
        ("pup", lambda state: state.update({"backbone.ln1.weight": torch.ones(64)}), "`backbone.ln1.weight`"),
        (
            "naive",
            lambda state: state.update({"decode_head.up_convs.0.0.bn.running_var": torch.full((16,), torch.nan)}),
            "NaN or infinite values in `decode_head.up_convs.0.0.bn.running_var`",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(decoder_type, change: Callable, message, tmp_path) -> None:
    content = torch.load(FIXTURES / f"setr_{decoder_type}" / "checkpoint.pth")
    change(content["state_dict"])
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_auxiliary_heads_of_several_kinds_are_refused(tmp_path) -> None:
    content = torch.load(FIXTURES / "setr_naive" / "checkpoint.pth")
    content["meta"]["config"] = content["meta"]["config"].replace("in_index=1", "in_index=2")
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"auxiliary heads on levels \[0, 1, 2\].*got \[0, 2, 2\]"):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")


# ---- the authors' repository: no golden, but a plain reading of its heads ----


class AuthorsEncoder(nn.Module):
    """Weights under the names of timm, which the authors use."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.blocks:
            block.norm1, block.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def features(self, pixel_values: torch.Tensor, drop_class_token: bool) -> list[torch.Tensor]:
        patches = self.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        tokens, outputs = tokens[:, 1:] if drop_class_token else tokens, []
        for block in self.blocks:
            batch, number, width = tokens.shape
            q, k, v = block.attn.qkv(block.norm1(tokens)).view(batch, number, 3, 2, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, number, width)
            tokens = tokens + block.attn.proj(attended)
            tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
            outputs.append(tokens)
        return outputs


def to_map(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, -16:].transpose(1, 2).reshape(len(tokens), -1, 4, 4)


class AuthorsUpHead(nn.Module):
    """Convolutions `conv_i` with a bias and norms `syncbn_fc_i`; upsampling in between only where `factors` say so."""

    def __init__(self, width: int, channels: int, kernel_size: int, factors: list[int], labels: int) -> None:
        super().__init__()
        self.factors = factors
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.conv_seg = nn.Conv2d(channels, labels, 1)  # of the base class, unused
        for index in range(len(factors)):
            before = width if index == 0 else channels
            self.add_module(f"conv_{index}", nn.Conv2d(before, channels, kernel_size, padding=kernel_size // 2))
            self.add_module(f"syncbn_fc_{index}", nn.BatchNorm2d(channels))
        self.add_module(f"conv_{len(factors)}", nn.Conv2d(channels, labels, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features = to_map(self.norm(tokens))
        for index, factor in enumerate(self.factors):
            features = F.relu(getattr(self, f"syncbn_fc_{index}")(getattr(self, f"conv_{index}")(features)))
            is_last = index == len(self.factors) - 1
            if is_last:
                features = getattr(self, f"conv_{index + 1}")(features)
            features = F.interpolate(features, scale_factor=factor, mode="bilinear") if factor > 1 else features
        return F.interpolate(features, size=(64, 64), mode="bilinear")


def conv_norm_relu(before: int, after: int, kernel_size: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


class AuthorsMla(nn.Module):
    """The neck (levels 2 to 5, the deepest last), the head with aligned corners, a bare convolution for each level."""

    def __init__(self, width: int, channels: int, labels: int) -> None:
        super().__init__()
        self.backbone, self.decode_head = AuthorsEncoder(width, 4), nn.Module()
        self.backbone.mla, self.decode_head.mlahead = nn.Module(), nn.Module()
        for level in range(4):
            self.backbone.add_module(f"norm_{level}", nn.LayerNorm(width, eps=1e-6))
            projection, conv = conv_norm_relu(width, channels, 1), conv_norm_relu(channels, channels, 3)
            self.backbone.mla.add_module(f"mla_p{level + 2}_1x1", nn.Sequential(*projection))
            self.backbone.mla.add_module(f"mla_p{level + 2}", nn.Sequential(*conv))
            half = conv_norm_relu(channels, channels // 2, 3) + conv_norm_relu(channels // 2, channels // 2, 3)
            self.decode_head.mlahead.add_module(f"head{level + 2}", nn.Sequential(*half))
        self.decode_head.cls = nn.Conv2d(2 * channels, labels, 3, padding=1)
        self.decode_head.conv_seg = nn.Conv2d(channels, labels, 1)
        self.auxiliary_head = nn.ModuleList(nn.Module() for _ in range(4))
        for head in self.auxiliary_head:
            head.aux, head.conv_seg = nn.Conv2d(channels, labels, 1, bias=False), nn.Conv2d(channels, labels, 1)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        tokens = self.backbone.features(pixel_values, drop_class_token=True)
        mla, head = self.backbone.mla, self.decode_head.mlahead
        maps = [to_map(getattr(self.backbone, f"norm_{level}")(tokens[level])) for level in range(4)]
        projected = [getattr(mla, f"mla_p{level + 2}_1x1")(maps[level]) for level in range(4)]
        levels = [getattr(mla, f"mla_p{level + 2}")(sum(projected[level:])) for level in range(4)]
        upsampled = [
            F.interpolate(getattr(head, f"head{i + 2}")(level), size=(16, 16), mode="bilinear", align_corners=True)
            for i, level in enumerate(levels)
        ]
        logits = [self.decode_head.cls(torch.cat(upsampled, 1))]
        logits += [auxiliary.aux(level) for auxiliary, level in zip(self.auxiliary_head, levels)]
        return [F.interpolate(each, size=(64, 64), mode="bilinear") for each in logits]


class AuthorsUp(nn.Module):
    def __init__(self, head: AuthorsUpHead, auxiliary: list[AuthorsUpHead], indices: list[int]) -> None:
        super().__init__()
        self.backbone = AuthorsEncoder(32, 4)
        self.decode_head, self.auxiliary_head, self.indices = head, nn.ModuleList(auxiliary), indices

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        tokens = self.backbone.features(pixel_values, drop_class_token=False)
        logits = [self.decode_head(tokens[3])]
        return logits + [head(tokens[index]) for head, index in zip(self.auxiliary_head, self.indices)]


def save_authors_checkpoint(model: nn.Module, path: Path, **text: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.running_mean, module.weight.data, module.bias.data):
                statistic.normal_()
            module.running_var.uniform_(0.5, 2)
    meta: dict[str, Any] = {"config": TEXT.format(**text), "CLASSES": tuple("abcdef")}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)


AUTHORS = {
    "naive": (
        lambda: AuthorsUp(
            AuthorsUpHead(32, 16, 1, [1], 6), [AuthorsUpHead(32, 16, 1, [1], 6) for _ in range(3)], [0, 1, 2]
        ),
        {
            "backbone": "type='VisionTransformer'",
            "head": "in_index=3, num_conv=2, conv3x3_conv1x1=False",
            "auxiliary": "dict(in_index=0), dict(in_index=1), dict(in_index=2)",
        },
        (1, 1, 1),
    ),
    "pup": (
        lambda: AuthorsUp(
            AuthorsUpHead(32, 16, 3, [2, 2, 2, 2], 6),
            [AuthorsUpHead(32, 16, 3, [1], 6) for _ in range(4)],
            [0, 1, 2, 3],
        ),
        {
            "backbone": "type='VisionTransformer'",
            "head": "in_index=3, num_conv=4, num_upsampe_layer=4",
            "auxiliary": "dict(in_index=0), dict(in_index=1), dict(in_index=2), dict(in_index=3)",
        },
        (4, 2, 1),
    ),
    "mla": (
        lambda: AuthorsMla(32, 16, 6),
        {
            "backbone": "type='VIT_MLA', mla_index=(0, 1, 2, 3)",
            "head": "type='VIT_MLAHead'",
            "auxiliary": ", ".join(f"dict(in_index={level})" for level in range(4)),
        },
        (2, 4, 1),
    ),
}


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@torch.no_grad()
def test_checkpoints_of_the_authors_give_the_logits_of_their_heads(decoder_type, tmp_path) -> None:
    make, text, (num_convs, factor, auxiliary_factor) = AUTHORS[decoder_type]
    authors = make().eval()
    save_authors_checkpoint(authors, tmp_path / "checkpoint.pth", **text)
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    config = model.config
    assert config.provenance["source"] == "fudan-zvg/SETR"
    assert (config.decoder_type, config.decoder_num_convs, config.decoder_upsample_factor) == (
        decoder_type,
        num_convs,
        factor,
    )
    assert config.auxiliary_upsample_factor == auxiliary_factor
    pixel_values = torch.randn(2, 3, 64, 64)
    outputs = model(pixel_values, output_auxiliary_logits=True)
    expected = authors(pixel_values)
    auxiliary = outputs.auxiliary_logits[::-1] if decoder_type == "mla" else outputs.auxiliary_logits
    for logits, golden in zip((outputs.logits, *auxiliary), expected, strict=True):
        upsampled = F.interpolate(logits, size=(64, 64), mode="bilinear")
        torch.testing.assert_close(upsampled, golden, rtol=0, atol=1e-4)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (processor.window_size, processor.window_stride, processor.do_reduce_labels) == (64, 42, True)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_upsampling_between_the_authors_convolutions_is_read_from_the_configuration(num_layers, tmp_path) -> None:
    factor = 4 if num_layers == 2 else 1
    heads = [AuthorsUpHead(32, 16, 3, [factor], 6) for _ in range(4)]
    authors = AuthorsUp(heads[0], heads[1:], [0, 1, 2]).eval()
    layers = f"num_upsampe_layer={num_layers}"
    auxiliary = ", ".join(f"dict(in_index={index}, {layers})" for index in range(3))
    text = {"backbone": "type='VisionTransformer'", "head": f"in_index=3, {layers}", "auxiliary": auxiliary}
    save_authors_checkpoint(authors, tmp_path / "checkpoint.pth", **text)
    output_dir = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "model", source_format="setr")
    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir).eval()
    assert (model.config.decoder_upsample_factor, model.config.auxiliary_upsample_factor) == (factor, factor)
    pixel_values = torch.randn(1, 3, 64, 64)
    upsampled = F.interpolate(model(pixel_values).logits, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(upsampled, authors(pixel_values)[0], rtol=0, atol=1e-4)
