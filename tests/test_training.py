"Training: a run that was stopped anywhere ends with the bits of one that was not, and a checkpoint is whole or absent."
import copy, errno, functools, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import segsyn.training as training
from segsyn.files import LockedError, SegsynError, folder_lock, verify_manifest
from segsyn.training import TrainConfig, batch_keys, checkpoint_folders, learning_rate_at
from training_run import Waves, make_model, noisy_loss, settings

ROOT = Path(__file__).resolve().parent.parent
RUN = Path(__file__).with_name("training_run.py")


fit = functools.partial(training.fit, progress=False)


def state(folder):
    "Every tensor of the last checkpoint, and the history's bytes."
    last = checkpoint_folders(folder)[-1]
    tensors = {f"{p.name}:{k}": v for p in sorted(last.glob("*.safetensors")) for k, v in load_file(p).items()}
    return last.name, tensors, (Path(folder)/"history.jsonl").read_bytes()


def assert_same(a, b):
    (name_a, tensors_a, history_a), (name_b, tensors_b, history_b) = state(a), state(b)
    assert name_a == name_b and history_a == history_b and tensors_a.keys() == tensors_b.keys()
    assert max((tensors_a[k].double() - tensors_b[k].double()).abs().max().item() for k in tensors_a) == 0


def start(folder, delay=0.0, **changes):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(RUN), str(folder), str(delay), json.dumps(changes)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read() if process.poll() is not None else "too slow"
        time.sleep(0.002)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"schedule": "cosine"}, {"workers": 2}, {"gradient_accumulation": 3, "max_gradient_norm": None}],
                         ids=["fp32", "bf16", "cosine", "workers", "three-parts"])
def test_resume_from_every_checkpoint_is_exact(tmp_path, changes):
    config = settings(steps=7, log_every=3, checkpoint_every=1, keep_checkpoints=99, **changes)  # 40 items, 12 an update: epochs end inside
    straight = fit(make_model(), Waves(), noisy_loss, config, tmp_path/"straight")
    config = config.model_copy(update={"checkpoint_every": 99})
    for checkpoint in checkpoint_folders(tmp_path/"straight")[:-1]:
        again = tmp_path/checkpoint.name
        shutil.copytree(checkpoint, again/"checkpoints"/checkpoint.name)
        resumed = fit(make_model(seed=5), Waves(), noisy_loss, config, again)
        assert_same(tmp_path/"straight", again)
        assert all(torch.equal(a, b) for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()))


def test_batches_do_not_depend_on_workers(tmp_path):
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"none")
    fit(make_model(), Waves(), noisy_loss, settings(workers=2), tmp_path/"two")
    assert torch.equal(*(state(tmp_path/n)[1]["model.safetensors:0.weight"] for n in ("none", "two")))


def test_validation_and_callers_random_stream_are_undisturbed(tmp_path):
    def look(model, step, folder):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        return {"score": float(step)}
    torch.manual_seed(7); expected = torch.rand(2); torch.manual_seed(7)
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"plain")
    assert torch.equal(torch.rand(2), expected)
    watched = fit(make_model(), Waves(), noisy_loss, settings(validate_every=3), tmp_path/"watched", validate=look)
    assert torch.equal(*(state(tmp_path/n)[1]["average.safetensors:0.weight"] for n in ("plain", "watched")))
    assert [h["score"] for h in watched.history if "score" in h] == [3, 6, 9, 12]


def test_killed_process_resumes_exactly(tmp_path):
    fit(make_model(), Waves(), noisy_loss, settings(steps=18, checkpoint_every=1, keep_checkpoints=1), tmp_path/"straight")
    changes = dict(steps=18, checkpoint_every=1, keep_checkpoints=1)
    for reached in (3, 8, 13):
        process = start(tmp_path/"killed", 0.005, **changes)
        wait_for(lambda: any(int(p.name[5:]) >= reached for p in checkpoint_folders(tmp_path/"killed")), process)
        process.kill(); process.communicate()
        left = checkpoint_folders(tmp_path/"killed")
        assert left and verify_manifest(left[-1]) == [] and len(left) <= 2
    fit(make_model(), Waves(), noisy_loss, settings(**changes), tmp_path/"killed")
    assert_same(tmp_path/"straight", tmp_path/"killed")
    assert not [p for p in (tmp_path/"killed"/"checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["terminate", "interrupt"])
def test_polite_signals_save_first(tmp_path, number, status):
    fit(make_model(), Waves(), noisy_loss, settings(steps=40, checkpoint_every=1000, log_every=1), tmp_path/"straight")
    process = start(tmp_path/"stopped", 0.02, steps=40, checkpoint_every=1000, log_every=1)
    history = tmp_path/"stopped"/"history.jsonl"
    wait_for(lambda: history.exists() and history.read_text().count("\n") >= 5, process)
    process.send_signal(number); process.communicate()
    assert process.returncode == status
    [left] = checkpoint_folders(tmp_path/"stopped")
    assert 5 <= int(left.name[5:]) < 40
    fit(make_model(), Waves(), noisy_loss, settings(steps=40, checkpoint_every=1000, log_every=1), tmp_path/"stopped")
    assert_same(tmp_path/"straight", tmp_path/"stopped")


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    fit(make_model(), Waves(), noisy_loss, settings(log_every=3, steps=6, keep_checkpoints=1), tmp_path/"run")
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(SegsynError, match="disk is full"): fit(make_model(), Waves(), noisy_loss, settings(log_every=3, steps=12, keep_checkpoints=1), tmp_path/"run")
    monkeypatch.undo()
    assert [p.name for p in checkpoint_folders(tmp_path/"run")] == ["step-00000006"]
    fit(make_model(), Waves(), noisy_loss, settings(log_every=3), tmp_path/"run")
    fit(make_model(), Waves(), noisy_loss, settings(log_every=3), tmp_path/"straight")
    assert_same(tmp_path/"run", tmp_path/"straight")


def test_damaged_checkpoint_falls_back_and_all_damaged_stops(tmp_path):
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"a")
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"b")
    older, last = checkpoint_folders(tmp_path/"a")
    (last/"optimizer.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="optimizer.safetensors: changed"): fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"a")
    assert_same(tmp_path/"a", tmp_path/"b")
    for place in checkpoint_folders(tmp_path/"a"): (place/"state.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(SegsynError, match="Every checkpoint"): fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"a")


def test_checkpoints_hold_no_pickle_and_are_few(tmp_path):
    fit(make_model(), Waves(), noisy_loss, settings(checkpoint_every=1, keep_checkpoints=3), tmp_path)
    assert len(checkpoint_folders(tmp_path)) == 3
    assert {p.suffix for p in (tmp_path/"checkpoints").rglob("*") if p.is_file()} == {".safetensors", ".json"}


@pytest.mark.parametrize("changes, named", [({"learning_rate": 2e-2}, "config.learning_rate: 0.01 -> 0.02"), ({"seed": 1}, "config.seed"), ({"precision": "bf16"}, "config.precision"),
                                            ({"steps": 8}, "config.steps: 12 -> 8"), ({"ema_decay": None}, "config.ema_decay")])
def test_changed_settings_are_refused_by_name(tmp_path, changes, named):
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path)
    before = state(tmp_path)[0]
    with pytest.raises(SegsynError, match=named.replace(".", r"\.")): fit(make_model(), Waves(), noisy_loss, settings(**changes), tmp_path)
    assert state(tmp_path)[0] == before
    with pytest.raises(SegsynError, match="facts.base"): fit(make_model(), Waves(), noisy_loss, settings(), tmp_path, facts={"base": "other"})
    with pytest.raises(SegsynError, match="model.trained"): fit(nn.Sequential(nn.Conv1d(2, 1, 1)), Waves(), noisy_loss, settings(), tmp_path)


def test_other_threads_are_warned_of(tmp_path):
    fit(make_model(), Waves(), noisy_loss, settings(steps=4, threads=1), tmp_path)
    with pytest.warns(UserWarning, match="another number of threads"): result = fit(make_model(), Waves(), noisy_loss, settings(steps=6, threads=2), tmp_path)
    assert result.steps == 6


def test_longer_run_continues_and_a_schedule_does_not(tmp_path):
    for steps in (6, 12): fit(make_model(), Waves(), noisy_loss, settings(steps=steps), tmp_path/"grown")
    fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"straight")
    assert torch.equal(*(state(tmp_path/n)[1]["average.safetensors:0.weight"] for n in ("grown", "straight")))
    fit(make_model(), Waves(), noisy_loss, settings(steps=6, schedule="poly"), tmp_path/"poly")
    with pytest.raises(SegsynError, match="Other steps"): fit(make_model(), Waves(), noisy_loss, settings(steps=12, schedule="poly"), tmp_path/"poly")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stops_in_its_step(tmp_path, bad):
    config = settings(steps=12, batch_size=4)
    spoilt = batch_keys(config, 40, step=6)[1][0]
    class Spoilt(Waves):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            return {**item, "y": item["y"]*bad} if key[0] == spoilt else item
    with pytest.raises(SegsynError, match="step 7") as caught: fit(make_model(), Spoilt(), noisy_loss, config, tmp_path)
    assert str(spoilt) in caught.value.found
    last = checkpoint_folders(tmp_path)[-1]
    assert last.name == "step-00000006" and all(t.isfinite().all() for t in load_file(last/"model.safetensors").values())


def test_not_finite_gradient_of_a_finite_loss_stops(tmp_path):
    def loss(model, batch, generator): return torch.sqrt((model(batch["x"])*0).square().sum())
    with pytest.raises(SegsynError, match="gradient norm not finite in step 1"): fit(make_model(), Waves(), loss, settings(), tmp_path)
    assert checkpoint_folders(tmp_path) == []


def test_frozen_parameters_stay_and_are_not_saved(tmp_path):
    model = make_model()
    model[0].requires_grad_(False); model[1].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, Waves(), noisy_loss, settings(), tmp_path)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after if k[0] in "01") and not torch.equal(before["4.weight"], after["4.weight"])
    tensors = state(tmp_path)[1]
    assert not [k for k in tensors if k.endswith(("0.weight", "1.weight"))] and "optimizer.safetensors:exp_avg/4.weight" in tensors
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(SegsynError, match="every parameter is frozen"): fit(model, Waves(), noisy_loss, settings(), tmp_path/"none")


def test_second_process_is_kept_out(tmp_path):
    with folder_lock(tmp_path/"run"), pytest.raises(LockedError): fit(make_model(), Waves(), noisy_loss, settings(), tmp_path/"run")


def test_out_of_memory_is_said_in_words(tmp_path):
    def loss(model, batch, generator): raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(SegsynError, match="gradient_accumulation to 4"): fit(make_model(), Waves(), loss, settings(), tmp_path)


@pytest.mark.parametrize("changes, named", [({"batch_size": 5}, "batch_size"), ({"precision": "fp16"}, "fp16")])
def test_impossible_settings(tmp_path, changes, named):
    with pytest.raises(SegsynError, match=named): fit(make_model(), Waves(), noisy_loss, settings(**changes), tmp_path)


@pytest.mark.parametrize("changes, named", [({"stepz": 3}, "Did you mean 'steps'"), ({"steps": 0}, "steps"), ({"learning_rate": "fast"}, "learning_rate"), ({"learning_rate": float("nan")}, "learning_rate")])
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(SegsynError, match=named): settings(**changes)


def test_model_is_given_back_as_it_came(tmp_path):
    model = make_model()
    fit(model, Waves(), noisy_loss, settings(precision="bf16"), tmp_path)
    assert "forward" not in vars(model) and not model.training
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin[4].bias += 1
    x = torch.zeros(2, 2, 16)
    assert torch.allclose(twin(x), model(x) + 1, atol=1e-6)


def test_two_processes_do_the_same_updates(tmp_path):
    "A batch of 12 as 1 process x 2 parts, or as 2 processes x 1 part: the same noise, the same samples, another order of sums."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    model_changes = dict(gradient_accumulation=1, steps=6)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631", str(RUN), str(tmp_path/"two"), "0", json.dumps(model_changes)],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fit(make_model(), Waves(), noisy_loss, settings(gradient_accumulation=2, steps=6), tmp_path/"one")
    one, two = state(tmp_path/"one")[1], state(tmp_path/"two")[1]
    assert torch.allclose(one["model.safetensors:4.weight"], two["model.safetensors:4.weight"], atol=1e-4)


def test_learning_rates():
    config = TrainConfig(steps=110, batch_size=1, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate_at(config, 0) == 0.1 and learning_rate_at(config, 9) == 1 and learning_rate_at(config, 60) == pytest.approx(0.5) and learning_rate_at(config, 110) == 0
