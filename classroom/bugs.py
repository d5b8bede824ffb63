"""Find the bug: changes of one line, of the kind that people make, and what they do to the curve.

    python classroom/bugs.py                          # the list, a question each: a hint
    python classroom/bugs.py --run 6                  # the script with bug 6 beside the good one
    python classroom/bugs.py --run 6 --show           # and the line that was changed
    python classroom/bugs.py --check                  # does its test notice each of them? Minutes
    python classroom/bugs.py --check --every 10       # a part of it

The bugs are in bugs.json, as [old text, new text] of a script; the scripts themselves are never
changed. --run takes short settings, and leaves runs and figure in runs/classroom/. What each bug
does, and why, is folded in README.md: look at the curve first.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT, RUNS = HERE.parent, Path("runs") / "classroom"
TESTS = {"rig_td3.py": "test_rig.py", "skill_embedding.py": "test_skill.py"}


@dataclass(frozen=True)
class Args:
    run: int | None = None  # number of a bug: run it beside the good script, and draw both
    show: bool = False  # also print question and changed line of the bug that is run
    check: bool = False  # does each patch apply to one place, and turn its test red?
    every: int = 1  # only each n-th bug (list and check)
    out: str = str(RUNS)  # folder for the figure and the curves of --run


def read():
    """The bugs, each with its number, and the flags and column of curve.csv to look at."""
    data = json.loads((HERE / "bugs.json").read_text())
    bugs = []
    for number, bug in enumerate(data["bugs"], 1):
        flags, column = data["settings"][bug["script"]]
        bugs.append({"number": number, "flags": flags, "column": column} | bug)
    return bugs


def patch(bug):
    """The text of the script with the bug in it."""
    text = (ROOT / bug["script"]).read_text()
    places = text.count(bug["old"])
    if places != 1:
        where = f"{bug['script']} has {places} places for bug {bug['number']}, {bug['name']}"
        raise SystemExit(f"error: {where}, not 1: has the script changed?")
    return text.replace(bug["old"], bug["new"])


def diff(bug):
    """The bug as lines with - and +."""
    text, broken = (ROOT / bug["script"]).read_text().splitlines(), patch(bug).splitlines()
    pairs = [pair for pair in zip(text, broken) if pair[0] != pair[1]]
    return [sign + line for i, sign in enumerate("-+") for line in (pair[i] for pair in pairs)]


def tests_fail(repository, *bugs):
    """Whether one of the tests of these bugs, which are of one script, fails there."""
    script = bugs[0]["script"]
    tests = {f"tests/{TESTS.get(script, 'test_' + script)}::{bug['test']}" for bug in bugs}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *sorted(tests)]
    code = subprocess.run(command, cwd=repository, capture_output=True, timeout=600).returncode
    if code not in (0, 1):
        raise SystemExit(f"error: cannot run {' '.join(command)}: exit code {code}")
    return code == 1


def check(bugs):
    """Every patch applies to exactly one place; its test is green without it and red with it."""
    texts, bad = {bug["number"]: patch(bug) for bug in bugs}, 0
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "results")
        shutil.copytree(ROOT, repository, ignore=ignored)
        for script in dict.fromkeys(bug["script"] for bug in bugs):
            mine = [bug for bug in bugs if bug["script"] == script]
            if tests_fail(repository, *mine):
                raise SystemExit(f"error: tests of {script} fail without any bug")
            for bug in mine:
                (repository / script).write_text(texts[bug["number"]])
                red = tests_fail(repository, bug)
                bad += not red
                said = "red" if red else "NOT NOTICED by"
                print(f"{bug['number']:3}  {script:20} {bug['name']:38} {said} {bug['test']}")
            shutil.copy(ROOT / script, repository / script)
    if bad:
        raise SystemExit(f"error: {bad} of {len(bugs)} bugs were not noticed")


def run_script(script, folder, flags):
    """Its curve: run it, unless that is so already. A run that diverges keeps what it wrote."""
    marker = folder / "finished"
    if not marker.exists() or marker.read_text() != flags + script.read_text():
        words = ["--torch-threads", "1", "--overwrite", "--out", str(folder), *flags.split()]
        print(script, *words, flush=True)
        where = os.environ | {"PYTHONPATH": str(ROOT)}  # for sprites_env
        code = subprocess.run([sys.executable, str(script), *words], env=where).returncode
        if not (folder / "curve.csv").exists() or not (folder / "curve.csv").stat().st_size:
            raise SystemExit(f"error: {script} left no curve (exit code {code})")
        marker.write_text(flags + script.read_text())
    with open(folder / "curve.csv") as file:
        return list(csv.DictReader(file))


def draw(bug, rows, path):
    """Both curves; rows of (which, step, value). What was changed is not told."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for which, colour in (("as it is", "#0072B2"), ("with the bug", "#E69F00")):
        points = [(int(step), float(value)) for name, step, value in rows if name == which]
        axis.plot(*zip(*points), ".-", color=colour, label=which)
    axis.set_xlabel(f"{bug['script']} {bug['flags']}", size=8)
    axis.set_ylabel(bug["column"])
    axis.set_title(f"bug {bug['number']}", size=8)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=90)


def run(bug, out, show):
    """Both curves, as a figure and as a table."""
    if show:
        print(bug["question"], *diff(bug), sep="\n")
    name = f"bug_{bug['script'].removesuffix('.py')}_{bug['name']}"
    folder, slug = RUNS / name, bug["flags"].replace("--", "").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    broken = folder / bug["script"]
    broken.write_text(patch(bug))
    good = RUNS / f"good_{bug['script'].removesuffix('.py')}_{slug}"
    curves = {"as it is": run_script(ROOT / bug["script"], good, bug["flags"])}
    curves["with the bug"] = run_script(broken, folder / "run", bug["flags"])
    rows = [(x, row["step"], row[bug["column"]]) for x, curve in curves.items() for row in curve]
    Path(out).mkdir(parents=True, exist_ok=True)
    draw(bug, rows, Path(out) / f"{name}.png")
    with open(Path(out) / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("run", "step", bug["column"]), *rows])
    print(f"{Path(out) / name}.png")


def main(args):
    bugs = read()
    if args.every < 1 or args.run is not None and not 1 <= args.run <= len(bugs):
        raise SystemExit(f"error: --every is at least 1, --run one of 1 ... {len(bugs)}")
    if args.run:
        run(bugs[args.run - 1], args.out, args.show)
    elif args.check:
        check(bugs[:: args.every])
    else:
        for bug in bugs[:: args.every]:
            print(f"{bug['number']:3}  {bug['script']:20} {bug['question']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
