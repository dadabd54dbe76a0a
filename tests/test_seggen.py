"SegGen's methods through the synthesis engine, and the statistics of their masks against slow oracles."
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from segsyn.base import load_base, make_tiny_base, save_base
from segsyn.dataset import Sample, SegmentationDataset, check_dataset
from segsyn.files import SegsynError, folder_hashes
from segsyn.labels import LabelSpace
from segsyn.mask2img import ImgSyn, MaskImageData, MaskSyn, create_controlnet, load_mask2img, plan_imgsyn, save_mask2img
from segsyn.synthesis import Request, load_method, plan_requests, synthesise
from segsyn.text2mask import ColorMapData, Text2Mask, class_agreement, clear_enough, load_text2mask, nearest_masks, save_text2mask

SPACE = LabelSpace.create(["disc", "box"], background="background")
BASE = make_tiny_base("sd15")
SIDE = BASE.image_size

def scene(k):
    rng = np.random.default_rng(k)
    mask, instances = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint16)
    for n in (1, 2):
        y, x = rng.integers(0, SIDE // 2, 2)
        mask[y:y + SIDE // 3, x:x + SIDE // 3] = instances[y:y + SIDE // 3, x:x + SIDE // 3] = n
    return Sample(f"{k:03d}", rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8), mask, "a disc and a box", tuple(SPACE.names[i] for i in np.unique(mask) if i), instances=instances)

SCENES = [scene(k) for k in range(4)]

@pytest.fixture(scope="module")
def controlnet():
    net = create_controlnet(BASE)
    for parameter in net.controlnet_mid_block.parameters(): parameter.data += 0.05 # so that it has a say
    return net.eval().requires_grad_(False)

def test_imgsyn_keeps_masks_and_instances(tmp_path, controlnet):
    method = ImgSyn(BASE, controlnet, SPACE, steps=2, chunk_size=3)
    requests = plan_imgsyn(SCENES, 6, seed=1)
    whole = synthesise(method, requests, tmp_path/"whole", SPACE, "ImgSyn", progress=False, root=tmp_path)
    data = SegmentationDataset(whole)
    assert check_dataset(whole) == [] and [s.extra["source"] for s in data] == ["000", "001", "002", "003", "000", "001"]
    for s, r in zip(data, requests): assert np.array_equal(s.mask, r.source.mask) and np.array_equal(s.instances, r.source.instances)
    assert not np.array_equal(data[0].image, data[4].image) # one mask, two pictures
    few = SegmentationDataset(synthesise(method, requests[:4], tmp_path/"few", SPACE, "ImgSyn", progress=False, root=tmp_path))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(few, data))

def test_masksyn_is_a_function_of_its_request(tmp_path, controlnet):
    method = MaskSyn(BASE, BASE, controlnet, SPACE, dict(steps=2, margin=5.0), dict(steps=2, chunk_size=2))
    requests = plan_requests([(s.caption, s.classes) for s in SCENES], 4, seed=3)
    first, second = [synthesise(method, requests, tmp_path/name, SPACE, "MaskSyn", progress=False, root=tmp_path/name[0]) for name in ("first", "second")]
    assert folder_hashes(first) == folder_hashes(second) and check_dataset(first) == []
    alone, = method(requests[2:3])
    made = SegmentationDataset(first)[2]
    assert np.array_equal(alone.image, made.image) and np.array_equal(alone.mask, made.mask)

def test_doubtful_masks_are_refused(tmp_path):
    method = Text2Mask(BASE, SPACE, steps=2, margin=200.0, chunk_size=2) # nearly every pixel is in doubt
    requests = plan_requests([(s.caption, s.classes) for s in SCENES], 2, seed=3)
    made = method(requests)
    assert all(s.scores["doubt"] > 0.2 for s in made)
    shown, bare = [replace(made[0], classes=names) for names in (("disc",), ())]
    assert [clear_enough(shown, 0.1), clear_enough(shown, 1.0), clear_enough(bare, 1.0)] == ["too many doubtful pixels", True, "no object"]

def test_settings_and_sources_are_checked(controlnet):
    with pytest.raises(SegsynError, match="Did you mean 'guidance'"): Text2Mask(BASE, SPACE, guidence=3.0)
    with pytest.raises(SegsynError, match="where: control"): ImgSyn(BASE, controlnet, SPACE, control=-1)
    with pytest.raises(SegsynError, match="no mask to draw"): ImgSyn(BASE, controlnet, SPACE, steps=1)([Request("a", "a disc", ("disc",), 1)])
    with pytest.raises(SegsynError, match="no caption"): ColorMapData([Sample("a", SCENES[0].image, SCENES[0].mask)], BASE, SPACE)[0, 1]
    with pytest.raises(SegsynError, match="no mask"): ColorMapData([Sample("a", SCENES[0].image, caption="a disc")], BASE, SPACE)[0, 1]

def test_nearest_masks_against_a_loop():
    masks, training = [scene(k).mask for k in range(10, 13)], [scene(k).mask for k in range(6)]
    def iou(a, b): return sum(int(((a == c) & (b == c)).sum()) for c in (1, 2)) / max(int(((a > 0) | (b > 0)).sum()), 1)
    slow = [[max(iou(m, t), iou(m[:, ::-1], t)) for t in training] for m in masks]
    index, best = nearest_masks(masks, training, SPACE)
    assert np.allclose(best, np.max(slow, axis=1)) and all(slow[k][i] == pytest.approx(b) for k, (i, b) in enumerate(zip(index, best)))

def test_class_agreement():
    both, none = np.concatenate([np.ones((2, 4)), np.full((2, 4), 2)]).astype(np.uint8), np.zeros((4, 4), np.uint8)
    assert class_agreement([both, none], [("disc",), ("box",)], SPACE) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert class_agreement([none], [()], SPACE) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}

def test_two_equal_colours_are_refused():
    with pytest.raises(SegsynError, match="(?i)colou?r"): LabelSpace.create(["disc", "box"], palette=[(0, 0, 0), (10, 20, 30), (10, 20, 30)])

def test_a_mask_of_another_label_space_is_refused():
    wrong = Sample("w", SCENES[0].image, np.full_like(SCENES[0].mask, 9), "a disc", ("disc",))
    for data in (ColorMapData([wrong], BASE, SPACE), MaskImageData([wrong], BASE, SPACE)):
        with pytest.raises(SegsynError, match="9"): data.__getitems__([(0, 1)])

def test_a_caption_without_a_class_is_refused(controlnet):
    nothing = Request("a", "a lamp", (), 1)
    for method in (Text2Mask(BASE, SPACE, steps=1, chunk_size=1), MaskSyn(BASE, BASE, controlnet, SPACE, dict(steps=1), dict(steps=1, chunk_size=1))):
        with pytest.raises(SegsynError, match="class"): method([nothing])

def test_models_remember_what_they_were_trained_for(tmp_path, controlnet):
    other, stranger = LabelSpace.create(["disc", "cross"], background="background"), make_tiny_base("sd15", seed=1)
    painter, net = save_text2mask(BASE, SPACE, tmp_path/"painter"), save_mask2img(controlnet, BASE, SPACE, tmp_path/"net")
    assert all(torch.equal(a, b) for a, b in zip(load_text2mask(painter, SPACE).unet.state_dict().values(), BASE.unet.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(load_mask2img(net, BASE, SPACE).state_dict().values(), controlnet.state_dict().values()))
    for call in (lambda: load_text2mask(painter, other), lambda: load_mask2img(net, BASE, other)):
        with pytest.raises(SegsynError, match="another label space"): call()
    with pytest.raises(SegsynError, match="another base"): load_mask2img(net, stranger, SPACE)
    with pytest.raises(SegsynError, match="no trained model"): load_text2mask(tmp_path, SPACE)

def test_workers_make_the_same_bytes(tmp_path, controlnet):
    base, net = save_base(BASE, tmp_path/"base"), create_controlnet(BASE)
    base = load_base(base)
    save_mask2img(net.eval(), base, SPACE, tmp_path/"net")
    recipe = partial(load_method, "imgsyn", base=str(tmp_path/"base"), controlnet=str(tmp_path/"net"), space=SPACE, settings=dict(steps=1, chunk_size=2))
    requests = plan_imgsyn(SCENES, 4, seed=1)
    one, two = [synthesise(recipe, requests, tmp_path/f"of-{n}", SPACE, "ImgSyn", workers=n, threads=1, progress=False, root=tmp_path/str(n)) for n in (1, 2)]
    assert folder_hashes(one) == folder_hashes(two)
