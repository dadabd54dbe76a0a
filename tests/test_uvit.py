"The transformer base: what it refuses, its folder, exact resume, sampling in chunks, and the map of UniDiffuser's weights."
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from segsyn.base import make_tiny_base
from segsyn.files import SegsynError
from segsyn.training import TrainConfig, checkpoint_folders
from segsyn.uvit import (UNIDIFFUSER_V1, CaptionedImages, MultimodalData, MultimodalLoss, UViT, clip_features, contrastive_loss, create_clip, create_codes, create_uvit_base, grow_uvit, load_unidiffuser_weights,
                         load_uvit_base, patch_modality, sample_modalities, sample_uvit, save_uvit_base, to_unidiffuser_weights, train_clip, train_uvit, unidiffuser_config, unidiffuser_pieces, vector_modality)

TEXTS = ["a photo of a bird and two flowers", "a photo of three fish and a tree", "a car beside a traffic sign", "two birds, one horse and a fruit"]
TINY = {**UNIDIFFUSER_V1, **dict(text_dim=6, clip_img_dim=5, num_text_tokens=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts():
    "A base of Stable Diffusion's parts, a CLIP, pictures, tokens, codes."
    small = make_tiny_base("sd", max_length=24)
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    rows = [[*small.tokenizers[0](t, padding="max_length")["input_ids"]] for t in TEXTS*2]
    tokens = np.repeat(np.array(rows)[:, None], 5, 1) # the same in every style
    clip = create_clip(small.tokenizers[0], width=16, layers=1, projection=12).eval()
    return small, clip, images, tokens, create_codes(small.text_encoders[0], tokens, clip_features(clip, images), 8)


def make_base(parts, seed=0, **sizes): return create_uvit_base(parts[0], parts[1], parts[4], seed=seed, **{**dict(width=24, depth=3, heads=2), **sizes})


def make_data(base, parts): return MultimodalData(base, torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)), parts[3], base.encode_clip(parts[2]))


@pytest.fixture(scope="module")
def base(parts): return make_base(parts)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory): return save_uvit_base(base, tmp_path_factory.mktemp("uvit")/"base")


def test_a_saved_base_is_the_same(base, saved, parts):
    again = load_uvit_base(saved)
    assert again.fingerprint == base.fingerprint and not any(p.requires_grad for p in again.uvit.parameters())
    first, second = (sample_uvit(b, TEXTS[:2], [1, 2], steps=2, batch_size=2).astype(int) for b in (base, again))
    assert np.abs(first - second).max() <= 1 # weights that lie elsewhere in memory may give other last bits
    assert make_base(parts, seed=1).fingerprint != base.fingerprint


def test_half_precision_folder_is_loaded_in_fp32(base, tmp_path):
    folder = save_uvit_base(base, tmp_path/"half", half=True)
    assert {v.dtype for v in load_file(folder/"uvit"/"diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    again = load_uvit_base(folder)
    assert {p.dtype for part in (again.uvit, again.vae, again.clip, again.text_encoder, again.codes) for p in part.parameters()} == {torch.float32}
    assert torch.equal(again.codes.text.weight, base.codes.text.weight)


@pytest.mark.parametrize("file", ["model_index.json", "uvit/config.json", "uvit/diffusion_pytorch_model.safetensors", "codes/config.json", "codes/diffusion_pytorch_model.safetensors",
                                  "vae/config.json", "clip/model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(saved, tmp_path, file):
    folder = tmp_path/"base"
    shutil.copytree(saved, folder)
    (folder/file).unlink()
    with pytest.raises(SegsynError, match=f"missing: {file}"): load_uvit_base(folder)


def test_a_missing_weight_is_named(saved, tmp_path):
    folder = tmp_path/"base"
    shutil.copytree(saved, folder)
    file = folder/"uvit"/"diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["middle.mlp.0.weight"]
    save_file(state, file)
    with pytest.raises(SegsynError, match="middle.mlp.0.weight"): load_uvit_base(folder)


def test_another_kind_of_folder_is_refused(parts, tmp_path):
    from segsyn.base import save_base
    with pytest.raises(SegsynError, match="no transformer base"): load_uvit_base(save_base(parts[0], tmp_path/"sd"))


def test_parts_that_do_not_fit_are_refused(parts, saved, tmp_path):
    small, clip, images, tokens, codes = parts
    wide = make_tiny_base("sd", max_length=24, vae={"latent_channels": 8})
    longer = make_tiny_base("sd", max_length=30)
    base = make_base(parts)
    with pytest.raises(SegsynError, match="channels"): replace(base, vae=wide.vae)
    with pytest.raises(SegsynError, match="text, tokens and numbers"): replace(base, tokenizer=longer.tokenizers[0])
    with pytest.raises(SegsynError, match="text, tokens and numbers"): replace(base, codes=create_codes(small.text_encoders[0], tokens, clip_features(clip, images), 4))
    with pytest.raises(SegsynError, match="text states, width"): replace(base, text_encoder=make_tiny_base("sd", max_length=24, text={"hidden_size": 48}).text_encoders[0])
    with pytest.raises(SegsynError, match="CLIP vector"): replace(base, clip=create_clip(small.tokenizers[0], width=16, layers=1, projection=20))


def test_wrong_values_are_refused(base):
    given = {"image": torch.zeros(2, 4, 16, 16), "text": torch.zeros(2, 24, 8), "clip": torch.zeros(2, 1, 12)}
    times = {"image": 5, "text": 5}
    assert base.uvit(given, times)["image"].shape == (2, 4, 16, 16)
    for wrong, match in (({**given, "image": torch.zeros(2, 8, 16, 16)}, "where: image"), ({**given, "text": torch.zeros(2, 24, 9)}, "where: text"), ({**given, "text": torch.zeros(2, 23, 8)}, "where: text"),
                         ({**given, "label": given["image"]}, "where: values"), ({"image": given["image"]}, "where: values")):
        with pytest.raises(SegsynError, match=match): base.uvit(wrong, times)
    with pytest.raises(SegsynError, match="where: times"): base.uvit(given, {"image": 5})


@pytest.mark.parametrize("changes,where", [(dict(depth=4), "depth"), (dict(heads=5), "heads"), (dict(norms="middle"), "norms"), (dict(clocks=["image"]), "clocks"),
                                           (dict(inputs=[vector_modality("a", 2, 2, "text"), vector_modality("a", 2, 2, "image")]), "inputs")])
def test_impossible_transformers_are_refused(changes, where):
    good = dict(inputs=[vector_modality("text", 4, 3, "text"), patch_modality("image", 4, 8)], width=24, depth=3, heads=2)
    with pytest.raises(SegsynError, match=f"where: {where}"): UViT(**{**good, **changes})
    with pytest.raises(SegsynError, match="patches do not fit"): patch_modality("image", 4, 9)


def test_samples_depend_on_their_seed_alone(base):
    codes = base.encode_text(TEXTS)
    for sampler in ("dpm++", "ddpm", "euler-edm"):
        whole = sample_modalities(base, ("image", "clip"), {"text": codes}, [1, 2, 3, 4], steps=3, sampler=sampler)
        other = sample_modalities(base, ("image", "clip"), {"text": codes[[2, 0, 1, 3]]}, [3, 9, 8, 7], steps=3, sampler=sampler)
        assert all(torch.equal(whole[n][2], other[n][0]) for n in whole)
    joint = sample_modalities(base, ("image", "clip", "text"), {}, [1, 2], steps=2)
    assert joint["text"].shape == (2, 24, 8)
    captions = sample_modalities(base, ("text",), {"image": whole["image"], "clip": whole["clip"]}, [1, 2, 3, 4], steps=2)
    assert list(captions) == ["text"]


def test_guidance_is_between_the_two_branches(base):
    "Guidance 1 is the given branch; 0 steps beyond it would be the blind one. The prediction is linear in the guidance, so one step of DDIM is too."
    codes = base.encode_text(TEXTS[:2])
    drawn = {g: sample_modalities(base, ("image", "clip"), {"text": codes}, [1, 2], steps=1, guidance=g, sampler="ddim")["image"] for g in (1, 2, 3)}
    assert torch.allclose(drawn[3] - drawn[2], drawn[2] - drawn[1], atol=1e-3) and not torch.allclose(drawn[2], drawn[1], atol=1e-4)


@pytest.mark.parametrize("wanted,given,seeds,match", [(("image",), {}, [1], "share a clock"), (("picture",), {}, [1], "cannot be sampled"), ((), {}, [1], "nothing wanted"),
                                                      (("image", "clip"), {"text": 3}, [1, 2], "needs a seed"), (("image", "clip"), {}, [], "needs a seed")])
def test_wrong_samples_are_refused(base, wanted, given, seeds, match):
    given = {n: torch.zeros(k, *base.uvit.modalities[n].shape) for n, k in given.items()}
    with pytest.raises(SegsynError, match=match): sample_modalities(base, wanted, given, seeds)


def test_prompts_and_seeds_are_counted(base):
    with pytest.raises(SegsynError, match="2 prompts, 1 seeds"): sample_uvit(base, TEXTS[:2], [1])
    with pytest.raises(SegsynError, match="too long"): sample_uvit(base, [" ".join(TEXTS*4)], [1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resume_is_exact(parts, tmp_path, checkpointing):
    settings = dict(steps=4, batch_size=4, learning_rate=1e-3, ema_decay=0.9, precision="fp32", threads=1, checkpoint_every=1, keep_checkpoints=9, log_every=1, gradient_checkpointing=checkpointing)
    straight = make_base(parts)
    train_uvit(straight, make_data(straight, parts), TrainConfig(**settings), tmp_path/"straight", prompts=TEXTS[:2], progress=False)
    middle = checkpoint_folders(tmp_path/"straight")[1]
    shutil.copytree(middle, tmp_path/"again"/"checkpoints"/middle.name)
    resumed = make_base(parts, seed=7)
    train_uvit(resumed, make_data(resumed, parts), TrainConfig(**settings), tmp_path/"again", prompts=TEXTS[:2], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(straight.uvit.state_dict().values(), resumed.uvit.state_dict().values()))
    assert (tmp_path/"straight"/"history.jsonl").read_bytes() == (tmp_path/"again"/"history.jsonl").read_bytes()
    assert not torch.equal(straight.uvit.middle.mlp[0].weight, make_base(parts).uvit.middle.mlp[0].weight)
    assert (tmp_path/"straight"/"samples-000004.png").is_file()
    with pytest.raises(SegsynError, match="other settings"): train_uvit(make_base(parts), make_data(straight, parts), TrainConfig(**settings), tmp_path/"again", weights={"image": 1, "text": 1, "clip": 1}, progress=False)


def test_frozen_parts_stay(parts, tmp_path):
    base = make_base(parts)
    before = {n: [p.clone() for p in getattr(base, n).parameters()] for n in ("vae", "text_encoder", "clip", "codes")}
    train_uvit(base, make_data(base, parts), TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, precision="fp32"), tmp_path, prompts=TEXTS[:1], progress=False)
    assert all(torch.equal(a, b) for n, old in before.items() for a, b in zip(old, getattr(base, n).parameters()))


def test_loss_of_a_grown_model_asks_for_its_weights(parts):
    base = make_base(parts)
    grown = replace(base, uvit=grow_uvit(base.uvit))
    with pytest.raises(SegsynError, match="label"): MultimodalLoss(grown)
    loss = MultimodalLoss(grown, {"image": 1, "text": 0.5, "clip": 0.5, "label": 1})
    batch = make_data(base, parts).__getitems__([(k, k) for k in range(4)])
    value, errors = loss(grown.uvit, {**batch, "label": batch["image"]}, torch.Generator().manual_seed(0))
    assert value.isfinite() and set(errors) == {"image error", "text error", "clip error", "label error"}
    assert set(sample_modalities(grown, ("image", "clip", "label"), {"text": base.encode_text(TEXTS[:1])}, [1], steps=1)) == {"image", "clip", "label"}
    for name, like in (("image", "image"), ("label", "picture")):
        with pytest.raises(SegsynError, match="cannot be added"): grow_uvit(base.uvit, name, like)


def test_loss_against_its_formula(base):
    "By hand, for one sample: v = sqrt(a) noise - sqrt(1 - a) clean, every modality at its clock's time."
    from diffusers import DDPMScheduler
    batch = {n: torch.randn(1, *m.shape, generator=torch.Generator().manual_seed(k)) for k, (n, m) in enumerate(base.uvit.modalities.items())}
    loss = MultimodalLoss(base, {"image": 2.0, "text": 0.5, "clip": 0.25}, min_snr_gamma=None)
    times = loss.draw_times(1, generator := torch.Generator().manual_seed(5))
    noise = loss.draw_noise(batch, generator)
    share = {c: DDPMScheduler.from_config(base.scheduler_config).alphas_cumprod[t].item() for c, t in times.items()}
    a = {"image": share["image"], "clip": share["image"], "text": share["text"]}
    with torch.no_grad():
        answer = base.uvit({n: a[n]**0.5*batch[n] + (1 - a[n])**0.5*noise[n] for n in batch}, times)
        wanted = sum(w*(answer[n] - a[n]**0.5*noise[n] + (1 - a[n])**0.5*batch[n]).pow(2).mean() for n, w in (("image", 2.0), ("text", 0.5), ("clip", 0.25)))
        found, _ = loss(base.uvit, batch, torch.Generator().manual_seed(5))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_codes_and_data_are_checked(base, parts):
    small, clip, images, tokens, codes = parts
    with pytest.raises(SegsynError, match="fewer directions"): create_codes(small.text_encoders[0], tokens, clip_features(clip, images), 32)
    with pytest.raises(SegsynError, match="Every picture"): MultimodalData(base, torch.zeros(7, 4, 16, 16), tokens, torch.zeros(8, 1, 12))
    with pytest.raises(SegsynError, match="Every picture"): CaptionedImages(images, tokens[:3, 0])
    with pytest.raises(SegsynError, match="where: weights"): MultimodalLoss(base, {"image": 1})


def test_clip_counts_equal_captions_as_right(parts):
    "Two pictures under one caption: a model that cannot tell them apart has found a right one, and its loss is the entropy of the shared target."
    class Model:
        def __call__(self, input_ids, pixel_values):
            same = (input_ids[:, None] == input_ids[None]).all(-1).float()
            return type("Answer", (), {"logits_per_text": 1000*same})
    ids = torch.tensor([[1, 2], [3, 4], [1, 2]])
    value, metrics = contrastive_loss(Model(), {"token_ids": ids, "pixels": torch.zeros(3, 3, 8, 8)}, None)
    assert metrics["found"].item() == 1 and value.item() == pytest.approx(2/3*np.log(2), rel=1e-4)


def test_clip_resumes_exactly(parts, tmp_path):
    small, _, images, tokens, _ = parts
    config = TrainConfig(steps=4, batch_size=4, learning_rate=1e-3, precision="fp32", threads=1, checkpoint_every=2)
    run = lambda folder: train_clip(images, tokens[:, 0], small.tokenizers[0], config, folder, progress=False, width=16, layers=1, projection=12)[0]
    straight = run(tmp_path/"straight")
    middle = checkpoint_folders(tmp_path/"straight")[0]
    shutil.copytree(middle, tmp_path/"again"/"checkpoints"/middle.name)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), run(tmp_path/"again").state_dict().values()))


def test_unidiffuser_weights_there_and_back():
    torch.manual_seed(0)
    model = UViT(**unidiffuser_config(TINY))
    state = to_unidiffuser_weights(model)
    again = load_unidiffuser_weights(UViT(**unidiffuser_config(TINY)), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_foreign_weights_are_refused():
    model = UViT(**unidiffuser_config(TINY))
    state = to_unidiffuser_weights(model)
    with pytest.raises(SegsynError, match="1 missing: text_in.bias"): load_unidiffuser_weights(model, {k: v for k, v in state.items() if k != "text_in.bias"})
    with pytest.raises(SegsynError, match="1 not known: more"): load_unidiffuser_weights(model, {**state, "more": torch.zeros(1)})
    with pytest.raises(SegsynError, match="where: text_in.weight"): load_unidiffuser_weights(model, {**state, "text_in.weight": torch.zeros(16, 7)})
    with pytest.raises(SegsynError, match="where: pos_embed"): load_unidiffuser_weights(model, {**state, "pos_embed": state["pos_embed"][:, :-1]})


@pytest.mark.parametrize("changes,where", [({"activation_fn": "geglu"}, "activation_fn"), ({"use_timestep_embedding": True}, "use_timestep_embedding"), ({"pre_layer_norm": True}, "block_type, pre_layer_norm")])
def test_foreign_configs_are_refused(changes, where):
    with pytest.raises(SegsynError, match=f"where: {where}"): unidiffuser_config({**UNIDIFFUSER_V1, **changes})


def test_the_published_size():
    with torch.device("meta"): model = UViT(**unidiffuser_config(UNIDIFFUSER_V1))
    assert sum(p.numel() for p in model.parameters()) == 952_509_520
    assert len({p.theirs for p in unidiffuser_pieces(model)}) == 480
    out = model({n: torch.empty(2, *m.shape, device="meta") for n, m in model.modalities.items()}, {"image": torch.zeros(2, device="meta"), "text": torch.zeros(2, device="meta")})
    assert {n: tuple(v.shape) for n, v in out.items()} == {"text": (2, 77, 64), "clip": (2, 1, 512), "image": (2, 4, 64, 64)}
