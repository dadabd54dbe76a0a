"The README is what nbs/index.ipynb says, with the results that are in git."
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
