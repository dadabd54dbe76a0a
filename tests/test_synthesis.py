"The engine's promises, tried with real processes: kill -9 at every step, signals, workers, extension, full disk, locks."
import errno, functools, json, multiprocessing, os, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from segsyn.dataset import SegmentationDataset, check_dataset
from segsyn.files import LockedError, SegsynError, derive_seed, folder_hashes, folder_lock, read_json, write_json
from segsyn.synthesis import METHODS, Request, load_method, plan_requests, read_journal, synthesise
import shapes_method
from shapes_method import CAPTIONS, SPACE, Shapes, large_enough, run

HERE = Path(__file__).parent
tree = lambda folder: folder_hashes(folder, skip=())

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run with one worker."
    root = tmp_path_factory.mktemp("whole")
    return run(root/"set", root)

def in_child(function, *arguments):
    "Run in a process of its own; returns its exit code, negative for a signal."
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start(); child.join(60)
    assert child.exitcode is not None
    return child.exitcode

def killed_at(step, folder, root, count=8):
    "A run that kills itself without mercy just before its step-th change of the file system."
    steps = [0]
    def patched(real):
        def call(*a, **k):
            if steps[0] == step: os.kill(os.getpid(), signal.SIGKILL)
            steps[0] += 1
            return real(*a, **k)
        return call
    for name in ("replace", "rename", "link", "fsync", "unlink"): setattr(os, name, patched(getattr(os, name)))
    run(folder, root, count)
    (Path(root)/"steps").write_text(str(steps[0]))

def test_killed_at_every_step(whole, tmp_path):
    assert in_child(killed_at, -1, tmp_path/"count"/"set", tmp_path/"count") == 0
    steps, expected = int((tmp_path/"count"/"steps").read_text()), tree(whole)
    assert steps > 60
    for step in range(0, steps):
        root = tmp_path/str(step)
        root.mkdir()
        assert in_child(killed_at, step, root/"set", root) == -signal.SIGKILL
        if (root/"set").exists(): assert tree(root/"set") == expected, f"a torn dataset after step {step}"
        if step % 5 == 0: assert in_child(killed_at, 7, root/"set", root) in (-signal.SIGKILL, 0) # a second misfortune
        assert tree(run(root/"set", root)) == expected, f"another dataset after a kill at step {step}"
        leftovers = [p.name for p in root.iterdir() if p.name.endswith((".partial", ".old"))]
        assert not leftovers, f"{leftovers} after step {step}"

def start(folder, root, **settings):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.Popen([sys.executable, str(HERE/"shapes_method.py"), str(folder), str(root), json.dumps(settings)], env=environment, stderr=subprocess.PIPE, text=True, cwd=HERE.parent)

def wait_for_journals(root, count, process):
    deadline = time.monotonic() + 60
    while len(list(Path(root).glob(".segsyn/work/*/journal/*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)

@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_from_outside(tmp_path, number, status, workers):
    whole = run(tmp_path/"whole"/"set", tmp_path/"whole", 24)
    process = start(tmp_path/"set", tmp_path, count=24, workers=workers, method={"delay": 0.04})
    wait_for_journals(tmp_path, 2, process)
    process.send_signal(number)
    assert process.wait(60) == status, process.stderr.read()
    time.sleep(0.3) # what is left of the workers ends
    before = sorted(tmp_path.glob(".segsyn/work/*/*/*"))
    assert not (tmp_path/"set").exists() and len(before) < 70
    time.sleep(0.3)
    assert sorted(tmp_path.glob(".segsyn/work/*/*/*")) == before, "a worker outlived its parent"
    assert tree(run(tmp_path/"set", tmp_path, 24)) == tree(whole)
    process.stderr.close()

def test_workers_write_the_same_bytes(whole, tmp_path):
    assert tree(run(tmp_path/"set", tmp_path, workers=2)) == tree(whole)

def test_workers_need_a_recipe(tmp_path):
    with pytest.raises(SegsynError, match="recipe"): run(tmp_path/"set", tmp_path, workers=2, method=Shapes())

def test_workers_need_what_can_be_pickled(tmp_path):
    with pytest.raises(SegsynError, match="picklable"): run(tmp_path/"set", tmp_path, workers=2, accept=lambda sample: True)

def test_progress_line(tmp_path, capsys):
    synthesise(Shapes(), plan_requests(CAPTIONS, 6, 0), tmp_path/"set", SPACE, "Shapes", threads=1, accept=large_enough, root=tmp_path)
    line = capsys.readouterr().err.split("\r")[-1]
    assert "6/6" in line and "sample/s" in line and "rejected=" in line

def test_samples_do_not_depend_on_what_else_is_made(whole, tmp_path):
    "Alone, in another order, with other neighbours: the same pixels."
    requests = plan_requests(CAPTIONS, 8, 0)
    backwards = synthesise(Shapes(), requests[::-1], tmp_path/"set", SPACE, "Shapes", progress=False, threads=1, retries=1, accept=large_enough, root=tmp_path)
    assert folder_hashes(backwards/"images") == folder_hashes(whole/"images") and folder_hashes(backwards/"masks") == folder_hashes(whole/"masks")

def test_extension_and_shrinking(whole, tmp_path):
    run(tmp_path/"set", tmp_path, 5)
    five = {n: h for n, h in tree(tmp_path/"set").items() if n.endswith(".png") and n != "contact.png"}
    assert tree(run(tmp_path/"set", tmp_path, 8)) == tree(whole)
    assert all(tree(whole)[n] == h for n, h in five.items())
    with pytest.raises(SegsynError, match="more samples than are asked for"): run(tmp_path/"set", tmp_path, 5)
    assert tree(tmp_path/"set") == tree(whole)
    assert len(SegmentationDataset(run(tmp_path/"set", tmp_path, 5, overwrite=True))) == 4 # and one dropped

def test_extension_without_the_work_folder(whole, tmp_path):
    class Counted(Shapes):
        asked = []
        def __call__(self, requests):
            self.asked.extend(r.key for r in requests)
            return super().__call__(requests)
    run(tmp_path/"set", tmp_path, 5)
    shutil.rmtree(tmp_path/".segsyn")
    assert tree(run(tmp_path/"set", tmp_path, 8, method=Counted())) == tree(whole)
    assert set(Counted.asked) == {"000005", "000006", "000007"}

def test_folders_of_other_kinds_are_never_removed(tmp_path):
    (tmp_path/"set").mkdir(); (tmp_path/"set"/"thesis.txt").write_text("ten years")
    with pytest.raises(SegsynError, match="something else"): run(tmp_path/"set", tmp_path, overwrite=True)
    assert (tmp_path/"set"/"thesis.txt").exists()

def test_finished_runs_do_nothing(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    run(whole, whole.parent)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before

@pytest.mark.parametrize("change, key", [({"method": Shapes(size=20)}, "settings.size: 16 -> 20"), ({"method": Shapes(chunk_size=4)}, "chunk_size: 3 -> 4"), ({"retries": 2}, "retries: 1 -> 2"),
                                         ({"accept": None}, "accept"), ({"facts": {"style": "labels"}}, "run.style"), ({"seed": 1}, "seeds")])
def test_other_settings_are_refused(whole, change, key):
    before = tree(whole)
    with pytest.raises(SegsynError) as error: run(whole, whole.parent, **change)
    assert key in str(error.value) and tree(whole) == before

def test_unfinished_runs_of_other_settings(tmp_path):
    assert in_child(killed_at, 40, tmp_path/"set", tmp_path) == -signal.SIGKILL
    with pytest.raises(SegsynError, match="settings.size: 16 -> 20"): run(tmp_path/"set", tmp_path, method=Shapes(size=20), resume="always")
    assert {Path(s.key).name for s in SegmentationDataset(run(tmp_path/"set", tmp_path, method=Shapes(size=20)))} <= {f"{i:06d}" for i in range(8)}
    with pytest.raises(SegsynError, match="resume"): run(tmp_path/"other", tmp_path, resume="perhaps")

def test_other_seeds_in_the_same_work_folder(tmp_path):
    "The seed is in the requests: nothing of the interrupted run is taken over."
    assert in_child(killed_at, 60, tmp_path/"set", tmp_path) == -signal.SIGKILL
    assert tree(run(tmp_path/"set", tmp_path, seed=1)) == tree(run(tmp_path/"fresh"/"set", tmp_path/"fresh", seed=1))

def test_damaged_work_is_made_again(whole, tmp_path):
    assert in_child(killed_at, 70, tmp_path/"set", tmp_path) == -signal.SIGKILL
    image = sorted(tmp_path.glob(".segsyn/work/*/images/*.png"))[0]
    image.write_bytes(image.read_bytes()[:50])
    assert tree(run(tmp_path/"set", tmp_path)) == tree(whole)

def test_new_work_leaves_finished_datasets_alone(tmp_path):
    "Work folder and dataset share files by links; making samples anew must not write through them."
    first = run(tmp_path/"set", tmp_path)
    first.rename(tmp_path/"kept")
    before = tree(tmp_path/"kept")
    run(tmp_path/"set", tmp_path, seed=1)
    assert tree(tmp_path/"kept") == before and check_dataset(tmp_path/"kept") == []

@pytest.mark.parametrize("writes", [5, 12, 25, 35]) # among the first samples, later ones, and while the dataset is put together
def test_full_disk(whole, tmp_path, monkeypatch, writes):
    real, calls = os.fsync, [0]
    def full(descriptor):
        calls[0] += 1
        if calls[0] > writes: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SegsynError) as error: run(tmp_path/"set", tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert "disk is full" in str(error.value) and not (tmp_path/"set").exists()
    assert tree(run(tmp_path/"set", tmp_path)) == tree(whole)

def test_too_little_memory_names_the_chunk(tmp_path):
    class Greedy(Shapes):
        def __call__(self, requests): raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with pytest.raises(SegsynError, match="chunk_size") as error: run(tmp_path/"set", tmp_path, method=Greedy(chunk_size=8))
    assert "Set it to 4" in str(error.value)

def test_locked_folders(tmp_path):
    with folder_lock(tmp_path/"set"):
        process = start(tmp_path/"set", tmp_path)
        assert process.wait(60) == 75
        assert f"process {os.getpid()}" in process.stderr.read()
    process.stderr.close()

def test_retries_are_decided_per_sample(tmp_path):
    requests = plan_requests(CAPTIONS, 20, 3)
    data = SegmentationDataset(run(tmp_path/"set", tmp_path, 20, seed=3, retries=2))
    made_by = read_json(tmp_path/"set"/"manifest.json")["facts"]
    tried = {r.key: [large_enough(Shapes().draw(r.at_attempt(a))) is True for a in range(3)] for r in requests}
    assert {s.key: s.extra["attempt"] for s in data} == {k: t.index(True) for k, t in tried.items() if any(t)}
    assert {s.key: s.seed for s in data} == {k: derive_seed(3, "sample", k, t.index(True)) for k, t in tried.items() if any(t)}
    assert made_by["rejected"] == {"too small": sum(t.index(True) if any(t) else 3 for t in tried.values())}
    assert made_by["dropped"] == sum(not any(t) for t in tried.values())
    assert read_json(tmp_path/"set"/"rejects.json") == {k: ["too small"]*(t.index(True) if any(t) else 3) for k, t in tried.items() if not t[0]}
    assert len(set(map(tuple, tried.values()))) > 1 # the case is not trivial

def test_all_rejected(tmp_path):
    with pytest.raises(SegsynError, match="Every sample was rejected"): run(tmp_path/"set", tmp_path, accept=lambda s: "ugly")
    assert not (tmp_path/"set").exists()

def test_acceptance_without_an_answer(tmp_path):
    with pytest.raises(SegsynError, match="True, False or a reason"): run(tmp_path/"set", tmp_path, accept=lambda s: None)

def test_samples_in_another_order_are_refused(tmp_path):
    class Shuffled(Shapes):
        def __call__(self, requests): return super().__call__(requests)[::-1]
    with pytest.raises(SegsynError, match="in order"): run(tmp_path/"set", tmp_path, method=Shuffled())

def test_loads_without_our_code(whole, tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = datasets.load_dataset("imagefolder", data_dir=str(whole), split="train", cache_dir=str(tmp_path))
    assert len(plain) == len(SegmentationDataset(whole)) and {"image", "mask", "text"} <= set(plain.column_names)
    assert np.array_equal(np.asarray(plain[0]["mask"]), SegmentationDataset(whole)[0].mask)
    assert check_dataset(whole) == []

def test_nothing_in_the_dataset_tells_time_or_place(whole):
    text = "".join(p.read_text() for p in whole.iterdir() if p.suffix in (".json", ".jsonl", ".md"))
    assert str(whole.parent) not in text and "seconds" not in text
    timings, = whole.parent.glob(".segsyn/work/*/timings.json")
    assert read_json(timings)["runs"][0]["samples"] > 0

@pytest.mark.parametrize("quotas", [None, "balanced", {"disc": 1, "square": 3}])
def test_plans_grow_at_the_end(quotas):
    rng = np.random.default_rng(0)
    captions = [(f"caption {i}", tuple(np.array(["disc", "square"])[rng.permutation(2)[:rng.integers(1, 3)]].tolist())) for i in range(40)]
    long = plan_requests(captions, 150, 5, quotas)
    for count in (1, 7, 40, 41, 149): assert plan_requests(captions, count, 5, quotas) == long[:count]
    assert len({r.seed for r in long}) == 150
    uses = Counter(r.caption for r in long[:40])
    if quotas is None: assert set(uses.values()) == {1} # all of them before any comes again

def test_quotas_balance():
    captions = [(f"a disc {i}", ("disc",)) for i in range(90)] + [(f"a square {i}", ("square",)) for i in range(10)]
    for quotas, share in (("balanced", 0.5), ({"disc": 1, "square": 3}, 0.75), ({"square": 1}, 1.0)):
        counts = Counter(name for r in plan_requests(captions, 200, 0, quotas) for name in r.classes)
        assert abs(counts["square"]/200 - share) < 0.01

@pytest.mark.parametrize("captions, quotas, words", [([], None, "no captions"), ([("", ("disc",))], None, "empty"), ([("a disc", ())], None, "no class"), ([("a disc", "disc")], None, "no class"),
    ([("a dsic", ("dsic",))], None, "disc"), ([("a disc", ("disc",))], {"disk": 1}, "disc"), ([("a disc", ("disc",))], {"disc": 0}, "above 0"), ([("a disc", ("disc",))], "even", "balanced")])
def test_bad_plans(captions, quotas, words):
    with pytest.raises(SegsynError) as error: plan_requests(captions, 3, 0, quotas, SPACE)
    assert words in str(error.value)

def test_bad_requests(tmp_path):
    for key in ("../a", "a/b", "", "train-1"):
        with pytest.raises(SegsynError): Request(key, "a disc", ("disc",), 0)
    twice = [Request("a", "a disc", ("disc",), 0), Request("A", "a disc", ("disc",), 1)]
    with pytest.raises(SegsynError, match="same key"): synthesise(Shapes(), twice, tmp_path/"set", SPACE, "x", root=tmp_path)
    with pytest.raises(SegsynError, match="no requests"): synthesise(Shapes(), [], tmp_path/"set", SPACE, "x", root=tmp_path)
    with pytest.raises(SegsynError, match="disc"): synthesise(Shapes(), [Request("a", "a dics", ("dics",), 0)], tmp_path/"set", SPACE, "x", root=tmp_path)

def test_load_method_names_the_nearest():
    for name, settings, words in (("atention", {}, "Did you mean 'attention'"), ("shapes_method:Shapes", {"chunksize": 2}, "Did you mean 'chunk_size'"), ("nowhere:Shapes", {}, "could not be imported"), ("shapes_method:Circles", {}, "could not be imported")):
        with pytest.raises(SegsynError) as error: load_method(name, **settings)
        assert words in str(error.value)
    assert load_method("shapes_method:Shapes", size=20).fingerprint() == {"size": 20}
    assert all(target.count(":") == 1 for target in METHODS.values())

def test_dataset_diffusion_keeps_the_promises(tmp_path):
    "The real method on a small random base: one worker, two workers and an extended run write the same bytes."
    from segsyn.base import make_tiny_base, save_base
    save_base(make_tiny_base("sd", seed=0), tmp_path/"base")
    recipe = functools.partial(load_method, "attention", base=str(tmp_path/"base"), space=SPACE, steps=3, chunk_size=2)
    requests, trees = plan_requests(CAPTIONS, 5, 0, "balanced", SPACE), []
    for name, workers, counts in (("one", 1, [5]), ("two", 2, [5]), ("extended", 1, [3, 5])):
        for count in counts: folder = synthesise(recipe, requests[:count], tmp_path/name/"set", SPACE, "Tiny", workers=workers, threads=1, progress=False, root=tmp_path/name)
        trees.append(tree(folder))
    assert trees[0] == trees[1] == trees[2]
