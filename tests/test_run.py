"""The stage runner as a command: what the terminal shows, the exit status, and what is left on disk."""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from segsyn.base import SAMPLERS
from segsyn.files import SegsynError
from segsyn.prompts import PROMPT_STYLES
from segsyn.panoptic import MASK2FORMERS
from segsyn.run import Mask2Former, Sampler, Segmenter, Style, check_section, read_notebook, read_params, read_yaml, run_profile, stage_values
from segsyn.segmenter import SEGMENTERS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tests" / "notebooks").glob("*.ipynb"))
PARAMS = """\
base:
  seed: 5
  threads: 1
  precision: fp32
  device: cpu
report:
  gallery: 7
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "nbs").mkdir()
    for notebook in NOTEBOOKS: shutil.copy(notebook, tmp_path / "nbs")
    return tmp_path


def run(project, notebook, *options, section="report", cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    return subprocess.run([sys.executable, "-m", "segsyn.run", str(project / "nbs" / f"{notebook}.ipynb"), section, *options],
                          cwd=cwd or project, env=environment, capture_output=True, text=True, timeout=120)


def files(project):
    return {p.relative_to(project).as_posix() for p in project.rglob("*") if p.is_file() and not p.name.endswith((".lock", ".pyc"))} - {f"nbs/{n.name}" for n in NOTEBOOKS}


def test_a_stage_runs_in_the_root_and_its_report_is_stable(project):
    hashes, elsewhere = [], project / "nbs"
    for cwd in (project, elsewhere):
        result = run(project, "good", cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert "step 0\nstep 1\nstep 2" in result.stdout
        hashes.append(hashlib.sha256((project / "reports" / "good.ipynb").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    assert (project / "results" / "values.txt").read_text() == "5 7"
    text = (project / "reports" / "good.ipynb").read_text()
    assert str(project) not in text and "papermill" not in text and '"name": "stderr"' not in text and "0x…" in text
    assert [c.id for c in read_notebook(project / "reports" / "good.ipynb").cells][:3] == ["title", "parameters-cell", "injected-parameters"]


def test_output_arrives_while_the_stage_runs(project):
    notebook = (project / "nbs" / "good.ipynb")
    notebook.write_text(notebook.read_text().replace("time.sleep(0.05 * (time.time_ns() % 3))", "time.sleep(2)"))
    process = subprocess.Popen([sys.executable, "-m", "segsyn.run", "nbs/good.ipynb", "report"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seen = {}
    for line in process.stdout: seen[line.strip()] = time.monotonic()
    assert process.wait() == 0
    assert seen["step 2"] - seen["step 0"] > 2


def test_settings_and_names(project):
    result = run(project, "good", "--set", "gallery=2", "--name", "good-two")
    assert result.returncode == 0, result.stderr
    assert (project / "reports" / "good-two.ipynb").is_file()
    assert (project / "results" / "values.txt").read_text() == "5 2"


@pytest.mark.parametrize("options, section, message", [
    (["--set", "galery=2"], "report", "Did you mean 'gallery'?"),
    (["--set", "gallery=true"], "report", "report.gallery"),
    (["--set", "gallery=two"], "report", "'two'"),
    (["--set", "gallery"], "report", "key=value"),
    ([], "reprot", "Did you mean 'report'?"),
    ([], "prepare", "prepare"),
    (["--profile", "smoek"], "report", "no such profile"),
    (["--params", "other.yaml"], "report", "other.yaml"),
])
def test_wrong_arguments_end_with_one_message(project, options, section, message):
    before = files(project)
    result = run(project, "good", *options, section=section)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) < 8
    assert files(project) == before


@pytest.mark.parametrize("text, message", [
    (PARAMS.replace("gallery", "galery"), "Did you mean 'gallery'?"),
    (PARAMS.replace("gallery: 7", "gallery: 7\n  gallery: 8"), "comes twice"),
    (PARAMS.replace("gallery: 7", "gallery: [7"), "not valid YAML"),
    (PARAMS.replace("gallery: 7", "gallery: 0"), "greater than 0"),
    (PARAMS.replace("seed: 5", "seed: -1"), "base.seed"),
    (PARAMS.replace("seed: 5", "seed: 5.0"), "base.seed"),
    (PARAMS.replace("fp32", "fp64"), "'fp64'"),
    (PARAMS.replace("  threads: 1\n", ""), "base.threads"),
    (PARAMS.replace("  gallery: 7", "  gallery: !!python/name:os.system ''"), "not valid YAML"),
])
def test_wrong_parameters(project, text, message):
    (project / "params.yaml").write_text(text)
    with pytest.raises(SegsynError, match=message.replace("?", r"\?")): stage_values("nbs/good.ipynb", "report", root=project)


def test_numbers_and_booleans():
    assert read_yaml("{a: 1e-4, b: -1.5E+3, c: .5, d: 1., e: 010, f: false, g: no, h: on, i: 1_000, j: ~, k: '1'}") == \
        {"a": 1e-4, "b": -1500.0, "c": 0.5, "d": 1.0, "e": 10, "f": False, "g": "no", "h": "on", "i": "1_000", "j": None, "k": "1"}


def test_a_profile_is_strict(project):
    (project / "profiles").mkdir()
    (project / "profiles" / "smoke.yaml").write_text("report: {gallery: 1}\n")
    assert read_params(project / "params.yaml", "smoke")["report"] == {"gallery": 1}
    assert stage_values("nbs/good.ipynb", "report", profile="smoke", root=project) == {"seed": 5, "gallery": 1}
    (project / "profiles" / "smoke.yaml").write_text("reprot: {gallery: 1}\n")
    with pytest.raises(SegsynError, match="Did you mean 'report'"): read_params(project / "params.yaml", "smoke")


@pytest.mark.parametrize("notebook, message", [("untagged", "tagged `parameters`"), ("computed", "`name = value` lines only"), ("other_names", "Did you mean 'galery'"), ("godo", "Did you mean 'good.ipynb'")])
def test_wrong_notebooks(project, notebook, message):
    with pytest.raises(SegsynError, match=message): stage_values(f"nbs/{notebook}.ipynb", "report", root=project)


def test_a_user_error_is_one_message(project):
    result = run(project, "user_error")
    assert result.returncode == 2
    assert "before" in result.stdout
    assert "No class is called brid." in result.stderr and "where: prompts[3]" in result.stderr and "fix: Write bird." in result.stderr
    assert "user_error.ipynb" in result.stderr and "Traceback" not in result.stderr and "----" not in result.stderr
    assert not (project / "reports" / "user_error.ipynb").exists()


def test_debug_shows_the_traceback(project):
    result = run(project, "user_error", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr and "No class is called brid." in result.stderr


def test_a_locked_folder_says_try_later(project):
    result = run(project, "locked")
    assert result.returncode == 75
    assert "Another process works in this folder." in result.stderr


def test_a_bug_shows_its_traceback(project):
    result = run(project, "bug")
    assert result.returncode == 1
    assert "IndexError: list index out of range" in result.stderr and "values[3]" in result.stderr
    assert not (project / "reports" / "bug.ipynb").exists()
    assert not [f for f in files(project) if f.endswith((".tmp", ".owner.json"))]


def test_a_failure_leaves_the_earlier_report_alone(project):
    (project / "reports").mkdir()
    (project / "reports" / "bug.ipynb").write_text("the earlier one")
    assert run(project, "bug").returncode == 1
    assert (project / "reports" / "bug.ipynb").read_text() == "the earlier one"


@pytest.mark.parametrize("number, statuses", [(signal.SIGTERM, (143,)), (signal.SIGINT, (130,))])
def test_a_stopped_stage_ends_its_kernel(project, number, statuses):
    process = subprocess.Popen([sys.executable, "-m", "segsyn.run", "nbs/slow.ipynb", "report"], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a job in a shell's background ignores SIGINT, and so would its children
    limit = time.monotonic() + 60
    while not (project / "started").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in statuses, errors
    assert not (project / "reports" / "slow.ipynb").exists()


def test_schemas_know_the_names_that_there_are():
    assert all(set(get_args(known)) == set(there) for known, there in ((Sampler, SAMPLERS), (Style, PROMPT_STYLES), (Segmenter, SEGMENTERS), (Mask2Former, MASK2FORMERS)))

@pytest.mark.parametrize("section, key, value, message", [("segment", "segmenter", "unett", "Did you mean 'unet'"), ("segment", "seeds", [0, 0], "different seeds"), ("attention", "quotas", "balancd", "Did you mean 'balanced'"),
    ("attention", "quotas", {"bird": "two"}, r"attention.quotas.bird\n  found: 'two'\n  allowed: a valid number"), ("attention", "self_layers", [["up_blocks.1.attentions.0", 1]], r"attention.self_layers.0.1\n.*\n.*a valid string, or a valid list")])
def test_wrong_values_are_named_where_they_are(section, key, value, message):
    values = read_params(ROOT / "params.yaml")[section]
    assert check_section(section, values)
    with pytest.raises(SegsynError, match=message): check_section(section, {**values, key: value})

def test_a_long_run_needs_a_folder(tmp_path):
    with pytest.raises(SegsynError, match="--folder runs/voc"): run_profile("voc", root=tmp_path)

def test_what_a_profile_started_ends_before_its_folder_is_cleared(tmp_path):
    grandchild = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), pathlib.Path(sys.argv[1], 'saved').touch(), sys.exit(0)))\npathlib.Path(sys.argv[1], 'begun').touch()\ntime.sleep(60)"
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}, sys.argv[1]]).wait()"
    outer = f"import signal, sys\nfrom segsyn.run import _run_group, _stop\nsignal.signal(signal.SIGTERM, _stop)\n_run_group([sys.executable, '-c', {child!r}, sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", outer, str(tmp_path)])
    while not (tmp_path/"begun").exists(): assert process.poll() is None; time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM and (tmp_path/"saved").exists(), "the stage was not waited for"


@pytest.fixture
def begun(project, monkeypatch):
    "A project in git; what a profile run copies is counted, and dvc is not started."
    import segsyn.run as module
    shutil.copy(ROOT / "params.yaml", project)
    (project / "profiles").mkdir()
    (project / "profiles" / "tiny.yaml").write_text("prepare: {train: 3}\n")
    (project / "data").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    copies, copy = [], module.copy_project
    monkeypatch.setattr(module, "copy_project", lambda *a: copies.append(a) or copy(*a))
    monkeypatch.setattr(module, "_run_group", lambda command, **settings: 0)
    return project, copies


def test_a_profile_run_goes_on_in_its_folder(begun, tmp_path_factory):
    project, copies = begun
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for _ in range(2): assert run_profile("tiny", folder=folder, root=project) == 0
    assert len(copies) == 1 and read_params(folder / "params.yaml")["prepare"]["train"] == 3
    with pytest.raises(SegsynError, match="(?s)not empty.*found: prepare.train: 3"): run_profile("tiny", settings=["prepare.train=4"], folder=folder, root=project)
    assert read_params(folder / "params.yaml")["prepare"]["train"] == 3


def test_a_profile_run_touches_nothing_of_others(begun, tmp_path_factory):
    project, copies = begun
    folder = tmp_path_factory.mktemp("holiday")
    (folder / "picture.png").write_bytes(b"precious")
    with pytest.raises(SegsynError, match="not empty"): run_profile("tiny", folder=folder, root=project)
    with pytest.raises(SegsynError, match="Did you mean 'train'"): run_profile("tiny", settings=["prepare.trian=3"], folder=folder / "new", root=project)
    assert [p.name for p in folder.iterdir()] == ["picture.png"] and not copies
