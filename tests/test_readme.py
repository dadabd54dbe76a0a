"The README is what nbs/index.ipynb says, with the results that are in git."
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_is_in_step():
    done = subprocess.run([sys.executable, "-m", "segsyn.report", "readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    paths = [part.split(")")[0] for part in text.split("](")[1:]]
    missing = [p for p in paths if not p.startswith("http") and not (ROOT / p).exists()]
    assert not missing


def test_figures_in_the_text_are_those_of_the_results():
    "The README's tables are made from results/; its sentences are typed, and these figures in them could go stale."
    text, measured = (ROOT / "README.md").read_text(), lambda name: json.loads((ROOT / f"{name}.json").read_text())
    joint, base, uvit, masks = measured("results/joint"), measured("training/results/measure"), measured("training/results/uvit-measure"), measured("results/masks")
    percent = lambda value: f"{100 * value:.0f} %"
    for figure in (f"they agree at {percent(joint['ratio'])} of what true scenes reach", f"(F1 {joint['classes']['f1']:.2f})", f"only at {percent(measured('results/mask2img')['ratio'])} of what true pictures",
                   f"in {percent(base['found']['mean'])} of its pictures of one class", f"in {percent(uvit['found']['mean'])} of its pictures", f"both classes of a prompt in {percent(base['found']['both of two'])}",
                   f"{100 * measured('results/label_vae')['reconstruction']['val-A']['0']['miou']:.1f} mIoU come back", *(f"{100 * masks['real_latents'][step]['miou']:.1f}" for step in ("cross", "self", "uncertainty"))):
        assert figure in text, figure
