"""Refinement and filters: decided at once, equal to the definition, defined at the edges, and refused in words."""
import pickle
from functools import partial
import numpy as np
import pytest
from scipy import ndimage
from segsyn.dataset import Sample, SegmentationDataset, check_dataset, write_dataset
from segsyn.files import SegsynError, read_json
from segsyn.labels import LabelSpace
from segsyn.refine import (Every, class_losses, equivalent_threshold, ignore_by_loss, keep_samples, label_regions, refine_dataset, refine_mask, refine_sample,
                           score_within, shows_classes)
from segsyn.synthesis import synthesis_facts

SPACE = LabelSpace.create(["bird", "fish", "bus"])


def by_definition(mask, threshold):
    new = mask.copy()
    for value in np.unique(mask):
        numbered, count = ndimage.label(mask == value)
        for k in range(1, count + 1):
            here = numbered == k
            ring = ndimage.binary_dilation(here, np.ones((3, 3))) & ~here
            if here.sum() < threshold and ring.any():
                values, votes = np.unique(mask[ring], return_counts=True)
                new[here] = values[votes.argmax()]
    return new


def random_mask(seed, shape=(40, 31), dtype=np.uint8):
    draw = np.random.default_rng(seed)
    mask = np.kron(draw.integers(0, 4, (10, 8)), np.ones((4, 4), int))[:shape[0], :shape[1]]
    specks = draw.random(mask.shape) < 0.15
    mask[specks] = draw.choice([0, 1, 2, 3, 255], specks.sum())
    return mask.astype(dtype)


def sample(seed=0, key="a0", **more):
    mask = random_mask(seed, (16, 16))
    return Sample(key, np.zeros((16, 16, 3), np.uint8), mask, "a bird", ("bird",), **more)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("threshold", [0, 1, 3, 12.5, np.inf])
def test_equal_to_the_definition(threshold, dtype):
    for seed in range(4):
        mask = random_mask(seed, dtype=dtype)
        before, found = mask.copy(), refine_mask(mask, threshold)
        assert found.dtype == mask.dtype and found is not mask
        np.testing.assert_array_equal(found, by_definition(mask, threshold))
        np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("turn", [lambda m: m.T, lambda m: m[::-1], lambda m: m[:, ::-1], lambda m: np.rot90(m)])
def test_no_order_of_rows_and_columns(turn):
    mask = random_mask(7)
    np.testing.assert_array_equal(refine_mask(turn(mask), 9), turn(refine_mask(mask, 9)))


def test_a_read_only_mask_and_one_in_another_memory_order():
    mask = random_mask(3)
    frozen = np.asfortranarray(mask)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(refine_mask(frozen, 9), refine_mask(mask, 9))


def test_thresholds_are_strict_and_areas_are_of_4_connected_regions():
    mask = np.zeros((9, 9), np.uint8)
    mask[2, 2:5] = 1                 # three pixels
    mask[5, 5] = mask[6, 6] = 2      # two of one pixel each, touching at a corner
    assert sorted(label_regions(mask)[2]) == [1, 1, 3, 76]
    assert (refine_mask(mask, 1) == mask).all()
    assert set(np.unique(refine_mask(mask, 2))) == {0, 1} and set(np.unique(refine_mask(mask, 3))) == {0, 1} and not refine_mask(mask, 4).any()


def test_ties_go_to_the_smallest_id_and_never_to_ignore():
    assert refine_mask(np.array([[3, 7, 2]], np.uint8), 2).tolist() == [[7, 2, 7]]
    assert refine_mask(np.array([[255, 255, 9, 4, 4]], np.uint8), 2).tolist() == [[255, 255, 4, 4, 4]]


def test_a_ring_pixel_votes_once():
    mask = np.array([[1, 1, 1, 1, 1],
                     [1, 5, 2, 2, 1],
                     [1, 5, 5, 2, 1],
                     [1, 2, 2, 1, 1],
                     [1, 1, 1, 1, 1]], np.uint8) # over edges the 2s would have 5 votes and the 1s 3; as pixels of the ring it is 5 and 7
    assert (refine_mask(mask, 4)[mask == 5] == 1).all()


def test_ignore_is_a_value_like_others_unless_kept():
    mask = np.zeros((9, 9), np.uint8)
    mask[1, 1], mask[4:9, 4:9], mask[6, 6] = 255, 255, 1
    found = refine_mask(mask, 5)
    assert found[1, 1] == 0 and found[6, 6] == 255
    assert refine_mask(mask, 5, keep=[255])[1, 1] == 255


@pytest.mark.parametrize("mask", [np.full((5, 7), 2, np.uint8), np.full((5, 7), 255, np.uint8), np.zeros((1, 1), np.uint8), np.zeros((0, 4), np.uint8), np.zeros((0, 0), np.uint8)])
def test_one_region_stays(mask):
    for threshold in (0, 1, 1000, np.inf):
        found = refine_mask(mask, threshold, passes=3)
        assert found.shape == mask.shape and (found == mask).all()


def test_passes_are_single_passes_in_a_row_and_settled_masks_stay():
    mask = random_mask(5)
    twice = refine_mask(refine_mask(mask, 9), 9)
    np.testing.assert_array_equal(refine_mask(mask, 9, passes=2), twice)
    settled = refine_mask(mask, 9, passes=50)
    assert not (label_regions(settled)[2] < 9).any()
    np.testing.assert_array_equal(refine_mask(settled, 9), settled)
    assert refine_mask(np.array([[0, 1]], np.uint8), 2, passes=101).tolist() == [[1, 0]] # a swap never settles, but ends


@pytest.mark.parametrize("mask, threshold, options, word", [
    (np.zeros((4, 4), np.float32), 2, {}, "float32"), (np.zeros((2, 4, 4), np.uint8), 2, {}, "(2, 4, 4)"), (np.zeros((4, 4), bool), 2, {}, "bool"), (np.full((4, 4), -1), 2, {}, "-1"),
    (np.full((4, 4), 70000), 2, {}, "70000"), (np.zeros((4, 4), np.uint8), -1, {}, "-1"), (np.zeros((4, 4), np.uint8), float("nan"), {}, "nan"), (np.zeros((4, 4), np.uint8), "20", {}, "20"),
    (np.zeros((4, 4), np.uint8), None, {}, "None"), (np.zeros((4, 4), np.uint8), 2, {"passes": 0}, "0"), (np.zeros((4, 4), np.uint8), 2, {"passes": 1.5}, "1.5")])
def test_refused_in_words(mask, threshold, options, word):
    with pytest.raises(SegsynError) as error: refine_mask(mask, threshold, **options)
    assert word in str(error.value.found) and error.value.allowed


def test_equivalent_thresholds():
    assert equivalent_threshold(64, 64) == 1 and equivalent_threshold(20, 512) == 20 and equivalent_threshold(20, (512, 1024)) == 40 and equivalent_threshold(5, 128, 64) == 20
    for bad in (lambda: equivalent_threshold(-1, 64), lambda: equivalent_threshold(20, 0), lambda: equivalent_threshold(float("nan"), 64)):
        with pytest.raises(SegsynError): bad()


def test_sample_keeps_what_still_fits():
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9], mask[12, 12] = 1, 2
    before = Sample("a0", np.zeros((16, 16, 3), np.uint8), mask, "x", ("bird", "fish", "bus"), (mask > 0).astype(np.uint16), scores={"doubt": 0.5})
    after = refine_sample(before, 4, SPACE)
    assert after.classes == ("bird", "bus") # bus was never there: what was asked for is not for this function to judge
    assert after.instances is None and after.scores == {"doubt": 0.5, "refined": 1 / 256} and before.mask[12, 12] == 2
    np.testing.assert_array_equal(refine_sample(before, 4 * 32 ** 2, SPACE, reference=512).mask, after.mask)
    with pytest.raises(SegsynError): refine_sample(Sample("a0", before.image), 4, SPACE)


def test_stages_write_sound_datasets(tmp_path):
    write_dataset(tmp_path / "raw", (sample(k, f"a{k}", scores={"doubt": k / 4}) for k in range(4)), SPACE, "raw", {})
    raw = SegmentationDataset(tmp_path / "raw")
    data = SegmentationDataset(refine_dataset(raw, tmp_path / "refined", 6))
    assert check_dataset(tmp_path / "refined") == [] and read_json(tmp_path / "refined" / "manifest.json")["facts"]["threshold"] == 6.0
    for k in range(4): np.testing.assert_array_equal(data[k].mask, refine_mask(raw[k].mask, 6))
    kept = SegmentationDataset(keep_samples(raw, partial(score_within, name="doubt", most=0.4), tmp_path / "kept"))
    assert [s.key for s in kept] == ["a0", "a1"] and check_dataset(tmp_path / "kept") == []
    assert read_json(tmp_path / "kept" / "manifest.json")["facts"]["rejected"] == {"doubt is too high": 2}
    with pytest.raises(SegsynError, match="Every sample was rejected"): keep_samples(raw, partial(score_within, name="doubt", most=-1), tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Painter:
    name, chunk_size = "painter", 1
    def __call__(self, requests): return []
    def fingerprint(self): return {}


def test_filters_travel_to_workers_and_count_in_fingerprints():
    strict, lenient = [Every(partial(score_within, name="doubt", most=most), partial(shows_classes, space=SPACE)) for most in (0.1, 0.2)]
    assert pickle.loads(pickle.dumps(strict))(sample(scores={"doubt": 0.0})) is True
    facts = [synthesis_facts(Painter(), SPACE, 1, 0, f, None) for f in (strict, lenient, strict)]
    assert facts[0] == facts[2] != facts[1]


def test_scores():
    one = sample(scores={"doubt": 0.3, "presence": float("nan")})
    assert score_within(one, "doubt", least=0.3, most=0.3) is True
    assert score_within(one, "doubt", least=0.31) == "doubt is too low" and score_within(one, "doubt", most=0.29) == "doubt is too high"
    assert score_within(one, "presence", least=0) == "presence is not a number"
    with pytest.raises(SegsynError, match="presence"): score_within(one, "presense", least=0)
    with pytest.raises(SegsynError): score_within(one, "doubt")


def test_classes_that_were_asked_for():
    one = sample()
    one.mask[:] = 0
    one.mask[:4, :4] = 1
    assert shows_classes(one, SPACE, least=16 / 256) is True and shows_classes(one, SPACE, least=0.07) == "bird is not in the mask"
    one.extra["asked"] = ["fish"]
    assert shows_classes(one, SPACE) == "fish is not in the mask"
    one.mask[:] = 255
    assert shows_classes(one, SPACE, least=0) == "nothing is labelled"


def test_losses_by_class():
    masks = [np.array([[0, 1], [1, 255]], np.uint8)]
    losses = [np.array([[1.0, 2.0], [4.0, np.nan]], np.float32)]
    typical = class_losses(losses, masks, 3)
    np.testing.assert_array_equal(typical, [1.0, 3.0, np.nan])
    assert ignore_by_loss(masks[0], losses[0], typical, 1.25).tolist() == [[0, 1], [255, 255]]
    assert ignore_by_loss(masks[0], losses[0], typical, 10).tolist() == masks[0].tolist()
    assert ignore_by_loss(np.array([[2]], np.uint8), np.array([[9.0]]), typical).tolist() == [[2]] # a class without a typical loss is left alone
    for bad in (dict(tolerance=0), dict(tolerance=float("nan"))):
        with pytest.raises(SegsynError): ignore_by_loss(masks[0], losses[0], typical, **bad)
    with pytest.raises(SegsynError): ignore_by_loss(masks[0], losses[0][:1], typical)
