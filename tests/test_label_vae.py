"The label autoencoder: its code, shapes for any number of classes, what is refused, and what is kept."
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from segsyn.dataset import Sample
from segsyn.files import SegsynError
from segsyn.label_vae import (CODES, LabelVAE, LabelVAELoss, MaskData, create_label_vae, decode_labels, encode_labels, label_bits, label_codes,
                              load_label_vae, reconstruction, save_label_vae, settle_latents, train_label_vae)
from segsyn.labels import LabelSpace
from segsyn.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SPACE = LabelSpace.create(["bird", "fish", "coin"]) # and background


def classes(count): return LabelSpace.create([f"class {k}" for k in range(count)], background=None)
def image_vae(levels=3, latent=4):
    return AutoencoderKL(block_out_channels=[8]*levels, down_block_types=["DownEncoderBlock2D"]*levels, up_block_types=["UpDecoderBlock2D"]*levels, norm_num_groups=4, latent_channels=latent)


def blocks(count, space, size=16, seed=0):
    "Masks of one rectangle each on the first class."
    rng, masks = np.random.default_rng(seed), np.zeros((count, size, size), space.dtype)
    for m in masks:
        (y, x), (h, w) = rng.integers(0, size//2, 2), rng.integers(4, size//2, 2)
        m[y:y + h, x:x + w] = rng.integers(1, space.num_classes)
    return masks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = TrainConfig(steps=60, batch_size=8, learning_rate=1e-2, precision="fp32", ema_decay=0.9)
    data = blocks(40, SPACE)
    data[:, -2:] = SPACE.ignore_id
    return data, *train_label_vae(data, SPACE, image_vae(), config, tmp_path_factory.mktemp("vae")/"run", channels=[8, 16, 16], progress=False)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 128, 129, 150, 254, 255, 256, 257, 1000])
def test_bits_are_those_of_numpy(count):
    space = classes(count)
    n = max(1, int(np.ceil(np.log2(count))))
    bits = label_bits(np.arange(count).reshape(1, 1, -1), space)
    assert bits.shape == (1, n, 1, count) and bits.dtype == torch.float32
    expected = np.array([[int(d) for d in np.binary_repr(k, n)[::-1]] for k in range(count)])
    assert np.array_equal(bits[0, :, 0].T.numpy(), 2*expected - 1)


@pytest.mark.parametrize("code", CODES)
def test_ignored_pixels_are_zeros_and_classes_differ(code):
    space = classes(300) # ignore id 65535
    ids = torch.cat([torch.arange(300), torch.tensor([space.ignore_id])]).view(1, 1, -1)
    values = label_codes(ids, space, code)[0, :, 0].T
    assert (values[-1] == 0).all() and values.abs().max() == 1
    assert len(values[:-1].unique(dim=0)) == 300


def test_kinds_of_masks_are_read_alike():
    masks = blocks(2, SPACE)
    wanted = label_bits(masks, SPACE)
    for other in (masks.astype(np.uint16), masks.astype(np.int64), torch.from_numpy(masks), torch.from_numpy(masks.astype(np.int64))): assert torch.equal(label_bits(other, SPACE), wanted)


@pytest.mark.parametrize("count", [2, 3, 150, 1000])
def test_from_two_to_a_thousand_classes(count):
    space = classes(count)
    model = create_label_vae(space, image_vae(), channels=[4, 8, 8])
    masks = np.random.default_rng(0).integers(0, count, (2, 8, 12)).astype(space.dtype)
    masks[0, :2] = space.ignore_id
    assert encode_labels(model, masks).shape == (2, 4, 2, 3)
    decoded, confidence = decode_labels(model, encode_labels(model, masks))
    assert decoded.shape == masks.shape and decoded.dtype == space.dtype and decoded.max() < count
    assert confidence.dtype == np.float32 and (confidence > 0).all() and (confidence <= 1).all()
    loss = LabelVAELoss(space.ignore_id)(model.train(), {"masks": torch.from_numpy(masks.astype(np.int64))}, torch.Generator())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("levels, latent", [(2, 4), (3, 4), (4, 16)])
def test_latents_have_the_shape_of_the_images(levels, latent):
    vae = image_vae(levels, latent)
    model = create_label_vae(SPACE, vae)
    images = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert encode_labels(model, blocks(1, SPACE, 32)).shape == images.shape
    assert model.factor == 2**(levels - 1)


def test_the_seed_decides_the_first_weights():
    first, same, other = (create_label_vae(SPACE, image_vae(), [4, 8, 8], seed=s).encode(blocks(1, SPACE)).mean for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_ignored_pixels_carry_no_loss():
    model, masks = create_label_vae(SPACE, image_vae(), [4, 8, 8]), torch.from_numpy(blocks(3, SPACE).astype(np.int64))
    masks[:, :8] = SPACE.ignore_id
    loss = LabelVAELoss(SPACE.ignore_id, noise=0.3)
    found = loss(model, {"masks": masks}, torch.Generator().manual_seed(0))
    logits = model(masks, 0.3, torch.Generator().manual_seed(0))
    known = masks != SPACE.ignore_id
    by_hand = -logits.log_softmax(1).permute(0, 2, 3, 1)[known].gather(1, masks[known][:, None]).mean()
    assert torch.allclose(found, by_hand, atol=1e-5)
    nothing = loss(model, {"masks": torch.full_like(masks, SPACE.ignore_id)}, torch.Generator())
    assert nothing == 0


def test_training_noise_is_relative_to_the_latent():
    "Larger numbers in the latent buy no safety from the noise."
    model, masks = create_label_vae(SPACE, image_vae(), [4, 8, 8]).eval(), torch.from_numpy(blocks(6, SPACE).astype(np.int64))
    with torch.no_grad():
        before = model(masks, 0.5, torch.Generator().manual_seed(0))
        model.encoder[-1].weight[:4] *= 10; model.encoder[-1].bias[:4] *= 10; model.encode_directly.weight *= 10
        model.encoder[-1].bias[4:] += 2*np.log(10) # the learned spread with them
        assert torch.allclose(before, model(masks, 0.5, torch.Generator().manual_seed(0)), atol=1e-3)


def test_trained_latents_have_unit_variance(trained):
    data, model, result = trained
    latents = encode_labels(model, data).transpose(0, 1).flatten(1)
    assert latents.dtype == torch.float32 and model.config.scaling_factor == 1
    assert torch.allclose(latents.mean(1), torch.zeros(4), atol=1e-3) and torch.allclose(latents.std(1), torch.ones(4), atol=1e-3)
    found = settle_latents(model, MaskData(data, SPACE)) # nothing is left to do
    assert torch.allclose(found, torch.tensor([[0.0, 1.0]]*4), atol=1e-3)
    assert result.steps == 60 and not any(p.requires_grad for p in model.parameters())


def test_settling_takes_mean_and_spread_along():
    model, data = create_label_vae(SPACE, image_vae(), [4, 8, 8]), MaskData(blocks(10, SPACE), SPACE)
    masks = np.stack([data.mask(i) for i in range(10)])
    with torch.no_grad(): before = model.encode(masks)
    center, scale = settle_latents(model, data, batch=3).view(4, 2, 1, 1).unbind(1)
    with torch.no_grad(): after = model.encode(masks)
    assert torch.allclose(after.mean, (before.mean - center)/scale, atol=1e-4)
    assert torch.allclose(after.std, before.std/scale, rtol=1e-3)


def test_it_learns_and_measures_itself(trained):
    data, model, _ = trained
    new = blocks(20, SPACE, seed=1)
    clean, noisy = reconstruction(model, new, SPACE), reconstruction(model, new, SPACE, noise=2.0)
    assert clean["miou"] > 0.6 and noisy["miou"] < clean["miou"] and set(clean) == {"miou", "border_miou", "pixels"}
    assert noisy == reconstruction(model, new, SPACE, noise=2.0, batch=7) # the noise belongs to the mask, not to the batch
    assert noisy != reconstruction(model, new, SPACE, noise=2.0, seed=1)
    ignored = np.where(new == 0, SPACE.ignore_id, new).astype(np.uint8)
    assert np.isfinite(reconstruction(model, ignored, SPACE)["miou"])


def test_confidence_makes_pixels_ignored(trained):
    data, model, _ = trained
    latents = encode_labels(model, data[:4])
    masks, confidence = decode_labels(model, latents)
    doubting, same = decode_labels(model, latents, confidence=0.9)
    assert np.array_equal(confidence, same) and not (masks == SPACE.ignore_id).any()
    assert np.array_equal(doubting, np.where(confidence < 0.9, SPACE.ignore_id, masks))
    together, one = decode_labels(model, latents)[0], np.stack([decode_labels(model, z[None])[0][0] for z in latents])
    assert np.array_equal(together, one)


def test_saved_and_loaded_alike(trained, tmp_path):
    data, model, _ = trained
    folder = save_label_vae(model, SPACE, tmp_path/"kept")
    assert {p.name for p in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "labels.json"}
    for again in (load_label_vae(folder, SPACE), LabelVAE.from_pretrained(folder)):
        assert torch.equal(encode_labels(again, data), encode_labels(model, data))
        for a, b in zip(decode_labels(again, encode_labels(model, data)), decode_labels(model, encode_labels(model, data))): assert np.array_equal(a, b)
    assert dict(LabelVAE.load_config(folder))["code"] == "bits"


def test_another_label_space_is_refused(trained, tmp_path):
    _, model, _ = trained
    folder = save_label_vae(model, SPACE, tmp_path/"kept")
    with pytest.raises(SegsynError, match="another label space"): load_label_vae(folder, LabelSpace.create(["fish", "bird", "coin"]))
    with pytest.raises(SegsynError, match="another label space"): save_label_vae(model, classes(7), tmp_path/"other")
    assert not (tmp_path/"other").exists()


@pytest.mark.parametrize("wrong, says", [
    (lambda m: encode_labels(m, np.zeros((1, 16, 18), np.uint8)), "16x18"),
    (lambda m: encode_labels(m, np.zeros((1, 15, 16), np.uint8)), "multiples of 4"),
    (lambda m: encode_labels(m, np.zeros((16, 16), np.uint8)), "no masks"),
    (lambda m: encode_labels(m, np.full((2, 16, 16), 4, np.uint8)), r"4 \(256 pixels\)"),
    (lambda m: encode_labels(m, np.full((1, 16, 16), -1)), "does not know"),
    (lambda m: label_bits(np.zeros((1, 4, 4), np.float32), SPACE), "no mask"),
    (lambda m: decode_labels(m, torch.zeros(1, 3, 4, 4)), "no latents"),
    (lambda m: decode_labels(m, torch.zeros(1, 4, 4, 4), confidence=2), "probability"),
    (lambda m: LabelVAE(1), "num_classes"),
    (lambda m: LabelVAE(300, ignore_id=255), "ignore_id"),
    (lambda m: LabelVAE(3, code="gray"), "bits, one-hot, index"),
    (lambda m: LabelVAE(3, channels=[8]), "two widths"),
    (lambda m: create_label_vae(SPACE, image_vae(), channels=[8, 8]), "3 widths"),
    (lambda m: classes(1), "at least two classes"),
    (lambda m: MaskData([], SPACE), "nothing to train on"),
    (lambda m: MaskData([np.zeros((4, 4), np.uint8)]), "label space is not known"),
    (lambda m: MaskData([Sample("a", np.zeros((4, 4, 3), np.uint8))], SPACE).mask(0), "no mask"),
    (lambda m: MaskData([np.zeros((4, 4), np.uint8), np.zeros((8, 8), np.uint8)], SPACE).__getitems__([(0, 0), (1, 0)]), "different sizes")])
def test_mistakes_are_explained(trained, wrong, says):
    with pytest.raises(SegsynError, match=says): wrong(trained[1])


def test_a_size_that_does_not_fit_is_refused_before_training(tmp_path):
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3)
    with pytest.raises(SegsynError, match="does not fit"): train_label_vae(np.zeros((2, 15, 16), np.uint8), SPACE, image_vae(), config, tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()


def test_masks_are_mirrored_by_their_seed():
    masks = blocks(3, SPACE)
    data = MaskData(masks, SPACE)
    found = data.__getitems__([(1, seed) for seed in range(30)])["masks"].numpy()
    mirrored = [np.array_equal(f, masks[1][:, ::-1]) for f in found]
    assert 5 < sum(mirrored) < 25 and all(m or np.array_equal(f, masks[1]) for f, m in zip(found, mirrored))
    assert torch.equal(data[1, 7]["masks"], data.__getitems__([(1, 7)])["masks"][0])
    samples = [Sample(str(k), np.zeros((16, 16, 3), np.uint8), m) for k, m in enumerate(masks)]
    assert MaskData(samples, SPACE).fingerprint() == data.fingerprint() != MaskData(masks[::-1], SPACE).fingerprint()
