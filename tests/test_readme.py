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
    for figure in (f"Pictures and masks agree at {percent(joint['ratio'])} of what true scenes reach", f"(F1 {joint['classes']['f1']:.2f})", "with an F1 of {:.2f}, in the base's own pictures for the same captions with {:.2f}, in true scenes with {:.2f}".format(*(joint["classes_seen"][name]["f1"] for name in ("pictures of pairs", "the base's pictures", "true scenes"))), f"only at {percent(measured('results/mask2img')['ratio'])} of what true pictures",
                   f"in {percent(base['found']['mean'])} of its pictures of one class", f"in {percent(uvit['found']['mean'])} of its pictures", f"both classes of a prompt in {percent(base['found']['both of two'])}",
                   f"{100 * measured('results/label_vae')['reconstruction']['val-A']['0']['miou']:.1f} mIoU come back", *(f"{100 * masks['real_latents'][step]['miou']:.1f}" for step in ("cross", "self", "uncertainty"))):
        assert figure in text, figure


def test_figures_about_the_sweeps_are_those_of_the_results():
    text, differences = (ROOT / "README.md").read_text(), json.loads((ROOT / "results" / "sweeps-differences.json").read_text())
    def score(choice, split): return f"{100 * mean(run['splits'][split]['miou'] for run in json.loads((ROOT / 'results' / 'sweeps' / f'{choice}.json').read_text())['runs']):.1f}"
    def difference(pair, split): return "{difference:+.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * v for k, v in differences[pair][split].items()})
    both, splits = "real+masksyn+imgsyn", ("val-A", "val-B", "unseen")
    for figure in (*(" / ".join(score(choice, split) for split in splits) for choice in ("long-real", "long-ceiling", f"long-{both}", "strategy-pretrain", "strategy-real", "alone-masksyn+imgsyn", "alone-attention", "fifth-real", f"fifth-{both}")), *(difference("alone-jodiffusion minus alone-jodiffusion-250", split) for split in splits), *(difference("alone-masksyn+imgsyn minus alone-imgsyn", split) for split in splits[:2]),
                   difference(f"fifth-{both} minus fifth-real", "val-A"), *(difference("strategy-pretrain minus strategy-real", split) for split in splits), *(difference(f"by-loss-{recipe} minus seeds-{recipe}", split) for recipe, split in (("real+jodiffusion", "val-A"), ("real+jodiffusion", "val-B"), (both, "val-A"), ("real+attention", "val-A"))), *(difference(f"{kind}-real+masksyn minus seeds-real+masksyn", "val-B") for kind in ("refined", "present", "near")), difference("long-ceiling minus long-real", "val-A"), *(difference(f"long-{both} minus {other}", split) for other in ("long-real", "strategy-pretrain") for split in splits),
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


def test_figures_about_filters_are_those_of_the_results():
    text, measured = (ROOT / "README.md").read_text(), {name: json.loads((ROOT / "results" / "filters" / f"{name}-by-loss.json").read_text()) for name in ("jodiffusion", "masksyn", "imgsyn", "attention")}
    before, after = ({name: f"{100 * own[state]['oracle_miou']:.1f}" for name, own in measured.items()} for state in ("as made", "filtered"))
    lost = [100 * own["filtered"]["confirmed labels lost"] for own in measured.values()]
    for figure in (f"masks at {after['jodiffusion']} mIoU, before at {before['jodiffusion']}", *(f"at {after[name]} ({before[name]})" for name in ("masksyn", "imgsyn", "attention")), f"{min(lost):.0f} to {max(lost):.0f} % of the labels that the oracle confirms"): assert figure in text, figure


def test_figures_about_the_scale_of_labels_are_those_of_the_results():
    measured = {scale: json.loads((ROOT / "results" / f"{name}.json").read_text()) for scale, name in (("0.2", "joint"), ("1", "full/joint-label-scale-1"), ("2", "full/joint-label-scale-2"))}
    assert "agree at {:.0f} and {:.0f} %".format(*(100 * measured[scale]["ratio"] for scale in ("1", "2"))) in (ROOT / "README.md").read_text()
    told = "".join(line for cell in json.loads((ROOT / "nbs" / "22_joint.ipynb").read_text())["cells"] for line in cell["source"])
    for scale, own in measured.items(): assert f"| {scale} | {own['agreement']['pairs, regions below 0 pixels refined']['free']:.3f} | {own['classes_seen']['pictures of pairs']['f1']:.2f} | {own['classes']['f1']:.2f} |" in told


def test_figures_about_longer_training_are_those_of_the_results():
    text, measured = (ROOT / "README.md").read_text(), lambda name: json.loads((ROOT / "results" / f"{name}.json").read_text())
    rows = {"of what true pictures do": [f"{100 * measured(f'{folder}mask2img')['ratio']:.0f} %" for folder in ("", "full/")],
            **{row: [f"{100 * measured(f'{folder}label_vae')['reconstruction']['val-A'][noise]['miou']:.1f}" for folder in ("", "full/")] for row, noise in (("comes back on `val-A`", "0"), ("a tenth of a standard deviation |", "0.1"))}}
    for row, values in rows.items(): assert " | ".join(values) in next(line for line in text.splitlines() if row in line), row
    painted, drawn = measured("full/text2mask")["by_steps"], measured("full/mask2img")["agreement"]
    assert "0.83, 0.83, 0.84 and 0.83" in text and [f"{painted[steps]['f1']:.2f}" for steps in ("5", "10", "25", "200")] == ["0.83", "0.83", "0.84", "0.83"]
    assert "42.3, 42.6, 42.3 and 42.1" in text and [f"{100 * drawn[f'{steps} steps']['free']:.1f}" for steps in (5, 10, 20, 40)] == ["42.3", "42.6", "42.3", "42.1"]
