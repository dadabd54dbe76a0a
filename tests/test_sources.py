"Collections labelled elsewhere: masks come back exactly, choices are consistent, and every fault is named before anything is written."
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from segsyn.dataset import SegmentationDataset, check_dataset, load_test_sets
from segsyn.files import SegsynError, folder_hashes
from segsyn.run import copy_project, run_stage, stage_values
from segsyn.sources import import_dataset, main, read_ade20k, read_coco, read_source, read_voc

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 10, 3)).astype(np.uint8)
MASK = np.repeat(np.array([[0, 0, 3, 3, 255, 12, 12, 12, 0, 0]], np.uint8), 6, 0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def refused(call, *words):
    with pytest.raises(SegsynError) as caught: call()
    for word in words: assert word in str(caught.value), str(caught.value)


@pytest.fixture
def voc(tmp_path):
    "Three pictures; the last in the list comes first by name."
    root = tmp_path / "VOC2012"
    for name in ("2007_b", "2007_c", "2007_a"):
        save(root / "JPEGImages" / f"{name}.jpg", IMAGE)
        save(root / "SegmentationClass" / f"{name}.png", MASK)
        save(root / "SegmentationObject" / f"{name}.png", np.where(MASK == 12, 1, MASK // 3 * (MASK < 5) * 2).astype(np.uint8))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_b\n2007_c\n2007_a\n")
    return root


@pytest.fixture
def coco(tmp_path):
    "Two pictures: one with a large and a small box that overlap and a crowd, one without anything. Categories 7 and 90."
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    box = lambda left, right: [[left, 0, right, 0, right, 6, left, 6]]
    crowd = np.zeros((6, 10), np.uint8, order="F"); crowd[:, 6:] = 1
    run = run_lengths.encode(crowd)
    table = {"images": [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 10} for i in (1, 2)],
             "categories": [{"id": 90, "name": "tie"}, {"id": 7, "name": "person"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 90, "segmentation": box(2, 4), "iscrowd": 0, "area": 12},
                             {"id": 2, "image_id": 1, "category_id": 7, "segmentation": box(0, 8), "iscrowd": 0, "area": 48},
                             {"id": 3, "image_id": 1, "category_id": 7, "segmentation": {"size": run["size"], "counts": run["counts"].decode()}, "iscrowd": 1, "area": 24}]}
    for i in (1, 2): save(root / "train2017" / f"{i}.png", IMAGE)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(table))
    return root, table


def test_voc_is_sorted_exact_and_has_the_sbd_part(voc):
    space, pictures = read_voc(voc, "train")
    assert pictures.names == ("2007_a", "2007_b", "2007_c") and space.names[12] == "dog" and all(space.things[1:])
    assert np.array_equal(pictures[0].mask, MASK) and set(pictures[0].instances[MASK == 255].tolist()) == {0}
    (voc / "SegmentationClassAug").mkdir()
    shutil.move(voc / "SegmentationClass" / "2007_c.png", voc / "SegmentationClassAug" / "2007_c.png")
    (voc / "SegmentationObject" / "2007_c.png").unlink()
    pictures.check()
    assert np.array_equal(pictures[-1].mask, MASK) and pictures[-1].instances is None


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_image_mask_and_instances_move_together(voc, fit):
    "A picture that is drawn from its mask still agrees with it after resizing, and no id appears."
    colours = np.stack([MASK] * 3, -1)
    save(voc / "JPEGImages" / "2007_a.jpg", colours.repeat(20, 0).repeat(20, 1), quality=100)
    for kind in ("SegmentationClass", "SegmentationObject"):
        path = voc / kind / "2007_a.png"
        save(path, np.asarray(Image.open(path)).repeat(20, 0).repeat(20, 1))
    sample = read_voc(voc, "train", size=48, fit=fit)[1][0]
    assert sample.image.shape == (48, 48, 3) and sample.mask.shape == sample.instances.shape == (48, 48)
    assert (np.abs(sample.image[..., 0].astype(int) - sample.mask) < 4).mean() > 0.75
    assert set(np.unique(sample.mask)) <= set(np.unique(MASK)) and set(np.unique(sample.mask[sample.instances > 0])) <= {3, 12}
    assert (sample.mask[:, 0] == (3 if fit == "crop" else 0)).all()


def test_chosen_classes_leave_void_alone(voc):
    space, pictures = read_voc(voc, "train", classes=["dog"])
    assert space.names == ("background", "dog") and pictures[0].classes == ("dog",)
    assert np.array_equal(pictures[0].mask, np.where(MASK == 12, 1, np.where(MASK == 255, 255, 0)))
    assert ((pictures[0].instances > 0) == (MASK == 12)).all()
    refused(lambda: read_voc(voc, "train", classes=["dgo"]), "dog")


def test_ade20k_zero_is_ignored_and_synonyms_stay_apart(tmp_path):
    save(tmp_path / "images" / "validation" / "ADE_val_00000001.jpg", IMAGE)
    save(tmp_path / "annotations" / "validation" / "ADE_val_00000001.png", np.full((6, 10), 2, np.uint8) * (np.arange(10) > 4).astype(np.uint8))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n2\t0.1\t1\t1\t0\tscreen, crt\n1\t0.2\t1\t1\t1\twall\n3\t0.1\t1\t1\t0\tscreen, silver\n")
    space, (sample,) = read_ade20k(tmp_path, "validation")
    assert space.names == ("wall", "screen, crt", "screen, silver") and space.things == (False, True, True) and space.background is None
    assert sample.key == "ADE_00000001" and set(sample.mask[:, :5].flat) == {255} and set(sample.mask[:, 5:].flat) == {1}
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n3\tsky\n")
    refused(lambda: read_ade20k(tmp_path, "validation"), "gaps", "1, 3")


def test_coco_smaller_on_top_crowds_below_and_uncounted(coco):
    space, (full, empty) = read_coco(coco[0], "train2017")
    assert space.names == ("background", "person", "tie")
    assert full.mask[0].tolist() == [1, 1, 2, 2, 1, 1, 1, 1, 1, 1] and full.instances[0].tolist() == [2, 2, 1, 1, 2, 2, 2, 2, 0, 0]
    assert not empty.mask.any() and empty.classes == () and empty.caption == "a photo"


def test_coco_panoptic_segments_must_be_known(coco):
    root, table = coco
    table["categories"] = [{**c, "isthing": 1} for c in table["categories"]]
    table["annotations"] = [{"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 70_000, "category_id": 7, "iscrowd": 0}]}]
    ids = np.zeros((6, 10, 3), np.uint8); ids[:3] = (70_000 % 256, 70_000 // 256 % 256, 70_000 // 65536)
    save(root / "annotations" / "panoptic_train2017" / "1.png", ids)
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps(table))
    pictures = read_coco(root, "train2017")[1]
    assert set(pictures[0].mask[:3].flat) == {0} and set(pictures[0].mask[3:].flat) == {255} and pictures[0].instances.max() == 1
    refused(pictures.check, "no annotation", "'2'")
    ids[5, 5] = (9, 0, 0); save(root / "annotations" / "panoptic_train2017" / "1.png", ids)
    refused(lambda: pictures[0], "9 (1 pixels)")


def test_coco_files_that_cannot_be_used(coco):
    root, table = coco
    write = lambda t: (root / "annotations" / "instances_train2017.json").write_text(json.dumps(t))
    write({**table, "annotations": [{k: v for k, v in table["annotations"][0].items() if k != "segmentation"}]})
    refused(lambda: read_coco(root, "train2017")[1][0], "annotation 1", "outline")
    write({**table, "annotations": [{**table["annotations"][0], "category_id": 8}]})
    refused(lambda: read_coco(root, "train2017")[1][0], "category", "8", "7, 90")
    write({**table, "images": [{**i, "file_name": "../../secret.png"} for i in table["images"][:1]]})
    refused(lambda: read_coco(root, "train2017")[1][0], "leads out")
    write({k: v for k, v in table.items() if k != "categories"})
    refused(lambda: read_coco(root, "train2017"), "categories")
    refused(lambda: read_coco(root, "train2017", panoptic=True), "no such split")


def test_faults_are_named(voc, tmp_path):
    _, pictures = read_voc(voc, "train")
    refused(lambda: read_voc(tmp_path / "nowhere", "train"), "no such folder")
    refused(lambda: read_voc(voc / "JPEGImages", "train"), "ImageSets/Segmentation", "2007_a.jpg")
    refused(lambda: read_voc(voc, "trian"), "'train'")
    refused(lambda: read_voc(voc, "train", size=0), "size")
    refused(lambda: read_source("vocc", voc, "train"), "'voc'")
    refused(lambda: read_source("voc", voc, "train", panoptic=True), "panoptic", "captions")
    save(voc / "SegmentationClass" / "2007_a.png", np.full((6, 10), 21, np.uint8))
    refused(lambda: pictures[0], "2007_a.png", "21 (60 pixels)")
    save(voc / "SegmentationClass" / "2007_a.png", MASK[:4])
    refused(lambda: pictures[0], "differ in size")
    (voc / "SegmentationClass" / "2007_b.png").unlink()
    refused(pictures.check, "2007_b", "mask is missing")


def test_a_turned_photograph_follows_its_mask(voc):
    note = Image.Exif(); note[0x0112] = 6
    save(voc / "JPEGImages" / "2007_a.jpg", IMAGE, exif=note, quality=100)
    stored = np.asarray(Image.open(voc / "JPEGImages" / "2007_a.jpg"))
    pictures = read_voc(voc, "train")[1]
    assert np.array_equal(pictures[0].image, stored)
    for kind in ("SegmentationClass", "SegmentationObject"): save(voc / kind / "2007_a.png", np.rot90(MASK, -1) * 0)
    assert np.array_equal(pictures[0].image, np.rot90(stored, -1))


def test_import_is_repeatable_whole_or_absent(voc, tmp_path):
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"2007_a": "one", "2007_b": "two"}))
    refused(lambda: import_dataset("voc", voc, "train", tmp_path / "out", captions=captions), "2007_c", "captions.json")
    assert not (tmp_path / "out").exists()
    for name in ("out", "again"): import_dataset("voc", voc, "train", tmp_path / name, count=2, captions=captions, size=6)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "again") and check_dataset(tmp_path / "out") == []
    assert [(s.key, s.caption) for s in SegmentationDataset(tmp_path / "out")] == [("2007_a", "one"), ("2007_b", "two")]
    before = folder_hashes(voc)
    refused(lambda: import_dataset("voc", voc, "train", voc), "no dataset")
    assert folder_hashes(voc) == before


def test_pictures_are_read_one_at_a_time(voc, tmp_path):
    "Ten times the pictures take no more memory."
    many = [f"2008_{i:03d}" for i in range(100)]
    for kind, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        big = np.asarray(Image.open(voc / kind / f"2007_a.{suffix}")).repeat(20, 0).repeat(20, 1)
        for name in many: save(voc / kind / f"{name}.{suffix}", big)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(many))
    peaks = []
    for count in (10, 100):
        tracemalloc.start()
        for _ in read_voc(voc, "train")[1][:count]: pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_command_line(voc, tmp_path, capsys):
    assert main(["voc", str(voc), str(tmp_path / "out"), "--split", "train", "--size", "6", "--classes", "dog", "bird", "--count", "1"]) == 0
    assert "1 pictures, 3 classes" in capsys.readouterr().out and SegmentationDataset(tmp_path / "out").space.names == ("background", "dog", "bird")
    done = subprocess.run([sys.executable, "-m", "segsyn.sources", "voc", str(voc), str(tmp_path / "new"), "--split", "val"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: There is no such split.") and "Traceback" not in done.stderr and not (tmp_path / "new").exists()


def test_a_seed_draws_and_a_smaller_draw_is_a_part(voc, tmp_path):
    keys = {}
    for count in (2, 3):
        import_dataset("voc", voc, "train", tmp_path / f"{count}", count, seed=5)
        keys[count] = [r["image_file_name"] for r in SegmentationDataset(tmp_path / f"{count}").records]
    assert set(keys[2]) < set(keys[3]) and len(keys[2]) == 2


def test_the_pipeline_prepares_a_download(voc, tmp_path):
    "One test set, the others empty; and nothing is read from the embedded cut-outs."
    project = copy_project(ROOT, tmp_path / "project")
    shutil.rmtree(project / "data")
    shutil.copy(voc / "ImageSets" / "Segmentation" / "train.txt", voc / "ImageSets" / "Segmentation" / "val.txt")
    run_stage("nbs/pipeline/01_prepare.ipynb", "prepare", ["source=voc", f"folder={voc}", "splits=[train,val]", "size=8", "train=2", "val=null", "oracle=null"], root=project)
    tests = load_test_sets(project / "datasets")
    assert {name: len(data) for name, data in tests.items()} == {"val-A": 3}
    assert len(SegmentationDataset(project / "datasets" / "train")) == 2 and tests["val-A"][0].image.shape == (8, 8, 3)
    assert "synthetic" not in (project / "datasets" / "train" / "README.md").read_text()


def test_a_download_needs_a_place():
    with pytest.raises(SegsynError, match="folder, splits"): stage_values("nbs/pipeline/01_prepare.ipynb", "prepare", ["source=voc"], root=ROOT)
