import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from segmenter_hf.data.label_sets import default_palette, load_label_set
from segmenter_hf.inference.legend import legend_entries, shorten
from segmenter_hf.inference.visualization import (
    _count_classes,
    colorize,
    image_table,
    label_map_image,
    overlay,
    prediction_grid,
    with_legend,
)


SCENES = load_label_set("scenes")
PALETTE, NAMES = SCENES.palette, SCENES.id2label


def random_scene(height=30, width=40, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    segmentation = rng.integers(0, 8, (height, width), dtype=np.uint8)
    segmentation[:2] = 255
    return image, segmentation


def halves(height, width):
    segmentation = np.zeros((height, width), dtype=np.uint8)
    segmentation[:, width // 2 :] = 1
    return segmentation


def test_colorize_paints_classes_in_their_colors_and_ignored_pixels_black():
    _, segmentation = random_scene()
    image = colorize(segmentation, PALETTE)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    expected = [[PALETTE[i].tolist() if i != 255 else [0, 0, 0] for i in row] for row in segmentation]
    assert np.asarray(image).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_segmentations_may_be_tensors(dtype):
    image, segmentation = random_scene()
    tensor = torch.from_numpy(segmentation).to(dtype)
    assert colorize(tensor, PALETTE) == colorize(segmentation, PALETTE)
    assert overlay(image, tensor, PALETTE) == overlay(image, segmentation, PALETTE)
    assert label_map_image(tensor, PALETTE) == label_map_image(segmentation, PALETTE)


def test_any_ignore_index_is_left_out():
    image, segmentation = random_scene()
    shifted = np.where(segmentation == 255, -100, segmentation.astype(np.int64))
    assert colorize(shifted, PALETTE, ignore_index=-100) == colorize(segmentation, PALETTE)
    assert overlay(image, shifted, PALETTE, ignore_index=-100) == overlay(image, segmentation, PALETTE)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (np.full((3, 4), 8), r"\[0, 8\), the length of the palette, .* ignore_index 255, got \[8\]"),
        (np.full((3, 4), -1), r"got \[-1\]"),
        (np.zeros((3, 4)), "integer map .* got float64"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "integer map"),
        (np.zeros((1, 3, 4), int), r"of shape \(1, 3, 4\)"),
    ],
)
def test_wrong_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        colorize(segmentation, PALETTE)
    with pytest.raises(ValueError, match=message):
        overlay(np.zeros((3, 4, 3), np.uint8), segmentation, PALETTE)


def through_png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return Image.open(file)


def test_a_saved_label_map_holds_the_class_ids_and_shows_their_colors():
    _, segmentation = random_scene()
    image = through_png(label_map_image(segmentation, PALETTE))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), segmentation)
    assert image.convert("RGB") == colorize(segmentation, PALETTE)


def test_a_saved_label_map_of_more_than_256_classes_holds_the_class_ids():
    segmentation = np.random.default_rng(0).integers(0, 1000, (30, 40))
    image = through_png(label_map_image(segmentation, default_palette(1000)))
    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), segmentation)


@pytest.mark.parametrize(("num_labels", "value"), [(8, 256), (8, -1), (300, 65536)])
def test_a_label_map_refuses_ids_that_it_cannot_store(num_labels, value):
    with pytest.raises(ValueError, match="class ids must lie in"):
        label_map_image(np.full((3, 4), value), default_palette(num_labels))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_overlay_blends_the_colors_and_leaves_ignored_pixels_alone(alpha):
    image, segmentation = random_scene()
    blended = np.asarray(overlay(image, segmentation, PALETTE, alpha=alpha, boundaries=False), dtype=float)
    ignored = segmentation == 255
    colors = np.asarray(colorize(segmentation, PALETTE), dtype=float)
    expected = (1 - alpha) * image + alpha * colors
    assert np.array_equal(blended[ignored], image[ignored])
    assert np.abs(blended - expected)[~ignored].max() <= 1


def test_overlay_lines_classes_on_both_sides_of_a_border_only():
    image = np.zeros((480, 640, 3), dtype=np.uint8)
    segmentation = halves(480, 640)
    segmentation[:100] = 255
    plain = np.asarray(overlay(image, segmentation, PALETTE, boundaries=False))
    lined = np.asarray(overlay(image, segmentation, PALETTE, boundaries=True))
    changed = (plain != lined).any(axis=-1)
    expected = np.zeros((480, 640), dtype=bool)
    expected[100:, 319:321] = True  # between the halves
    expected[100] = True  # below the ignored pixels
    assert np.array_equal(changed, expected)
    assert (lined[changed].sum(axis=-1) > plain[changed].sum(axis=-1)).all()


def test_small_overlays_have_no_lines():
    image, segmentation = np.zeros((48, 64, 3), dtype=np.uint8), halves(48, 64)
    assert overlay(image, segmentation, PALETTE) == overlay(image, segmentation, PALETTE, boundaries=False)


def test_images_may_be_pil_or_gray_arrays():
    image, segmentation = random_scene()
    assert overlay(Image.fromarray(image), segmentation, PALETTE) == overlay(image, segmentation, PALETTE)
    gray = image[..., 0]
    as_color = np.repeat(gray[..., None], 3, axis=-1)
    assert overlay(gray, segmentation, PALETTE) == overlay(as_color, segmentation, PALETTE)
    assert overlay(Image.fromarray(gray), segmentation, PALETTE) == overlay(as_color, segmentation, PALETTE)


@pytest.mark.parametrize("shape", [(3, 30, 40), (30, 40, 4), (30, 40, 1)])
def test_arrays_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match="uint8 array of shape"):
        overlay(np.zeros(shape, np.uint8), random_scene()[1], PALETTE)


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="got float64"):
        overlay(np.zeros((30, 40, 3)), random_scene()[1], PALETTE)


def test_sizes_that_differ_are_refused():
    image, segmentation = random_scene()
    message = r"got \(30, 40\) and \(40, 30\)"
    with pytest.raises(ValueError, match=message):
        overlay(image, segmentation.T, PALETTE)
    with pytest.raises(ValueError, match=message):
        with_legend(image, segmentation.T, NAMES, PALETTE)
    with pytest.raises(ValueError, match=message):
        prediction_grid([(image, segmentation, segmentation.T)], PALETTE, NAMES)


def test_an_alpha_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 50"):
        overlay(*random_scene(), PALETTE, alpha=50)


def test_legend_entries_are_sorted_by_area_with_percentages():
    segmentation = np.full((10, 200), 255)
    segmentation.flat[:1000] = [2] * 250 + [5] * 700 + [0] * 49 + [7]
    entries = legend_entries(_count_classes([segmentation], len(PALETTE), 255), NAMES, PALETTE, max_entries=20)
    assert [(name, share) for _, name, share in entries] == [
        ("car", "70.0 %"),
        ("road", "25.0 %"),
        ("sky", "4.9 %"),
        ("sign", "0.1 %"),
    ]
    assert [color for color, _, _ in entries] == [SCENES.colors[i] for i in (5, 2, 0, 7)]


def test_legend_entries_sum_up_what_is_beyond_the_limit():
    segmentation = np.repeat(np.arange(8), [40, 20, 10, 10, 8, 6, 4, 2])[None]
    entries = legend_entries(_count_classes([segmentation], len(PALETTE), 255), NAMES, PALETTE, max_entries=3)
    assert [(name, share) for _, name, share in entries] == [
        ("sky", "40.0 %"),
        ("building", "20.0 %"),
        ("road", "10.0 %"),
        ("+ 5 more", "30.0 %"),
    ]
    assert entries[-1][0] is None


def test_a_class_without_a_name_is_refused():
    _, segmentation = random_scene()
    with pytest.raises(ValueError, match=r"got none for \[7\]"):
        with_legend(segmentation, segmentation, {i: NAMES[i] for i in range(7)}, PALETTE)


def count_swatches(panel, palette):
    """Classes whose color fills a noticeable part of an image."""
    pixels = np.asarray(panel).reshape(-1, 3)
    return [i for i, color in enumerate(palette) if (pixels == color).all(axis=-1).sum() > 50]


@pytest.mark.parametrize("size", [(400, 600), (1200, 900)])
def test_the_legend_stands_to_the_right_and_shows_the_classes_that_are_present(size):
    segmentation = halves(*size)
    image = colorize(segmentation, PALETTE)
    legended = with_legend(image, segmentation, NAMES, PALETTE)
    assert legended.mode == "RGB"
    assert legended.height == image.height and legended.width > image.width
    assert legended.crop((0, 0, *image.size)) == image
    panel = legended.crop((image.width, 0, *legended.size))
    assert count_swatches(panel, PALETTE) == [0, 1]


def test_small_images_are_enlarged_by_a_whole_factor():
    image, segmentation = random_scene(height=48, width=64)
    legended = with_legend(image, segmentation, NAMES, PALETTE)
    enlarged = np.asarray(legended)[: 48 * 8, : 64 * 8]
    assert np.array_equal(enlarged, image.repeat(8, axis=0).repeat(8, axis=1))


def test_a_legend_longer_than_the_image_extends_below_it():
    palette = default_palette(60)
    segmentation = np.arange(1200 * 200).reshape(200, 1200) % 60
    names = {i: f"class {i}" for i in range(60)}
    image = colorize(segmentation, palette)
    legended = with_legend(image, segmentation, names, palette, max_entries=20)
    assert legended.height > 200
    panel = legended.crop((1200, 0, *legended.size))
    assert count_swatches(panel, palette) == list(range(20))


def test_a_map_that_is_ignored_everywhere_has_an_empty_legend():
    segmentation = np.full((300, 600), 255)
    legended = with_legend(colorize(segmentation, PALETTE), segmentation, NAMES, PALETTE)
    assert count_swatches(legended.crop((600, 0, *legended.size)), PALETTE) == []


def test_long_names_end_in_an_ellipsis_and_fit():
    font = ImageFont.load_default(size=20)
    assert shorten("road", font, 200) == "road"
    short = shorten("an exceedingly long and winding class name", font, 200)
    assert short.endswith("…") and short.startswith("an exceedingly")
    assert 150 < font.getlength(short) <= 200


def test_a_long_name_does_not_widen_the_legend_without_bound():
    segmentation = np.zeros((400, 600), dtype=int)
    image = colorize(segmentation, PALETTE)
    widths = [with_legend(image, segmentation, {0: "x" * n}, PALETTE).width for n in (5, 100, 1000)]
    assert widths[0] < widths[1] == widths[2] < 2 * 600


def test_the_grid_holds_a_column_for_the_truth_only_if_there_is_one():
    image, segmentation = random_scene(height=60, width=80)
    with_truth = prediction_grid([(image, segmentation, segmentation)], PALETTE, NAMES, row_height=120)
    without = prediction_grid([(image, None, segmentation)], PALETTE, NAMES, row_height=120)
    gap = 7  # half of the smallest font
    assert with_truth.width == gap + 3 * (160 + gap)
    assert without.width == gap + 2 * (160 + gap)


def test_the_grid_shows_every_row_at_one_height():
    title, gap = 2 * 14, 7
    rows = []
    for i, (height, width) in enumerate([(120, 240), (60, 60), (240, 120)]):
        image = np.full((height, width, 3), 40 * (i + 1), dtype=np.uint8)
        rows.append((image, np.full((height, width), 255) if i != 1 else None, np.full((height, width), i)))
    grid = np.asarray(prediction_grid(rows, PALETTE, NAMES, row_height=120))
    for i, width in enumerate([240, 120, 60]):
        top = title + i * (120 + gap)
        row = grid[top : top + 120]
        image = (row[:, : gap + 240] == 40 * (i + 1)).all(axis=-1)
        assert image.sum() == 120 * width
        truth = row[:, gap + 247 : gap + 487]
        assert (truth == 40 * (i + 1)).all(axis=-1).sum() == (120 * width if i != 1 else 0)
        middle = row[60, gap + 2 * 247 + 120]
        assert np.abs(middle - (0.3 * 40 * (i + 1) + 0.7 * PALETTE[i])).max() <= 1


def test_the_grid_has_one_legend_of_all_maps():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    rows = [(image, np.full((60, 80), 0), np.full((60, 80), 3)), (image, None, np.full((60, 80), 5))]
    grid = prediction_grid(rows, PALETTE, NAMES, row_height=120)
    legend = grid.crop((0, 28 + 2 * 127, *grid.size))
    assert count_swatches(legend, PALETTE) == [0, 3, 5]


def test_a_grid_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        prediction_grid([], PALETTE, NAMES)


def test_a_table_of_very_long_images_stays_narrow() -> None:
    table = image_table({"row": [Image.new("RGB", (5000, 4))] * 2}, ["a", "b"], height=100)
    assert table.width < 2 * 4 * 100 + 200 and table.height < 200
