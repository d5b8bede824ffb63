"""Every figure and table of the README's results, from benchmark/results/*.csv alone.

    python benchmark/plot.py

Writes benchmark/results/learning_curves.png and comparisons.png, and the tables between the
`<!-- table: name -->` and `<!-- end -->` marks of README.md. Intervals are 95 % bootstrap
intervals of the mean over seeds (10,000 resamples, fixed seed); with three to five seeds they are
rough, so every seed is drawn as well.
"""

import csv
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
import sprites_env  # noqa: E402

TEXT = ("encoder", "objective", "git_commit")  # columns that hold no number
# Okabe and Ito's colours, which survive colour blindness, and dashes, which survive greyscale.
STYLES = {
    "oracle": ("#000000", "-"),
    "reward_prediction_finetune": ("#D55E00", "-"),
    "reward_prediction": ("#E69F00", "--"),
    "image_scratch": ("#0072B2", "-"),
    "cnn": ("#56B4E9", "-."),
    "image_reconstruction_finetune": ("#009E73", "-"),
    "image_reconstruction": ("#CC79A7", "--"),
}


def read(name):
    """Rows of a results file, numbers as numbers."""
    with open(RESULTS / name, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in TEXT else float(v or "nan") for k, v in row.items()}
            for row in rows]  # fmt: skip


def interval(values):
    """(mean, low, high) over axis 0 (seeds): 95 % percentile bootstrap. values (S, ...)."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def curves(rows, encoder, distractors):
    """(steps (M,), returns (S, M)) of one encoder at one number of distractors."""
    runs = {}
    for row in rows:
        if row["encoder"] == encoder and row["distractors"] == distractors:
            runs.setdefault(row["seed"], []).append((row["step"], row["eval_return"]))
    if not runs:
        return None
    runs = np.array([sorted(run) for run in runs.values()])  # (S, M, 2)
    return runs[0, :, 0], runs[:, :, 1]


def draw_curves(axis, rows, encoders, distractors):
    """Mean, interval and every seed of these encoders; the hand-written controllers as lines."""
    for name, level in sprites_env.REFERENCE_RETURNS["follow"].items():
        axis.axhline(level, color="grey", lw=0.7, ls=":", zorder=0)
        label = name.replace("_", " with ")
        axis.annotate(label, (0.995, level), xycoords=("axes fraction", "data"), color="grey",
                      size=7, ha="right", va="bottom")  # fmt: skip
    for encoder in encoders:
        found = curves(rows, encoder, distractors)
        if found is None:
            continue
        steps, returns = found
        colour, dashes = STYLES[encoder]
        mean, low, high = interval(returns)
        axis.plot(steps, returns.T, color=colour, lw=0.5, alpha=0.35)
        axis.plot(steps, mean, dashes, color=colour, lw=1.8, label=encoder)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xlabel="environment steps", ylim=(27.5, 39.6))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")


def learning_curves(rows):
    """One panel per number of distractors, all seven encoders."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for distractors, axis in enumerate(axes):
        draw_curves(axis, rows, STYLES, distractors)
        axis.set_title(f"{distractors} distractor{'s' * (distractors != 1)}")
    axes[0].set_ylabel("return of a 40-step episode, acting without noise")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7,
                  fontsize=8)  # fmt: skip
    figure.savefig(RESULTS / "learning_curves.png", dpi=90)


def comparisons(rows, finals):
    """The four comparisons of the source document, at 2 distractors, and against distractors."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    panels = {
        "pretrained or not": ("reward_prediction_finetune", "image_scratch"),
        "what it was pretrained for": (
            "reward_prediction_finetune",
            "image_reconstruction_finetune",
            "reward_prediction",
            "image_reconstruction",
        ),
        "capacity": ("cnn", "image_scratch"),
    }
    for axis, (title, encoders) in zip(axes, panels.items()):
        draw_curves(axis, rows, encoders, 2)
        axis.set_title(f"{title} (2 distractors)", fontsize=10)
    for shift, (encoder, (colour, dashes)) in enumerate(STYLES.items()):
        levels = [final_returns(finals, encoder, d) for d in range(3)]
        if all(levels):
            mean, low, high = np.array([interval(level) for level in levels]).T
            x = np.arange(3) + 0.05 * (shift - 3)
            axes[3].errorbar(x, mean, [mean - low, high - mean], fmt=dashes, marker="o", ms=3,
                             color=colour, lw=1.2, label=encoder)  # fmt: skip
    axes[3].set(xticks=range(3), xlabel="distractors")
    axes[3].set_title("number of distractors (final return)", fontsize=10)
    axes[0].set_ylabel("return of a 40-step episode")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower center", ncols=7,
                  fontsize=8)  # fmt: skip
    figure.savefig(RESULTS / "comparisons.png", dpi=90)


def final_returns(finals, encoder, distractors):
    """Final deterministic returns, one per seed."""
    return [r["eval_return_mean"] for r in finals
            if r["encoder"] == encoder and r["distractors"] == distractors]  # fmt: skip


def seconds_to(rows, encoder, level):
    """Median over seeds of the seconds until an evaluation at 0 distractors reaches `level`."""
    first = {}
    for row in rows:
        if (row["encoder"], row["distractors"]) == (encoder, 0) and row["eval_return"] >= level:
            first[row["seed"]] = min(row["seconds"], first.get(row["seed"], np.inf))
    seeds = {r["seed"] for r in rows if (r["encoder"], r["distractors"]) == (encoder, 0)}
    return f"{np.median(list(first.values())):.0f}" if seeds and len(first) == len(seeds) else "-"


def returns_table(finals, curve_rows):
    """Final returns: mean over seeds and its interval."""
    seeds = sorted({int(r["seed"]) for r in finals})
    lines = ["| encoder | 0 distractors | 1 | 2 | score at 2 | minutes | seconds to 36.0 at 0 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for encoder in STYLES:
        cells, score = [], ""
        for distractors in range(3):
            returns = final_returns(finals, encoder, distractors)
            if not returns:
                cells.append("")
                continue
            mean, low, high = interval(returns)
            fewer = (
                ""
                if len(returns) == len(seeds)
                else f" ({len(returns)} seed{'s' * (len(returns) > 1)})"
            )
            cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]{fewer}")
            score = f"{sprites_env.score(mean):.2f}" if distractors == 2 else ""
        minutes = [r["minutes"] for r in finals if r["encoder"] == encoder]
        cells += [score, f"{np.median(minutes):.1f}" if minutes else ""]
        cells.append(seconds_to(curve_rows, encoder, 36.0))
        lines.append(f"| `{encoder}` | " + " | ".join(cells) + " |")
    steps = int(finals[0]["steps"])
    return [*lines, "", f"Seeds {', '.join(map(str, seeds))}; {steps:,} environment steps."]


def pretraining_table(rows):
    """What pretraining reaches: prediction error and what a linear probe reads off z."""
    lines = ["| objective | distractors | MSE, rewards | MSE, pixels | R² agent | R² target |"
             " R² distractors | minutes |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for objective in ("reward_prediction", "image_reconstruction"):
        for distractors in range(3):
            runs = [
                r for r in rows if (r["objective"], r["distractors"]) == (objective, distractors)
            ]
            if not runs:
                continue
            cell = lambda *names, digits=3, runs=runs: spread(  # noqa: E731
                [np.mean([r[name] for name in names]) for r in runs], digits
            )
            both = lambda thing: [f"r2_{thing}_x", f"r2_{thing}_y"]  # noqa: E731
            other = [name for i in range(distractors) for name in both(f"distractor{i + 1}")]
            lines.append(
                f"| `{objective}` | {distractors} | "
                + (cell("mse", digits=4) if objective == "reward_prediction" else "")
                + " | "
                + (cell("mse_image", digits=4) if objective != "reward_prediction" else "")
                + f" | {cell(*both('agent'))}"
                + f" | {cell(*both('target'))} | {cell(*other) if other else ''}"
                + f" | {cell('minutes', digits=1)} |"
            )
    seeds = sorted({int(r["seed"]) for r in rows})
    return [*lines, "", f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}."]


def spread(values, digits):
    """mean ± standard deviation as text."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1 seed)"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def main():
    """Draw everything and put the tables into the README."""
    curve_rows, finals = read("ppo_encoder.csv"), read("ppo_encoder_final.csv")
    usual = min(row["total_steps"] for row in finals)  # leave longer runs out
    curve_rows = [row for row in curve_rows if row["total_steps"] == usual]
    finals = [row for row in finals if row["total_steps"] == usual]
    learning_curves(curve_rows)
    comparisons(curve_rows, finals)
    tables = {"returns": returns_table(finals, curve_rows)}
    tables["pretraining"] = pretraining_table(read("rp_pretrain_final.csv"))
    readme = (ROOT / "README.md").read_text()
    for name, lines in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(pattern, lambda m, t="\n".join(lines): f"{m[1]}\n{t}\n\n{m[2]}", readme,
                        flags=re.S)  # fmt: skip
        print("\n".join(lines), "\n")
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
