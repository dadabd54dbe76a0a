"Six mistakes that users make, each through the command that they would run: one clear message, a status other than 0, nothing half-written."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segsyn.dataset import write_dataset
from segsyn.files import find_root
from segsyn.stamps import Stamps, make_scenes, stamps_space

ROOT = find_root(Path(__file__).parent)


@pytest.fixture(scope="module")
def scenes():
    return list(make_scenes(Stamps(ROOT / "data" / "stamps"), "A", 6, seed=0))


@pytest.fixture
def project(tmp_path, scenes):
    "A project with the stage notebooks and a labelled set of six scenes."
    for name in ("params.yaml", "settings.ini"): shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs" / "pipeline", tmp_path / "nbs" / "pipeline")
    write_dataset(tmp_path / "datasets" / "train", scenes, stamps_space(), "six scenes", {"seed": 0})
    return tmp_path


def run(project, notebook, section, *settings, **environment):
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "segsyn.run", f"nbs/pipeline/{notebook}.ipynb", section, *arguments], cwd=project, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    error = done.stderr[done.stderr.rfind("error:"):]
    assert done.returncode != 0 and "Traceback" not in error, done.stderr[-3000:]
    made = sorted(p.relative_to(project).as_posix() for folder in ("reports", "models", "results") for p in (project / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    assert made == [] and [p.name for p in (project / "datasets").iterdir() if not p.name.startswith(".")] == ["train"]
    return error


def test_wrong_parameter(project):
    assert "Did you mean 'tau'?" in run(project, "10_attention", "attention", "tua=3")


def test_unknown_class_in_a_prompt(project):
    path = project / "datasets" / "train" / "metadata.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[2]["classes"] = ["brid"]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    error = run(project, "10_attention", "attention", f"model={ROOT / 'data' / 'tiny-sd'}")
    assert "did you mean 'bird'?" in error


def test_truncated_image(project):
    path = project / "datasets" / "train" / "images" / "000003.png"
    path.write_bytes(path.read_bytes()[:1000])
    assert "images/000003.png" in run(project, "40_segment", "segment", "recipe=real")


def test_unknown_id_in_a_mask(project):
    path = project / "datasets" / "train" / "masks" / "000001.png"
    mask = np.array(Image.open(path))
    mask[:2, :3] = 77
    Image.fromarray(mask).save(path)
    error = run(project, "40_segment", "segment", "recipe=real")
    assert "masks/000001.png" in error and "77" in error and "6 " in error


def test_missing_base_folder(project):
    assert "models/my-base" in run(project, "10_attention", "attention", "model=models/my-base")


def test_no_network_with_a_hub_id(project):
    error = run(project, "10_attention", "attention", "model=someone/some-base@" + "0" * 40, HF_HUB_OFFLINE="1", HF_HOME=str(project / "hub"))
    assert "someone/some-base" in error
