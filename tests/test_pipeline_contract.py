"""What dvc.yaml promises: stages that re-run when, and only when, something they use has changed."""
import hashlib
import re
import shlex
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml
from segsyn.run import SCHEMAS, check_section, merge_params, notebook_parameters, read_notebook, read_params, read_yaml, stage_modules, stage_values
from segsyn.synthesis import METHODS

ROOT = Path(__file__).parent.parent
PIPELINES = {"dvc.yaml": "params.yaml", "sweeps/dvc.yaml": "params.yaml", "panoptic/dvc.yaml": "params.yaml", "training/dvc.yaml": "training/params.yaml"}


def fill(obj, values):
    "DVC's ${...}, with dots"
    if isinstance(obj, dict): return {fill(k, values): fill(v, values) for k, v in obj.items()}
    if isinstance(obj, list): return [fill(o, values) for o in obj]
    if not isinstance(obj, str): return obj
    def look_up(match):
        value = values
        for key in match[1].split("."): value = value[key]
        return str(value)
    return re.sub(r"\$\{([^}]+)\}", look_up, obj)


def expand(name, stage, params):
    "A stage, or each member of a foreach or matrix: (name, definition)"
    if "foreach" in stage:
        over = stage["foreach"]
        if isinstance(over, str): over = eval_reference(over, params)
        items = over.items() if isinstance(over, dict) else [(str(v), v) for v in over]
        return [(f"{name}@{k}", fill(stage["do"], {**params, "key": k, "item": v})) for k, v in items]
    if "matrix" in stage:
        axes = {k: eval_reference(v, params) if isinstance(v, str) else v for k, v in stage["matrix"].items()}
        return [(f"{name}@{'-'.join(map(str, chosen))}", fill({k: v for k, v in stage.items() if k != "matrix"}, {**params, "item": dict(zip(axes, chosen)), "key": "-".join(map(str, chosen))}))
                for chosen in product(*axes.values())]
    return [(name, fill(stage, params))]


def eval_reference(text, params):
    value = params
    for key in text.strip("${} ").split("."): value = value[key]
    return value


def paths(entries):
    return [next(iter(e)) if isinstance(e, dict) else e for e in entries or []]


def load(file):
    path = ROOT / file
    assert path.is_file(), f"{file} is missing: the pipeline is not defined"
    return yaml.safe_load(path.read_text()), read_params(ROOT / PIPELINES[file])


def all_stages():
    found = []
    for file in PIPELINES:
        if not (ROOT / file).is_file(): continue
        definition, params = load(file)
        found += [(file, name, stage) for top, raw in definition["stages"].items() for name, stage in expand(top, raw, params)]
    return found


try: STAGES, PROBLEM = all_stages(), None
except Exception as error: STAGES, PROBLEM = [], error  # reported by the first test, by name
stages = pytest.mark.parametrize("file, name, stage", STAGES, ids=[f"{f}:{n}" for f, n, _ in STAGES])


def command(stage):
    words = shlex.split(stage["cmd"])
    assert words[:3] == ["python", "-m", "segsyn.run"], "stages run through segsyn.run"
    options = {k: [] for k in ("--set", "--name", "--params", "--reports")}
    rest, i = [], 3
    while i < len(words):
        if words[i] in options: options[words[i]].append(words[i + 1]); i += 2
        else: rest.append(words[i]); i += 1
    return *rest, options


@pytest.mark.parametrize("file", PIPELINES)
def test_pipeline_is_readable(file):
    assert PROBLEM is None, f"{type(PROBLEM).__name__}: {PROBLEM}"
    definition, _ = load(file)
    assert definition["stages"]


@stages
def test_deps_name_the_notebook_and_every_module(file, name, stage):
    notebook, section, _ = command(stage)
    deps = set(paths(stage["deps"]))
    assert notebook in deps
    missing = set(stage_modules(notebook, ROOT)) - deps
    assert not missing, f"{name} imports {sorted(missing)}"


@stages
def test_methods_are_loaded_by_a_name_that_can_be_read(file, name, stage):
    "A name in a variable would hide the method's module from the stage's dependencies."
    notebook, *_ = command(stage)
    lines = [l for c in read_notebook(ROOT / notebook).cells if c.cell_type == "code" for l in c.source.splitlines() if not l.startswith("from ")]
    calls = re.findall(r"load_method[(,]\s*([^,)]+)", "\n".join(lines))
    assert all(c.strip("\"'") in METHODS for c in calls), calls


@stages
def test_deps_name_no_module_in_vain(file, name, stage):
    notebook, *_ = command(stage)
    listed = {d for d in paths(stage["deps"]) if d.startswith("segsyn/")}
    assert "segsyn" not in paths(stage["deps"]), "files, not the folder: one typo would re-run everything"
    idle = listed - set(stage_modules(notebook, ROOT)) - {"segsyn/run.py"}
    assert not idle, f"{sorted(idle)} change the stage for nothing"


@stages
def test_params_are_sections_with_a_schema(file, name, stage):
    notebook, section, options = command(stage)
    listed = []
    for entry in stage["params"]:
        if isinstance(entry, dict): assert list(entry) == [PIPELINES[file]]; listed += next(iter(entry.values()))
        else: assert PIPELINES[file] == "params.yaml"; listed.append(entry)
    assert {"base", section} <= set(listed), "the stage's section and base"
    assert all(s.split(".")[0] in SCHEMAS for s in listed)
    assert options["--params"] == ([] if PIPELINES[file] == "params.yaml" else [PIPELINES[file]])


@stages
def test_notebook_and_section_agree(file, name, stage):
    notebook, section, options = command(stage)
    assert stage_values(notebook, section, options["--set"], params=PIPELINES[file], root=ROOT)


@stages
def test_no_stage_depends_on_an_executed_notebook(file, name, stage):
    assert not [d for d in paths(stage["deps"]) if d.endswith(".ipynb") and not d.startswith(("nbs/pipeline/", "nbs/training/"))]
    assert not [d for d in paths(stage["deps"]) if Path(d).name == "reports"]


@stages
def test_the_report_is_an_output(file, name, stage):
    notebook, _, options = command(stage)
    report = f"{(options['--reports'] or ['reports'])[0]}/{(options['--name'] or [Path(notebook).stem])[0]}.ipynb"
    assert report in paths(stage["outs"])


@stages
def test_outputs_keep_the_run_cache(file, name, stage):
    "DVC forgets a stage's earlier runs when an output has `persist`; big outputs belong in its cache."
    for entry in stage["outs"]:
        if isinstance(entry, dict):
            (path, options), = entry.items()
            assert not options.get("persist"), path
            assert options.get("cache", True) or path.startswith(("results/", "training/results/")), f"{path} is not cached"


def test_no_output_twice():
    outs = [o for _, _, s in STAGES for o in paths(s.get("outs")) + paths(s.get("metrics"))]
    assert len(outs) == len(set(outs))


def test_every_stage_notebook_is_in_a_pipeline():
    used = {command(s)[0] for _, _, s in STAGES}
    there = {p.relative_to(ROOT).as_posix() for folder in ("pipeline", "training") for p in (ROOT / "nbs" / folder).glob("*.ipynb")}
    assert there == used


def test_plots_and_metrics_are_outputs():
    definition, _ = load("dvc.yaml")
    outs = {o for f, _, s in STAGES if f == "dvc.yaml" for o in paths(s.get("outs")) + paths(s.get("metrics"))}
    for path in paths(definition.get("plots")):
        assert any(path == o or path.startswith(o + "/") for o in outs), path
    assert any(s.get("metrics") for f, _, s in STAGES if f == "dvc.yaml")


@pytest.mark.parametrize("file", PIPELINES.values())
def test_parameters_are_valid(file):
    for section, values in read_params(ROOT / file).items(): check_section(section, values, file)


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_profiles_are_valid(profile):
    for section, values in read_params(ROOT / "params.yaml", profile.stem).items(): check_section(section, values, profile.name)
    assert read_yaml(profile.read_text()), "an empty profile"


def test_there_is_a_smoke_profile():
    assert (ROOT / "profiles" / "smoke.yaml").is_file()


def test_parameters_mean_the_same_to_dvc():
    "DVC reads YAML 1.2 with its own library; both must see the same values."
    from dvc.utils.serialize import load_yaml
    for file in PIPELINES.values():
        assert load_yaml(str(ROOT / file)) == read_params(ROOT / file)


def test_lock_is_in_step_with_the_stages():
    "A lock file from before a stage was renamed or re-cut would promise results that nobody can check."
    lock = ROOT / "dvc.lock"
    assert lock.is_file(), "dvc.lock is missing: run dvc repro and commit it"
    locked = yaml.safe_load(lock.read_text())["stages"]
    assert set(locked) == {n for f, n, _ in STAGES if f == "dvc.yaml"}


@pytest.mark.parametrize("lock", ["dvc.lock", "sweeps/dvc.lock", "panoptic/dvc.lock"]) # the paths of all are from the root
def test_files_in_git_are_those_of_the_lock(lock):
    "The results in git are what the code, the parameters and the notebooks in git make."
    tracked = set(subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"))
    stale = {e["path"]: name for name, stage in yaml.safe_load((ROOT / lock).read_text())["stages"].items() for e in (*stage.get("deps", ()), *stage.get("outs", ()))
             if e["path"] in tracked and hashlib.md5((ROOT / e["path"]).read_bytes()).hexdigest() != e["md5"]}
    assert not stale, "run dvc repro and commit what it makes"
