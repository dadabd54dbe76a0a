"SegGen's methods through the synthesis engine, and the statistics of their masks against slow oracles."
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from segsyn.base import load_base, make_tiny_base, save_base
from segsyn.dataset import Sample, SegmentationDataset, check_dataset
from segsyn.files import SegsynError, folder_hashes
from segsyn.labels import LabelSpace
from segsyn.mask2img import ImgSyn, Mask2ImgLoss, MaskImageData, MaskSyn, create_controlnet, load_mask2img, plan_imgsyn, save_mask2img, train_mask2img
from segsyn.synthesis import Request, load_method, plan_requests, synthesise
from segsyn.text2mask import ColorCode, ColorMapData, Text2Mask, class_agreement, clear_enough, load_text2mask, nearest_masks, save_text2mask
from segsyn.training import TrainConfig

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

def test_imgsyn_with_shades_sees_instances_and_keeps_them(controlnet):
    touching = scene(0)
    touching.mask[:], touching.instances[:] = 0, 0
    touching.mask[4:20, 4:28], touching.instances[4:20, 4:16], touching.instances[4:20, 16:28] = 1, 1, 2
    seeing = deepcopy(controlnet)
    seeing.controlnet_cond_embedding.conv_out.weight.data += 0.1 # so that the map has a say
    merged = replace(touching, instances=np.minimum(touching.instances, 1))
    two, one, blind = [ImgSyn(BASE, seeing, SPACE, steps=2, chunk_size=1, shades=n)(plan_imgsyn([s], 1, seed=1))[0] for n, s in ((2, touching), (2, merged), (None, touching))]
    assert np.array_equal(two.instances, touching.instances) and np.array_equal(two.mask, touching.mask) and np.array_equal(blind.instances, touching.instances)
    assert not np.array_equal(two.image, one.image)
    with pytest.raises(SegsynError, match="no instance map"): ImgSyn(BASE, controlnet, SPACE, steps=1, shades=2)(plan_imgsyn([replace(touching, instances=None)], 1, seed=1))

def test_masksyn_with_shades_brings_the_painted_instances(controlnet, monkeypatch):
    mask, ids = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint16)
    mask[4:20, 4:28], ids[4:20, 4:16], ids[4:20, 16:28] = 2, 1, 2
    code, rng = ColorCode(SPACE, 2), np.random.default_rng(0)
    def paint(painter, latents, **more): return np.stack([np.clip(code.encode(mask, ids) + rng.integers(-9, 10, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8) for _ in latents])
    monkeypatch.setattr("segsyn.text2mask.decode_latents", paint)
    method = MaskSyn(BASE, BASE, controlnet, SPACE, dict(steps=1), dict(steps=1, chunk_size=2), shades=2)
    for made in method([Request(f"{k}", "two boxes", ("box",), k) for k in range(2)]):
        assert np.array_equal(made.mask, mask) and made.classes == ("box",)
        assert np.array_equal(made.instances > 0, ids > 0) and [len(np.unique(made.instances[ids == n])) for n in (1, 2)] == [1, 1] and made.instances.max() == 2

def test_instances_count_where_they_are_painted_and_nowhere_else():
    swapped = [replace(s, instances=np.minimum(s.instances, 1)) for s in SCENES]
    one_class = [replace(s, mask=np.minimum(s.mask, 1)) for s in SCENES], [replace(s, mask=np.minimum(s.mask, 1)) for s in swapped]
    for kind in (ColorMapData, MaskImageData):
        plain, shaded = [[kind(data, BASE, SPACE, shades=n).fingerprint() for data in one_class] for n in (None, 2)]
        assert plain[0] == plain[1] == kind(one_class[0], BASE, SPACE).fingerprint() and len({*plain, *shaded}) == 3
    assert ColorCode(SPACE).fingerprint() == SPACE.fingerprint() != ColorCode(SPACE, 1).fingerprint() != ColorCode(SPACE, 2).fingerprint()
    assert Text2Mask(BASE, SPACE, steps=1).fingerprint()["labels"] == SPACE.fingerprint()

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

def test_a_class_that_no_label_space_knows_is_refused(controlnet):
    unknown = Request("a", "a lamp", ("lamp",), 1)
    for method in (Text2Mask(BASE, SPACE, steps=1, chunk_size=1), MaskSyn(BASE, BASE, controlnet, SPACE, dict(steps=1), dict(steps=1, chunk_size=1)), ImgSyn(BASE, controlnet, SPACE, steps=1, chunk_size=1)):
        with pytest.raises(SegsynError, match="lamp"): method([replace(unknown, source=SCENES[0])])
    for data in (ColorMapData([replace(SCENES[0], classes=("lamp",))], BASE, SPACE), MaskImageData([replace(SCENES[0], classes=("lamp",))], BASE, SPACE)):
        with pytest.raises(SegsynError, match="lamp"): data.__getitems__([(0, 1)])

def test_a_denoiser_that_does_not_stay_frozen_is_noticed(tmp_path, monkeypatch):
    class Careless(Mask2ImgLoss):
        def _predict(self, model, *rest):
            with torch.no_grad(): next(model.unet.parameters()).add_(1e-3)
            return super()._predict(model, *rest)
    config, data = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3), MaskImageData(SCENES, BASE, SPACE)
    train_mask2img(BASE, data, config, tmp_path / "good", progress=False)
    monkeypatch.setattr("segsyn.mask2img.Mask2ImgLoss", Careless)
    with pytest.raises(SegsynError, match="frozen"): train_mask2img(BASE, data, config, tmp_path / "careless", progress=False)

def test_models_remember_what_they_were_trained_for(tmp_path, controlnet):
    other, stranger = LabelSpace.create(["disc", "cross"], background="background"), make_tiny_base("sd15", seed=1)
    painter, net = save_text2mask(BASE, SPACE, tmp_path/"painter"), save_mask2img(controlnet, BASE, SPACE, tmp_path/"net")
    assert all(torch.equal(a, b) for a, b in zip(load_text2mask(painter, SPACE).unet.state_dict().values(), BASE.unet.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(load_mask2img(net, BASE, SPACE).state_dict().values(), controlnet.state_dict().values()))
    for call in (lambda: load_text2mask(painter, other), lambda: load_mask2img(net, BASE, other)):
        with pytest.raises(SegsynError, match="another label space"): call()
    with pytest.raises(SegsynError, match="another base"): load_mask2img(net, stranger, SPACE)
    with pytest.raises(SegsynError, match="no trained model"): load_text2mask(tmp_path, SPACE)

def test_no_weight_of_a_controlnet_is_left_at_random(tmp_path, controlnet):
    weights = save_mask2img(controlnet, BASE, SPACE, tmp_path/"net")/"controlnet"/"diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: state[name] for name in sorted(state)[1:]}, weights)
    with pytest.raises(SegsynError, match="do not fill the model"): load_mask2img(tmp_path/"net", BASE, SPACE)
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(SegsynError): load_mask2img(tmp_path/"net", BASE, SPACE) # a pickle is not read

def test_models_remember_their_colour_code(tmp_path, controlnet):
    for shades in (None, 2):
        painter, net = save_text2mask(BASE, SPACE, tmp_path/f"painter-{shades}", shades=shades), save_mask2img(controlnet, BASE, SPACE, tmp_path/f"net-{shades}", shades)
        assert load_text2mask(painter, SPACE, shades=shades) and load_mask2img(net, BASE, SPACE, shades)
        for other in {None, 2, 3} - {shades}:
            for call in (lambda: load_text2mask(painter, SPACE, shades=other), lambda: load_mask2img(net, BASE, SPACE, other), lambda: Text2Mask(painter, SPACE, shades=other),
                         lambda: ImgSyn(BASE, net, SPACE, shades=other), lambda: MaskSyn(painter, BASE, controlnet, SPACE, shades=other)):
                with pytest.raises(SegsynError, match="another colour code"): call()

def test_workers_make_the_same_bytes(tmp_path, controlnet):
    base, net = save_base(BASE, tmp_path/"base"), create_controlnet(BASE)
    base = load_base(base)
    save_mask2img(net.eval(), base, SPACE, tmp_path/"net")
    recipe = partial(load_method, "imgsyn", base=str(tmp_path/"base"), controlnet=str(tmp_path/"net"), space=SPACE, settings=dict(steps=1, chunk_size=2))
    requests = plan_imgsyn(SCENES, 4, seed=1)
    one, two = [synthesise(recipe, requests, tmp_path/f"of-{n}", SPACE, "ImgSyn", workers=n, threads=1, progress=False, root=tmp_path/str(n)) for n in (1, 2)]
    assert folder_hashes(one) == folder_hashes(two)
