"""Every figure and table of the README's results.

    python benchmark/plot.py

Draws figures from benchmark/results/*.csv, beside them, and writes the tables between the marks
`<!-- table: name -->` and `<!-- end -->` of README.md. Intervals are 95 % bootstrap intervals of
the mean over seeds (10,000 resamples, fixed seed); with three to five seeds they are rough, so
every seed is drawn as well. Films, and pictures that need a network, come from the study's runs of
seed 1: without their folders in runs/study/ those in the results stay as they are.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
import sprites_env  # noqa: E402

TEXT = ("encoder", "objective", "algorithm", "mixture", "mode", "task", "goals")
TEXT += ("goal_fractions", "experiment", "embedding", "git_commit")  # columns that hold no number
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
PICTURES = {  # what runs have drawn: file in runs/study/ -> file in the results
    "ppo_encoder/reward_prediction_d2_s1_n250000/rollout.gif": "rollout.gif",
    "rig/push_latent_0.2_0.4_0.4_s1/imagined_goals.png": "rig_imagined_goals.png",
    "rig/push_latent_0.2_0.4_0.4_s1/reached.png": "rig_reached.png",
    "rig/push_latent_0.2_0.4_0.4_s1/latent_walk.png": "rig_latent_walk.png",
    "rig/push_latent_0.2_0.4_0.4_s1/rollout.gif": "rig_rollout.gif",
    "skill/library_gaussian_0.2_s1/skills.png": "skill_library.png",
    "skill/generality_gaussian_0.2_s1/skills.png": "skill_generality.png",
    "skill/versatility_bernoulli_0.5_s1/skills.png": "skill_versatility.png",
    "skill/transfer_gaussian_0.2_s1/rollout.gif": "skill_transfer.gif",
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


def runs_of(rows, **wanted):
    """The rows that have these values, one list for each seed, in the order of steps."""
    runs = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            runs.setdefault(row["seed"], []).append(row)
    return [sorted(run, key=lambda row: row.get("step", 0)) for run in runs.values()]


def values_of(runs, name):
    """One column of all rows, (S, M)."""
    return np.array([[row[name] for row in run] for run in runs])


def draw_band(axis, x, values, colour, dashes, label):
    """Every seed, their mean, and its interval. x (M,), values (S, M)."""
    mean, low, high = interval(values)
    axis.plot(x, values.T, color=colour, lw=0.5, alpha=0.35)
    axis.plot(x, mean, dashes, color=colour, lw=1.8, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def draw_curves(axis, rows, encoders, distractors):
    """Mean, interval and every seed of these encoders; the hand-written controllers as lines."""
    for name, level in sprites_env.REFERENCE_RETURNS["follow"].items():
        axis.axhline(level, color="grey", lw=0.7, ls=":", zorder=0)
        label = name.replace("_", " with ")
        axis.annotate(label, (0.995, level), xycoords=("axes fraction", "data"), color="grey",
                      size=7, ha="right", va="bottom")  # fmt: skip
    for encoder in encoders:
        if runs := runs_of(rows, encoder=encoder, distractors=distractors):
            steps, returns = values_of(runs, "step")[0], values_of(runs, "eval_return")
            draw_band(axis, steps, returns, *STYLES[encoder], encoder)
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
                + f" | {np.median([r['minutes'] for r in runs]):.1f} |"
            )
    seeds = sorted({int(r["seed"]) for r in rows})
    return [
        *lines,
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; median minutes.",
    ]


def long_runs(rows):
    """The runs that are longer than the rest: does anything decay late?"""
    rows = [row for row in rows if row["total_steps"] >= 2_000_000]
    if not rows:
        return
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, rows, STYLES, 2)
    axis.set(ylabel="return of a 40-step episode", title="2 distractors, one seed")
    axis.legend(fontsize=8)
    figure.savefig(RESULTS / "long_runs.png", dpi=90)


def decoder_probe(runs):
    """What a decoder that looked on makes of z, per pretraining. Needs the runs' checkpoints, which
    are too large to keep with the results: without them the picture stays as it is."""
    import torch

    import rp_pretrain

    kinds = {
        "agent's x": "rp_single_task/agent_x_d{}_s1",
        "all four positions": "rp_pretrain/reward_prediction_d{}_s1",
        "reconstruction": "rp_pretrain/image_reconstruction_d{}_s1",
    }
    paths = [runs / kind.format(d) / "checkpoint.pt" for kind in kinds.values() for d in (0, 2)]
    if missing := [path for path in paths if not path.exists()]:
        print(f"decoder_probe.png stays as it is: {missing[0]} is missing\n")
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(4, 12)
    for half, distractors in enumerate((0, 2)):
        frames, _ = rp_pretrain.probe_data(distractors, "cpu")
        rows = {"true": frames[:6]}
        for name, kind in kinds.items():
            saved = torch.load(
                runs / kind.format(distractors) / "checkpoint.pt", map_location="cpu"
            )
            encoder, decoder = rp_pretrain.Encoder(), rp_pretrain.Decoder()
            encoder.load_state_dict(saved["encoder"])
            decoder.load_state_dict(saved["decoder"])
            with torch.no_grad():
                rows[name] = decoder(encoder(frames[:6]))
        for line, (name, images) in zip(axes, rows.items()):
            for axis, image in zip(line[6 * half :], images):
                axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        axes[0, 6 * half].set_title(f"{distractors} distractors", loc="left", fontsize=10)
    figure.savefig(RESULTS / "decoder_probe.png", dpi=80)


AWAC_STYLES = {
    "awac": ("#D55E00", "-"),
    "sac_from_buffer": ("#0072B2", "-"),
    "sac": ("#56B4E9", "-."),
    "filtered_bc": ("#009E73", "--"),
    "bc": ("#000000", "--"),
}


def awac_figure(rows, finals):
    """Left: scores offline, then online, per algorithm. Right: offline score against lambda."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for algorithm, (colour, dashes) in AWAC_STYLES.items():
        if runs := runs_of([row for row in rows if row["total_steps"]], algorithm=algorithm):
            steps, online = values_of(runs, "step")[0], values_of(runs, "online_step")[0]
            offline, scores = (steps - online).max(), values_of(runs, "eval_score")
            draw_band(left, (steps - offline) / 1000, scores, colour, dashes, algorithm)
            if not online.any():  # no online phase: what it would stay at
                left.plot([0, 20], [scores[:, -1].mean()] * 2, ":", color=colour, lw=1)
    left.axvspan(left.get_xlim()[0], 0, color="grey", alpha=0.12, lw=0)
    left.axhline(100, color="grey", lw=0.7, ls=":")
    left.set(xlabel="offline updates | online environment steps (thousands)")
    left.set(ylabel="score: 0 random, 100 the data's expert")
    left.legend(fontsize=8, loc="lower right")

    sweep = {}
    for row in finals:
        if row["algorithm"] == "awac":
            sweep.setdefault(row["temperature"], []).append(row["offline_score"])
    if sweep:
        x = sorted(sweep)
        mean, low, high = np.array([interval(sweep[t]) for t in x]).T
        for t in x:
            right.plot([t] * len(sweep[t]), sweep[t], ".", color="#D55E00", alpha=0.4, ms=4)
        right.errorbar(x, mean, [mean - low, high - mean], fmt="-o", color="#D55E00", ms=4)
        right.set_xscale("log")
    for algorithm in ("bc", "filtered_bc"):
        scores = [r["offline_score"] for r in finals if r["algorithm"] == algorithm]
        if scores:
            right.axhline(np.mean(scores), color=AWAC_STYLES[algorithm][0], ls="--", lw=1)
            right.annotate(algorithm, (0.01, np.mean(scores)), fontsize=8, va="bottom",
                           xycoords=("axes fraction", "data"))  # fmt: skip
    right.set(xlabel="temperature λ", ylabel="score after the offline phase")
    figure.savefig(RESULTS / "awac.png", dpi=90)


def awac_table(finals):
    """Scores of each algorithm: mean over seeds and its interval."""
    finals = [row for row in finals if row["total_steps"]]
    steps = max(int(row["total_steps"]) for row in finals)
    columns = ("offline_score", "worst_online_dip", "online_score")
    lines = ["| algorithm | offline score | worst dip, first 2,000 online steps | final score |"
             " final return | minutes |", "|---|---|---|---|---|---|"]  # fmt: skip
    for algorithm in AWAC_STYLES:
        runs = [row for row in finals if row["algorithm"] == algorithm]
        if not runs:
            continue
        cells = []
        for column in columns:
            values = [row[column] for row in runs if not np.isnan(row[column])]
            mean, low, high = interval(values) if values else (None, None, None)
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]" if values else "-")
        mean, low, high = interval([row["eval_return_mean"] for row in runs])
        cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        cells.append(f"{np.median([row['minutes'] for row in runs]):.1f}")
        lines.append(f"| `{algorithm}` | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, sorted({int(row["seed"]) for row in finals})))
    return [*lines, "", f"Mean and 95 % bootstrap interval, seeds {seeds}; {steps:,} online steps."]


CURL_STYLES = {  # letters as in the ablation's usual order
    "state": ("#000000", "-"),
    "pixel": ("#56B4E9", "-."),
    "rad": ("#0072B2", "-"),
    "curl": ("#D55E00", "-"),
    "curl_unaugmented_sac": ("#E69F00", "--"),
    "contrastive_only": ("#CC79A7", ":"),
}
PROBED = ("agent", "target", "relative_position", "target_velocity", "distractors")


def curl_figure(rows, finals):
    """Above: return against steps, per mode. Below: what a linear probe reads off each code."""
    numbers = sorted({int(row["distractors"]) for row in finals})
    figure = Figure(figsize=(1 + 5.5 * len(numbers), 7.5), layout="constrained")
    above, below = figure.subplots(2, len(numbers), squeeze=False)
    for axis, bars, distractors in zip(above, below, numbers):
        for mode, (colour, dashes) in CURL_STYLES.items():
            if runs := runs_of(rows, mode=mode, distractors=distractors):
                x, returns = values_of(runs, "step")[0] / 1000, values_of(runs, "eval_return")
                draw_band(axis, x, returns, colour, dashes, mode)
        for name, level in sprites_env.REFERENCE_RETURNS["follow"].items():
            axis.axhline(level, color="grey", lw=0.7, ls=":", zorder=0)
            axis.annotate(name, (0.01, level), xycoords=("axes fraction", "data"),
                          color="grey", fontsize=8)  # fmt: skip
        axis.set(xlabel="environment steps (thousands)", ylim=(26.5, 39.4))
        axis.set_title(f"{distractors} distractors")

        quantities = PROBED[: 5 if distractors else 4]
        here = [row for row in finals if row["distractors"] == distractors]
        series = {mode: ([r for r in here if r["mode"] == mode], "probe_r2", colour)
                  for mode, (colour, _) in CURL_STYLES.items() if mode != "state"}  # fmt: skip
        control = [r for r in here if r["mode"] == "curl"]
        series["random encoder"] = (control, "probe_r2_random_encoder", "#BBBBBB")
        series["raw pixels"] = (control, "probe_r2_pixels", "#777777")
        for i, (label, (runs, column, colour)) in enumerate(series.items()):
            if runs:
                values = np.array([[r[f"{column}_{q}"] for q in quantities] for r in runs])
                at = np.arange(len(quantities)) + (i - 3) * 0.12
                bars.bar(at, values.mean(0), 0.11, color=colour, label=label)
                for seed in values:
                    bars.plot(at, seed, "k.", ms=2)
        bars.axhline(0, color="grey", lw=0.7)
        bars.set_xticks(range(len(quantities)), [q.replace("_", "\n") for q in quantities])
        bars.set(ylim=(-0.15, 1.35))
    above[0].set_ylabel("return of a 40-step episode")
    above[0].legend(fontsize=8, loc="lower right")
    below[0].set_ylabel("held-out R² of a ridge probe")
    below[0].legend(fontsize=8, ncols=3, loc="upper center")
    figure.savefig(RESULTS / "curl.png", dpi=80)


def curl_table(finals):
    """Returns of each mode: mean over seeds and its interval."""
    lines = ["| | mode | 0 distractors | 2 distractors | top-1 at 0, 2 | minutes |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for letter, mode in zip("abcdef", CURL_STYLES):
        cells, accuracies, minutes = [], [], []
        for distractors in (0, 2):
            runs = [r for r in finals if (r["mode"], r["distractors"]) == (mode, distractors)]
            if not runs:
                cells.append("-")
                continue
            mean, low, high = interval([r["eval_return_mean"] for r in runs])
            spread = f" [{low:.2f}, {high:.2f}]" if len(runs) > 1 else ""
            cells.append(f"{mean:.2f}{spread} (n={len(runs)})")
            accuracies.append(np.mean([r["contrastive_accuracy"] for r in runs]))
            minutes += [r["minutes"] for r in runs]
        if minutes:
            cells.append(", ".join(f"{a:.2f}" for a in accuracies if not np.isnan(a)))
            cells.append(f"{np.nanmedian(minutes):.1f}")  # a paused run has none
            lines.append(f"| {letter} | `{mode}` | " + " | ".join(cells) + " |")
    return lines


RIG_STYLES = {  # (goals, goal fractions): label, colour, dashes
    ("oracle", "0.2 0.4 0.4"): ("true positions", "#000000", "-"),
    ("latent", "0.2 0.4 0.4"): ("latent, mixed relabelling", "#D55E00", "-"),
    ("pixel", "0.2 0.4 0.4"): ("distance between pixels", "#0072B2", "--"),
    ("latent", "0.2 0 0.8"): ("latent, future only", "#009E73", "-."),
    ("latent", "0.2 0.8 0"): ("latent, prior only", "#E69F00", "--"),
    ("latent", "1 0 0"): ("latent, none", "#CC79A7", ":"),
}


def rig_figure(rows, finals):
    """Final distance against steps: reach (rewards, then relabelling), push (block and agent)."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    mixed = "0.2 0.4 0.4"
    panels = [  # task, whose distance, configurations
        ("reach", "agent", [(g, mixed) for g in ("oracle", "latent", "pixel")]),
        ("reach", "agent", [key for key in RIG_STYLES if key[0] == "latent"]),
        ("push", "block", [(g, mixed) for g in ("oracle", "latent")]),
        ("push", "agent", [(g, mixed) for g in ("oracle", "latent")]),
    ]
    for axis, (task, what, keys) in zip([*axes, axes[2]], panels):
        for goals, fractions in keys:
            label, colour, dashes = RIG_STYLES[goals, fractions]
            if task == "push":
                label = f"{what}, {label.split(',')[0]}"
                dashes = "-" if what == "block" else ":"
            if runs := runs_of(rows, task=task, goals=goals, goal_fractions=fractions):
                x, values = (
                    values_of(runs, "step")[0] / 1000,
                    values_of(runs, f"final_{what}_distance"),
                )
                draw_band(axis, x, values, colour, dashes, label)
    for axis, task, title in zip(axes, ("reach", "reach", "push"),
                                 ("reach: rewards", "reach: relabelling", "push")):  # fmt: skip
        what = "block" if task == "push" else "agent"
        levels = [r[f"untouched_{what}_distance"] for r in finals if r["task"] == task]
        if levels:
            axis.axhline(levels[0], color="grey", lw=0.8, ls="--")
            axis.annotate(f"{what}, untouched", (0.98, levels[0]), ha="right", va="bottom",
                          xycoords=("axes fraction", "data"), color="grey", fontsize=8)  # fmt: skip
        axis.set(xlabel="environment steps (thousands)", title=title)
        axis.set_ylim(0, 0.45)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("final distance to the goal (frame widths)")
    figure.savefig(RESULTS / "rig.png", dpi=90)


def rig_table(finals):
    """Final distances of each configuration: mean over seeds and its interval."""
    lines = ["| task | z and reward | agent's distance | block's distance | success | worst seed |"
             " probe R² | minutes | seeds |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for task in ("reach", "push"):
        counts = "block" if task == "push" else "agent"
        for key, (label, *_) in RIG_STYLES.items():
            runs = [
                r for r in finals if (r["task"], r["goals"], r["goal_fractions"]) == (task, *key)
            ]
            if not runs:
                continue
            cells = []
            for column in ("agent", "block"):
                mean, low, high = interval([r[f"final_{column}_distance"] for r in runs])
                shown = column == "agent" or task == "push"
                spread = f" [{low:.3f}, {high:.3f}]" if len(runs) > 1 else ""
                cells.append(f"{mean:.3f}{spread}" if shown else "")
            cells.append(f"{100 * np.mean([r['success_rate'] for r in runs]):.0f} %")
            cells.append(f"{max(r[f'final_{counts}_distance'] for r in runs):.3f}")
            probe = np.mean([r["probe_r2_agent" if task == "reach" else "probe_r2"] for r in runs])
            cells.append("" if np.isnan(probe) else f"{probe:.3f}")
            cells += [f"{np.median([r['minutes'] for r in runs]):.1f}", str(len(runs))]
            lines.append(f"| {task} | {label} | " + " | ".join(cells) + " |")
    return lines


def speed_tables(measured):
    """What throughput.py measured: {name of a table in the README: its lines}."""

    def lines(header, rows, digits=0):
        text = lambda v: f"{v:,.{digits}f}" if isinstance(v, float) else str(v)  # noqa: E731
        body = ["| " + " | ".join(map(text, row)) + " |" for row in rows]
        return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *body]

    environment, vector = measured["environment"], measured["environment"]["vector"]
    names = ("image, 1 distractors", "state, 1 distractors", "SyncVectorEnv, image, 1 distractor",
             "writing the bytes alone")  # fmt: skip
    rows = [["one `SpritesEnv`", environment["one SpritesEnv, image, 1 distractor"], "", "", ""]]
    for row in vector:
        cells = [float(f"{row[name]:.3g}") if name in row else "" for name in names]
        rows.append([f"`SpritesVectorEnv`, {row['environments']}", *cells])
    rows[0][1] = float(f"{rows[0][1]:.3g}")
    header = ["steps per second, 1 thread, 1 distractor", "images", "states",
              "images, gymnasium's `SyncVectorEnv`", "writing as many bytes"]  # fmt: skip
    tables = {"speed of the environment": lines(header, rows)}

    rows = []
    for row in measured["ppo"]:
        encoder = row["encoder"]
        share = [f"{100 * row.get(f'share {name}', 0):.0f} %" for name in
                 ("environment", "forward, encoder", "backward", "optimiser")]  # fmt: skip
        cells = [float(f"{row[f'steps/s, threads {n}']:.3g}") for n in (1, 2)]
        rows.append([f"`{encoder}`", *cells, *share])
    header = ["PPO, steps per second", "1 thread", "2 threads", "environment", "encoder forward",
              "backward", "optimiser"]  # fmt: skip
    tables["speed of PPO"] = lines(header, rows)

    encoders = [name for name in measured["scaling"][0] if name != "environments"]
    rows = [[row["environments"], *(float(f"{row[name]:.3g}") for name in encoders)]
            for row in measured["scaling"]]  # fmt: skip
    header = ["environments in lockstep", *(f"`{name}`" for name in encoders)]
    tables["speed against environments"] = lines(header, rows)
    rows = [[f"`{row['encoder']}`", *(float(f"{row[k]:.3g}") for k in ("ours", "ordinary")),
             row["ratio"]] for row in measured["ordinary"]]  # fmt: skip
    header = ["PPO, 2 threads", "this code", "the ordinary way", "ratio"]
    tables["speed against ordinary code"] = lines(header, rows)
    rates = {(row["objective"], row["threads"]): row["updates_per_second"]
             for row in measured["pretraining"]}  # fmt: skip
    rows = [[f"`{name}`", rates[name, 1], rates[name, 2]]
            for name in ("reward_prediction", "image_reconstruction")]  # fmt: skip
    header = ["pretraining, updates per second", "1 thread", "2 threads"]
    tables["speed of pretraining"] = lines(header, rows)
    return tables


SKILLS = {  # (embedding, whether skills were to be told apart): label, colour, dashes
    ("gaussian", True): ("skills", "#D55E00", "-"),
    ("gaussian", False): ("skills, α₂ = 0", "#0072B2", "--"),
    ("one_hot", False): ("one-hot tasks", "#009E73", "-."),
}
SCRATCH = (("gaussian", True), ("one_hot", False))  # beside α₂ = 0 scratch is that of α₂ > 0 again


def skill_runs(rows, experiment, embedding, apart):
    """The runs of one configuration, paid for being told apart or not."""
    rows = [row for row in rows if (row["alpha2"] > 0) == apart]
    return runs_of(rows, experiment=experiment, embedding=embedding)


def draw_seeds(axis, runs, name, label, colour, dashes="-"):
    """One column against steps: every seed, and their median (with three seeds an interval would
    say no more, and success on a new task is all or nothing)."""
    if runs:
        x, values = values_of(runs, "step")[0] / 1000, values_of(runs, name)
        axis.plot(x, values.T, dashes, color=colour, lw=0.7, alpha=0.5)
        axis.plot(x, np.median(values, axis=0), dashes, color=colour, lw=1.8, label=label)


def skill_figure(rows):
    """Library; equal and other tasks; transfer to both new tasks."""
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    learnt, equal, *new = figure.subplots(1, 4)
    library = skill_runs(rows, "library", "gaussian", True)
    draw_seeds(learnt, library, "success_rate", "success", "#D55E00")
    draw_seeds(learnt, library, "identifiability_top1", "top-1 of 64", "#0072B2", "--")
    learnt.axhline(1 / 64, color="grey", lw=0.8, ls=":")
    learnt.set(title="library: four goals", ylabel="share of episodes", ylim=(0, 1.02))
    pairs = skill_runs(rows, "generality", "gaussian", True)
    for other, label, colour in ((2, "another goal", "#0072B2"), (4, "a third goal", "#009E73"),
                                 (3, "the same goal", "#D55E00")):  # fmt: skip
        draw_seeds(equal, pairs, f"kl_1_{other}", label, colour)
    equal.set(title="generality: KL(task 1 ‖ task t)", ylabel="nats", yscale="log")
    for axis, task in zip(new, ("interpolation", "sequencing")):
        for (embedding, apart), style in SKILLS.items():
            runs = skill_runs(rows, "transfer", embedding, apart)
            draw_seeds(axis, runs, f"skills_{task}", *style)
        scratch = [run for kind in SCRATCH for run in skill_runs(rows, "transfer", *kind)]
        draw_seeds(axis, scratch, f"scratch_{task}", "from scratch", "#000000", ":")
        axis.set(title=f"transfer: {task}", ylabel="success rate", ylim=(-0.02, 1.02))
    for axis in figure.axes:
        axis.set_xlabel("environment steps (thousands)")
        axis.legend(fontsize=8)
    figure.savefig(RESULTS / "skill.png", dpi=90)


def skill_tables(finals):
    """What the library experiments found, seed by seed; what skills are worth on new tasks."""
    library = ["| experiment | p(z\\|t) | success | worst task | top-1 of 64 | solutions found |"
               " KL to the same task | KL to the others | minutes |"]  # fmt: skip
    library.append("|---|---|---|---|---|---|---|---|---|")
    for experiment in ("library", "generality", "versatility"):
        for embedding in ("gaussian", "bernoulli"):
            runs = [run[0] for run in skill_runs(finals, experiment, embedding, True)]
            if not runs:
                continue

            def each(column, form, runs=runs):
                found = [run.get(column, np.nan) for run in runs]
                return "" if np.isnan(found).all() else ", ".join(map(form.format, found))

            cells = [experiment, embedding, each("success_rate", "{:.2f}")]
            cells += [each("worst_task", "{:.2f}"), each("identifiability_top1", "{:.2f}")]
            cells += [each("solutions_found", "{:.0f}"), each("kl_duplicate", "{:.1g}")]
            cells += [each("kl_others", "{:.1f}")]
            cells.append(f"{np.median([run['minutes'] for run in runs]):.1f}")
            library.append("| " + " | ".join(cells) + " |")
    transfer = ["| new task | actor | success at the end | steps to 80 % |"
                " times fewer than scratch | success of random choices |",
                "|---|---|---|---|---|---|"]  # fmt: skip
    for task in ("interpolation", "sequencing"):
        for (embedding, apart), (label, *_) in SKILLS.items():
            runs = [run[0] for run in skill_runs(finals, "transfer", embedding, apart)]
            scratch = [run for kind in SCRATCH for (run,) in skill_runs(finals, "transfer", *kind)]
            actors = [(label, "skills", runs)]
            actors += [("from scratch, six runs", "scratch", scratch)] if apart else []
            for name, how, runs in actors:
                rates = [f"{run[f'success_{how}_{task}']:.2f}" for run in runs]
                steps = [run[f"steps_{how}_{task}"] for run in runs]
                steps = ["never" if np.isnan(n) else f"{n:,.0f}" for n in steps]
                cells = [task, name, ", ".join(rates), "; ".join(steps), "", ""]
                if how == "skills":
                    ratios = [run[f"transfer_steps_ratio_{task}"] for run in runs]
                    never = [np.isnan(run[f"steps_scratch_{task}"]) for run in runs]
                    cells[4] = ", ".join("-" if np.isnan(r) else f"{'> ' * int(n)}{r:.1f}"
                                         for r, n in zip(ratios, never))  # fmt: skip
                    chance = [f"{run[f'success_random_{task}']:.2f}" for run in runs]
                    cells[5] = ", ".join(chance)
                transfer.append("| " + " | ".join(cells) + " |")
    return library, transfer


def spread(values, digits):
    """mean ± standard deviation as text."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1 seed)"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def main():
    """Draw everything and put the tables into the README."""
    curve_rows, finals = read("ppo_encoder.csv"), read("ppo_encoder_final.csv")
    long_runs(curve_rows)
    runs = ROOT / "runs" / "study"
    decoder_probe(runs)
    for drawn, name in PICTURES.items():
        if (runs / drawn).exists():
            shutil.copy(runs / drawn, RESULTS / name)
    usual = min(row["total_steps"] for row in finals)  # leave longer runs out
    curve_rows = [row for row in curve_rows if row["total_steps"] == usual]
    finals = [row for row in finals if row["total_steps"] == usual]
    learning_curves(curve_rows)
    comparisons(curve_rows, finals)
    tables = {"returns": returns_table(finals, curve_rows)}
    tables["pretraining"] = pretraining_table(read("rp_pretrain_final.csv"))
    if (RESULTS / "awac_final.csv").exists():
        runs = read("awac_final.csv")
        awac_figure(read("awac.csv"), runs)
        tables["awac"] = awac_table(runs)
    if (RESULTS / "curl_final.csv").exists():
        runs = read("curl_final.csv")
        curl_figure(read("curl.csv"), runs)
        tables["contrastive learning"] = curl_table(runs)
    if (RESULTS / "rig_final.csv").exists():
        runs = read("rig_final.csv")
        rig_figure(read("rig.csv"), runs)
        tables["imagined goals"] = rig_table(runs)
    if (RESULTS / "skill_final.csv").exists():
        skill_figure(read("skill.csv"))
        tables["skills"], tables["transfer of skills"] = skill_tables(read("skill_final.csv"))
    if (RESULTS / "awac_narrow_final.csv").exists():
        tables["awac, narrow data"] = awac_table(read("awac_narrow_final.csv"))
    if (RESULTS / "throughput.json").exists():
        measured = json.loads((RESULTS / "throughput.json").read_text())
        tables |= speed_tables(measured)
    readme = (ROOT / "README.md").read_text()
    for name, lines in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(pattern, lambda m, t="\n".join(lines): f"{m[1]}\n{t}\n\n{m[2]}", readme,
                        flags=re.S)  # fmt: skip
        print("\n".join(lines), "\n")
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
