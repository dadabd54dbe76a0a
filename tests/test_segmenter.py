"Contracts of segsyn.segmenter that need another process, other sizes or an oracle."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation, ResNetBackbone, ResNetConfig
from segsyn.dataset import Sample, SegmentationDataset, check_dataset, write_dataset
from segsyn.files import SegsynError
from segsyn.labels import LabelSpace
from segsyn.segmenter import (Augment, MixedData, PairData, _fixed_chunks, augment_pair, copy_paste, create_segmenter, cut_objects, dilate_backbone, evaluate_segmenter,
                              load_segmenter, predict_masks, relabel_dataset, segmentation_loss, segmenter_recipe, train_segmenter)

ROOT = Path(__file__).resolve().parents[1]
SPACE = LabelSpace.create(["disc", "square", "bar"])

def scene(k, size=32):
    "One shape of each of two classes on a gradient; both are whole and apart."
    rng = np.random.default_rng(k)
    image = np.tile(np.linspace(40, 90, size, dtype=np.uint8)[None, :, None], (size, 1, 3)).copy()
    mask, ids = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint16)
    for n, (class_id, left) in enumerate(zip(rng.permutation(3)[:2] + 1, (3, 18)), 1):
        top, side = int(rng.integers(3, 18)), int(rng.integers(7, 11))
        here = slice(top, top + side), slice(left, left + side)
        image[here], mask[here], ids[here] = 255 * np.eye(3, dtype=np.uint8)[class_id - 1], class_id, n
    return Sample(f"{k:04d}", image, mask, "shapes", tuple(SPACE.names[i] for i in sorted(set(mask.ravel()) - {0})), ids)

SCENES = [scene(k) for k in range(12)]
def small_unet(**changes): return create_segmenter("unet", SPACE, channels=[8, 16], groups=4, **changes)

@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_loss_and_gradient_are_those_of_pytorch(share):
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 5, 9, 7, generator=g, requires_grad=True), torch.randint(0, 5, (2, 9, 7), generator=g)
    labels[torch.rand(labels.shape, generator=g) < share] = 255
    ours, oracle = segmentation_loss(logits, labels), F.cross_entropy(logits, labels, ignore_index=255)
    assert torch.allclose(ours, oracle)
    assert torch.allclose(*[torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, oracle)], atol=1e-8)

def test_a_batch_without_labels_costs_nothing():
    for name in ("unet", "deeplabv3-tiny"):
        model = create_segmenter(name, SPACE)
        loss = model(torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), 255)).loss
        loss.backward()
        assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())

@pytest.mark.parametrize("kind", ["basic", "bottleneck", "first 1x1 strides"])
@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
def test_dilated_backbone_refines_the_strided_one(kind, output_stride):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 2, 2, 2], layer_type="basic" if kind == "basic" else "bottleneck",
                          downsample_in_bottleneck=kind == "first 1x1 strides", out_features=["stage2", "stage3", "stage4"])
    strided, dilated = ResNetBackbone(config).eval(), ResNetBackbone(config).eval()
    dilated.load_state_dict(strided.state_dict())
    dilate_backbone(dilated, output_stride)
    assert {k: v.shape for k, v in strided.state_dict().items()} == {k: v.shape for k, v in dilated.state_dict().items()}
    with torch.no_grad(): coarse, fine = [net(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))).feature_maps for net in (strided, dilated)]
    for own, a, b in zip((8, 16, 32), coarse, fine):
        step = max(1, own // output_stride)
        assert b.shape[-1] == 96 // min(own, output_stride)
        assert torch.allclose(b[..., ::step, ::step], a, atol=1e-4)

def test_an_impossible_output_stride_is_refused():
    with pytest.raises(SegsynError, match="output stride"): create_segmenter("deeplabv3-tiny", SPACE, output_stride=12)

def test_published_parameter_counts():
    space = LabelSpace.create([f"class {i}" for i in range(20)])
    with torch.device("meta"): counts = [sum(p.numel() for p in create_segmenter(f"deeplabv3-{size}", space, **more).parameters()) for size in ("r50", "r101") for more in ({}, dict(auxiliary_weight=0.0))]
    assert counts == [42_004_074, 39_638_869, 60_996_202, 58_630_997]

@pytest.mark.parametrize("name", ["unet", "deeplabv3-tiny"])
@pytest.mark.parametrize("size", [(33, 47), (64, 64)])
def test_logits_have_the_size_of_the_picture(name, size):
    assert create_segmenter(name, SPACE).eval()(torch.zeros(1, 3, *size)).logits.shape == (1, 4, *size)

@pytest.mark.parametrize("name", ["unet", "deeplabv3-tiny"])
def test_saved_is_loaded(name, tmp_path):
    model = create_segmenter(name, SPACE).eval()
    model.save_pretrained(tmp_path/"model")
    assert sorted(p.name for p in (tmp_path/"model").iterdir()) == ["config.json", "model.safetensors"]
    x = torch.randn(2, 3, 32, 32)
    for again in (load_segmenter(tmp_path/"model", SPACE), AutoModelForSemanticSegmentation.from_pretrained(tmp_path/"model")):
        assert torch.equal(again(x).logits, model(x).logits) and again.space == SPACE
    for other, words in ((LabelSpace.create(["disc", "square"]), "number of classes"), (LabelSpace.create(["square", "disc", "bar"]), "another label space")):
        with pytest.raises(SegsynError, match=words): load_segmenter(tmp_path/"model", other)

def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file
    small_unet().save_pretrained(tmp_path)
    weights = load_file(tmp_path/"model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "head.weight"}, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SegsynError, match="head.weight"): load_segmenter(tmp_path, SPACE)

def test_first_weights_come_from_their_seed_alone():
    torch.manual_seed(5); before = torch.get_rng_state(); a = small_unet()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6); b, c = small_unet(), small_unet(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and not torch.equal(a.head.weight, c.head.weight)

def test_augmentation_moves_picture_and_mask_together():
    still = dict(brightness=0, contrast=0, saturation=0, tint=0)
    for seed in range(50):
        s = SCENES[seed % 12]
        image, mask = augment_pair(s.image, s.mask, Augment(**still), seed)
        assert image.shape == (32, 32, 3) and set(np.unique(mask)) <= {*np.unique(s.mask), 255} and 0 <= image.min() and image.max() <= 1
        inside = mask != 255
        named = np.where(image.max(-1) > 0.75, image.argmax(-1) + 1, 0) # each class has its own pure colour
        assert (named == mask)[inside].mean() > 0.93

@pytest.mark.parametrize("crop", [16, 32, 80])
def test_crops_have_their_size(crop):
    batch = PairData(SCENES, SPACE, Augment(crop=crop)).__getitems__([(k, k) for k in range(4)])
    assert batch["pixel_values"].shape == (4, 3, crop, crop) and batch["labels"].shape == (4, crop, crop)

def test_pairs_depend_on_index_and_seed_alone():
    data = PairData([SCENES[:5], SCENES[5:]], SPACE)
    batch = data.__getitems__([(7, 3), (0, 3), (7, 4)])
    assert len(data) == 12 and torch.equal(batch["pixel_values"][0], PairData(SCENES, SPACE)[7, 3]["pixel_values"]) and not torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    plain = PairData(SCENES, SPACE, augment=None)[4, 9]["labels"]
    assert np.array_equal(plain, SCENES[4].mask)

def test_pairs_that_cannot_be_used_are_named():
    for bad, words in ((Sample("a", SCENES[0].image), "no mask"), (Sample("a", SCENES[0].image, SCENES[0].mask[:8]), "size"), (Sample("a", SCENES[0].image, SCENES[0].mask + 9), "label space")):
        with pytest.raises(SegsynError, match=words): PairData([bad], SPACE)[0, 0]
    with pytest.raises(SegsynError, match="crop"): PairData([SCENES[0], scene(1, 48)], SPACE).__getitems__([(0, 0), (1, 0)])
    with pytest.raises(SegsynError, match="probability"): MixedData(PairData(SCENES, SPACE), PairData(SCENES, SPACE), 1.2)

def test_mixing_keeps_its_proportions_and_its_partners():
    real, synthetic = PairData(SCENES[:4], SPACE), PairData(SCENES, SPACE)
    seeds = range(3000)
    for p in (0, 0.25, 0.6, 1):
        share = np.mean([MixedData(real, synthetic, p).choose(s % 4, s)[0] == "synthetic" for s in seeds])
        assert share == p if p in (0, 1) else abs(share - p) < 0.03
    picked = [MixedData(real, synthetic, 1).choose(0, s)[1] for s in seeds]
    assert np.bincount(picked, minlength=12).min() > 180
    partners = [[0, 1], [2], [], [5]]
    assert {MixedData(real, synthetic, 1, partners).choose(i, s) for i in range(4) for s in range(40)} == {("synthetic", 0), ("synthetic", 1), ("synthetic", 2), ("real", 2), ("synthetic", 5)}
    mixed = MixedData(real, synthetic, 0)
    assert torch.equal(mixed[2, 8]["pixel_values"], real[2, 8]["pixel_values"])

def test_training_learns_and_says_what_changed(tmp_path):
    config = segmenter_recipe(steps=200, batch_size=6, warmup_steps=5, checkpoint_every=200, learning_rate=1e-2, precision="fp32")
    result = train_segmenter(small_unet(), PairData(SCENES, SPACE), tmp_path/"work", config, validation=SCENES[:2], progress=False)
    assert evaluate_segmenter(result.model, SCENES)["mean_iou"] > 0.7
    with pytest.raises(SegsynError): train_segmenter(small_unet(), PairData(SCENES[:6], SPACE), tmp_path/"work", config, progress=False)
    with pytest.raises(SegsynError, match="number of classes"): train_segmenter(create_segmenter("unet", LabelSpace.create(["disc"])), PairData(SCENES, SPACE), tmp_path/"other", config)

def test_deeplab_names_its_smallest_batch():
    with pytest.raises(SegsynError, match="batch of one"): create_segmenter("deeplabv3-tiny", SPACE)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long))

def test_predictions_do_not_depend_on_neighbours():
    model = small_unet().eval()
    images = [s.image for s in SCENES] + [scene(1, 48).image]
    masks, confidence = predict_masks(model, images, batch=4, flip=True, scales=(0.75, 1.0))
    for k in (0, 7, 12):
        m, c = predict_masks(model, images[k:k + 1], batch=4, flip=True, scales=(0.75, 1.0))
        assert np.array_equal(c[0], confidence[k]) and np.array_equal(m[0], masks[k]) and m[0].shape == images[k].shape[:2]
    assert sorted(k for chunk in _fixed_chunks(images, 4) for k in chunk) == list(range(13))

def test_one_view_is_the_plain_argmax_and_flips_cancel():
    model, s = small_unet().eval(), SCENES[3]
    pixels = PairData([s], SPACE, augment=None)[0, 0]["pixel_values"][None]
    with torch.no_grad(): plain = model(pixels).logits.argmax(1)[0].numpy()
    assert np.array_equal(predict_masks(model, [s.image], batch=1)[0][0], plain)
    straight, mirrored = [predict_masks(model, [i], batch=1, flip=True)[1][0] for i in (s.image, s.image[:, ::-1])]
    assert np.allclose(straight, mirrored[:, ::-1], atol=1e-5)
    allowed, _ = predict_masks(model, [s.image], allowed=[[0, 2]])
    assert set(np.unique(allowed[0])) <= {0, 2}

def test_evaluation_counts_every_labelled_pixel_once():
    marked = [Sample(s.key, s.image, np.where(np.arange(32) < 5, 255, s.mask).astype(np.uint8)) for s in SCENES]
    result = evaluate_segmenter(small_unet(), marked, SPACE, batch=5)
    assert result["confusions"].dtype == np.int64 and (result["confusions"].sum((1, 2)) == 32 * 27).all() and result["keys"] == [s.key for s in SCENES]
    json.dumps({k: v for k, v in result.items() if k != "confusions"})

def test_relabelling_keeps_everything_but_the_masks(tmp_path):
    write_dataset(tmp_path/"old", SCENES, SPACE, "shapes", {})
    old, model = SegmentationDataset(tmp_path/"old"), small_unet()
    new = SegmentationDataset(relabel_dataset(model, old, tmp_path/"new", keep_above=0.4, within_classes=True))
    masks, confidence = predict_masks(model, [s.image for s in SCENES], allowed=[{0, *map(SPACE.id_of, s.classes)} for s in SCENES])
    assert not check_dataset(tmp_path/"new")
    for a, b, m, c in zip(old, new, masks, confidence):
        assert a.key == b.key and np.array_equal(a.image, b.image) and a.classes == b.classes and np.array_equal(b.mask, np.where(c < 0.4, 255, m))

def test_copy_paste_books_what_it_covers(tmp_path):
    pasted = list(copy_paste(SCENES, 60, seed=3, space=SPACE, objects=(1, 4)))
    write_dataset(tmp_path/"pasted", pasted, SPACE, "pasted", {})
    assert not check_dataset(tmp_path/"pasted")
    for s in pasted:
        ids = np.unique(s.instances)
        assert ids.tolist() == list(range(len(ids)))                                             # numbered without gaps
        assert {SPACE.id_of(c) for c in s.classes} == set(np.unique(s.mask)) - {0, 255}          # what is listed is there
        for k in ids[1:]: assert len(np.unique(s.mask[s.instances == k])) == 1                   # one class an object
        assert not (s.mask[s.instances == 0][s.mask[s.instances == 0] != 255]).any()             # and every object pixel has one
        assert all(c in s.caption for c in s.classes)
    assert any((s.mask == 255).any() for s in pasted)
    alone = list(copy_paste(SCENES, 5, seed=3, space=SPACE, objects=(1, 4)))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(alone, pasted))                  # a longer set begins with a shorter one

def test_copy_paste_works_without_instances_and_says_when_it_cannot():
    plain = [Sample(s.key, s.image, s.mask) for s in SCENES]
    assert [len(cut_objects(s, SPACE)) for s in plain] == [2] * 12
    assert sorted(c.class_id for c in cut_objects(plain[0], SPACE)) == sorted(c.class_id for c in cut_objects(SCENES[0], SPACE))
    empty = Sample("empty", SCENES[0].image, np.zeros((32, 32), np.uint8))
    with pytest.raises(SegsynError, match="no object"): next(copy_paste([empty], 1, 0, space=SPACE))

SCRIPT = """
import sys, hashlib, torch; sys.path.insert(0, 'tests'); torch.set_num_threads(1)
from test_segmenter import *
d = hashlib.sha256()
for s in copy_paste(SCENES, 4, seed=1, space=SPACE): d.update(s.image.tobytes() + s.mask.tobytes() + repr(s.extra).encode())
data = MixedData(PairData(SCENES[:6], SPACE), PairData(list(copy_paste(SCENES, 4, seed=1, space=SPACE)), SPACE), 0.5)
for k in range(12): d.update(data[k % 6, k]['pixel_values'].numpy().tobytes())
model = small_unet().eval()
for c in predict_masks(model, [s.image for s in SCENES], batch=4)[1]: d.update(c.tobytes())
print(d.hexdigest(), data.fingerprint())
"""
def test_processes_agree():
    def run(hash_seed): return subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    assert run("1") == run("2") != ""
