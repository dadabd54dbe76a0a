"Models from the Hub, against a small server in this process; the client runs in processes of its own, because its address is read at import."
import json, os, socket, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from safetensors.numpy import save
sys.path.insert(0, str(Path(__file__).parent))
from hub_server import running_hub
from segsyn.files import SegsynError
from segsyn.hub import parse_reference, resolve_model, wanted_files

INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"],
         "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}


def model_files(fill: float = 0.0) -> dict:
    weights, text_weights = (save({"weight": np.full(1000, fill + part, np.float32)}) for part in (0, 0.5))
    return {"model_index.json": json.dumps(INDEX).encode(), "unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors": weights,
            "unet/diffusion_pytorch_model.fp16.safetensors": weights, "unet/diffusion_pytorch_model.bin": b"pickle", "text_encoder/config.json": b"{}",
            "text_encoder/model.safetensors": text_weights, "tokenizer/tokenizer_config.json": b"{}", "tokenizer/merges.txt": b"", "scheduler/scheduler_config.json": b"{}",
            "safety_checker/model.safetensors": weights, "all.safetensors": weights, "old.ckpt": b"pickle", "pipeline.py": b"raise SystemExit('ran')", "README.md": b"# tiny"}


def without(files: dict, *names: str) -> dict: return {n: b for n, b in files.items() if n not in names}


MODELS = {"acme/tiny-sd": {"main": model_files(), "v2": model_files(1.0)},
          "acme/only-pickle": {"main": {n: b for n, b in model_files().items() if not n.endswith(".safetensors")}},
          "acme/half-pickle": {"main": without(model_files(), "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors")},
          "acme/no-index": {"main": without(model_files(), "model_index.json")},
          "acme/own-code": {"main": model_files() | {"model_index.json": json.dumps(INDEX | {"unet": ["my_unet", "MyUnet"]}).encode()}}}

PROGRAM = """
import json, sys, warnings
from segsyn.files import SegsynError, cli
from segsyn.hub import resolve_model, resolved_revision
def main(arguments):
    for reference in arguments:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = resolve_model(reference)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        print(json.dumps([files, resolved_revision(folder), [str(w.message) for w in caught]]))
cli(main)
"""


def client(home: Path, address: str, *references: str, **environment: str) -> subprocess.CompletedProcess:
    "Resolve models in a fresh process."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM, *references], capture_output=True, text=True, env=env, timeout=120)


def refusal(result: subprocess.CompletedProcess) -> str:
    "The message of a run that ended as a user's error should: status 2, one message, no traceback."
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1, result.stderr
    return result.stderr


def test_download_then_offline(tmp_path):
    with running_hub(MODELS) as (address, hub):
        commit, second = hub.commit("acme/tiny-sd", "main"), hub.commit("acme/tiny-sd", "v2")
        first = client(tmp_path, address, "acme/tiny-sd", f"acme/tiny-sd@{second}")
        assert first.returncode == 0, first.stderr
        (files, revision, warned), (_, other, silent) = map(json.loads, first.stdout.splitlines())
        assert revision == commit and other == second
        assert len(warned) == 1 and f"acme/tiny-sd@{commit}" in warned[0] and silent == [] # a moving name is reported with its commit
        assert files == sorted(["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
                                "tokenizer/tokenizer_config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"])
        asked = len(hub.requests)
        assert json.loads(client(tmp_path, address, f"acme/tiny-sd@{commit}").stdout)[0] == files
        assert len(hub.requests) == asked # a whole copy at a commit asks nothing
    # the server is gone
    assert json.loads(client(tmp_path, address, "acme/tiny-sd").stdout)[1] == commit
    assert json.loads(client(tmp_path, address, "acme/tiny-sd", HF_HUB_OFFLINE="1").stdout)[1] == commit


@pytest.mark.parametrize("reference, words", [
    ("acme/nothing", ["no such model", "acme/nothing"]),
    ("acme/tiny-sd@v9", ["no such revision", "v9"]),
    ("acme/only-pickle", ["pickle", "diffusion_pytorch_model.bin", "safetensors"]),
    ("acme/half-pickle", ["missing: unet/diffusion_pytorch_model.safetensors"]),
    ("acme/no-index", ["missing: model_index.json"]),
    ("acme/own-code", ["own code", "my_unet.MyUnet"])])
def test_refused(tmp_path, reference, words):
    with running_hub(MODELS) as (address, _):
        message = refusal(client(tmp_path, address, reference))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network_and_no_copy(tmp_path, environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = refusal(client(tmp_path, address, "acme/tiny-sd@" + "0a" * 20, **environment))
    for word in ("missing: model_index.json", "acme/tiny-sd@0a0a", "hf download acme/tiny-sd", "--local-dir", "HF_HOME"): assert word in message


def test_broken_download_goes_on(tmp_path):
    with running_hub(MODELS) as (address, hub):
        hub.broken = {"unet/diffusion_pytorch_model.safetensors": 2000}
        message = refusal(client(tmp_path, address, "acme/tiny-sd"))
        assert "broke off" in message and "Run again" in message and "missing: unet/diffusion_pytorch_model.safetensors" in message
        offline = refusal(client(tmp_path, address, "acme/tiny-sd", HF_HUB_OFFLINE="1"))
        assert "missing: " in offline
        hub.broken = {}
        again = client(tmp_path, address, "acme/tiny-sd")
        assert again.returncode == 0, again.stderr
        downloaded = next(tmp_path.rglob("unet/diffusion_pytorch_model.safetensors"))
        assert downloaded.read_bytes() == MODELS["acme/tiny-sd"]["main"]["unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("status, word", [(500, "status 500"), (403, "accepted its terms")])
def test_server_says_no(tmp_path, status, word):
    with running_hub(MODELS) as (address, hub):
        hub.status = status
        assert word in refusal(client(tmp_path, address, "acme/tiny-sd"))


def test_missing_folder_is_no_question_to_a_server(tmp_path, monkeypatch):
    (tmp_path/"data"/"tiny-sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SegsynError, match="no such model folder") as caught: parse_reference("data/tiny-ds")
    assert "tiny-sd" in str(caught.value.fix)
    with pytest.raises(SegsynError, match="missing: model_index.json"): resolve_model("data/tiny-sd")


def test_wanted_files_leave_code_and_pickles():
    wanted = wanted_files(sorted(model_files()))
    assert not [n for n in wanted if n.endswith((".py", ".bin", ".ckpt", ".fp16.safetensors", ".md")) or "/" not in n and n.endswith(".safetensors")]
