"Written sets load with plain `datasets`, come back as they were, and every fault is found by name."
import json, os, re, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np
import pytest
import yaml
from PIL import Image
from segsyn.dataset import (PictureError, Sample, SegmentationDataset, check_dataset, finish_dataset, main, png_bytes, read_image, read_mask,
                            write_dataset, write_sample)
from segsyn.files import SegsynError, folder_hashes
from segsyn.labels import LabelSpace

SPACE = LabelSpace.create(("background", "bird", "fish"))
MANY = LabelSpace.create(tuple(f"class {i}" for i in range(300)), background=None)
CAPTIONS = ["plain", 'say "yes"', "it's", "two\nlines\r\nand\ttabs", "{{template}} {% x %} ${y}", "naïve 鳥 🐦 👩‍🚀", "\u202eturned\u202c", "a\u2028b\x85c", "<script>alert(1)</script>",
            "--- \n# no: yaml", "```\ncode", "back\\slash \\n", "", "null", " spaces ", "\x01\x1f", "a,b;c|d"]


def sample(k: int, space: LabelSpace = SPACE, caption: str = "", **more) -> Sample:
    rng = np.random.default_rng(k)
    mask = rng.integers(0, space.num_classes, (6, 8)).astype(space.dtype)
    mask[0, 0] = space.ignore_id
    return Sample(f"{k:06d}", rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), mask, caption or f"caption {k}", (space.names[1],),
                  rng.integers(0, 65536, (6, 8)).astype(np.uint16), seed=2**63 - 1 - k, method="test", scores={"s": k / 7}, extra={"cutouts": [f"c{k}"], "pool": "A"}, **more)


def write(folder: Path, samples=None, space: LabelSpace = SPACE) -> Path:
    write_dataset(folder, samples or [sample(k, space) for k in range(4)], space, "Test", {"seed": 0})
    return folder


def load(folder: Path, cache: Path):
    import datasets
    datasets.disable_progress_bars()
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))


@pytest.mark.parametrize("space", [SPACE, MANY], ids=["8 bits", "16 bits"])
def test_imagefolder_and_reader_agree(tmp_path, space):
    samples = [sample(k, space) for k in range(4)]
    folder = write(tmp_path/"train"/"val-set", samples, space) # names of splits in the path above do no harm
    plain, ours = load(folder, tmp_path/"cache"), SegmentationDataset(folder)
    assert plain.column_names[:4] == ["image", "mask", "instances", "text"]
    assert len(plain) == len(ours) == 4 and ours.space == space and check_dataset(folder) == []
    for raw, read, made in zip(plain, ours, samples, strict=True):
        for name in ("image", "mask", "instances"):
            assert np.array_equal(np.asarray(raw[name]), getattr(made, name)) and np.array_equal(getattr(read, name), getattr(made, name))
            assert getattr(read, name).dtype == getattr(made, name).dtype
        assert (raw["text"], raw["seed"], raw["classes"]) == (made.caption, made.seed, list(made.classes))
        for name in ("key", "caption", "classes", "seed", "method", "scores", "extra"): assert getattr(read, name) == getattr(made, name)


def test_captions_round_trip(tmp_path):
    captions = [c for c in CAPTIONS if c]
    folder = write(tmp_path/"set", [sample(k, caption=c) for k, c in enumerate(captions)])
    assert [s.caption for s in SegmentationDataset(folder)] == captions == load(folder, tmp_path/"cache")["text"]
    assert len((folder/"metadata.jsonl").read_text(encoding="utf-8").splitlines()) == len(captions)
    card = (folder/"README.md").read_text(encoding="utf-8")
    head = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S)
    assert yaml.safe_load(head[1])["task_categories"] == ["image-segmentation"]
    assert not re.search(r"<script|\{\{|\u202e|[\x00-\x09\x0b-\x1f]", head[2])


def test_card_escapes_title_and_classes(tmp_path):
    space = LabelSpace.create(("background", "<b>|pipe"))
    write_dataset(tmp_path/"set", [Sample("0", np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8), "x", ("<b>|pipe",))], space, "a: b\n---\n<i>", {"note": "```\n<u>"})
    card = (tmp_path/"set"/"README.md").read_text()
    assert yaml.safe_load(card.split("\n---\n")[0][4:])["pretty_name"] == "a: b\n---\n<i>"
    body = card.split("\n---\n", 1)[1]
    assert "<b>" not in body and "<i>" not in body and r"\|pipe" in body


def test_samples_without_masks(tmp_path):
    folder = write(tmp_path/"set", [Sample(f"{k}x", np.full((4, 4, 3), k, np.uint8), caption="no labels") for k in range(2)])
    assert SegmentationDataset(folder)[0].mask is None and check_dataset(folder) == []
    assert load(folder, tmp_path/"cache").column_names[:2] == ["image", "text"]


def test_same_bytes_in_other_processes(tmp_path):
    program = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_dataset as t; t.write(Path(sys.argv[2]), [t.sample(k, caption=c) for k, c in enumerate(t.CAPTIONS)])")
    for k, env in enumerate([{"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}, {"PYTHONHASHSEED": "2", "LC_ALL": "C", "PYTHONUTF8": "0"}]):
        subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path/str(k))], env=os.environ | env, check=True)
    assert folder_hashes(tmp_path/"0", skip=()) == folder_hashes(tmp_path/"1", skip=())


def test_failure_leaves_the_old_set(tmp_path):
    folder = write(tmp_path/"set")
    before = folder_hashes(folder, skip=())
    def failing():
        yield sample(0)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write(folder, failing())
    bad = sample(1)
    bad.mask[0, :3] = 77
    with pytest.raises(SegsynError, match="77"): write(folder, [sample(0), bad])
    with pytest.raises(SegsynError, match="at least one"): write(tmp_path/"empty", iter(()))
    assert folder_hashes(folder, skip=()) == before and sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("change", [dict(key="../up"), dict(key="train-1"), dict(key="x" * 101), dict(key=""), dict(image=np.zeros((6, 8), np.uint8)), dict(image=np.zeros((6, 8, 3))),
                                    dict(mask=np.zeros((8, 6), np.uint8)), dict(mask=np.zeros((6, 8), np.int64)), dict(instances=np.zeros((6, 8), np.uint8)), dict(classes=("brid",)),
                                    dict(seed=-1), dict(seed=2**63), dict(caption=None), dict(caption="nul\0"), dict(caption="\ud800"), dict(scores={"s": float("nan")})], ids=lambda c: str(c)[:40])
def test_unwritable_samples(tmp_path, change):
    s = sample(0)
    for name, value in change.items(): setattr(s, name, value)
    with pytest.raises(SegsynError): write_sample(tmp_path, s, SPACE)
    assert list(tmp_path.iterdir()) == []


def test_records_that_datasets_could_not_load(tmp_path):
    for extra in ([{"a": 1}, {"a": "x"}], [{"a": [1, "x"]}, {}], [{"source_file_name": "x.jpg"}, {}], [{"a": {"file_names": ["x"]}}, {}]):
        records = [write_sample(tmp_path, sample(k), SPACE) | {"extra": e} for k, e in enumerate(extra)]
        with pytest.raises(SegsynError, match="datasets"): finish_dataset(tmp_path, records, SPACE, "t", {})
    with pytest.raises(SegsynError, match="same key"): finish_dataset(tmp_path, [{"image_file_name": "images/a.png"}, {"image_file_name": "images/A.png"}], SPACE, "t", {})


def edit_record(folder: Path, k: int, **change):
    lines = (folder/"metadata.jsonl").read_text().splitlines()
    lines[k] = json.dumps(json.loads(lines[k]) | change)
    (folder/"metadata.jsonl").write_text("\n".join(lines) + "\n")


def save(folder: Path, name: str, pixels, format: str = "PNG", **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(folder/name, format, **options)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bomb(side: int) -> bytes:
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


IMAGE, MASK, INSTANCES = "images/000001.png", "masks/000001.png", "instances/000001.png"
UNKNOWN = np.zeros((6, 8), np.uint8)
UNKNOWN[:2, :5] = 9
FAULTS = { # name: (what to do to a sound folder, the file, the kind, words of the message)
    "truncated image": (lambda f: (f/IMAGE).write_bytes((f/IMAGE).read_bytes()[:100]), IMAGE, "corrupt", ["cut off"]),
    "truncated mask": (lambda f: (f/MASK).write_bytes((f/MASK).read_bytes()[:60]), MASK, "corrupt", []),
    "truncated JPEG": (lambda f: (save(f, IMAGE, np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8), "JPEG"), (f/IMAGE).write_bytes((f/IMAGE).read_bytes()[:-60])), IMAGE, "corrupt", []),
    "text for an image": (lambda f: (f/IMAGE).write_text("<html>404</html>"), IMAGE, "corrupt", []),
    "empty file": (lambda f: (f/MASK).write_bytes(b""), MASK, "corrupt", []),
    "size mismatch": (lambda f: save(f, MASK, np.zeros((6, 7), np.uint8)), MASK, "size-mismatch", ["image 8 x 6", "mask 7 x 6"]),
    "rotated photo": (lambda f: save(f, IMAGE, np.zeros((6, 8, 3), np.uint8), "JPEG", exif=turned(6)), MASK, "size-mismatch", ["EXIF", "orientation 6", "Turn the mask"]),
    "upside-down photo": (lambda f: save(f, IMAGE, np.zeros((6, 8, 3), np.uint8), "JPEG", exif=turned(3)), IMAGE, "exif-rotation", ["orientation 3"]),
    "unknown id": (lambda f: save(f, MASK, UNKNOWN), MASK, "unknown-id", ["9", "10 pixels"]),
    "16-bit id that would wrap": (lambda f: (f/MASK).write_bytes(png_bytes(np.full((6, 8), 257, np.uint16))), MASK, "unknown-id", ["257", "48 pixels"]),
    "RGB mask": (lambda f: save(f, MASK, np.zeros((6, 8, 3), np.uint8)), MASK, "wrong-mode", ["RGB", "decode_colors"]),
    "RGBA mask": (lambda f: save(f, MASK, np.zeros((6, 8, 4), np.uint8)), MASK, "wrong-mode", ["RGBA"]),
    "1-bit mask": (lambda f: save(f, MASK, np.zeros((6, 8), bool)), MASK, "wrong-mode", []),
    "JPEG mask": (lambda f: save(f, MASK, np.zeros((6, 8), np.uint8), "JPEG"), MASK, "wrong-mode", ["JPEG"]),
    "transparent image": (lambda f: save(f, IMAGE, np.zeros((6, 8, 4), np.uint8)), IMAGE, "wrong-mode", ["transparent"]),
    "16-bit image": (lambda f: (f/IMAGE).write_bytes(png_bytes(np.zeros((6, 8), np.uint16))), IMAGE, "wrong-mode", ["I;16"]),
    "bomb": (lambda f: (f/MASK).write_bytes(bomb(60_000)), MASK, "too-large", ["89,478,485"]),
    "smaller bomb": (lambda f: (f/MASK).write_bytes(bomb(12_000)), MASK, "too-large", ["12000 x 12000"]),
    "missing mask": (lambda f: (f/MASK).unlink(), MASK, "missing", []),
    "orphan": (lambda f: save(f, "images/extra.png", np.zeros((6, 8, 3), np.uint8)), "images/extra.png", "orphan", []),
    "orphan by case": (lambda f: (f/IMAGE).rename(f/"images/000001.PNG"), "images/000001.PNG", "orphan", []),
    "duplicate": (lambda f: edit_record(f, 2, image_file_name=IMAGE), "metadata.jsonl", "duplicate", ["000001"]),
    "parent path": (lambda f: edit_record(f, 1, mask_file_name="../secret.png"), "images/000001.png", "unsafe-path", ["../secret.png"]),
    "absolute path": (lambda f: edit_record(f, 1, image_file_name="/etc/passwd"), "/etc/passwd", "unsafe-path", []),
    "Windows path": (lambda f: edit_record(f, 1, mask_file_name="C:\\x.png"), "images/000001.png", "unsafe-path", []),
    "number for a path": (lambda f: edit_record(f, 1, mask_file_name=7), "images/000001.png", "unsafe-path", []),
    "symbolic link": (lambda f: ((f/MASK).unlink(), (f/MASK).symlink_to("/etc/hostname")), "images/000001.png", "unsafe-path", ["symbolic link"]),
    "unknown class": (lambda f: edit_record(f, 1, classes=["brid"]), IMAGE, "unknown-class", ["'bird'"]),
    "changed file": (lambda f: save(f, IMAGE, np.zeros((6, 8, 3), np.uint8)), IMAGE, "manifest", ["changed"]),
    "no manifest": (lambda f: (f/"manifest.json").unlink(), "manifest.json", "manifest", ["incomplete"]),
    "damaged manifest": (lambda f: (f/"manifest.json").write_text("{\"files\": 3}"), "manifest.json", "manifest", []),
    "damaged metadata": (lambda f: (f/"metadata.jsonl").write_text("{\"image_file_name\": \n"), "metadata.jsonl", "metadata", ["line 1"]),
    "no labels": (lambda f: (f/"labels.json").unlink(), "labels.json", "metadata", []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_finds(tmp_path, fault, capsys):
    damage, file, kind, words = FAULTS[fault]
    folder = write(tmp_path/"set")
    (tmp_path/"secret.png").write_bytes(png_bytes(np.zeros((6, 8), np.uint8)))
    damage(folder)
    problems = check_dataset(folder)
    found = [p for p in problems if (p.file, p.kind) == (file, kind)]
    assert found, problems
    assert all(any(word in p.detail for p in found) for word in words), found
    assert main(["check", str(folder)]) == 1
    assert f"{kind:14}{file}" in capsys.readouterr().out
    if kind not in ("orphan", "duplicate", "metadata", "manifest", "exif-rotation"):
        with pytest.raises(SegsynError): SegmentationDataset(folder)[1]
        assert len(SegmentationDataset(folder, skip_bad=True)) == 3


def test_terminal(tmp_path):
    folder = write(tmp_path/"set")
    run = lambda *words: subprocess.run([sys.executable, "-m", "segsyn.dataset", *map(str, words)], capture_output=True, text=True)
    assert run("check", folder).returncode == 0
    missing = run("check", tmp_path/"nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    for words in ([], ["check"], ["chekc", str(folder)], ["check", str(folder), "--max-pixels", "many"]):
        with pytest.raises(SystemExit) as ended: main(words)
        assert ended.value.code == 2


def test_bad_input_of_the_reader(tmp_path):
    with pytest.raises(SegsynError, match="no dataset"): SegmentationDataset(tmp_path)
    folder = write(tmp_path/"set")
    with pytest.raises(PictureError, match="8 x 6") as caught: SegmentationDataset(folder, max_pixels=10)[0]
    assert caught.value.kind == "too-large"
    with pytest.raises(IndexError): SegmentationDataset(folder)[4]


def test_errors_survive_a_worker():
    import pickle
    error = PictureError("corrupt", "what", "where", "found", "allowed", "fix")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.kind, str(copy)) == ("corrupt", str(error))


def test_masks_of_few_bits_are_not_stretched(tmp_path):
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    for bits, row in ((2, 0b00011000), (4, 0b00000001)): # ids 0, 1, 2, 0 and 0, 1
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes([0, row]))) + chunk(b"IEND", b"")
        (tmp_path/"grey.png").write_bytes(data)
        assert np.asarray(Image.open(tmp_path/"grey.png")).max() > 2 # what Pillow makes of it
        with pytest.raises(PictureError, match="fewer than 8 bits"): read_mask(tmp_path/"grey.png")


def test_palette_masks_keep_their_indices(tmp_path):
    ids = np.arange(3, dtype=np.uint8).reshape(1, 3)
    picture = Image.fromarray(ids)
    picture.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    picture.save(tmp_path/"p.png")
    assert np.array_equal(read_mask(tmp_path/"p.png"), ids)


def test_every_orientation(tmp_path):
    from PIL import ImageOps
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    for k in range(1, 9):
        Image.fromarray(pixels).save(tmp_path/"o.png", exif=turned(k))
        assert np.array_equal(read_image(tmp_path/"o.png"), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/"o.png"))))


def test_subset_and_fingerprint(tmp_path):
    first, again, other = (SegmentationDataset(write(tmp_path/n, s)) for n, s in (("a", None), ("b", None), ("c", [sample(k) for k in (3, 2, 1, 0)])))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert [s.key for s in first.subset([2, 0])] == ["000002", "000000"] and len(first.subset(lambda r: r["text"] == "caption 1")) == 1
    assert first.subset([0]).fingerprint != first.subset([1]).fingerprint != first.fingerprint
    (tmp_path/"b"/"manifest.json").unlink()
    assert SegmentationDataset(tmp_path/"b").fingerprint == first.fingerprint
