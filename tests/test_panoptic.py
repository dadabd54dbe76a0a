"Contracts of segsyn.panoptic: faults in words, exact resume, sizes and types that the notebook does not meet."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from segsyn.dataset import Sample, SegmentationDataset, write_dataset
from segsyn.files import SegsynError
from segsyn.labels import LabelSpace, decode_colors
from segsyn.panoptic import (InstanceData, MixedInstances, code_ceiling, create_mask2former, evaluate_panoptic, instance_ap, load_mask2former, mask2former_recipe,
                             panoptic_counts, panoptic_quality, predict_instances, predict_panoptic, predict_semantic, train_mask2former)
from segsyn.segmenter import Augment, PairData
from segsyn.text2mask import ColorCode, decode_instances, encode_instances, shade_space

SPACE = LabelSpace.create(["disc", "square", "lawn"], things=["disc", "square"])
SMALL = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_queries=5, train_num_points=64, num_attention_heads=2)


def scene(k, size=32):
    "Two squares that touch, or a disc, on a lawn under a plain sky."
    rng = np.random.default_rng(k)
    mask, ids = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint16)
    mask[size // 2:] = 3
    top, left = rng.integers(2, 10, 2)
    mask[top:top + 8, left:left + 16], ids[top:top + 8, left:left + 8], ids[top:top + 8, left + 8:left + 16] = 2, 1, 2
    if k % 2: mask[22:30, 20:28], ids[22:30, 20:28] = 1, 3
    image = np.clip(SPACE.colors[mask] * 0.6 + 40 + rng.normal(0, 4, (size, size, 3)) + 20 * (ids == 1)[..., None], 0, 255).astype(np.uint8)
    return Sample(f"{k:04d}", image, mask, "shapes", tuple(SPACE.names[i] for i in np.unique(mask) if i), ids)


SCENES = [scene(k) for k in range(8)]
def small(**changes): return create_mask2former("tiny", SPACE, **{**SMALL, **changes})


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
def test_truth_is_perfect_whatever_its_type_and_layout(kind):
    for s in SCENES:
        m, i = s.mask.astype(kind), s.instances.astype(kind)
        for a, b in ((m, i), (m.T, i.T), (m[::-1, ::2], i[::-1, ::2])):
            counts = panoptic_counts(a, b, a, b, SPACE)
            assert not counts[:, 1:3].any() and np.array_equal(counts[:, 0], counts[:, 3])


def test_numbers_do_not_matter_and_large_ones_neither():
    s = SCENES[1]
    other = np.array([0, 60_000, 7, 31_000_000])[s.instances]
    assert np.array_equal(panoptic_counts(s.mask, s.instances, s.mask, other, SPACE), panoptic_counts(s.mask, s.instances, s.mask, s.instances, SPACE))
    assert np.array_equal(panoptic_counts(s.mask, other, s.mask, s.instances, SPACE), panoptic_counts(s.mask, s.instances, s.mask, s.instances, SPACE))


def test_void_and_crowds_excuse():
    truth, ids = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint16)
    truth[:, :4] = 255
    found, numbers = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint16)
    found[:4, :5] = 1; numbers[:4, :5] = 1 # 16 of 20 pixels in void
    assert not panoptic_counts(truth, ids, found, numbers, SPACE)[1].any()
    found[:4, 5:8] = 1; numbers[:4, 5:8] = 1 # now 16 of 32: half is not most
    assert panoptic_counts(truth, ids, found, numbers, SPACE)[1, 1] == 1
    crowd = np.where(truth == 255, 1, truth).astype(np.uint8) # the same pixels as a crowd of discs: excused; of squares: not
    found[:4, 5:8] = 0; numbers[:4, 5:8] = 0
    assert panoptic_counts(crowd, ids, found, numbers, SPACE)[1].tolist() == [0, 0, 0, 0]
    assert panoptic_counts(np.where(crowd == 1, 2, 0), ids, found, numbers, SPACE)[1].tolist() == [0, 1, 0, 0]


def test_classes_that_are_nowhere_do_not_count():
    s = SCENES[0] # no disc
    table = panoptic_quality(panoptic_counts(s.mask, s.instances, s.mask, s.instances, SPACE), SPACE)
    assert np.isnan(table.loc["disc", "PQ"]) and table.loc["all", "PQ"] == table.loc["things", "PQ"] == 1


def test_average_precision_of_truth_is_one_and_of_nothing_zero():
    truths = [(s.mask, s.instances) for s in SCENES]
    perfect = [[(s.instances == k, int(s.mask[s.instances == k][0]), 0.5) for k in np.unique(s.instances) if k] for s in SCENES]
    assert (instance_ap(truths, perfect, SPACE)[["AP", "AP50", "AP75"]] == 1).all(axis=None)
    assert instance_ap(truths, [[] for _ in truths], SPACE).loc["mean", "AP"] == 0


def test_average_precision_prints_nothing(capsys):
    instance_ap([(SCENES[0].mask, SCENES[0].instances)], [[]], SPACE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shape", [(40, 40), (33, 57)])
@pytest.mark.parametrize("shades", [2, 3, 5])
def test_instances_come_back_from_a_drawn_map(shape, shades):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask, ids = np.zeros(shape, np.uint8), np.zeros(shape, np.uint16)
        corners = [(y, x) for y in range(0, shape[0] - 8, 8) for x in range(0, shape[1] - 8, 8)]
        for n in range(2): # a row of two that touch, of one class
            y, x = corners[rng.integers(len(corners))]
            here = slice(y, y + 8), slice(x, x + 8)
            mask[here], ids[here] = 1, n + 1
        ids = np.where(mask == 1, ids, 0)
        found_mask, found = decode_instances(encode_instances(mask, ids, SPACE, shades), SPACE, shades)
        assert np.array_equal(found_mask, mask)
        assert len(np.unique(np.stack([ids.ravel(), found.ravel()]), axis=1).T) == len(np.unique(ids)) == len(np.unique(found))


def test_ignored_pixels_and_pieces_come_back():
    mask, ids = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint16)
    mask[:, :8] = 255
    mask[10:30, 12:20] = mask[10:30, 22:30] = 1; ids[mask == 1] = 1 # one disc behind a pole of two pixels
    found_mask, found = decode_instances(encode_instances(mask, ids, SPACE), SPACE)
    assert np.array_equal(found_mask, mask) and np.array_equal(found > 0, ids > 0) and found.max() == 1
    assert decode_instances(encode_instances(mask, ids, SPACE), SPACE, reach=0)[1].max() == 2


def test_codes_of_a_large_label_space():
    wide = LabelSpace.create([f"class {k}" for k in range(200)])
    mask = np.kron(np.arange(1, 5).reshape(2, 2) * 45, np.ones((12, 12), int)).astype(np.uint8)
    ids = np.kron(np.arange(1, 5).reshape(2, 2), np.ones((12, 12), int)).astype(np.uint16)
    assert shade_space(wide, 2).ignore_id == 65535 and shade_space(wide, 2).num_classes == 401
    assert np.array_equal(decode_instances(encode_instances(mask, ids, wide), wide)[0], mask)
    assert (decode_colors(encode_instances(mask, ids, wide), shade_space(wide, 2)) == mask).all()


def test_nothing_but_seams_is_nothing():
    stripes = np.zeros((20, 20, 3), np.uint8); stripes[::2] = 255
    mask, ids = decode_instances(stripes, SPACE, smallest=500)
    assert (mask == SPACE.ignore_id).all() and not ids.any()


@pytest.mark.parametrize("shades", [None, 2, 3])
def test_a_sample_comes_back_from_its_code(shades):
    code = ColorCode(SPACE, shades)
    for s in SCENES:
        mask, ids = code.decode(code.encode(s.mask, s.instances, s.key), margin=10.0)
        assert np.array_equal(mask, s.mask) and mask.dtype == SPACE.dtype
        if shades is None: assert ids is None
        else: assert len(np.unique(np.stack([s.instances.ravel(), ids.ravel()]), axis=1).T) == len(np.unique(s.instances)) == len(np.unique(ids))


def test_what_cannot_be_read_belongs_to_no_instance():
    code, s = ColorCode(SPACE, 2), SCENES[0]
    rgb = code.encode(s.mask, s.instances)
    row, column = np.argwhere(s.instances == 1)[20]
    first, second = [np.array(code.palette.colors[k], int) for k in (2, code.palette.names.index("square, shade 2"))]
    rgb[row, column] = (first + second) // 2 # a square, but which?
    assert code.decode(rgb)[0][row, column] == 2
    mask, ids = code.decode(rgb, margin=30.0)
    assert mask[row, column] == SPACE.ignore_id and ids[row, column] == 0 and (mask != s.mask).sum() == 1


def test_the_ceiling_of_an_autoencoder_that_loses_nothing_is_one():
    same = SimpleNamespace(device="cpu", encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x)), decode=lambda x: SimpleNamespace(sample=x))
    best = code_ceiling(same, SCENES, ColorCode(SPACE, 2), batch=3)
    assert [best[k] for k in ("mean_iou", "PQ", "PQ things", "AP")] == [1, 1, 1, 1] and best["keys"] == [s.key for s in SCENES]


# faults

def faulty(case):
    s, good = SCENES[0], [[(SCENES[0].instances == 1, 2, 0.5)]]
    return {
        "mask ids outside the space": lambda: panoptic_counts(s.mask, s.instances, np.full_like(s.mask, 9), s.instances, SPACE),
        "instances of another size": lambda: panoptic_counts(s.mask, s.instances[:16], s.mask, s.instances, SPACE),
        "predictions of another size": lambda: panoptic_counts(s.mask, s.instances, s.mask[:16], s.instances[:16], SPACE),
        "instances that are no integers": lambda: encode_instances(s.mask, s.instances.astype(float), SPACE),
        "counts of other classes": lambda: panoptic_quality(np.zeros((3, 4)), SPACE),
        "a list too few": lambda: instance_ap([(s.mask, s.instances)] * 2, good, SPACE),
        "a predicted mask of another size": lambda: instance_ap([(s.mask, s.instances)], [[(s.instances[:8] == 1, 2, 0.5)]], SPACE),
        "a predicted instance of stuff": lambda: instance_ap([(s.mask, s.instances)], [[(s.instances == 1, 3, 0.5)]], SPACE),
        "no shade": lambda: shade_space(SPACE, 0),
        "a code of no shade": lambda: ColorCode(SPACE, 0),
        "a code without its instances": lambda: ColorCode(SPACE, 2).encode(s.mask, None, s.key),
        "a ceiling without shades": lambda: code_ceiling(None, SCENES, ColorCode(SPACE)),
        "data with unknown ids": lambda: InstanceData([replace(s, mask=np.full_like(s.mask, 9))], SPACE)[0, 0],
        "data with instances of another size": lambda: InstanceData([replace(s, instances=s.instances[:16])], SPACE)[0, 0],
        "data without instances": lambda: InstanceData([replace(s, instances=None)], SPACE)[0, 0],
        "data without a mask": lambda: InstanceData([replace(s, mask=None)], SPACE)[0, 0],
        "an unknown target": lambda: InstanceData(SCENES, SPACE, target="pan-optic"),
        "an unknown size": lambda: create_mask2former("swin-x", SPACE),
        "an unknown setting": lambda: create_mask2former("tiny", SPACE, number_of_queries=3),
    }[case]


@pytest.mark.parametrize("case, words", [("mask ids outside the space", "9 "), ("instances of another size", "(16, 32)"), ("predictions of another size", "differ in size"),
    ("instances that are no integers", "float"), ("counts of other classes", "(3, 4)"), ("a list too few", "1 lists for 2"), ("a predicted mask of another size", "(8, 32)"), ("a predicted instance of stuff", "no class of things"),
    ("no shade", "shades"), ("a code of no shade", "shades"), ("a code without its instances", "no instance map"), ("a ceiling without shades", "does not paint instances"), ("data with unknown ids", "0000"), ("data with instances of another size", "0000"), ("data without instances", "no instance map"), ("data without a mask", "no mask"),
    ("an unknown target", "panoptic"), ("an unknown size", "swin-"), ("an unknown setting", "num_queries")])
def test_faults_are_told_in_words(case, words):
    with pytest.raises(SegsynError) as caught: faulty(case)()
    assert words in str(caught.value)


def test_a_model_of_another_label_space_is_refused(tmp_path):
    model, images = small(), [SCENES[0].image]
    others = {"another number": LabelSpace.create(["disc", "square"]), "another label space": LabelSpace.create(["disc", "lawn", "square"], things=["disc", "square"]), "other things": LabelSpace.create(SPACE.names)}
    model.save_pretrained(tmp_path / "model")
    for words, other in others.items():
        for call in (lambda: predict_panoptic(model, images, other), lambda: predict_instances(model, images, other), lambda: load_mask2former(tmp_path / "model", other),
                     lambda: evaluate_panoptic(model, SCENES, other), lambda: train_mask2former(model, InstanceData(SCENES, other, augment=None), tmp_path / "run", mask2former_recipe(steps=1), progress=False)):
            with pytest.raises(SegsynError, match=words): call()
    assert len(predict_panoptic(load_mask2former(tmp_path / "model", SPACE), images, SPACE)) == 1


def test_weights_of_another_network_are_refused(tmp_path):
    create_mask2former("tiny", SPACE, **{**SMALL, "hidden_dim": 64}).save_pretrained(tmp_path / "wide")
    with pytest.raises(SegsynError, match="another network"): small(weights=tmp_path / "wide")
    own = small(seed=3)
    own.save_pretrained(tmp_path / "own")
    loaded = small(weights=tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), loaded.state_dict().values())) # the same classes: class scores too
    fewer = LabelSpace.create(["disc"])
    moved = create_mask2former("tiny", fewer, **SMALL, weights=tmp_path / "own")
    fresh = create_mask2former("tiny", fewer, **SMALL)
    same = {k: torch.equal(v, own.state_dict()[k]) for k, v in moved.state_dict().items() if not k.startswith(("class_predictor", "criterion"))}
    assert all(same.values()) and torch.equal(moved.class_predictor.weight, fresh.class_predictor.weight)


def test_backbone_weights_fill_the_backbone(tmp_path):
    from transformers import ResNetModel
    own = small().model.pixel_level_module.encoder
    with torch.random.fork_rng(): donor = ResNetModel(own.config)
    donor.save_pretrained(tmp_path / "resnet")
    filled = small(weights=tmp_path / "resnet").model.pixel_level_module.encoder
    assert all(torch.equal(v, donor.state_dict()[k]) for k, v in filled.state_dict().items())
    with pytest.raises(SegsynError, match="another backbone"):
        with torch.device("meta"): create_mask2former("swin-t", SPACE, weights=tmp_path / "resnet")


def test_backbone_weights_fill_a_swin_but_for_its_output_norms(tmp_path, monkeypatch):
    from segsyn import panoptic
    from transformers import SwinModel
    tiny_swin = lambda: panoptic._swin(16, [1, 1, 1, 1], [1, 2, 2, 4], 4, image_size=64)
    monkeypatch.setitem(panoptic.MASK2FORMERS, "swin-t", (tiny_swin, SMALL))
    SwinModel(tiny_swin()).save_pretrained(tmp_path / "swin")
    donor = SwinModel.from_pretrained(tmp_path / "swin").state_dict()
    filled = create_mask2former("swin-t", SPACE, weights=tmp_path / "swin").model.pixel_level_module.encoder.swin.state_dict()
    assert all(torch.equal(v, donor[k]) for k, v in filled.items() if not k.startswith("layernorm"))
    SwinModel(panoptic._swin(16, [1, 1, 2, 1], [1, 2, 2, 4], 4, image_size=64)).save_pretrained(tmp_path / "deeper")
    with pytest.raises(SegsynError, match="another network"): create_mask2former("swin-t", SPACE, weights=tmp_path / "deeper")


def test_a_fresh_model_depends_on_its_seed_alone():
    torch.manual_seed(1); first = small().state_dict()
    torch.manual_seed(2); again, other = small().state_dict(), small(seed=1).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first) and not all(torch.equal(first[k], other[k]) for k in first)


def test_data_say_what_a_segment_is():
    s = SCENES[1] # sky, disc, two squares, lawn
    of = {target: InstanceData([s], SPACE, target=target, augment=None)[0, 0]["class_labels"].tolist() for target in ("panoptic", "instance", "semantic")}
    assert of == {"panoptic": [0, 1, 2, 2, 3], "instance": [1, 2, 2], "semantic": [0, 1, 2, 3]}
    plain = InstanceData([replace(s, instances=None)], SPACE, target="semantic", augment=None)[0, 0]
    assert (plain["mask_labels"].argmax(0).numpy() == s.mask).all()


def test_void_and_crowds_are_no_segments():
    mask = SCENES[1].mask.copy(); mask[:3] = 255
    ids = np.where(SCENES[1].instances == 3, 0, SCENES[1].instances) # the disc is a crowd
    item = InstanceData([replace(SCENES[1], mask=mask, instances=ids)], SPACE, augment=None)[0, 0]
    assert item["class_labels"].tolist() == [0, 2, 2, 3]
    assert np.array_equal(item["mask_labels"].sum(0).numpy() == 0, (mask == 255) | (mask == 1))


def test_pictures_are_those_of_pair_data_and_masks_go_with_them():
    data, pairs = InstanceData(SCENES, SPACE, augment=Augment(scale=(0.6, 1.6))), PairData(SCENES, SPACE, Augment(scale=(0.6, 1.6)))
    for seed in range(30):
        item, pair = data[seed % 8, seed], pairs[seed % 8, seed]
        assert torch.equal(item["pixel_values"], pair["pixel_values"])
        labels = torch.full_like(pair["labels"], 255)
        for m, c in zip(item["mask_labels"], item["class_labels"]): labels[m > 0] = c
        assert torch.equal(labels, pair["labels"]) and item["mask_labels"].sum(0).max() <= 1 and item["mask_labels"].flatten(1).any(1).all()


def test_instances_count_in_the_fingerprint():
    swapped = [replace(SCENES[0], instances=np.array([0, 2, 1, 3], np.uint16)[SCENES[0].instances]), *SCENES[1:]]
    prints = {InstanceData(SCENES, SPACE).fingerprint(), InstanceData(swapped, SPACE).fingerprint(), InstanceData(SCENES, SPACE, target="instance").fingerprint(), PairData(SCENES, SPACE).fingerprint()}
    assert len(prints) == 4 and InstanceData(list(SCENES), SPACE).fingerprint() in prints


def test_a_dataset_on_disk_serves_as_well(tmp_path):
    write_dataset(tmp_path / "data", SCENES, SPACE, title="shapes", facts={})
    stored = InstanceData(SegmentationDataset(tmp_path / "data"))
    for a, b in zip(stored[1, 5].values(), InstanceData(SCENES, SPACE)[1, 5].values()): assert torch.equal(a, b)


def test_mixtures_hold_whole_scenes():
    mixed = MixedInstances(InstanceData(SCENES[:4], SPACE), InstanceData(SCENES[4:], SPACE), 0.5)
    batch = mixed.__getitems__([(k % 4, k) for k in range(12)])
    assert len(batch["mask_labels"]) == 12 and all(len(m) == len(c) for m, c in zip(batch["mask_labels"], batch["class_labels"]))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def run(folder, *steps):
        for n in steps: result = train_mask2former(small(), InstanceData(SCENES, SPACE), folder, mask2former_recipe(steps=n, batch_size=4, warmup_steps=0, schedule="constant", checkpoint_every=2, precision="fp32", threads=1), progress=False)
        return result.model.state_dict()
    whole, parts = run(tmp_path / "whole", 4), run(tmp_path / "parts", 2, 4)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_scene_without_segments_can_be_trained_on(tmp_path):
    empty = [replace(s, mask=np.full_like(s.mask, 255), instances=np.zeros_like(s.instances)) for s in SCENES[:4]]
    result = train_mask2former(small(), InstanceData(empty, SPACE), tmp_path / "run", mask2former_recipe(steps=2, batch_size=2, precision="fp32"), progress=False)
    assert np.isfinite(result.history[-1]["loss"])


def test_predictions_do_not_depend_on_neighbours_and_sizes_may_differ():
    model, images = small().eval(), [s.image for s in SCENES[:5]] + [np.zeros((48, 64, 3), np.uint8)]
    many, one = predict_instances(model, images, batch=4), predict_instances(model, images[2:3], batch=4)[0]
    assert len(many[2]) == len(one) and all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(many[2], one))
    assert [m.shape for m in predict_semantic(model, images)] == [i.shape[:2] for i in images]
    for mask, ids in predict_panoptic(model, images, threshold=0.0, overlap=0.0):
        assert not ids[(mask == SPACE.ignore_id) | (mask == 0) | (mask == 3)].any() and (ids[(mask == 1) | (mask == 2)] > 0).all()


def test_it_learns(tmp_path):
    "Two touching squares of other brightness are told apart after some steps on eight scenes."
    result = train_mask2former(small(num_queries=8), InstanceData(SCENES, SPACE, augment=None), tmp_path / "run", mask2former_recipe(steps=120, batch_size=8, learning_rate=3e-3, warmup_steps=10, precision="fp32"), progress=False)
    figures = evaluate_panoptic(result.model, SCENES, SPACE, threshold=0.3)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"] and figures["mean_iou"] > 0.3 and figures["PQ"] > 0.2
