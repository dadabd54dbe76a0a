"SegGen's methods through the synthesis engine, and the statistics of their masks against slow oracles."
import numpy as np
import pytest

from segsyn.base import make_tiny_base
from segsyn.dataset import Sample, SegmentationDataset, check_dataset
from segsyn.files import SegsynError, folder_hashes
from segsyn.labels import LabelSpace
from segsyn.mask2img import ImgSyn, MaskSyn, create_controlnet, plan_imgsyn
from segsyn.synthesis import Request, plan_requests, synthesise
from segsyn.text2mask import ColorMapData, Text2Mask, class_agreement, clear_enough, nearest_masks

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
    assert all(s.scores["doubt"] > 0.2 for s in made) and clear_enough(0.1)(made[0]) == "too many doubtful pixels" and clear_enough(1.0)(made[0]) is True

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
