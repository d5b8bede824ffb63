"""The answers to every Try: runs what the scripts' docstrings ask for, and draws it.

    python classroom/answers.py                    # every Try, its commands, and what is missing
    python classroom/answers.py --run              # runs what is missing, and draws: an hour or two
    python classroom/answers.py --run --only pretext_3

The questions are in the scripts' docstrings. tries.json has, for each, what words cannot say: its
runs as flags, an edit as [old text, new text], rows of benchmark/results that need no run, what is
measured, and which picture of a run to keep. An answer is classroom/results/<script>_<n>.csv and
.png; what stands in the table is not run again. Runs live in runs/classroom/. Stop at any time.
"""

import ast
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT, RESULTS, RUNS = HERE.parent, HERE / "results", Path("runs") / "classroom"
SHARES = "(probe_)?r2|retrieval|localisation|success|identif|order_acc|contrastive_acc|sample_size"
COLUMNS = ("label", "source", "seed", "step", "measure", "value")


@dataclass(frozen=True)
class Args:
    run: bool = False  # run what is missing, and draw
    only: tuple[str, ...] = ()  # which ones, such as pretext_3 (default: all)


def questions(script):
    """The texts of a script's Try, in their order."""
    text = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    return [" ".join(q.split()) for q in re.split(r"\n {4}\d\. ", text.split("\nTry")[1])[1:]]


def read_table(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def flat(summary):
    """{"probe_r2": {"agent": 1}} is probe_r2_agent."""
    found = {}
    for name, value in summary.items():
        nested = {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        found |= nested or {name: value}
    return found


def rows_of(label, source, seed, curve, summary, wanted):
    """The table's rows of one run: its curve, and what it measured at the end."""
    last = curve[-1] | {name: x for name, x in summary.items() if x not in ("", None)}
    points = [(row["step"], wanted.get("curve"), row) for row in curve if "curve" in wanted]
    points += [("end", name, last) for name in wanted["measures"]]
    rows = [(label, source, seed, step, name, row.get(name)) for step, name, row in points]
    return [dict(zip(COLUMNS, row)) for row in rows if row[-1] not in ("", None)]


def from_benchmark(label, table, key, wanted):
    """Rows of a study: the curve of its first seed, the last numbers of all."""
    belongs = lambda row: all(row[name] == value for name, value in key.items())  # noqa: E731
    path, rows = ROOT / "benchmark" / "results", []
    curves = [row for row in read_table(path / f"{table}.csv") if belongs(row)]
    for i, final in enumerate(
        row for row in read_table(path / f"{table}_final.csv") if belongs(row)
    ):
        curve = [row for row in curves if row["seed"] == final["seed"]]
        asked = wanted if i == 0 else {"measures": wanted["measures"]}
        rows += rows_of(label, f"benchmark {table}", final["seed"], curve, final, asked)
    if not rows:
        print(f"  benchmark/results/{table}.csv has no rows for {label}, {key}")
    return rows


def command(script, n, label, flags, wanted):
    """What is run for a label, and the folder of the run."""
    folder = RUNS / f"{script}_{n}" / re.sub(r"\W+", "_", label)
    path = folder / f"{script}.py" if "edit" in wanted else ROOT / f"{script}.py"
    return [
        os.path.relpath(path),
        *flags.split(),
        "--torch-threads",
        "1",
        "--out",
        str(folder / "run"),
    ], folder


def execute(script, n, label, flags, wanted):
    """A run, unless its folder has it, and its rows."""
    words, folder = command(script, n, label, flags, wanted)
    if "edit" in wanted:
        old, new = wanted["edit"]
        text = (ROOT / f"{script}.py").read_text()
        if text.count(old) != 1:
            raise SystemExit(
                f"error: the edit of {script}_{n} fits {text.count(old)} places, not 1"
            )
        folder.mkdir(parents=True, exist_ok=True)
        Path(words[0]).write_text(text.replace(old, new))
    if not (folder / "run" / "summary.json").exists():
        where = os.environ | {"PYTHONPATH": str(ROOT)}  # for sprites_env
        code = subprocess.run([sys.executable, *words, "--overwrite"], env=where).returncode
    curve, summary = read_table(folder / "run" / "curve.csv"), {}
    if (folder / "run" / "summary.json").exists():
        summary = flat(json.loads((folder / "run" / "summary.json").read_text()))
    elif not curve:  # a run that diverges leaves what it reported until then: an answer, too
        raise SystemExit(f"error: python {' '.join(words)} ended with {code}")
    if summary and "picture" in wanted:
        name = f"{script}_{n}_{folder.name}.png"
        shutil.copy(folder / "run" / wanted["picture"], RESULTS / name)
    return rows_of(label, f"{script}.py {flags}".strip(), 1, curve, summary, wanted)


def draw(rows, wanted, path):
    """A panel for the curve, if there is one, and one for each measure, a dot for each seed."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row["label"] for row in rows))
    colours = dict(zip(labels, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")))
    panels = [wanted[name] for name in ["curve"] if name in wanted] + wanted["measures"]
    lines, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure(figsize=(2.6 * max(2, columns), 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for i, (axis, name) in enumerate(zip(axes, panels)):
        axis.set_title(name, size=9)
        axis.tick_params(labelsize=8)
        if re.match(SHARES, name):  # all on one scale: .98 beside .96 is no difference to see
            axis.set_ylim(-0.05, 1.05)
        for place, label in enumerate(labels):
            mine = [row for row in rows if (row["label"], row["measure"]) == (label, name)]
            if i == 0 and "curve" in wanted:
                points = [(int(r["step"]), float(r["value"])) for r in mine if r["step"] != "end"]
                axis.plot(*zip(*points), ".-", color=colours[label], label=label, ms=3)
                axis.locator_params(axis="x", nbins=4)
                axis.set_xlabel("step (first seed)", size=8)
                continue
            values = [float(row["value"]) for row in mine if row["step"] == "end"]
            axis.plot([place] * len(values), values, "o", color=colours[label], ms=4)
            axis.set_xlim(-0.5, len(labels) - 0.5)
            axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        low, high = axis.get_ylim()
        if high - low < 0.01 * abs(high):  # the same to a hundredth: draw it as the same
            axis.set_ylim(0.99 * low, 1.01 * high)
        if i == 0 and "curve" in wanted:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def main(args):
    tries = json.loads((HERE / "tries.json").read_text())
    names = {f"{script}_{n}": (script, n) for script in tries for n in (1, 2, 3)}
    unknown = set(args.only) - set(names)
    if unknown:
        raise SystemExit(f"error: --only {unknown.pop()}: one of {', '.join(names)}")
    RESULTS.mkdir(exist_ok=True)
    for name in args.only or names:
        script, n = names[name]
        wanted, path = tries[script][n - 1], RESULTS / f"{name}.csv"
        print(f"{name}: {questions(script)[n - 1]}")
        old, rows = read_table(path), []
        for label, flags in wanted.get("runs", {}).items():
            source = f"{script}.py {flags}".strip()
            have = [row for row in old if (row["label"], row["source"]) == (label, source)]
            edit = ", edited (see tries.json)" if "edit" in wanted else ""
            words, _ = command(script, n, label, flags, wanted)
            print(f"  {'finished' if have else 'to run'}: python {' '.join(words)}{edit}")
            rows += have or (execute(script, n, label, flags, wanted) if args.run else [])
        for label, (table, key) in wanted.get("rows", {}).items():
            print(f"  in benchmark/results/{table}.csv: {label}")
            rows += from_benchmark(label, table, key, wanted) if args.run else []
        if args.run:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            draw(rows, wanted, path.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
