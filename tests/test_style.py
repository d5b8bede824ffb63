"""The house rules: a script stands alone, the same name means the same code everywhere, equations
have functions, and the algorithm stands above the plumbing."""

import ast
import dataclasses
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(  # without what students call theirs
    p for p in ROOT.glob("*.py") if p.name != "sprites_env.py" and not p.name.startswith("my_")
)
HEADINGS = "What Paper Algorithm Equations Notation Differs.from.the.paper Run Writes Result Try"
PACKAGES = {"torch", "numpy", "gymnasium", "matplotlib", "tyro", "PIL", "sprites_env"}
Definition = ast.FunctionDef | ast.ClassDef

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def parse(script):
    return ast.parse(script.read_text())


def definitions(tree):
    return {node.name: node for node in tree.body if isinstance(node, Definition)}


def code(node):
    """The source without docstrings and comments."""
    for part in ast.walk(node):
        if isinstance(part, Definition) and ast.get_docstring(part):
            part.body = part.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def appendix(script):
    """The line at which the pictures begin."""
    lines = script.read_text().splitlines()
    ends = ("# --- Appendix", "if __name__")
    return next(i for i, line in enumerate(lines, 1) if line.startswith(ends))


def test_same_name_same_code():
    seen = {}
    for script in SCRIPTS:
        for name, node in definitions(parse(script)).items():
            if name not in ("Args", "train"):
                first, expected = seen.setdefault(name, (script.name, code(node)))
                assert code(node) == expected, f"{name} differs: {first} and {script.name}"


@each_script
def test_imports(script):
    """The standard library, the five packages (Pillow comes with matplotlib) and sprites_env."""
    for node in ast.walk(parse(script)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        for module in (m.split(".")[0] for m in modules):
            assert module in PACKAGES or module in sys.stdlib_module_names, module
            # matplotlib takes a second to import: only where something is drawn
            assert module not in ("matplotlib", "PIL") or node.col_offset > 0


@each_script
def test_docstring_headings(script):
    docstring = ast.get_docstring(parse(script))
    headings = re.findall(r"(?m)^(\S[^\n]*)$", docstring)[1:]
    assert len(headings) == len(HEADINGS.split())
    for found, expected in zip(headings, HEADINGS.split()):
        assert re.fullmatch(expected, found)


@each_script
def test_every_equation_has_one_function(script):
    """An equation (n) of the docstring is named, as "eq. (n)", by exactly one function or class."""
    tree = parse(script)
    numbers = re.findall(r"(?m)^ {4}\((\d+)\) ", ast.get_docstring(tree).split("Equations")[1])
    assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers
    named = []
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            named += re.findall(r"eq\. \((\d+)\)", ast.get_docstring(node) or "")
    assert sorted(named, key=int) == numbers


@each_script
def test_no_algorithm_in_the_appendix(script):
    """Whatever updates and equations use, and what that uses in turn, stands above the appendix,
    which has nothing but pictures; and of sprites_env it is about the environment at most."""
    tree = parse(script)
    defined = definitions(tree)
    waiting = [name for name in defined if name.startswith(("update", "collect", "roll_out"))]
    waiting += [n for n, node in defined.items() if "eq. (" in (ast.get_docstring(node) or "")]
    assert len(waiting) > 3
    used = set()
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            nodes = ast.walk(defined.get(name, ast.Pass()))
            waiting += [n.id for n in nodes if isinstance(n, ast.Name)]
    below = {name for name, node in defined.items() if node.lineno > appendix(script)}
    assert not used & below and not used & {"Run", "require", "require_positive"}
    for name in below - {"load_skills"}:
        assert name.startswith("draw_")


@each_script
def test_order_and_length(script):
    """Arguments, networks, losses, updates, data, training, pictures; `train` fits on a slide."""
    text, order = script.read_text(), []
    titles = (
        "class Args|# --- Networks|# --- Losses|# --- (?:The u|U)pdate|# --- Data|# --- Training"
    )
    for title in re.split(r"\|(?!U)", titles):
        order.append(re.search(f"(?m)^{title}", text).start())
    assert order == sorted(order)
    for node in ast.walk(parse(script)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name
    algorithm = appendix(script) - text[: order[1]].count("\n")
    assert algorithm / text.count("\n") > 0.6
    assert max(map(len, text.splitlines())) <= 100


@each_script
def test_every_update_steps_in_sight(script):
    """zero_grad, backward and step stand in this order in every update, or in what it calls."""
    defined = definitions(parse(script))
    updates = [n for n in defined if n.startswith("update_")]
    assert updates
    for name in updates:
        source = ast.unparse(defined[name])
        if "step_policy(" in source:
            source += ast.unparse(defined["step_policy"])
        at = [source.index(part) for part in (".zero_grad()", ".backward()", ".step()")]
        assert at == sorted(at)


@each_script
def test_every_flag_has_help_and_every_function_a_docstring(script):
    text = script.read_text()
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    module = importlib.import_module(script.stem)
    assert len(dataclasses.fields(module.Args)) <= 25
    for name, node in definitions(ast.parse(text)).items():
        if name == "Args":
            for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
                assert field.end_lineno in comments, field.target.id
        else:
            assert ast.get_docstring(node), name


@each_script
def test_columns_are_explained(script):
    """Every column of a committed study of this script is named in its docstring."""
    tables = {"rig_td3": "rig", "skill_embedding": "skill"}
    table = ROOT / "benchmark" / "results" / f"{tables.get(script.stem, script.stem)}.csv"
    module = importlib.import_module(script.stem)
    flags = {field.name for field in dataclasses.fields(module.Args)}
    with open(table) as file:
        columns = file.readline().strip().split(",")
    for column in columns:
        families = ("mse_", "r2_", "kl_1_", "skills_", "scratch_")
        known = column in flags or column.startswith(families)
        assert known or f"`{column}`" in module.__doc__, column


@each_script
def test_no_name_done(script):
    """Truncation ends an episode without ending the bootstrap: one word for both is a trap."""
    tokens = tokenize.generate_tokens(io.StringIO(script.read_text()).readline)
    assert not {t.string for t in tokens if t.type == tokenize.NAME} & {"done", "dones"}


def test_readme_is_one_page_and_mentions_every_script():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    for script in SCRIPTS:
        assert f"`{script.name}`" in readme
