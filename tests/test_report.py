"Tables come from metrics files alone: what is missing or no number is refused by name, and verdicts follow the intervals."
import json
import pytest
from segsyn.files import SegsynError, write_json
from segsyn.report import (CLAIMS, Claim, choose_extremes, claim_table, class_table, find_result, judge_claim, load_metrics, mask_table, pair_numbers, pair_table, segment_numbers, segment_table,
                           tau_figure, to_markdown, write_figures, write_tables)

def score(miou, reach=0.02, **more): return {"miou": miou, "low": round(miou - reach, 4), "high": round(miou + reach, 4), "iou": {"background": 0.9, "bird": miou, "rare": None}, **more}
def recipe(name, seed=0, **splits): return {"recipe": name, "labels_used": "10 masks", "steps": 5, "seed": seed, "splits": splits}

def results(folder, *recipes, masks=None):
    for i, r in enumerate(recipes): write_json(folder/"segment"/f"{i}-{r['recipe']}.json", r)
    if masks is not None: write_json(folder/"masks.json", masks)
    return load_metrics(folder)

def test_one_run_and_several_in_files_or_in_a_list(tmp_path):
    runs = [recipe("real", s, **{"val-A": score(m)}) for s, m in enumerate((0.4, 0.5, 0.6))]
    table = segment_table(results(tmp_path/"files", *runs, recipe("synthetic", **{"val-A": score(0.3)})))
    assert table["val-A"].tolist() == ["50.0 ± 10.0", "30.0 [28.0, 32.0]"] and table["runs"].tolist() == ["3 runs", "one run"]
    listed = {k: runs[0][k] for k in ("recipe", "labels_used", "steps")} | {"runs": [{k: r[k] for k in ("seed", "splits")} for r in runs]}
    numbers = segment_numbers(results(tmp_path/"list", listed))
    assert numbers.iloc[0][["runs", "low", "high"]].tolist() == [3, 0.38, 0.62] and numbers.spread[0] == pytest.approx(0.1)

@pytest.mark.parametrize("text, words", [('{"recipe": "real"', "not valid JSON"), ('{"recipe": "real", "steps": 5, "splits": {}}', "labels_used"), ('{"recipe": "real", "labels_used": "x", "steps": 5}', "runs"),
    ('{"recipe": "real", "labels_used": "x", "steps": 5, "splits": {"val-A": {"miou": NaN}}}', "val-A.miou"), ('{"recipe": "real", "labels_used": "x", "steps": 5, "splits": {"val-A": {"miou": 43.0}}}', "43.0"),
    ('{"recipe": "real", "labels_used": "x", "steps": 5, "splits": {"val-A": {}}}', "val-A.miou"), ("[1, 2]", "real.json"),
    ('{"recipe": "real", "labels_used": "x", "steps": 5, "seeds": [0, 1], "splits": {"val-A": {"miou": 0.4}}}', "kept apart")])
def test_bad_files_are_named(tmp_path, text, words):
    (tmp_path/"segment").mkdir(); (tmp_path/"segment"/"real.json").write_text(text)
    with pytest.raises(SegsynError) as error: load_metrics(tmp_path)
    assert words in str(error.value) and "real.json" in str(error.value)

def test_missing_parts(tmp_path):
    with pytest.raises(SegsynError, match="no metrics here"): load_metrics(tmp_path)
    with pytest.raises(SegsynError, match="lacks a split"): segment_table(results(tmp_path, recipe("real", 0, **{"val-A": score(0.4), "unseen": score(0.2)}), recipe("real", 1, **{"val-A": score(0.4)})))
    metrics = results(tmp_path/"b", recipe("real", **{"val-A": score(0.4)}))
    assert set(claim_table(metrics).verdict) == {"not measured"} and len(mask_table(metrics)) == 3
    with pytest.raises(SegsynError, match="val-A"): class_table(metrics, "valA")
    with pytest.raises(SegsynError, match="not varied"): tau_figure(metrics)
    with pytest.raises(SegsynError, match="not addressed"): find_result(metrics, "masks/real")
    with pytest.raises(SegsynError, match="do not belong together"): results(tmp_path/"b", recipe("real", 1, **{"val-A": score(0.4)}) | {"steps": 6}, recipe("real", 2, **{"val-A": score(0.4)}))

def test_absent_classes_are_not_zero(tmp_path):
    assert class_table(results(tmp_path, recipe("real", **{"val-A": score(0.4)})), "val-A").values.tolist() == [["background", "90.0"], ["bird", "40.0"], ["rare", "–"]]

@pytest.mark.parametrize("better, worse, versus, verdict", [(0.5, 0.4, None, "shown"), (0.42, 0.4, None, "undecided"), (0.4, 0.42, None, "undecided"), (0.4, 0.5, None, "not shown"), (0.4, 0.4, None, "undecided"),
    (0.4, 0.42, {"difference": -0.02, "low": -0.03, "high": -0.01}, "not shown"), (0.4, 0.42, {"difference": -0.02, "low": -0.05, "high": 0.01}, "undecided"), (0.42, 0.4, {"difference": 0.02, "low": 0.01, "high": 0.03}, "shown"), (0.5, 0.4, {"difference": 0.1, "low": -0.01, "high": 0.2}, "undecided")])
def test_verdicts(tmp_path, better, worse, versus, verdict):
    more = {"versus": {"real": versus}} if versus else {}
    metrics = results(tmp_path, recipe("real", **{"val-A": score(worse)}), recipe("synthetic", **{"val-A": score(better, **more)}))
    assert judge_claim(metrics, Claim("it helps", "-", "segment/synthetic/val-A", "segment/real/val-A"))["verdict"] == verdict

def test_markdown_is_escaped(tmp_path):
    metrics = results(tmp_path, recipe("a|b\nc", **{"val-A": score(0.4)}))
    assert all(line.count("|") - line.count("\\|") == 6 for line in to_markdown(segment_table(metrics)).splitlines())

def test_same_metrics_same_bytes(tmp_path):
    masks = {"real_latents": {"cross": score(0.3), "self": score(0.4)}, "tau": {str(t): score(0.3 + t/50) for t in range(6)}}
    metrics = results(tmp_path, recipe("real", **{"val-A": score(0.4), "unseen": score(0.2)}), masks=masks)
    read = lambda f: {p.name: p.read_bytes() for p in sorted(f.iterdir())}
    for name in ("one", "two"): write_tables(metrics, tmp_path/name); write_figures(load_metrics(tmp_path), tmp_path/name)
    assert read(tmp_path/"one") == read(tmp_path/"two") and {"segment.csv", "masks.md", "claims.csv", "classes-unseen.csv", "recipes.png", "tau.png"} <= set(read(tmp_path/"one"))

def test_extremes():
    assert choose_extremes([0.1, None, 0.9, float("nan"), 0.9, 0.5], 2) == ([2, 4], [0, 5])
    assert choose_extremes([0.5], 3) == ([], []) and len(CLAIMS) == len({c.text for c in CLAIMS})

def test_pairs_of_every_method_that_was_measured(tmp_path):
    assert pair_table(tmp_path).empty
    write_json(tmp_path/"seggen.json", {"imgsyn": {"samples": 7, "oracle_miou": 0.4, "foreground": 0.2, "ignored": 0.0}})
    assert pair_table(tmp_path)["and of training"].tolist() == ["–"], "of the one dataset that there is the training is not known"
    (tmp_path/"seggen.json").unlink()
    write_json(tmp_path/"attention.json", {"images": 8, "mean foreground": 0.3, "mean ignored": 0.04, "operations": 3e10})
    write_json(tmp_path/"jodiffusion.json", {"samples": 9, "oracle_miou": 0.5, "foreground": 0.2, "ignored": 0.0, "operations": 6e10})
    assert pair_table(tmp_path)["the oracle's mIoU against their masks"].tolist() == ["–", "50.0"], "without the mask study nothing is known of Dataset Diffusion's agreement"
    write_json(tmp_path/"masks.json", {"oracle_miou": 0.57})
    write_json(tmp_path/"seggen.json", {name: {"samples": 7, "oracle_miou": 0.4, "foreground": 0.2, "ignored": 0.0} for name in ("imgsyn", "masksyn")})
    numbers, table = pair_numbers(tmp_path), pair_table(tmp_path)
    assert numbers.dataset.tolist() == ["attention", "imgsyn", "masksyn", "jodiffusion"] and numbers.samples.tolist() == [8, 7, 7, 9]
    write_json(tmp_path/"mask2img.json", {"training_operations": 7e10})
    assert pair_table(tmp_path)["and of training"].tolist() == ["0", "10", "–", "–"], "both of MaskSyn's trainings must be known"
    write_json(tmp_path/"text2mask.json", {"training_operations": 14e10})
    assert pair_table(tmp_path)["and of training"].tolist() == ["0", "10", "30", "–"]
    assert table["10⁹ operations a pair"].tolist() == ["30", "–", "–", "60"] and table["the oracle's mIoU against their masks"].tolist() == ["57.0", "40.0", "40.0", "50.0"]
