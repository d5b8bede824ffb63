"""classroom/: bugs apply and are noticed, blanks can be filled, every Try has its runs.

`python classroom/bugs.py --check` asks every bug's test, in minutes; here only two are asked."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
CLASSROOM = ROOT / "classroom"
sys.path.append(str(CLASSROOM))

import answers  # noqa: E402
import blanks  # noqa: E402
import bugs  # noqa: E402
import fold  # noqa: E402

BUGS = bugs.read()
each_script = pytest.mark.parametrize("script", blanks.SCRIPTS)


def python(*words, cwd=ROOT):
    """Exit code and what a program says."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdicts(text):
    """Number of an equation -> right, not yet or wrong."""
    lines = re.findall(r"(?m)^eq\. \((\d+)\) +\w+ +(right|not yet|wrong)", text)
    return {int(number): verdict for number, verdict in lines}


# --- Blanks ----------------------------------------------------------------------------------


@each_script
def test_only_bodies_of_equations_are_gone(script):
    text = (ROOT / script).read_text()
    tree, copy = ast.parse(text), ast.parse(blanks.blank(text))
    found, left = blanks.equations(tree), blanks.equations(copy)
    assert list(found) == list(left) == list(range(1, len(found) + 1))
    for (name, function), (same, hollow) in zip(found.values(), left.values()):
        assert name == same and ast.get_docstring(hollow) == ast.get_docstring(function)
        assert ast.unparse(hollow.args) == ast.unparse(function.args)
        assert ast.unparse(hollow.body[-1]) == "raise NotImplementedError"
        assert len(hollow.body) == 1 + (ast.get_docstring(function) is not None)
        hollow.body = function.body
    assert ast.unparse(copy) == ast.unparse(tree)


def fill(copy, script, wrong=None):
    """The bodies of a script's equations back in their places, or one wrong body in its place."""
    text, lines = (ROOT / script).read_text().splitlines(), copy.splitlines()
    for number, (_, function) in blanks.equations(ast.parse("\n".join(text))).items():
        _, hollow = blanks.equations(ast.parse("\n".join(lines)))[number]
        first = function.body[ast.get_docstring(function) is not None].lineno
        body = text[first - 1 : function.end_lineno] if not wrong else wrong.get(number)
        if body:
            lines[hollow.end_lineno - 1 : hollow.end_lineno] = body
    return "\n".join(lines) + "\n"


def ask(*copies):
    """Exit code and verdicts of the tests on each copy, all of them at once."""
    command = [sys.executable, "-m", "pytest", "-q", "classroom", "--script"]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen([*command, str(copy)], **pipes) for copy in copies]
    said = [process.communicate()[0] for process in running]
    return [(process.returncode, verdicts(text)) for process, text in zip(running, said)]


def test_a_blank_copy_fails_its_equations_and_passes_with_the_bodies_back(tmp_path):
    """Outside the repository. What is wrong with one equation is not held against the others."""
    scripts = "rp_pretrain.py", "ppo_encoder.py"
    copies = [tmp_path / f"my_{script}" for script in scripts]
    for script, copy in zip(scripts, copies):
        code, said = python("classroom/blanks.py", script, "--out", str(copy))
        assert code == 0 and f"--script {copy}" in said
        assert copy.read_text() == blanks.blank((ROOT / script).read_text())
    blank = [copy.read_text() for copy in copies]
    copies[1].write_text(fill(blank[1], scripts[1], {2: ["    return log_prob.mean()"]}))
    not_yet = dict.fromkeys((1, 2, 3), "not yet")
    assert ask(*copies) == [(1, not_yet), (1, not_yet | {2: "wrong"})]
    for script, copy, text in zip(scripts, copies, blank):
        copy.write_text(fill(text, script))
        assert copy.read_text() == (ROOT / script).read_text()
    assert ask(*copies) == [(0, dict.fromkeys((1, 2, 3), "right"))] * 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["ppo.py", "--out", "new.py"], "error: ppo.py is none of awac.py, cc_rig.py"),
        (["sprites_env.py", "--out", "new.py"], "error: sprites_env.py is none of"),
        (["curl.py", "--out", "here.py"], "error: here.py exists"),
        (["curl.py", "--out", "no/where.py"], "error: cannot write no/where.py"),
    ],
)
def test_bad_input_for_blanks(words, message, tmp_path):
    (tmp_path / "here.py").write_text("work")
    code, said = python(str(CLASSROOM / "blanks.py"), *words, cwd=tmp_path)
    assert code == 1 and said.startswith(message) and said.count("\n") == 1
    assert (tmp_path / "here.py").read_text() == "work" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read"),
        ("def f(:", "line 1: invalid syntax"),
        ("x = 1", "begins like that of none of the scripts"),
        (
            blanks.blank((ROOT / "awac.py").read_text()).replace("def td_target", "def td"),
            "td_targ",
        ),
    ],
)
def test_bad_copies(text, message, tmp_path, monkeypatch):
    import conftest

    copy = tmp_path / "copy.py"
    if text:
        copy.write_text(text)
    config = SimpleNamespace(
        getoption=lambda name: str(copy), invocation_params=SimpleNamespace(dir=tmp_path)
    )
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


# --- Bugs ------------------------------------------------------------------------------------


def test_there_are_enough_bugs():
    assert len(BUGS) >= 40
    assert all(sum(bug["script"] == script for bug in BUGS) >= 4 for script in blanks.SCRIPTS)
    names = [(bug["script"], bug["name"]) for bug in BUGS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug['script'][:-3]}-{bug['name']}")
def test_every_bug_applies_to_one_line_and_names_a_test_and_a_column(bug):
    removed, *added = bugs.diff(bug)
    assert removed[0] == "-" and len(added) == 1 and added[0][0] == "+"
    compile(bugs.patch(bug), bug["script"], "exec")
    tests = bugs.TESTS.get(bug["script"], f"test_{bug['script']}")
    assert f"def {bug['test']}(" in (ROOT / "tests" / tests).read_text()
    assert bug["question"].endswith("?") and bug["explanation"]


def test_a_bug_is_noticed(capsys):
    """check() asks the tests without the bug, and with it."""
    (bug,) = [bug for bug in BUGS if bug["name"] == "weights_that_broadcast"]
    bugs.check([bug])
    assert "red test_weighted_cloning_loss_by_hand" in capsys.readouterr().out


def test_a_bug_that_nobody_notices_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bugs, "tests_fail", lambda *args: False)
    with pytest.raises(SystemExit, match="1 of 1 bugs were not noticed"):
        bugs.check(BUGS[:1])
    assert "NOT NOTICED" in capsys.readouterr().out


def test_a_patch_must_fit_one_place():
    with pytest.raises(SystemExit, match="has 0 places for bug 1, .*, not 1"):
        bugs.patch(BUGS[0] | {"old": "no such line"})


def test_list_and_bad_numbers(capsys):
    bugs.main(bugs.Args())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(BUGS) and lines[6].split()[:2] == ["7", BUGS[6]["script"]]
    for wrong in ({"run": 0}, {"run": len(BUGS) + 1}, {"every": 0}):
        with pytest.raises(SystemExit, match="--run one of 1 ..."):
            bugs.main(bugs.Args(**wrong))


@pytest.mark.parametrize("show", [False, True])
def test_both_curves_are_drawn(tmp_path, monkeypatch, capsys, show):
    """What was changed is told to those who ask."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def run_script(script, folder, flags):
        seen.append(script.read_text())
        return [{"step": 1, "mse": 0.5 + len(seen)}, {"step": 2, "mse": 0.25}]

    monkeypatch.setattr(bugs, "run_script", run_script)
    bugs.run(BUGS[0], "figures", show)
    assert (BUGS[0]["question"] in capsys.readouterr().out) == show
    assert seen == [(ROOT / "rp_pretrain.py").read_text(), bugs.patch(BUGS[0])]
    table = (tmp_path / "figures" / f"bug_rp_pretrain_{BUGS[0]['name']}.csv").read_text()
    assert table.splitlines()[:2] == ["run,step,mse", "as it is,1,1.5"]
    assert (tmp_path / "figures" / f"bug_rp_pretrain_{BUGS[0]['name']}.png").exists()


# --- Answers ---------------------------------------------------------------------------------

TRIES = json.loads((CLASSROOM / "tries.json").read_text())


@each_script
def test_every_try_has_its_runs(script):
    """What the docstring asks for, flag by flag; edits fit one place; tables have such rows."""
    asked = answers.questions(script[:-3])
    assert len(asked) == len(TRIES[script[:-3]]) == 3
    for question, wanted in zip(asked, TRIES[script[:-3]]):
        runs, rows = wanted.get("runs", {}), wanted.get("rows", {})
        assert runs or rows
        flags = set(" ".join(runs.values()).split())
        flags |= {"--" + name.replace("_", "-") for _, key in rows.values() for name in key}
        assert set(re.findall(r"--[a-z][a-z0-9-]*", question)) - {"--out"} <= flags
        old, _ = wanted.get("edit", ("class Args", ""))
        assert (ROOT / script).read_text().count(old) == 1
        for label, (table, key) in rows.items():
            found = answers.from_benchmark(label, table, key, wanted)
            assert found, f"benchmark/results/{table}.csv has no rows for {key}"


def test_an_answer_is_run_once_and_drawn(tmp_path, monkeypatch, capsys):
    """A stand-in for the script writes what a run leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers, "RESULTS", tmp_path / "results")
    ran = []

    def run(command, env):
        ran.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "curve.csv").write_text("step,order_accuracy\n1,0.5\n2,0.75\n")
        (folder / "summary.json").write_text(json.dumps({"order_accuracy": 0.75, "r2_agent": 0.5}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(answers.subprocess, "run", run)
    answers.main(answers.Args(only=("pretext_3",)))
    assert "to run: python" in capsys.readouterr().out and not ran
    for _ in range(2):
        answers.main(answers.Args(run=True, only=("pretext_3",)))
    assert len(ran) == 1 and "--objective shuffle --contrast 0" in " ".join(ran[0])
    with open(tmp_path / "results" / "pretext_3.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "order alone"]
    values = [(row["step"], row["measure"], row["value"]) for row in rows]
    assert values[:3] == [
        ("1", "order_accuracy", "0.5"),
        ("2", "order_accuracy", "0.75"),
        ("end", "order_accuracy", "0.75"),
    ]
    assert (tmp_path / "results" / "pretext_3.png").exists()
    with pytest.raises(SystemExit, match="--only pretext_4"):
        answers.main(answers.Args(only=("pretext_4",)))


def test_an_edit_makes_a_copy_and_leaves_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=3))
    wanted = TRIES["awac"][2]
    with pytest.raises(SystemExit, match="ended with 3"):
        answers.execute("awac", 3, "flipped", "", wanted)
    copy = (tmp_path / "runs" / "classroom" / "awac_3" / "flipped" / "awac.py").read_text()
    old, new = wanted["edit"]
    assert copy == (ROOT / "awac.py").read_text().replace(old, new)
    with pytest.raises(SystemExit, match="fits 0 places"):
        answers.execute("awac", 3, "flipped", "", wanted | {"edit": ["no such line", ""]})


# --- README ----------------------------------------------------------------------------------


def test_readme_is_folded_from_the_data():
    """After a change of a Try, of bugs.json or of tries.json: python classroom/fold.py."""
    text = (CLASSROOM / "README.md").read_text()
    assert fold.folded(text) == text
    assert text.count("<details>") == text.count("</details>") == 6 + 30 + len(BUGS)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (CLASSROOM / target).exists(), target
    for script in blanks.SCRIPTS:
        assert f"`{script}`" in text.split("## Glossary")[0]


def test_the_bugs_of_the_sessions_have_their_numbers():
    """The programs list bugs by number: those that a session names are of its scripts."""
    text = (CLASSROOM / "README.md").read_text().split("## Glossary")[0]
    sessions = text.split("## Session ")[1:]
    assert len(sessions) == 6
    for session in sessions:
        listed = session.partition("*Bugs*:")[2].partition(").")[0]
        numbers = [int(n) for n in re.findall(r"(\d+)\s\(", listed)]
        assert numbers
        for number in numbers:
            assert f"`{BUGS[number - 1]['script']}`" in session.partition("\n")[0]


def test_every_column_is_in_the_glossary():
    glossary = (CLASSROOM / "README.md").read_text().split("### Columns")[1].split("## Answers")[0]
    names = set(re.findall(r"`([a-z0-9_<>]+)`", glossary))
    known = "|".join(re.sub("<[a-z]+>", "[a-z0-9_]+", name) for name in names)
    sys.path.append(str(ROOT / "benchmark"))
    import study

    for table, keys in study.KEYS.items():
        path = study.RESULTS / f"{table}.csv"
        header = path.read_text().partition("\n")[0] if path.exists() else ",".join(keys)
        for column in set(header.split(",")) - set(keys):
            assert re.fullmatch(known, column), column
