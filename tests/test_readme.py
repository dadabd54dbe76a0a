"The README is what nbs/index.ipynb says, with the results that are in git."
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

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


def test_figures_about_the_sweeps_are_those_of_the_results():
    text, differences = (ROOT / "README.md").read_text(), json.loads((ROOT / "results" / "sweeps-differences.json").read_text())
    def score(choice, split): return f"{100 * mean(run['splits'][split]['miou'] for run in json.loads((ROOT / 'results' / 'sweeps' / f'{choice}.json').read_text())['runs']):.1f}"
    def difference(pair, split): return "{difference:+.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * v for k, v in differences[pair][split].items()})
    both, splits = "real+masksyn+imgsyn", ("val-A", "val-B", "unseen")
    for figure in (*(" / ".join(score(choice, split) for split in splits) for choice in ("strategy-pretrain", "strategy-real", "fifth-real", f"fifth-{both}")), difference(f"fifth-{both} minus fifth-real", "val-A"), *(difference("strategy-pretrain minus strategy-real", split) for split in splits),
                   f"from {score('seeds-real', 'val-A')} without to {score('alone-masksyn+imgsyn', 'val-A')}", f"from {score('seeds-real', 'val-B')} to {score('share-0.6', 'val-B')}",
                   f"from {score('amount-125', 'val-B')} to {score(f'seeds-{both}', 'val-B')}", *(difference(pair, "val-B") for pair in (*(f"fifth-{recipe} minus fifth-real" for recipe in ("real+masksyn", "real+imgsyn", both)), f"seeds-{both} minus amount-125", "seeds-real+jodiffusion minus pairs-250", f"bare-{both} minus bare-real", f"seeds-{both} minus seeds-real")),
                   *(score(f"deeplab-{recipe}", "val-B") for recipe in ("attention", "masksyn+imgsyn", "jodiffusion", "real", "real+attention", both, "real+jodiffusion"))):
        assert figure in text, figure


def test_figures_about_instances_and_fewer_labels_are_those_of_the_results():
    text, measured = (ROOT / "README.md").read_text(), lambda name: json.loads((ROOT / "results" / f"{name}.json").read_text())
    own, real = (measured("panoptic")["recipes"][recipe]["val-B"] for recipe in ("real+masksyn+imgsyn", "real"))
    gained = 100 * (own["mean"]["mean_iou"] - real["mean"]["mean_iou"])
    for figure in (f"from {100 * real['mean']['AP']:.1f} to {100 * own['mean']['AP']:.1f}", f"{100 * measured('panoptic')['ceiling']['val-A']['PQ']:.1f} PQ on `val-A`", "{:+.1f} [{:.1f}, {:.1f}] mIoU".format(gained, *(100 * v for v in own["gain"]["mean_iou"])),
                   f"(F1 {measured('panoptic-text2mask')['agreement']['f1']:.2f} against {measured('text2mask')['agreement']['f1']:.2f}", f"({100 * measured('panoptic-mask2img')['ratio']:.0f} and {100 * measured('mask2img')['ratio']:.0f} %)",
                   f"(F1 {measured('fifth-text2mask')['agreement']['f1']:.2f})", f"obey at {100 * measured('fifth-mask2img')['ratio']:.0f} %"):
        assert figure in text, figure
