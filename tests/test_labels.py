"""Label codes: random spaces make the round trip, the table agrees with brute force, outlines keep instances apart."""
import numpy as np
import pytest
from segsyn.files import SegsynError
from segsyn.labels import LabelSpace, closest_pair, decode_colors, draw_outlines, encode_mask, far_apart_palette, recover_instances


@pytest.mark.parametrize("count", [2, 3, 17, 100, 170, 253, 254, 255, 256, 1000])
def test_round_trip(count):
    draw = np.random.default_rng(count)
    space = LabelSpace.create([f"class {i}" for i in range(count)], background=None)
    mask = draw.integers(0, count, (32, 33)).astype(space.dtype)
    mask[draw.random(mask.shape) < 0.1] = space.ignore_id
    found = decode_colors(encode_mask(mask, space), space, strict=True)
    assert found.dtype == space.dtype == (np.uint8 if count <= 254 else np.uint16)
    np.testing.assert_array_equal(found, mask)


def test_noise_below_half_the_distance_is_harmless():
    space = LabelSpace.create([f"class {i}" for i in range(170)], background=None)
    mask = np.random.default_rng(0).integers(0, 170, (64, 64)).astype(np.uint8)
    reach = int(closest_pair(np.vstack([space.colors, space.void_color, space.outline_color]))[0] / 2 / 3**0.5)
    noise = np.random.default_rng(1).integers(-reach, reach + 1, mask.shape + (3,))
    moved = np.clip(encode_mask(mask, space) + noise, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(decode_colors(moved, space), mask)


@pytest.mark.parametrize("margin", [0.0, 9.0])
@pytest.mark.parametrize("seed", range(3))
def test_table_agrees_with_brute_force(seed, margin):
    draw = np.random.default_rng(seed)
    colors = draw.permutation(np.unique(draw.integers(0, 64, (40, 3)), axis=0))
    space = LabelSpace.create([f"class {i}" for i in range(len(colors))], background=None, palette=colors.tolist())
    pixels = np.vstack([draw.integers(0, 256, (1000, 3)), draw.integers(0, 64, (1000, 3))]).astype(np.uint8)[None]
    entries = np.vstack([colors, space.outline_color, space.void_color]).astype(np.int64)
    squares = ((pixels[0][:, None].astype(np.int64) - entries) ** 2).sum(2)
    nearest, ordered = squares.argmin(1), np.sqrt(np.sort(squares, axis=1))
    expected = np.where((nearest >= len(colors)) | (ordered[:, 1] - ordered[:, 0] < margin), space.ignore_id, nearest)
    np.testing.assert_array_equal(decode_colors(pixels, space, margin)[0], expected)


def test_palettes_are_stable_and_distinct():
    for count in (1, 2, 60, 172, 400, 1500):
        colors = far_apart_palette(count)
        assert colors.shape == (count, 3) and len(np.unique(colors, axis=0)) == count
        np.testing.assert_array_equal(colors, far_apart_palette(count))


def test_touching_instances_come_back():
    space = LabelSpace.create(["bird", "grass"], things=["bird"])
    mask = np.zeros((40, 40), np.uint8)
    instances = np.zeros((40, 40), np.uint16)
    for n, left in enumerate((4, 14, 24), start=1):
        mask[8:30, left:left + 10], instances[8:30, left:left + 10] = 1, n
    found_mask, found = recover_instances(draw_outlines(mask, instances, space), space)
    np.testing.assert_array_equal(found_mask, mask)
    assert found.max() == 3 and found.dtype == np.uint16


def test_empty_outline_map():
    space = LabelSpace.create(["bird"])
    mask, instances = recover_instances(np.tile(np.array(space.outline_color, np.uint8), (5, 6, 1)), space)
    assert (mask == space.ignore_id).all() and not instances.any()


@pytest.mark.parametrize("change", [{"names": ("a", "a ")}, {"names": ("a", "")}, {"ignore_id": 1}, {"void_color": (0, 0, 0)}, {"background": 7}])
def test_broken_spaces_are_refused(change):
    good = LabelSpace.create(["b"]).model_dump()
    with pytest.raises(SegsynError): LabelSpace(**{**good, **change})
