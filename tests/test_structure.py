"""The form of the notebooks: what keeps one notebook one module, in one order, and small."""
import ast
import json
import re
from pathlib import Path

import pytest
from nbdev.export import nb_export
from segsyn.run import imported_modules, notebook_parameters, read_notebook

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(p for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb") if not p.name.startswith("00_"))
STAGES = sorted([*(ROOT / "nbs" / "pipeline").glob("*.ipynb"), *(ROOT / "nbs" / "training").glob("*.ipynb")])
NUMBERS = {p.stem[3:]: int(p.stem[:2]) for p in LIBRARY}
name_of = lambda path: str(path.relative_to(ROOT / "nbs"))
library = pytest.mark.parametrize("path", LIBRARY, ids=name_of)
stages = pytest.mark.parametrize("path", STAGES, ids=name_of)
everything = pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=name_of)


def code_cells(path):
    "(directives, source without them) of every code cell"
    found = []
    for cell in read_notebook(path).cells:
        if cell.cell_type != "code": continue
        lines = cell.source.splitlines()
        marks = [re.sub(r"^#\|\s*", "", l.strip()) for l in lines if l.lstrip().startswith("#|")]
        found.append((marks, "\n".join(l for l in lines if not l.lstrip().startswith(("#|", "%", "!")))))
    return found


def shown(path):
    "Code cells without those marked `hide`, which silence a library's warning."
    return [(marks, source) for marks, source in code_cells(path) if "hide" not in marks or "export" in marks]


def is_imports(source):
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


def test_there_is_a_library_and_no_number_twice():
    assert len(LIBRARY) >= 10
    numbers = [p.name[:2] for p in LIBRARY]
    assert len(set(numbers)) == len(numbers)


@library
def test_module_is_named_like_the_notebook(path):
    assert code_cells(path)[0][0] == [f"default_exp {path.stem[3:]}"]
    assert sum(m.startswith("default_exp") for marks, _ in code_cells(path) for m in marks) == 1


@library
def test_opening_cells(path):
    cells = read_notebook(path).cells
    code = shown(path)
    assert "export" in code[1][0] and is_imports(code[1][1]), "the second cell exports imports, and only imports"
    head = next(c.source for c in cells if c.cell_type == "markdown")
    assert re.match(r"# \S.*\n+> \S", head), "the first text is `# Title` and `> subtitle`"
    before = [c for c in cells[: cells.index(next(c for c in cells if c.cell_type == "markdown"))] if "hide" not in c.source.splitlines()[0]]
    assert all(is_imports("\n".join(l for l in c.source.splitlines() if not l.startswith(("#|", "%")))) for c in before), "imports come before the title"


@library
def test_imports_only_lower_numbers(path):
    imported = imported_modules("\n".join(source for _, source in code_cells(path)))
    unknown = imported - set(NUMBERS)
    assert not unknown, f"no notebook makes {sorted(unknown)}"
    # a notebook may use its own module, as a second process does
    higher = {m for m in imported if NUMBERS[m] > NUMBERS[path.stem[3:]]}
    assert not higher, f"{path.name} imports {sorted(higher)}, which come later"


@library
def test_imports_have_cells_of_their_own(path):
    for marks, source in shown(path):
        nodes = ast.parse(source).body
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes}
        assert len(kinds) < 2, f"imports and code in one cell:\n{source[:200]}"


@library
def test_export_cells_are_short(path):
    for marks, source in code_cells(path):
        if any(m.split()[0] in ("export", "exports", "exporti") for m in marks if m):
            lines = [l for l in source.splitlines() if l.strip()]
            assert len(lines) <= 40, f"{len(lines)} lines:\n{source[:200]}"


@library
def test_a_refusal_that_does_not_come_is_noticed(path):
    "A cell that shows an error message fails where there is none."
    for marks, source in code_cells(path):
        if "export" in marks: continue
        tries = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Try) and not n.orelse and any(h.type and "SegsynError" in ast.unparse(h.type) for h in n.handlers)]
        assert not tries or "raise AssertionError" in source, f"the `try` has no `else: raise AssertionError(...)`:\n{source[:200]}"


@everything
def test_weight(path):
    assert path.stat().st_size < 500_000


@everything
def test_outputs_hold_no_errors_secrets_or_machine_paths(path):
    text = json.dumps([c.get("outputs", []) for c in read_notebook(path).cells if c.cell_type == "code"])
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert '"output_type": "error"' not in text
    assert not re.search(r"\bhf_[A-Za-z]{20,}", text)
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text


@library
def test_exported_file_is_in_step(path, tmp_path):
    "Exporting again changes nothing: someone who forgot `nbdev_export` would run old code."
    nb_export(path, lib_path=tmp_path / "segsyn")
    name = f"{path.stem[3:]}.py"
    content = lambda file: re.sub(r"^(# %% |# AUTOGENERATED.*: )\S*nbs/", r"\1nbs/", file.read_text(), flags=re.M) # paths are relative to the module
    assert content(tmp_path / "segsyn" / name) == content(ROOT / "segsyn" / name), f"run nbdev_export: segsyn/{name} is not what {path.name} exports"


def test_every_module_has_its_notebook():
    modules = {p.stem for p in (ROOT / "segsyn").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(NUMBERS)


@stages
def test_stage_notebook(path):
    cells = read_notebook(path).cells
    assert notebook_parameters(read_notebook(path), path.name)
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells if c.cell_type == "code"), "stored with outputs"
    assert not any(m.startswith(("export", "default_exp")) for marks, _ in code_cells(path) for m in marks), "stages export nothing"
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@stages
def test_stage_defines_no_logic(path):
    "A function longer than a few lines belongs in the library."
    for _, source in code_cells(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 8, f"{node.name} belongs in nbs/"


def test_settings_keep_the_parameters_tag():
    text = (ROOT / "settings.ini").read_text()
    assert re.search(r"^allowed_cell_metadata_keys\s*=\s*tags\s*$", text, re.M)
    assert not re.search(r"^clear_all\s*=\s*True", text, re.M)
