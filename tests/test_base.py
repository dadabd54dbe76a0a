"The contracts of segsyn.base that its notebook does not show: full-size shapes, other kinds of bases, wrong input, damaged folders."
import json, os, shutil, subprocess, sys
from dataclasses import replace
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from segsyn.base import (SAMPLERS, Base, Conditioning, DenoiserWithText, DiffusionLoss, add_noise, base_fingerprint, build_parts, decode_latents, diffusion_loss,
                         empty_conditioning, encode_images, encode_prompts, full_size_config, load_base, make_sampler, make_tiny_base, min_snr_weights,
                         predict_noise, resolve_precision, sample_latents, sample_noise, save_base, tokenize_prompts, train_tokenizer, training_target)
from segsyn.files import SegsynError

KINDS = {"sd": {}, "sd21": {"scheduler": {"prediction_type": "v_prediction"}}, "sdxl": {}}
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(): return {kind: make_tiny_base(kind, **options) for kind, options in KINDS.items()}


@pytest.fixture()
def folder(bases, tmp_path): return save_base(bases["sd"], tmp_path/"base")


def close(a, b, tolerance): assert (a - b).abs().max().item() <= tolerance*b.abs().max().item()


@pytest.mark.parametrize("name,unet,vae,text", [("sd15", 859_520_964, 83_653_863, [123_060_480]), ("sd21", 865_910_724, 83_653_863, [340_387_840]),
                                               ("sdxl", 2_567_463_684, 83_653_863, [123_060_480, 694_659_840])])
def test_full_size(name, unet, vae, text):
    with torch.device("meta"): parts = build_parts(full_size_config(name))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(parts[1]), count(parts[0]), [count(t) for t in parts[2]]) == (unet, vae, text)
    base = Base(*parts, [], full_size_config(name)["scheduler"])
    assert base.image_size == (1024 if name == "sdxl" else 512) and base.latent_shape() == (4, base.image_size//8, base.image_size//8)
    width = sum(t.config.hidden_size for t in parts[2])
    conditioning = Conditioning(torch.empty(2, 77, width, device="meta"), *([torch.empty(2, 1280, device="meta"), torch.empty(2, 6, device="meta")] if name == "sdxl" else []))
    out = predict_noise(base, torch.empty(2, 4, 64, 64, device="meta"), torch.zeros(2, device="meta"), conditioning)
    assert out.shape == (2, 4, 64, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_saved_base_is_a_diffusers_pipeline(bases, kind, half, tmp_path):
    import diffusers
    base, folder = bases[kind], save_base(bases[kind], tmp_path/"base", half)
    again = load_base(folder)
    pipe = getattr(diffusers, PIPELINES[base.kind]).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_sampler("dpm++", again, 3)
    seeds, prompts = [5, 6], ["a bird", "two flowers"]
    for negative in (None, ["a tree", ""]):
        theirs = pipe(prompts, negative_prompt=negative, num_inference_steps=3, guidance_scale=5.0, height=64, width=64,
                      generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="np").images
        latents = sample_latents(again, encode_prompts(again, prompts), negative and encode_prompts(again, negative), seeds, steps=3, guidance=5.0)
        assert np.abs(theirs*255 - decode_latents(again, latents)).max() <= 0.51
    stored = {part: {v.dtype for v in load_file(next((folder/part).glob("*.safetensors"))).values()} for part in ("unet", "vae", "text_encoder")}
    expected = torch.float16 if half else torch.float32
    assert stored == {"unet": {expected}, "vae": {expected}, "text_encoder": {torch.float32}}
    assert (again.kind, again.prediction_type, again.zero_empty) == (base.kind, base.prediction_type, base.zero_empty)
    assert [t.get_vocab() for t in again.tokenizers] == [t.get_vocab() for t in base.tokenizers]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_wherever_and_however_often_it_is_saved(bases, kind, tmp_path):
    first = save_base(bases[kind], tmp_path/"a")
    second = save_base(load_base(first), tmp_path/"elsewhere"/"b")
    files = lambda f: {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()}
    assert files(first) == files(second)
    assert not any(str(tmp_path).encode() in content for content in files(second).values())
    assert base_fingerprint(first) == base_fingerprint(second) == load_base(second).fingerprint


def test_fingerprint_follows_training(folder):
    base = load_base(folder)
    before = base.fingerprint
    with torch.no_grad(): next(base.unet.parameters()).add_(1e-3)
    assert base.fingerprint != before


def test_fingerprint_follows_the_parts(folder):
    base = load_base(folder)
    encoded, other = encode_prompts(base, ["a bird"]), make_tiny_base(seed=5)
    assert base.fingerprint != replace(base, unet=other.unet).fingerprint
    assert not torch.equal(encoded.hidden, encode_prompts(replace(base, text_encoders=other.text_encoders), ["a bird"]).hidden)


@pytest.mark.parametrize("images", [np.zeros((16, 16, 3), np.uint8), np.zeros((2, 3, 16, 16), np.uint8), np.zeros((2, 16, 16, 3), np.float32)])
def test_images_of_another_shape_are_refused(folder, images):
    with pytest.raises(SegsynError, match=r"(?s)wrong shape.*\(.*16, 16.*\)"): encode_images(load_base(folder), images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_slot_and_neighbours_do_not_matter(bases, kind, sampler):
    base, seeds = bases[kind], [3, 4, 5]
    conditioning = encode_prompts(base, ["a bird", "two fish", "a car"])
    for dtype in (torch.float32, torch.bfloat16):
        b = Base(**{k: getattr(base, k) for k in ("vae", "unet", "text_encoders", "tokenizers", "scheduler_config", "zero_empty")}, dtype=dtype)
        draw = lambda order, s: sample_latents(b, conditioning[order], seeds=s, steps=3, sampler=sampler)
        one = draw([0, 1, 2], seeds)[2]
        assert torch.equal(one, draw([2, 0, 0], [5, 17, 18])[0])
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_with_few_and_all_steps(bases, kind):
    for name in SAMPLERS:
        for steps in (1, 2, 999, 1000):
            scheduler = make_sampler(name, bases[kind], steps)
            assert len(scheduler.timesteps) == steps and 0 <= scheduler.timesteps.min() and scheduler.timesteps.max() <= 999
            assert scheduler.config.prediction_type == bases[kind].prediction_type
        assert torch.isfinite(sample_latents(bases[kind], encode_prompts(bases[kind], ["a bird"]), seeds=[1], steps=1, sampler=name)).all()


def test_published_scheduler_configs():
    "Folders on the Hub name another scheduler, with keys of its own; latents must not be clipped."
    published = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    for name in SAMPLERS:
        scheduler = make_sampler(name, published, 20)
        assert not getattr(scheduler.config, "clip_sample", False)


def test_guidance(bases):
    base, calls = bases["sd"], []
    prompts, negative = encode_prompts(base, ["a bird"]), encode_prompts(base, ["a tree"])
    def spy(latents, time, conditioning):
        calls.append((len(latents), conditioning.hidden.clone()))
        return predict_noise(base, latents, time, conditioning)
    sample_latents(base, prompts, negative, [1], steps=1, guidance=3, denoiser=spy)
    assert calls[0][0] == 2 and torch.equal(calls[0][1], torch.cat([negative.hidden, prompts.hidden])) # the prompt is the second half
    plain = sample_latents(base, prompts, negative, [1], steps=1, guidance=1, denoiser=spy)
    assert calls[1][0] == 1 and torch.equal(plain, sample_latents(base, prompts, None, [1], steps=1, guidance=0.5))


def test_no_prompt(bases):
    assert empty_conditioning(bases["sdxl"]).hidden.abs().sum() == 0 == empty_conditioning(bases["sdxl"]).pooled.abs().sum()
    assert torch.equal(empty_conditioning(bases["sd"]).hidden, encode_prompts(bases["sd"], [""]).hidden)
    assert encode_prompts(bases["sdxl"], ["a bird"]).hidden.abs().sum() > 0 # zeros did not get into the memory
    encode_prompts(bases["sdxl"], [""])
    assert encode_prompts(bases["sdxl"], [""]).hidden.abs().sum() > 0


def test_prompt_is_encoded_alone_and_once(bases, monkeypatch):
    base, calls = make_tiny_base("sdxl"), []
    forward = base.text_encoders[0].forward
    monkeypatch.setattr(base.text_encoders[0], "forward", lambda ids, **kw: calls.append(ids.shape) or forward(ids, **kw))
    encode_prompts(base, ["a bird", "two fish", "a bird"]); encode_prompts(base, ["two fish"], size=32)
    assert calls == [(1, 16)]*2
    assert encode_prompts(base, ["two fish"], size=(32, 64)).time_ids.tolist() == [[32, 64, 0, 0, 32, 64]]


def test_half_weights_as_on_a_gpu(bases):
    base = make_tiny_base("sdxl")
    prompts = encode_prompts(base, ["a bird", "two fish"])
    full = sample_latents(base, prompts, seeds=[1, 2], steps=2)
    base.unet.to(torch.bfloat16); base.dtype = torch.bfloat16
    half = sample_latents(base, prompts, seeds=[1, 2], steps=2)
    assert half.dtype == torch.float32
    close(half, full, 0.1)


def test_latents(bases):
    base, images = bases["sd"], np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    latents = encode_images(base, images)
    assert latents.shape == (2, 4, 8, 16) == (2, *base.latent_shape((32, 64))) and decode_latents(base, latents).shape == images.shape
    a, b = (encode_images(base, images, [torch.Generator().manual_seed(s) for s in (1, 2)]) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, latents)
    base = make_tiny_base("sd", vae=dict(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5))
    raw = base.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1).latent_dist.mean
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    close(encode_images(base, images), (raw - mean)*0.5/std, 1e-5)
    shifted = make_tiny_base("sd", vae=dict(shift_factor=0.1, scaling_factor=0.5))
    close(encode_images(shifted, images), (shifted.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1).latent_dist.mean - 0.1)*0.5, 1e-5)


def test_autoencoder_is_enough_for_latents(bases):
    vae_only = Base(vae=bases["sd"].vae, unet=None, text_encoders=[], tokenizers=[], scheduler_config={})
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert torch.equal(encode_images(vae_only, images), encode_images(bases["sd"], images))


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_denoiser_has_no_loss(bases, kind):
    "A denoiser that knows the clean latents answers the target exactly, for both prediction types."
    base, latents = bases[kind], torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    def oracle(noisy, timesteps):
        clean, zero = add_noise(base, latents, torch.zeros_like(latents), timesteps), torch.zeros_like(latents)
        noise = (noisy - clean)/add_noise(base, zero, torch.ones_like(latents), timesteps)
        return training_target(base, latents, noise, timesteps)
    assert diffusion_loss(oracle, base, latents, torch.Generator().manual_seed(1), 5.0)[0] < 1e-4


def test_min_snr_is_the_same_weight_on_the_clean_latent():
    "Both formulas say the same: an error in the clean latent counts min(SNR, gamma) times."
    config, every = full_size_config("sd15")["scheduler"], torch.arange(1000)
    share = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2, 0)
    snr = share/(1 - share)
    for kind, of_clean in (("epsilon", snr), ("v_prediction", snr + 1)): # squared error of the prediction = of_clean times that of the clean latent
        close(min_snr_weights(config | {"prediction_type": kind}, every, 5.0)*of_clean, snr.clamp(max=5), 1e-3)
    zero_snr = config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert torch.isfinite(min_snr_weights(zero_snr, every)).all() and torch.isfinite(min_snr_weights(zero_snr | {"prediction_type": "epsilon"}, every)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches(bases, kind):
    base = make_tiny_base(kind, **KINDS[kind])
    loss, latents = DiffusionLoss(base, caption_dropout=0.5), torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    c = encode_prompts(base, ["a bird"]*4)
    batch = {"latents": latents, "hidden": c.hidden} | ({"pooled": c.pooled, "time_ids": c.time_ids} if base.kind == "sdxl" else {})
    value, metrics = loss(base.unet, batch, torch.Generator().manual_seed(2))
    value.backward()
    assert torch.isfinite(value) and all(p.grad is not None for p in base.unet.parameters())
    assert torch.equal(value, loss(base.unet, batch, torch.Generator().manual_seed(2))[0]) and float(metrics["mse"]) > 0
    all_dropped = DiffusionLoss(base, caption_dropout=1.0).drop_captions(batch, torch.Generator())
    assert torch.equal(all_dropped["hidden"], empty_conditioning(base, 4).hidden) and torch.equal(all_dropped["latents"], latents)
    if base.kind == "sdxl": assert torch.equal(all_dropped["pooled"], empty_conditioning(base, 4).pooled) and torch.equal(all_dropped["time_ids"], c.time_ids)


def test_denoiser_with_text(bases):
    base = make_tiny_base("sd")
    model = DenoiserWithText(base.unet, base.text_encoders[0])
    ids = tokenize_prompts(base.tokenizers[0], ["a bird", "two fish"])
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    close(model(latents, torch.tensor([3, 30]), ids).detach(), predict_noise(base, latents, torch.tensor([3, 30]), encode_prompts(base, ["a bird", "two fish"])).detach(), 1e-5)
    model.enable_gradient_checkpointing(); model.train()
    DiffusionLoss(base)(model, {"latents": latents, "token_ids": ids}, torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in model.named_parameters())


def test_tokenizer():
    captions = ["a photo of three rodents and a traffic sign", "two butterflies beside an apple; butterfly apple", "a photo of a bird"]
    tokenizer = train_tokenizer(captions, 2000, 24)
    assert all(len(tokenizer.tokenize(w)) == 1 for c in captions for w in c.replace(";", " ").split())
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1 and tokenizer.model_max_length == 24
    assert tokenizer.get_vocab() == train_tokenizer(captions, 2000, 24).get_vocab()
    assert len(train_tokenizer(captions, 530)) <= 530
    code = "import hashlib; from segsyn.base import make_tiny_base; b = make_tiny_base('sd'); print(hashlib.sha256(repr(sorted(b.tokenizers[0].get_vocab().items())).encode()).hexdigest(), b.fingerprint)"
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONHASHSEED=str(seed))).stdout for seed in (0, 1)}
    assert len(prints) == 1 # the same in every process
    for text in ("日本 naïve ☃", "x", "a-b c's 123", "zebra"):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"][1:-1]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def refused(what, call, *names):
    with pytest.raises(SegsynError) as error: call()
    assert what in str(error.value) and all(n in str(error.value) for n in names), str(error.value)


def test_wrong_arguments(bases):
    base = bases["sd"]
    one = encode_prompts(base, ["a bird"])
    refused("no sampler", lambda: make_sampler("ddmp", base, 10), "Did you mean")
    for steps in (0, 1001, 2.5, True): refused("number of steps", lambda: make_sampler("ddim", base, steps), str(steps))
    refused("no base of this name", lambda: make_tiny_base("sdx"), "sdxl")
    refused("no precision", lambda: resolve_precision("bf-16"), "bf16")
    refused("needs a GPU", lambda: resolve_precision("fp16", "cpu"))
    refused("does not fit the autoencoder", lambda: sample_noise(base, [0], 30), "30 x 30", "multiples of 4")
    refused("prompt and a seed", lambda: sample_latents(base, one, seeds=[1, 2]), "1 prompts, 2 seeds")
    refused("prompt and a seed", lambda: sample_latents(base, one, empty_conditioning(base, 3), [1]), "3 negative")
    refused("list of texts", lambda: encode_prompts(base, "a bird"))
    refused("list of texts", lambda: encode_prompts(base, ["a bird", None]), "NoneType")
    refused("list of texts", lambda: encode_prompts(base, []))
    refused("too long", lambda: encode_prompts(base, ["bird "*30]), "32 tokens", "16")
    assert encode_prompts(base, ["bird "*30], truncate=True).hidden.shape == (1, 16, 32)
    refused("wrong shape", lambda: encode_images(base, np.zeros((1, 3, 32, 32), np.uint8)))
    refused("does not fit", lambda: encode_images(base, np.zeros((1, 31, 32, 3), np.uint8)), "31 x 32")
    refused("dropped captions", lambda: DiffusionLoss(base, caption_dropout=10), "10")
    refused("vocabulary", lambda: train_tokenizer(["a"], 300))


def test_results_that_are_no_pictures(bases, monkeypatch):
    base = bases["sd"]
    latents = torch.zeros(3, 4, 16, 16); latents[1, 0, 0, 0] = float("inf")
    refused("not finite", lambda: decode_latents(base, latents), "slots [1]")
    broken = lambda z, t, c: torch.full_like(z, float("nan"))
    refused("not finite", lambda: sample_latents(base, encode_prompts(base, ["a bird"]), seeds=[1], steps=2, denoiser=broken), "slots [0]")
    class Out: sample = torch.stack([torch.zeros(3, 64, 64), -torch.ones(3, 64, 64)])
    monkeypatch.setattr(base.vae, "decode", lambda z: Out)
    refused("black", lambda: decode_latents(base, latents[:1].repeat(2, 1, 1, 1)), "slots [1]")
    assert decode_latents(base, latents[:1].repeat(2, 1, 1, 1), allow_black=True)[1].max() == 0


def test_damaged_folders(folder, tmp_path, bases):
    index = json.loads((folder/"model_index.json").read_text())
    refused("no such model folder", lambda: load_base(tmp_path/"absent"), "absent")
    def variant(name, **changes):
        path = shutil.copytree(folder, tmp_path/name)
        (path/"model_index.json").write_text(json.dumps(index | changes))
        return path
    refused("does not work here", lambda: load_base(variant("class", unet=["diffusers", "FluxTransformer2DModel"])), "FluxTransformer2DModel", "UNet2DConditionModel")
    refused("lacks a part", lambda: load_base(variant("part", vae=[None, None])), "vae")
    weights = "unet/diffusion_pytorch_model.safetensors"
    cut = variant("cut"); (cut/weights).write_bytes((folder/weights).read_bytes()[:5000])
    refused("could not be loaded", lambda: load_base(cut), "unet")
    few = variant("few"); tensors = load_file(folder/weights); tensors.pop(sorted(tensors)[0]); save_file(tensors, few/weights, {"format": "pt"})
    refused("", lambda: load_base(few), "unet")
    gone = variant("gone"); (gone/weights).unlink()
    refused("missing", lambda: load_base(gone), weights)
    pickled = variant("pickled"); (pickled/weights).rename((pickled/weights).with_suffix(".bin"))
    refused("pickle", lambda: load_base(pickled))
    other = variant("other"); shutil.rmtree(other/"text_encoder"); bases["sd"].text_encoders[0].__class__(bases["sd"].text_encoders[0].config.__class__(**bases["sd"].text_encoders[0].config.to_dict() | {"hidden_size": 64})).save_pretrained(other/"text_encoder")
    refused("do not fit each other", lambda: load_base(other), "needs 64")
    schedule = variant("schedule"); (schedule/"scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": "sample"}))
    refused("no prediction type", lambda: load_base(schedule), "epsilon")


def test_unfinished_save_leaves_the_old_one(folder, bases):
    before = base_fingerprint(folder)
    broken = make_tiny_base("sd")
    with torch.no_grad(): next(broken.unet.parameters()).view(-1)[0] = 1e6
    refused("not finite", lambda: save_base(broken, folder, half=True), "unet", "fp16")
    assert base_fingerprint(folder) == before and [p.name for p in folder.parent.iterdir()] == ["base"]


def test_latents_are_kept_and_not_mistaken_for_others(tmp_path):
    from segsyn.tiny_base import create_autoencoder, encode_corpus
    vae, images = create_autoencoder((16, 16, 16)).eval(), np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    first = encode_corpus(vae, images, 3, False, tmp_path / "latents.npy")
    assert torch.equal(encode_corpus(vae, 255 - images, 3, False, tmp_path / "latents.npy"), first), "read, not computed anew"
    with pytest.raises(SegsynError, match="other pictures"): encode_corpus(vae, images[:2], 2, False, tmp_path / "latents.npy")
