"Attention is read beside the denoiser: the picture keeps its bytes, the maps are exact, and a sample's neighbours have no part in it."
import weakref
from dataclasses import dataclass
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from segsyn.attention import (AttentionMaps, DatasetDiffusion, add_head_mean, attention_layers, attention_maps, attention_resolutions, attention_settings,
                              capture_attention, chosen_steps, default_resolutions, level_grids, mask_from_maps, maps_to_mask, presence_score,
                              read_attention, refine_maps, scale_maps)
from segsyn.base import decode_latents, encode_prompts, full_size_config, make_tiny_base, predict_noise, sample_latents, sample_noise
from segsyn.files import SegsynError
from segsyn.labels import LabelSpace
from segsyn.prompts import build_prompt, token_spans

KINDS = ("sd", "sd21", "sdxl")
SPACE = LabelSpace.create(["background", "bird", "boat", "flower"])


@dataclass(frozen=True)
class Asked:
    key: str; caption: str; classes: tuple; seed: int


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    torch.set_num_threads(1)
    made = make_tiny_base(request.param)
    # random projections give nearly flat maps; sharper ones make differences visible
    with torch.no_grad():
        for layer in attention_layers(made.unet).values(): layer.to_q.weight *= 6; layer.to_k.weight *= 6
    return made


def requests(count): return [Asked(f"{i:06d}", ("a bird on a boat", "a flower", "two birds")[i % 3], (("bird", "boat"), ("flower",), ("bird",))[i % 3], 100 + i) for i in range(count)]


class Reference(AttnProcessor):
    "The slow, obvious version: explicit attention that keeps every map of every head."
    def __init__(self, store, name): self.store, self.name = store, name
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        own = encoder_hidden_states is None
        key = attn.to_k(hidden_states if own else self.store["class_hidden"])
        query, key = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), key))
        count = len(self.store["class_hidden"])
        query, key = query[-count:], key[-count:]
        self.store.setdefault(("self" if own else "cross", query.shape[2]), []).append((query @ key.mT * attn.scale).softmax(-1).mean(1))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def test_bytes_are_those_of_plain_sampling(base):
    method = DatasetDiffusion(base, SPACE, steps=4, chunk_size=3, sampler="dpm++")
    asked = requests(3)
    text = encode_prompts(base, [build_prompt(r.caption, r.classes, tokenizer=base.tokenizers).text for r in asked])
    plain = decode_latents(base, sample_latents(base, text, None, [r.seed for r in asked], None, 4, 7.5, "dpm++"))
    made = method(asked)
    assert all(np.array_equal(a, s.image) for a, s in zip(plain, made))
    # and the hooks are gone
    assert not base.unet._forward_pre_hooks and not any(l.to_q._forward_hooks or l.to_k._forward_hooks for l in attention_layers(base.unet).values())


def test_neighbours_and_slots_do_not_matter(base):
    method = DatasetDiffusion(base, SPACE, steps=3, chunk_size=3, sampler="dpm++")
    asked = requests(5)
    together, reordered, alone = method(asked), method(asked[::-1])[::-1], [method([r])[0] for r in asked]
    for one, two, three in zip(together, reordered, alone):
        assert one.key == two.key == three.key and one.scores == two.scores == three.scores and one.extra == two.extra == three.extra
        for other in (two, three): assert np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)


def test_sums_equal_the_slow_version_and_rows_sum_to_one(base):
    count, size = 2, base.latent_shape()[-1]
    noise, time = sample_noise(base, [1, 2]), torch.tensor(300)
    text = encode_prompts(base, ["a bird", "", "a boat", "two flowers"])
    class_hidden = encode_prompts(base, ["bird", "boat flower"]).hidden
    store = {"class_hidden": class_hidden}
    resolutions = attention_resolutions(base.unet, size)
    with capture_attention(base.unet, class_hidden, resolutions[0], resolutions) as capture:
        out = [predict_noise(base, torch.cat([noise, noise]), time, text) for _ in range(2)][0]
    before = base.unet.attn_processors
    base.unet.set_attn_processor({name: Reference(store, name) for name in before})
    with torch.no_grad(): slow = predict_noise(base, torch.cat([noise, noise]), time, text)
    base.unet.set_attn_processor(before)
    assert torch.allclose(out, slow, atol=1e-4)
    grids = level_grids(size, size, len(base.unet.config.block_out_channels))
    compared = 0
    for (kind, positions), maps in ((k, v) for k, v in store.items() if isinstance(k, tuple)):
        if (kind, grids[positions]) not in capture.sums: continue
        mean = capture.sums[kind, grids[positions]] / capture.counts[kind, grids[positions]]
        assert capture.counts[kind, grids[positions]] == 2 * len(maps) and mean.dtype == torch.float32 and len(mean) == count
        assert torch.allclose(mean, torch.stack(maps).mean(0), atol=2e-5)
        assert torch.allclose(mean.sum(-1), torch.ones(()), atol=1e-5)
        compared += 1
    assert compared == 1 + len(resolutions)
    # the resolutions told by the config are those that run
    assert {r for kind, r in capture.seen if kind == "cross"} == set(resolutions)


def test_softmax_over_the_classes_leaves_the_padding_out(base):
    ids, spans = token_spans(base.tokenizers, ["bird", "boat"])
    hidden = encode_prompts(base, ["bird boat"]).hidden
    noise, text = sample_noise(base, [1]), encode_prompts(base, ["a bird"])
    size = base.latent_shape()[-1]
    with capture_attention(base.unet, hidden, None, default_resolutions(base.unet, size)[1], token_counts=[len(ids)]) as capture:
        predict_noise(base, noise, torch.tensor(300), text)
    (place, total), = capture.sums.items()
    assert not total[..., len(ids):].any() and torch.allclose(total[..., :len(ids)].sum(-1) / capture.counts[place], torch.ones(()), atol=1e-5)


def test_only_chosen_steps_layers_and_heads_are_read(base):
    hidden, noise, text = encode_prompts(base, ["bird"]).hidden, sample_noise(base, [1]), encode_prompts(base, ["a bird"])
    size = base.latent_shape()[-1]
    own, cross = default_resolutions(base.unet, size)
    def read(**options):
        with capture_attention(base.unet, hidden, own, cross, **options) as capture:
            for time in (900, 500, 100): predict_noise(base, noise, torch.tensor(time), text)
        return capture
    every, first, one = read(), read(calls=[0]), read(self_layers=[("up_blocks", [0])], cross_layers=[("up_blocks", None)])
    assert all(every.counts[place] == 3 * first.counts[place] for place in every.counts)
    assert all(one.counts[place] < every.counts[place] for place in every.counts)
    heads = [read(self_layers=[("up_blocks", [h])]).sums["self", (own, own)] for h in (0, 1)]
    both = read(self_layers=[("up_blocks", [0, 1])]).sums["self", (own, own)]
    assert torch.allclose(both, (heads[0] + heads[1]) / 2, atol=1e-5)
    with pytest.raises(SegsynError, match="no such head"): read(self_layers=[("up_blocks", [99])])
    with pytest.raises(SegsynError, match="resolution"):
        with capture_attention(base.unet, hidden, 5, cross) as capture: predict_noise(base, noise, torch.tensor(100), text)
        attention_maps(capture, [["bird"]], [[(1, 2)]])
    with pytest.raises(SegsynError, match="batch"):
        with capture_attention(base.unet, hidden, own, cross): predict_noise(base, sample_noise(base, [1, 2, 3]), torch.tensor(1), encode_prompts(base, ["a"] * 3))
    assert not base.unet._forward_pre_hooks


def test_half_precision_maps_are_added_in_fp32():
    torch.set_num_threads(1)
    base = make_tiny_base("sd21")
    hidden, noise, text = encode_prompts(base, ["bird"]).hidden, sample_noise(base, [1]), encode_prompts(base, ["a bird"])
    with torch.autocast("cpu", torch.bfloat16), capture_attention(base.unet, hidden, 16, (16,)) as capture: predict_noise(base, noise, torch.tensor(100), text)
    for place, total in capture.sums.items():
        assert total.dtype == torch.float32 and torch.allclose(total.sum(-1) / capture.counts[place], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 48), (40, 40), (17, 9)])
def test_pictures_that_are_not_square_or_not_even(shape):
    torch.set_num_threads(1)
    base = make_tiny_base("sd")
    latents, text = torch.randn(1, 4, *shape), encode_prompts(base, ["a bird"])
    own, cross = default_resolutions(base.unet, *shape)
    try: predict_noise(base, latents, torch.tensor(100), text)
    except RuntimeError: pytest.skip("the U-Net itself refuses this size")
    with capture_attention(base.unet, encode_prompts(base, ["bird"]).hidden, own, cross) as capture: predict_noise(base, latents, torch.tensor(100), text)
    maps, = attention_maps(capture, [["bird"]], [[(1, 2)]])
    assert max(maps.cross.shape[1:]) == own and maps.self_map.shape[0] == maps.cross[0].numel()


def test_full_size_denoisers_get_the_papers_resolutions():
    def shaped(name):
        with torch.device("meta"): return UNet2DConditionModel(**full_size_config(name)["unet"])
    for name, latent, expected in (("sd15", 64, (32, (16,))), ("sd21", 64, (32, (16,))), ("sdxl", 128, (32, (32,)))):
        assert default_resolutions(shaped(name), latent) == expected


def test_running_sum_holds_one_head_at_a_time(monkeypatch):
    largest = []
    kept = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *a, **k: (largest.append(x.numel()), kept(x, *a, **k))[1])
    query, key = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    one = add_head_mean(torch.zeros(2, 64, 64), query, key, heads=8)
    assert max(largest) == 2 * 64 * 64
    assert torch.allclose(one, add_head_mean(torch.zeros(2, 64, 64), query, key, heads=8, group=3), atol=1e-6)
    slow = (query.unflatten(-1, (8, 4)).transpose(1, 2) @ key.unflatten(-1, (8, 4)).transpose(1, 2).mT / 2).softmax(-1).mean(1)
    assert torch.allclose(one, slow, atol=1e-6)


class Peak(TorchDispatchMode):
    "The most bytes that tensors made inside the block have held at once."
    def __init__(self): super().__init__(); self.live, self.now, self.most = set(), 0, 0
    def free(self, key, size): self.live.discard(key); self.now -= size
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata in self.live: continue
            self.live.add(storage._cdata); self.now += storage.nbytes(); self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out


def test_memory_is_the_running_sums_and_one_heads_map():
    torch.set_num_threads(1)
    base = make_tiny_base("sd21")
    hidden, noise, text = encode_prompts(base, ["bird"] * 2).hidden, sample_noise(base, [1, 2]), encode_prompts(base, ["a bird"] * 4)
    def run():
        for time in (900, 100): predict_noise(base, torch.cat([noise, noise]), torch.tensor(time), text)
    with torch.no_grad(), Peak() as plain: run()
    with Peak() as read, capture_attention(base.unet, hidden, 16, (16, 8)) as capture: run()
    kept, head = sum(total.nbytes for total in capture.sums.values()), 2 * 256 * 256 * 4
    small = 64 * 1024 + sum(keys.nbytes for keys in capture.keys.values()) # one head's queries and keys, class keys
    assert head < plain.most and read.most <= plain.most + kept + head + small


@pytest.mark.parametrize("positions", [(8, 8), (16, 16), (32, 24)])
@pytest.mark.parametrize("tau", range(6))
def test_thin_products_equal_the_matrix_power(positions, tau):
    draw = torch.Generator().manual_seed(tau)
    self_map = (3 * torch.randn(positions[0] * positions[1], positions[0] * positions[1], generator=draw)).softmax(-1)
    cross = torch.rand(3, *positions, generator=draw)
    power = torch.linalg.matrix_power(self_map, tau) @ cross.flatten(1).T
    assert (refine_maps(self_map, cross, tau).flatten(1).T - power).abs().max() < 1e-5


def test_weak_maps_survive_many_products():
    "A nearly uniform self-attention leaves little contrast, which must not drown in rounding."
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    self_map = (-0.02 * torch.cdist(places, places)).softmax(-1)
    cross = 0.01 + 0.001 * torch.rand(1, 16, 16, generator=draw); cross[0, 2:6, 2:6] += 0.01
    exact = self_map.double(); exact = torch.linalg.matrix_power(exact / exact.sum(1, keepdim=True), 5) @ cross.double().flatten()
    refined = refine_maps(self_map, cross, 5)
    assert torch.allclose(refined.flatten(), exact, rtol=1e-12) and scale_maps(refined).max() == 1
    constant = refine_maps(self_map, torch.full((1, 16, 16), 0.01) + 1e-9 * torch.rand(1, 16, 16, generator=draw), 5)
    assert not scale_maps(constant).any()


def test_odd_maps_have_a_defined_result():
    flat, empty = torch.full((8, 8), 0.3), torch.zeros(8, 8)
    broken, shaped = torch.full((8, 8), float("nan")), torch.linspace(0, 1, 64).reshape(8, 8)
    noise = flat + 3e-8 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    scaled = scale_maps(torch.stack([flat, empty, broken, noise, shaped]))
    assert not scaled[:4].any() and scaled[4].min() == 0 and scaled[4].max() == 1 and scaled.isfinite().all()
    scores = presence_score(torch.stack([flat, empty, broken, shaped]))
    assert scores[:3].abs().max() < 1e-6 and scores[3] > 0.5 and scores.isfinite().all()
    mask = maps_to_mask(scaled, [1, 2, 3, 1, 2], size=16)
    assert set(np.unique(mask)) <= {0, 2, 255} and (mask == 2).any()
    assert not maps_to_mask(scaled[:4], [1, 2, 3, 1], size=16).any()
    assert (maps_to_mask(scaled[:0], [], size=(4, 6)) == 0).all() and maps_to_mask(scaled[:0], [], size=(4, 6)).shape == (4, 6)
    assert (maps_to_mask(scaled[:1], [1], size=4, ignore_id=65535, background=None) == 65535).all()


def test_thresholds_by_hand():
    values = torch.tensor([[0.0, 0.5, 0.55], [0.6, 0.9, 1.0]])[None]
    assert maps_to_mask(values, [7], 0.5, 0.6, (2, 3)).tolist() == [[0, 0, 255], [7, 7, 7]]
    assert maps_to_mask(values, [7], 0.5, 0.5, (2, 3)).tolist() == [[0, 0, 7], [7, 7, 7]]
    two = torch.cat([values, values.flip(0).flip(1)])
    assert maps_to_mask(two, [7, 9], 0.5, 0.6, (2, 3)).tolist() == [[9, 9, 9], [7, 7, 7]]


def test_a_class_that_was_not_drawn_gets_no_mask():
    shaped = torch.zeros(8, 8); shaped[2:5, 2:5] = 1
    faint = torch.full((8, 8), 0.2); faint[6, 6] = 0.21
    maps = AttentionMaps(("bird", "boat"), torch.stack([shaped, faint]), torch.eye(64))
    mask, scores = mask_from_maps(maps, [1, 2], 8, presence=0.0)
    assert (mask == 2).any() # scaling alone makes it look as sure as any
    mask, scores = mask_from_maps(maps, [1, 2], 8, presence=0.2)
    assert scores["boat"] < 0.2 < scores["bird"] and not (mask == 2).any() and (mask == 1).any()


def test_read_attention_takes_pictures_and_latents_in_any_company():
    torch.set_num_threads(1)
    base = make_tiny_base("sd")
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    args = (["a bird", "a boat", "a flower"], [("bird",), ("boat",), ("flower", "bird")], (100, 400))
    maps = read_attention(base, images, *args, seeds=[1, 2, 3], settings={"chunk_size": 2})
    swapped = read_attention(base, images[::-1], args[0][::-1], args[1][::-1], args[2], seeds=[3, 2, 1], settings={"chunk_size": 2})[::-1]
    for one, two in zip(maps, swapped): assert torch.equal(one.self_map, two.self_map) and torch.equal(one.cross, two.cross)
    assert [m.cross.shape[0] for m in maps] == [1, 1, 2]
    for bad in ((args[0], args[1], ()), (args[0][:2], args[1][:2], (100,))):
        with pytest.raises(SegsynError): read_attention(base, images, *bad, seeds=[1, 2, 3])


def test_settings_are_checked_by_name():
    assert attention_settings().tau == 4 and (attention_settings().alpha, attention_settings().beta, attention_settings().steps, attention_settings().guidance) == (0.5, 0.6, 100, 7.5)
    for bad, word in (({"tua": 3}, "tau"), ({"alpha": 0.9}, "alpha"), ({"capture_steps": (0.4, 0.4)}, "capture_steps"), ({"style": "poem"}, "style"),
                      ({"softmax": "none"}, "softmax"), ({"steps": "many"}, "steps"), ({"beta": 2}, "beta")):
        with pytest.raises(SegsynError, match=word): attention_settings(bad)
    assert attention_settings({"self_layers": [["up_blocks.1", [0, 2]], ["mid_block", None]]}).self_layers == (("up_blocks.1", (0, 2)), ("mid_block", None))
    assert chosen_steps(100, (0.0, 0.12)) == tuple(range(12)) and chosen_steps(4, (0.9, 1.0)) == (3,) and chosen_steps(1, (0.0, 0.1)) == (0,)


def test_unknown_classes_and_captions_without_classes():
    torch.set_num_threads(1)
    base = make_tiny_base("sd")
    method = DatasetDiffusion(base, SPACE, steps=2, chunk_size=1)
    with pytest.raises(SegsynError, match="flower"): method([Asked("0", "a rose", ("flowr",), 1)])
    sample, = DatasetDiffusion(base, SPACE, steps=2, chunk_size=1, style="caption")([Asked("0", "a rose", ("flower",), 1)])
    assert not sample.mask.any() and sample.classes == () and sample.scores["foreground"] == 0
    assert method.fingerprint() != DatasetDiffusion(base, SPACE, steps=2, chunk_size=1, tau=3).fingerprint()
