"""Every figure and table of the results.

    python benchmark/plot.py

Draws figures from benchmark/results/*.csv, beside them, and writes the tables between the marks
`<!-- table: name -->` and `<!-- end -->` of README.md and benchmark/README.md: each file gets those
whose marks it has. STUDIES, at the end, says what is made of which results. Intervals are 95 %
bootstrap intervals of the mean over seeds (10,000 resamples, fixed seed); with three to five seeds
they are rough, so every seed is drawn as well. Films, and pictures that need a network, come from
the study's runs of seed 1: without their folders in runs/study/ the old ones stay as they are.
"""

import csv
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = Path("benchmark") / "results", Path("runs") / "study"  # in ROOT
PAGES = ("README.md", "benchmark/README.md")  # in ROOT
sys.path.insert(0, str(ROOT))
import sprites_env  # noqa: E402


def kinds(name, styles):
    """{label: (style, what its rows have)} of "label style, ..."; column `name` has the label."""
    pairs = (pair.split() for pair in styles.split(", "))
    return {label: (style, {name: label}) for label, style in pairs}


# What is compared, in the order of the tables. A style is a letter for one of Okabe and Ito's
# colours, which survive colour blindness, and dashes, which survive greyscale.
COLOURS = {"k": "#000000", "r": "#D55E00", "o": "#E69F00", "b": "#0072B2"}
COLOURS |= {"s": "#56B4E9", "g": "#009E73", "p": "#CC79A7"}
ENCODERS = kinds(
    "encoder",
    "oracle k-, reward_prediction_finetune r-, reward_prediction o--, image_scratch b-, cnn s-., "
    "image_reconstruction_finetune g-, image_reconstruction p--",
)
ALGORITHMS = kinds("algorithm", "awac r-, sac_from_buffer b-, sac s-., filtered_bc g--, bc k--")
MODES = kinds(
    "mode", "state k-, pixel s-., rad b-, curl r-, curl_unaugmented_sac o--, contrastive_only p:"
)
PARTS = kinds(
    "mode", "rad k-, aat g-., cat o--, correspondence b-, full r-, full_shuffled_actions p:"
)
MIXED = "0.2 0.4 0.4"  # shares of rig_td3.py's goals: as practised, from the prior, from the future
GOALS = {
    "true positions": ("k-", {"goals": "oracle", "goal_fractions": MIXED}),
    "latent, mixed relabelling": ("r-", {"goals": "latent", "goal_fractions": MIXED}),
    "distance between pixels": ("b--", {"goals": "pixel", "goal_fractions": MIXED}),
    "latent, future only": ("g-.", {"goals": "latent", "goal_fractions": "0.2 0 0.8"}),
    "latent, prior only": ("o--", {"goals": "latent", "goal_fractions": "0.2 0.8 0"}),
    "latent, none": ("p:", {"goals": "latent", "goal_fractions": "1 0 0"}),
}
SKILLS = {
    "skills": ("r-", {"embedding": "gaussian", "alpha2": 0.2}),
    "skills, α₂ = 0": ("b--", {"embedding": "gaussian", "alpha2": 0}),
    "one-hot tasks": ("g-.", {"embedding": "one_hot", "alpha2": 0}),
}
GRASP2VEC = {"objective": "grasp2vec"}
GRASPS = {  # how the towers of grasp2vec.py are trained
    "subtraction": ("r-", GRASP2VEC | {"same_place": "False", "jitter": 2, "lam": 5e-4}),
    "outcome in the same place": ("b--", GRASP2VEC | {"same_place": "True"}),
    "no jitter": ("g-.", GRASP2VEC | {"jitter": 0}),
    "λ = 0": ("o:", GRASP2VEC | {"lam": 0}),
    "reconstruction": ("p:", {"objective": "reconstruction"}),
}
GRASP_SHARES = [f"{a}_{b}" for a in ("retrieval", "localisation") for b in ("seen", "novel")]
ATTRIBUTES = ("shape", "size", "grey")
PRETEXTS = {  # objectives of pretext.py, and the measure of whether each is met
    "inverse": "action_r2",
    "forward_inverse": "action_r2",
    "forward": "code_r2",
    "forward_slow_target": "code_r2",
    "time_contrast": "top_1",
    "augmentation_contrast": "top_1",
    "shuffle": "order_accuracy",
    "temporal_disentanglement": "pair_accuracy",
    "autoencoder": "mse_image",
    "beta_vae": "bce",
    "reward_prediction": "mse",
    "none": "",
}
CONTEXTS = {"CC-RIG": ("r-", {"context": "frame"}), "no context": ("b--", {"context": "none"})}
KEPT = ("agent", "agent_displacement", "target", "target_velocity", "distractors")
STITCHED = ({"episodes": 200}, {"episodes": 60})  # data of the study of stitching
ROUNDS = {
    "oracle, 8 steps": ("r-", {"encoder": "oracle", "rollout_steps": 8}),
    "oracle, 40 steps": ("k-", {"encoder": "oracle", "rollout_steps": 40}),
    "image_scratch, 8 steps": ("b--", {"encoder": "image_scratch", "rollout_steps": 8}),
}
NEW_TASKS = ("interpolation", "sequencing")
RETURN, THOUSANDS = "eval_return_mean", "environment steps (thousands)"
BELOW = {"loc": "outside lower center", "ncols": 7, "fontsize": 8}  # a legend of all encoders


# --- Rows of results -------------------------------------------------------------------------


def read(name):
    """The rows of a results file, numbers as numbers, nan where there is nothing."""

    def value(text):
        try:
            return float(text or "nan")
        except ValueError:
            return text

    with open(ROOT / RESULTS / name, newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def where(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def split(rows, kinds):
    """(label, style, its rows) for each kind that has rows."""
    for label, (style, wanted) in kinds.items():
        if here := where(rows, **wanted):
            yield label, style, here


def runs_of(rows):
    """One list for each seed, in the order of steps. (Skills are compared across embeddings.)"""
    runs = {}
    for row in rows:
        runs.setdefault((row["seed"], row.get("embedding")), []).append(row)
    return [sorted(run, key=lambda row: row["step"]) for run in runs.values()]


def values_of(rows, name):
    """One column: (M,) of rows, (S, M) of runs; nan where nothing was measured."""
    if rows and isinstance(rows[0], list):
        return np.array([values_of(run, name) for run in rows])
    return np.array([row.get(name, np.nan) for row in rows])


def usual(rows):
    """Without the PPO runs that are longer than the rest."""
    return where(rows, total_steps=min(values_of(rows, "total_steps")))


def interval(values):
    """(mean, low, high) over axis 0 (seeds): 95 % percentile bootstrap. values (S, ...)."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0)
    return values.mean(0), low, high


# --- Text ------------------------------------------------------------------------------------


def table(titles, lines, below=""):
    """Lines of a markdown table; titles are those of its columns, `below` stands under it."""
    head, *body = (f"| {line} |" for line in (titles, *(" | ".join(cells) for cells in lines)))
    dashes = "|---" * (head.count(" | ") + 1) + "|"
    return [head, dashes, *body, *(["", below] if below else [])]


def mean(rows, name, digits, empty="-"):
    """mean [low, high]; of one seed the mean alone."""
    values = [value for value in values_of(rows, name) if value == value]
    middle, *ends = (f"{number:.{digits}f}" for number in interval(values)) if values else [empty]
    return f"{middle} [{', '.join(ends)}]" if len(values) > 1 else middle


def spread(rows, names, digits):
    """Mean ± standard deviation over seeds of the mean of these columns, if there are any."""
    values = [np.mean([row[name] for name in names]) for row in rows if names]
    deviation = f"± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "(1 seed)"
    return f"{np.mean(values):.{digits}f} {deviation}" if values else ""


def each(rows, name, form, nan="", between=", "):
    """The number of every row; `nan`, or nothing, for those without one."""
    values = values_of(rows, name)
    return between.join(f"{v:,.{form}}" if v == v else nan for v in values if v == v or nan)


def minutes(rows):
    """The median; a paused run has none."""
    return f"{np.nanmedian(values_of(rows, 'minutes')):.1f}"


def seeds(rows):
    """1, 2, 3"""
    return ", ".join(f"{seed:.0f}" for seed in sorted(set(values_of(rows, "seed"))))


# --- Parts of figures ------------------------------------------------------------------------


def panels(width, height, rows, columns, dpi=90, **options):
    """An empty figure of that many inches, and its axes."""
    figure = Figure((width, height), dpi=dpi, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def draw_curve(axis, rows, name, label, style, start=0, band=True):
    """A column against thousands of steps: a thin line for each seed, and their mean with its
    interval as a band; or, without a band, their median."""
    if not (runs := runs_of(rows)):
        return
    x, values = (values_of(runs, "step")[0] - start) / 1000, values_of(runs, name)
    colour, dashes = COLOURS[style[0]], style[1:]
    thin = {"lw": 0.5, "alpha": 0.35} if band else {"lw": 0.7, "alpha": 0.5, "ls": dashes}
    axis.plot(x, values.T, color=colour, **thin)
    middle, low, high = interval(values)
    middle = middle if band else np.median(values, axis=0)
    axis.plot(x, middle, dashes, color=colour, lw=1.8, label=label)
    if band:
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def draw_means(axis, x, groups, style, **options):
    """The mean of each group of numbers, with its interval as a bar."""
    middle, low, high = np.array([interval(group) for group in groups]).reshape(-1, 3).T
    options |= {"fmt": style[1:], "color": COLOURS[style[0]]}
    axis.errorbar(x, middle, [middle - low, high - middle], **options)


def draw_level(axis, y, name, x, line, **text):
    """A line at y, and its name at x, from 0 (left) to 1 (right)."""
    axis.axhline(y, **{"color": "grey"} | line)
    text = {"color": "grey", "size": 8, "va": "bottom", "ha": "right" if x > 0.5 else "left"} | text
    axis.annotate(name, (x, y), xycoords=("axes fraction", "data"), **text)


def draw_returns(axis, curves, styles, x, space, **text):
    """Return against steps of each kind, beside what the hand-written controllers get."""
    for name, level in sprites_env.REFERENCE_RETURNS["follow"].items():
        line = {"lw": 0.7, "ls": ":", "zorder": 0}
        draw_level(axis, level, name.replace("_", space), x, line, **text)
    for name, style, rows in split(curves, styles):
        draw_curve(axis, rows, "eval_return", name, style)


# --- The studies: figures and tables of (curves, finals) -------------------------------------


def draw_encoders(axes, curves, shown, y_label, size=12):
    """A panel of returns for each of `shown`, {title: (distractors, encoders)}."""
    for axis, (title, (distractors, encoders)) in zip(axes, shown.items()):
        styles = {name: ENCODERS[name] for name in encoders}
        rows = where(curves, distractors=distractors)
        draw_returns(axis, rows, styles, 0.995, " with ", size=7)
        axis.set(xlabel="environment steps", ylim=(27.5, 39.6))
        axis.set_title(title, fontsize=size)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}k")
    axes[0].set_ylabel(y_label)


def learning_curves(curves, finals):
    """One panel per number of distractors, all seven encoders."""
    figure, axes = panels(13, 4.6, 1, 3, sharey=True)
    shown = {f"{d} distractor{'s' * (d != 1)}": (d, ENCODERS) for d in range(3)}
    draw_encoders(axes, usual(curves), shown, "return of a 40-step episode, acting without noise")
    figure.legend(*axes[0].get_legend_handles_labels(), **BELOW)
    return figure


def comparisons(curves, finals):
    """The four comparisons of the source document, at 2 distractors, and against distractors."""
    figure, axes = panels(13, 4.4, 1, 4, sharey=True)
    aims = ("reward_prediction", "image_reconstruction")
    compared = {"pretrained or not": ("reward_prediction_finetune", "image_scratch")}
    compared["what it was pretrained for"] = [a + end for end in ("_finetune", "") for a in aims]
    compared["capacity"] = ("cnn", "image_scratch")
    shown = {f"{title} (2 distractors)": (2, names) for title, names in compared.items()}
    draw_encoders(axes, usual(curves), shown, "return of a 40-step episode", size=10)
    for name, style, rows in split(usual(finals), ENCODERS):
        returns = [values_of(where(rows, distractors=d), RETURN) for d in range(3)]
        if all(map(len, returns)):
            x = np.arange(3) + 0.05 * (list(ENCODERS).index(name) - 3)
            draw_means(axes[3], x, returns, style, marker="o", ms=3, lw=1.2, label=name)
    axes[3].set(xticks=range(3), xlabel="distractors")
    axes[3].set_title("number of distractors (final return)", fontsize=10)
    figure.legend(*axes[3].get_legend_handles_labels(), **BELOW)
    return figure


def long_runs(curves, finals):
    """The runs that are longer than the rest, if there are any: does anything decay late?"""
    if rows := [row for row in curves if row["total_steps"] >= 2_000_000]:
        figure, axis = panels(7, 3.6, 1, 1)
        shown = {"2 distractors, one seed": (2, ENCODERS)}
        draw_encoders([axis], rows, shown, "return of a 40-step episode")
        axis.legend(fontsize=8)
        return figure


def decoder_probe(curves, finals):
    """What a decoder that looked on makes of z, per pretraining. Needs the runs' checkpoints, which
    are too large to keep with the results: without them the picture stays as it is."""
    import torch

    import rp_pretrain

    folders = {"agent's x": "rp_single_task/agent_x"}
    folders["all four positions"] = "rp_pretrain/reward_prediction"
    folders["reconstruction"] = "rp_pretrain/image_reconstruction"
    figure, axes = panels(12, 4, 4, 12, dpi=80)
    for half, distractors in enumerate((0, 2)):
        frames = rp_pretrain.probe_data(distractors, "cpu")[0][:6]
        pictures = {"true": frames}
        for name, folder in folders.items():
            path = ROOT / RUNS / f"{folder}_d{distractors}_s1" / "checkpoint.pt"
            if not path.exists():
                return print(f"decoder_probe.png stays as it is: {path} is missing\n")
            saved = torch.load(path, map_location="cpu")
            channels = rp_pretrain.CHANNELS[saved["objective"]]
            encoder, decoder = rp_pretrain.Encoder(), rp_pretrain.Decoder(channels=channels)
            encoder.load_state_dict(saved["encoder"])
            decoder.load_state_dict(saved["decoder"])
            with torch.no_grad():
                pictures[name] = decoder(encoder(frames))
        for line, (name, images) in zip(axes, pictures.items()):
            for axis, image in zip(line[6 * half :], images):
                axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        axes[0, 6 * half].set_title(f"{distractors} distractors", loc="left", fontsize=10)
    return figure


def seconds_to(level, runs):
    """Median over seeds of the seconds until an evaluation reaches `level`, if all seeds' do."""
    reached = [[row["seconds"] for row in run if row["eval_return"] >= level] for run in runs]
    return f"{np.median([min(times) for times in reached]):.0f}" if runs and all(reached) else "-"


def returns_table(curves, finals):
    """Final returns: mean over seeds and its interval."""
    curves, finals, lines = where(usual(curves), distractors=0), usual(finals), []
    everyone = len(set(values_of(finals, "seed")))
    for name, _, rows in split(finals, ENCODERS):
        runs = [where(rows, distractors=d) for d in range(3)]
        fewer = [f" (n={len(r)})" * (0 < len(r) < everyone) for r in runs]
        cells = [mean(r, RETURN, 2, empty="") + note for r, note in zip(runs, fewer)]
        score = f"{sprites_env.score(values_of(runs[2], RETURN).mean()):.2f}" if runs[2] else ""
        seconds = seconds_to(36.0, runs_of(where(curves, encoder=name)))
        lines.append([f"`{name}`", *cells, score, minutes(rows), seconds])
    titles = "encoder | 0 distractors | 1 | 2 | score at 2 | minutes | seconds to 36.0 at 0"
    below = f"Seeds {seeds(finals)}; {int(finals[0]['steps']):,} environment steps."
    return table(titles, lines, below)


def stack_figure(curves, finals):
    """Three encoders that see two frames at once."""
    figure, axes = panels(10, 4, 1, 2, sharey=True)
    shown = {f"{d} distractors, two frames at once": (d, ENCODERS) for d in (0, 2)}
    draw_encoders(axes, curves, shown, "return of a 40-step episode", size=11)
    figure.legend(*axes[0].get_legend_handles_labels(), **BELOW)
    return figure


def stack_table(curves, finals):
    """Final returns with two frames at once, each seed."""
    lines, numbers = [], sorted(set(values_of(finals, "distractors")))
    for name, _, rows in split(finals, ENCODERS):
        runs = [where(rows, distractors=d) for d in numbers]
        seeds_of = [", ".join(f"{x:.2f}" for x in values_of(r, RETURN)) for r in runs]
        cells = [cell for r, s in zip(runs, seeds_of) for cell in (mean(r, RETURN, 2), s)]
        lines.append([f"`{name}`", *cells, minutes(rows)])
    titles = " | ".join(f"{d:.0f} distractors | its seeds" for d in numbers)
    below = f"Seeds {seeds(finals)}; {int(finals[0]['steps']):,} steps."
    return table(f"encoder | {titles} | minutes", lines, below)


def rounds_figure(curves, finals):
    """Return against steps, for short rollouts and for the usual ones."""
    figure, axes = panels(10, 3.8, 1, 2, sharey=True)
    groups = list(split(curves, ROUNDS))
    for axis, group in zip(axes, (groups[:2], groups[2:])):
        draw_returns(axis, curves, {}, 0.02, " ")
        for name, style, rows in group:
            draw_curve(axis, rows, "eval_return", name, style)
        axis.set(xlabel=THOUSANDS)
        axis.legend(loc="lower right", fontsize=8)
    axes[0].set(ylabel="return of a 40-step episode")
    return figure


def rounds_table(curves, finals):
    """What short rollouts earn, and the steps that they need."""
    lines = []
    for name, _, rows in split(finals, ROUNDS):
        here = runs_of(next(rows for kind, _, rows in split(curves, ROUNDS) if kind == name))
        reached = [[row["step"] for row in run if row["eval_return"] >= 37.5] for run in here]
        first = sorted(min(steps) for steps in reached if steps)
        first = f"{first[0]:,.0f} to {first[-1]:,.0f}" if all(reached) else "-"
        lines.append([name, f"{rows[0]['steps']:,.0f}", mean(rows, RETURN, 2), first])
    titles = "encoder, steps of a rollout | steps in all | return | steps to 37.5"
    return table(titles, lines, f"2 distractors; seeds {seeds(finals)} (images: 1, 2, 3).")


def pretraining_table(curves, finals):
    """What pretraining reaches: prediction error and what a linear probe reads off z."""
    lines, errors = [], {"reward_prediction": "mse", "image_reconstruction": "mse_image"}
    for objective, d in ((objective, d) for objective in errors for d in range(3)):
        if runs := where(finals, objective=objective, distractors=d):
            things = (["agent"], ["target"], [f"distractor{i + 1}" for i in range(d)])
            names = [[f"r2_{thing}_{axis}" for thing in t for axis in "xy"] for t in things]
            mse = spread(runs, [errors[objective]], 4)
            cells = [mse, ""] if objective == "reward_prediction" else ["", mse]
            cells += [spread(runs, some, 3) for some in names]
            lines.append([f"`{objective}`", str(d), *cells, minutes(runs)])
    titles = "objective | distractors | MSE, rewards | MSE, pixels | R² agent | R² target"
    below = f"Mean ± standard deviation over seeds {seeds(finals)}; median minutes."
    return table(f"{titles} | R² distractors | minutes", lines, below)


def awac_figure(curves, finals):
    """Left: scores offline, then online, per algorithm. Right: offline score against λ."""
    figure, (left, right) = panels(11, 4.2, 1, 2, width_ratios=(2, 1))
    curves = [row for row in curves if row["total_steps"]]
    for name, style, rows in split(curves, ALGORITHMS):
        offline = max(row["step"] - row["online_step"] for row in rows)
        draw_curve(left, rows, "eval_score", name, style, start=offline)
        if not values_of(rows, "online_step").any():  # no online phase: what it would stay at
            level = values_of(runs_of(rows), "eval_score")[:, -1].mean()
            left.plot([0, 20], [level, level], ":", color=COLOURS[style[0]], lw=1)
    left.axvspan(left.get_xlim()[0], 0, color="grey", alpha=0.12, lw=0)
    left.axhline(100, color="grey", lw=0.7, ls=":")
    left.set(xlabel="offline updates | online environment steps (thousands)")
    left.set(ylabel="score: 0 random, 100 the data's expert")
    left.legend(fontsize=8, loc="lower right")

    scores = {}
    for row in sorted(where(finals, algorithm="awac"), key=lambda row: row["lam"]):
        scores.setdefault(row["lam"], []).append(row["offline_score"])
    for lam, group in scores.items():
        right.plot([lam] * len(group), group, ".", color=COLOURS["r"], alpha=0.4, ms=4)
    draw_means(right, list(scores), scores.values(), "ro-", ms=4)
    for name, style, rows in split(
        finals, {name: ALGORITHMS[name] for name in ("bc", "filtered_bc")}
    ):
        line = {"color": COLOURS[style[0]], "ls": "--", "lw": 1}
        draw_level(right, values_of(rows, "offline_score").mean(), name, 0.01, line, color="black")
    right.set(xscale="log", xlabel="temperature λ", ylabel="score after the offline phase")
    return figure


def awac_table(curves, finals):
    """Scores of each algorithm: mean over seeds and its interval."""
    finals, lines = [row for row in finals if row["total_steps"]], []
    for algorithm, _, rows in split(finals, ALGORITHMS):
        scores = ("offline_score", "worst_online_dip", "online_score")
        cells = [mean(rows, name, 1) for name in scores] + [mean(rows, RETURN, 2), minutes(rows)]
        lines.append([f"`{algorithm}`", *cells])
    titles = "algorithm | offline score | worst dip, first 2,000 online steps | final score"
    steps = f"{int(max(values_of(finals, 'total_steps'))):,} online steps"
    below = f"Mean and 95 % bootstrap interval, seeds {seeds(finals)}; {steps}."
    return table(f"{titles} | final return | minutes", lines, below)


def stitching_figure(curves, finals):
    """Where no episode is good: many for 10,000 updates, few, and many for 2,000, then online."""
    figure, axes = panels(13, 4.2, 1, 3, sharey=True)
    for axis, data in zip(axes, STITCHED):
        for label, style, rows in split(where(curves, total_steps=0, **data), ALGORITHMS):
            draw_curve(axis, rows, "eval_score", label, style)
        axis.set(title=f"{data['episodes']} episodes", xlabel="offline updates (thousands)")
    online = [row for row in curves if row["total_steps"]]
    learners = {name: ALGORITHMS[name] for name in ("awac", "sac_from_buffer")}
    for label, style, rows in split(online, learners):
        draw_curve(axes[2], rows, "eval_score", label, style, start=rows[0]["offline_updates"])
    axes[2].axvspan(-2, 0, color="grey", alpha=0.12, lw=0)
    axes[2].set(title="200 episodes, 2,000 updates, then online", xlim=(-2, 20))
    axes[2].set(xlabel="environment steps (thousands)")
    for axis in axes:
        axis.axhline(100, color="grey", lw=0.7, ls=":")
    axes[0].set(ylabel="score: 0 random, 100 the data's expert", ylim=(-50, 112))
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def promised_figure(curves, finals):
    """What the critic promises at the start of an episode, and the discounted return that comes."""
    figure, axes = panels(9, 3.8, 1, 2, sharey=True)
    for axis, data in zip(axes, STITCHED):
        for label in ("awac", "sac_from_buffer"):
            colour = ALGORITHMS[label][0][0]
            rows = where(curves, algorithm=label, total_steps=0, **data)
            draw_curve(axis, rows, "promised", f"{label}, promised", f"{colour}-")
            draw_curve(axis, rows, "earned", f"{label}, earned", f"{colour}--")
        axis.set(title=f"{data['episodes']} episodes", xlabel="offline updates (thousands)")
    axes[0].set(ylabel="discounted return, γ = 0.9")
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def stitching_table(curves, finals):
    """Scores where no episode is good, after few updates and after many, and online."""
    lines = []
    for algorithm, _, rows in split(finals, ALGORITHMS):
        cells = []
        for data in STITCHED:
            offline = where(rows, total_steps=0, **data)
            first = where(curves, algorithm=algorithm, total_steps=0, step=2000, **data)
            cells += [mean(first, "eval_score", 0), mean(offline, "offline_score", 0)]
        online = [row for row in rows if row["total_steps"]]
        cells += [mean(online, name, 0) for name in ("worst_online_dip", "online_score")]
        lines.append([f"`{algorithm}`", *cells])
    offline = "after 2,000 updates | after 10,000"
    titles = f"algorithm | 200 episodes: {offline} | 60 episodes: {offline}"
    titles += " | 200 episodes, 2,000 updates, then online: worst dip | final score"
    below = f"Scores: mean and 95 % bootstrap interval, seeds {seeds(finals)}; 20,000 online steps."
    return table(titles, lines, below)


def draw_modes(curves, finals, styles, bars):
    """Above: return against steps, per mode. Below: what a linear probe reads off each code."""
    numbers = sorted(set(values_of(finals, "distractors")))
    figure, (above, below) = panels(1 + 5.5 * len(numbers), 7.5, 2, len(numbers), 80, squeeze=False)
    for axis, probes, d in zip(above, below, numbers):
        draw_returns(axis, where(curves, distractors=d), styles, 0.01, "_", va="baseline")
        axis.set(xlabel=THOUSANDS, ylim=(26.5, 39.4), title=f"{d:.0f} distractors")
        draw_probes(probes, where(finals, distractors=d), bars)
    above[0].set_ylabel("return of a 40-step episode")
    above[0].legend(fontsize=8, loc="lower right")
    below[0].set_ylabel("held-out R² of a ridge probe")
    below[0].legend(fontsize=8, ncols=3, loc="upper center")
    return figure


def curl_figure(curves, finals):
    """Codes of the modes that see pixels, of an untrained encoder, and the pixels themselves."""
    bars = [(mode, mode, "", COLOURS[style[0]]) for mode, (style, _) in MODES.items()][1:]
    bars += [("random encoder", "curl", "random_encoder_", "#BBBBBB")]
    bars += [("raw pixels", "curl", "pixels_", "#777777")]
    return draw_modes(curves, finals, MODES, bars)


def psrl_figure(curves, finals):
    """Codes of the modes."""
    bars = [(mode, mode, "", COLOURS[style[0]]) for mode, (style, _) in PARTS.items()]
    return draw_modes(curves, finals, PARTS, bars)


def psrl_table(curves, finals):
    """Of each mode: returns, what is in the features, the flow, and what the action tells."""
    lines = []
    for mode, _, rows in split(finals, PARTS):
        runs = [where(rows, distractors=d) for d in (0, 2)]
        last = where(curves, mode=mode, step=max(values_of(curves, "step")))
        last = [where(last, distractors=d) for d in (0, 2)]
        cells = [mean(r, RETURN, 2) for r in runs]
        cells += [spread(r, ["probe_r2_agent"], 2) for r in runs]
        cells += [spread(r, ["probe_r2_features_target_velocity"], 2) for r in runs]
        for name, here in (("flow_error", runs), ("distance_pr", last)):
            cells += [spread(r, [name], 2).replace("nan ± nan", "") for r in here]
        lines.append([f"`{mode}`", *cells, minutes(rows)])
    zero = [values_of(where(finals, distractors=d), "flow_error_zero") for d in (0, 2)]
    zero = " and ".join(f"{np.nanmean(values):.2f}" for values in zero)
    below = f"Returns: mean and 95 % bootstrap interval, seeds {seeds(finals)}; others: mean ±"
    below += f" standard deviation. With no flow at all its error would be {zero} pixels."
    titles = "mode | return, 0 distractors | 2 | R² of the agent's place, from the code, 0 | 2"
    titles += " | R² of the target's velocity, from features z, 0 | 2"
    titles += " | error of the flow in pixels, 0 | 2 | distance of Ẑ^pr, 0 | 2 | minutes"
    return table(titles, lines, below)


def draw_probes(axis, finals, bars):
    """R² of probes, bars (label, mode, code, colour), and its seeds as dots."""
    things = ["agent", "target", "relative_position", "target_velocity"]
    things += ["distractors"] if finals[0]["distractors"] else []
    for i, (label, mode, code, colour) in enumerate(bars):
        if rows := where(finals, mode=mode):
            values = np.array([values_of(rows, f"probe_r2_{code}{thing}") for thing in things])
            x = np.arange(len(things)) + (i - 3) * 0.12
            axis.bar(x, values.mean(1), 0.11, color=colour, label=label)
            axis.plot(x, values, "k.", ms=2)
    axis.axhline(0, color="grey", lw=0.7)
    axis.set_xticks(range(len(things)), [thing.replace("_", "\n") for thing in things])
    axis.set(ylim=(-0.15, 1.35))


def curl_table(curves, finals):
    """Returns of each mode: mean over seeds and its interval."""
    lines = []
    for mode, _, rows in split(finals, MODES):
        runs = [where(rows, distractors=d) for d in (0, 2)]
        cells = [mean(r, RETURN, 2) + f" (n={len(r)})" * bool(r) for r in runs]
        top1 = [values_of(r, "contrastive_accuracy").mean() for r in runs if r]
        top1 = ", ".join(f"{share:.2f}" for share in top1 if not np.isnan(share))
        letter = "abcdef"[list(MODES).index(mode)]
        lines.append([letter, f"`{mode}`", *cells, top1, minutes(rows)])
    return table("| mode | 0 distractors | 2 distractors | top-1 at 0, 2 | minutes", lines)


def rig_figure(curves, finals):
    """Final distance against steps: reach (rewards, then relabelling), push (block and agent)."""
    figure, axes = panels(11, 3.8, 1, 3)
    true, mixed, pixels, *others = GOALS
    shown = {  # title: task, whose distance, configurations
        "reach: rewards": ("reach", ["agent"], (true, mixed, pixels)),
        "reach: relabelling": ("reach", ["agent"], (mixed, *others)),
        "push": ("push", ["block", "agent"], (true, mixed)),
    }
    for axis, (title, (task, whose, labels)) in zip(axes, shown.items()):
        styles, here = {label: GOALS[label] for label in labels}, where(curves, task=task)
        for what in whose:
            for label, style, rows in split(here, styles):
                if task == "push":
                    label = f"{what}, {label.split(',')[0]}"
                    style = style[0] + ("-" if what == "block" else ":")
                draw_curve(axis, rows, f"final_{what}_distance", label, style)
        for row in where(finals, task=task)[:1]:
            level, name = row[f"untouched_{whose[0]}_distance"], f"{whose[0]}, untouched"
            draw_level(axis, level, name, 0.98, {"lw": 0.8, "ls": "--"})
        axis.set(xlabel=THOUSANDS, title=title, ylim=(0, 0.45))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("final distance to the goal (frame widths)")
    return figure


def rig_table(curves, finals):
    """Final distances of each configuration: mean over seeds and its interval."""
    lines = []
    for task, what, probe in (("reach", "agent", "probe_r2_agent"), ("push", "block", "probe_r2")):
        for label, _, rows in split(where(finals, task=task), GOALS):
            block = mean(rows, "final_block_distance", 3) if task == "push" else ""
            success = f"{100 * values_of(rows, 'success_rate').mean():.0f} %"
            worst = f"{values_of(rows, f'final_{what}_distance').max():.3f}"
            r2 = [f"{value:.3f}" for value in [values_of(rows, probe).mean()] if value == value]
            cells = [task, label, mean(rows, "final_agent_distance", 3), block, success, worst]
            lines.append([*cells, "".join(r2), minutes(rows), str(len(rows))])
    titles = "task | z and reward | agent's distance | block's distance | success | worst seed"
    return table(f"{titles} | probe R² | minutes | seeds", lines)


def from_scratch(rows):
    """The policies from scratch, a run for each seed: beside other skills they are the same."""
    return where(rows, experiment="transfer", **SKILLS["skills"][1])


def skill_figure(curves, finals):
    """Library; equal and other tasks; transfer to both new tasks. Thick lines are medians: with
    three seeds an interval would say no more, and success on a new task is all or nothing."""
    figure, axes = panels(14, 3.8, 1, 4)
    library, pairs = (where(curves, experiment=name) for name in ("library", "generality"))
    lines = [  # panel, rows, column, label, style
        (0, library, "success_rate", "success", "r-"),
        (0, library, "identifiability_top1", "top-1 of 64", "b--"),
        (1, pairs, "kl_1_2", "another goal", "b-"),
        (1, pairs, "kl_1_4", "a third goal", "g-"),
        (1, pairs, "kl_1_3", "the same goal", "r-"),
    ]
    for i, task in enumerate(NEW_TASKS, 2):
        for label, style, rows in split(where(curves, experiment="transfer"), SKILLS):
            lines.append((i, rows, f"skills_{task}", label, style))
        lines.append((i, from_scratch(curves), f"scratch_{task}", "from scratch", "k:"))
        axes[i].set(title=f"transfer: {task}", ylabel="success rate", ylim=(-0.02, 1.02))
    for i, *line in lines:
        draw_curve(axes[i], *line, band=False)
    axes[0].axhline(1 / 64, color="grey", lw=0.8, ls=":")
    axes[0].set(title="library: four goals", ylabel="share of episodes", ylim=(0, 1.02))
    axes[1].set(title="generality: KL(task 1 ‖ task t)", ylabel="nats", yscale="log")
    for axis in axes:
        axis.set_xlabel(THOUSANDS)
        axis.legend(fontsize=8)
    return figure


def library_table(curves, finals):
    """What the library experiments found, seed by seed."""
    lines, forms = [], {"success_rate": "2f", "worst_task": "2f", "identifiability_top1": "2f"}
    forms |= {"solutions_found": "0f", "kl_duplicate": "1g", "kl_others": "1f"}
    for experiment in ("library", "generality", "versatility"):
        for embedding in ("gaussian", "bernoulli"):
            if rows := where(finals, experiment=experiment, embedding=embedding):
                cells = [each(rows, name, form) for name, form in forms.items()]
                lines.append([experiment, embedding, *cells, minutes(rows)])
    titles = r"experiment | p(z\|t) | success | worst task | top-1 of 64 | solutions found"
    return table(f"{titles} | KL to the same task | KL to the others | minutes", lines)


def transfer_table(curves, finals):
    """What skills are worth on new tasks, run by run, beside policies from scratch."""
    kinds = split(where(finals, experiment="transfer"), SKILLS)
    actors = [(label, "skills", rows) for label, _, rows in kinds]
    actors.insert(1, ("from scratch", "scratch", from_scratch(finals)))
    lines = []
    for task, (label, how, rows) in ((task, actor) for task in NEW_TASKS for actor in actors):
        rates = each(rows, f"success_{how}_{task}", "2f")
        steps = each(rows, f"steps_{how}_{task}", "0f", nan="never", between="; ")
        ratios, chance = [], ""
        if how == "skills":
            chance = each(rows, f"success_random_{task}", "2f")
            for row in rows:  # ">": scratch never got there
                never = np.isnan(row[f"steps_scratch_{task}"])
                ratio = each([row], f"transfer_steps_ratio_{task}", "1f")
                ratios.append(("> " if never else "") + ratio if ratio else "-")
        lines.append([task, label, rates, steps, ", ".join(ratios), chance])
    titles = "new task | actor | success at the end | steps to 80 % | times fewer than scratch"
    return table(f"{titles} | success of random choices", lines)


def grasp_figure(curves, finals):
    """Retrieval and localisation against updates, beside what needs no training."""
    figure, axes = panels(14, 3.8, 1, 4, sharey=True)
    for axis, what in zip(axes, GRASP_SHARES):
        for control in ("chance", "pixels", "untrained"):
            level = values_of(finals, f"{control}_{what}").mean()
            name, x = ("raw pixels", 0.6) if control == "pixels" else (control, 0.99)
            va = "bottom" if control == "chance" else "top"
            draw_level(axis, level, name, x, {"lw": 0.7, "ls": ":", "zorder": 0}, va=va)
        for label, style, rows in split(curves, GRASPS):
            draw_curve(axis, rows, what, label, style)
        title = "{}, {} objects".format(*what.split("_"))
        axis.set(xlabel="updates (thousands)", ylim=(0, 1.02), title=title)
    axes[0].set_ylabel("share of held-out grasps")
    figure.legend(*axes[0].get_legend_handles_labels(), **BELOW)
    return figure


def grasp_table(curves, finals):
    """Retrieval and localisation of each training, beside controls and the paper's numbers."""
    lines = []
    for label, _, rows in split(finals, GRASPS):
        wrong = [f"{100 * values_of(rows, f'wrong_{a}').mean():.1f}" for a in ATTRIBUTES]
        cells = [mean(rows, what, 3) for what in GRASP_SHARES]
        lines.append([label, *cells, " / ".join(wrong), str(len(rows))])
    main = where(finals, **GRASPS["subtraction"][1])
    for label in ("untrained", "pixels", "chance"):
        cells = [mean(main, f"{label}_{what}", 3) for what in GRASP_SHARES]
        label = {"pixels": "raw pixels, 4 x 4 patches", "untrained": "untrained tower"}.get(label)
        lines.append([label or "chance", *cells, "", ""])
    lines.append(["the paper, simulated scenes", ".88", ".64", ".96", ".77", "", ""])
    lines.append(["the paper, ImageNet features", ".23", ".22", ".18", ".15", "", ""])
    titles = "training | retrieval, seen | retrieval, novel | localisation, seen"
    titles += " | localisation, novel | wrong shape / size / grey, % | seeds"
    return table(titles, lines)


def context_figure(curves, finals):
    """Final distance against steps; and, against how many scenes training has, the distance in
    scenes as in training and in unseen ones, and the error of the scene in imagined goals."""
    figure, axes = panels(14, 3.8, 1, 4)
    for label, style, rows in split(where(curves, appearances="all"), CONTEXTS):
        draw_curve(axes[0], rows, "unseen_agent_distance", label, style)
    axes[0].set(xlabel=THOUSANDS, ylim=(0, 0.5))
    axes[0].set_title("ever new scenes, tested in unseen", fontsize=10)
    shown = {"final_agent_distance": "scenes as in training"}
    shown |= {"unseen_agent_distance": "unseen scenes"}
    shown |= {"unseen_imagined_scene_error": "goals imagined in unseen scenes"}
    for axis, (name, title) in zip(axes[1:], shown.items()):
        for label, style, rows in split(finals, CONTEXTS):
            groups = [values_of(where(rows, appearances=a), name) for a in (1, 4, "all")]
            here = [i for i, group in enumerate(groups) if len(group)]
            x = np.array(here) + (0.05 if label == "CC-RIG" else -0.05)  # side by side
            draw_means(axis, x, [groups[i] for i in here], style, marker="o", label=label)
        axis.set_xticks(range(3), ["1", "4", "ever new"])
        axis.set(xlabel="scenes in training", ylim=(0, 0.5 if "distance" in name else 0.8))
        axis.set_title(title, fontsize=10)
    for axis in axes[:3]:
        axis.set_ylabel("final distance (frame widths)")
    axes[3].set_ylabel("squared error of the scene")
    for axis, place in zip(axes, ("upper right", "best", "best", "lower left")):
        axis.legend(fontsize=8, loc=place)
    return figure


def context_table(curves, finals):
    """What is imagined, what z and its context tell, and how near the agent comes."""
    lines = []
    for appearances in (1, 4, "all"):
        for method, _, rows in split(where(finals, appearances=appearances), CONTEXTS):
            names = ("imagined_scene_error", "unseen_imagined_scene_error", "unseen_probe_r2_agent")
            names += ("unseen_probe_r2_scene_z", "unseen_probe_r2_scene_context")
            names += ("final_agent_distance", "unseen_agent_distance")
            cells = [mean(rows, name, 3) for name in names]
            cells.append(f"{100 * values_of(rows, 'unseen_success_rate').mean():.0f} %")
            scenes = "ever new" if appearances == "all" else f"{appearances:.0f}"
            lines.append([scenes, method, *cells, minutes(rows)])
    if (ROOT / RESULTS / "rig_scenes_final.csv").exists():
        for z_dim in (4, 16):
            rows = where(read("rig_scenes_final.csv"), z_dim=z_dim)
            cells = ["", "", mean(rows, "probe_r2_agent", 3), "", ""]
            cells += [mean(rows, "final_agent_distance", 3), "", "", minutes(rows)]
            lines.append(["ever new", f"`rig_td3.py`, z of {z_dim}", *cells])
    titles = "scenes in training | method | error of imagined scenes, as in training | unseen"
    titles += " | R² agent from z | R² scene from z | R² scene from z_c"
    titles += " | distance, scenes as in training | unseen | success, unseen | minutes"
    return table(titles, lines)


def kept(finals, distractors):
    """(label, objective, its rows, prefix of its R²) for every line of the matrix: raw pixels and
    an untrained encoder, then those that were trained."""
    lines = [("raw pixels", "none", "pixels_"), ("none (untrained)", "none", "")]
    for label, objective, prefix in lines + [(name, name, "") for name in list(PRETEXTS)[:-1]]:
        if rows := where(finals, objective=objective, distractors=distractors):
            yield label, objective, rows, prefix


def pretext_figure(curves, finals):
    """The matrix: what can be read off each code, means over seeds."""
    figure, axes = panels(13, 5.6, 1, 2)
    for axis, d in zip(axes, (0, 2)):
        things, lines = KEPT[: 5 if d else 4], list(kept(finals, d))
        r2 = [[values_of(rows, f"{p}r2_{t}").mean() for t in things] for _, _, rows, p in lines]
        axis.imshow(r2, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(r2):
            shade, value = "white" if value > 0.6 else "black", round(value, 2) + 0  # not -0.00
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=shade, size=9)
        axis.set_xticks(range(len(things)), [thing.replace("_", "\n") for thing in things])
        axis.set_yticks(range(len(lines)), [label for label, *_ in lines])
        axis.set_title(f"{d} distractors: held-out R² of a linear probe", fontsize=11)
    return figure


def pretext_decoded(curves, finals):
    """What a decoder that looked on makes of each code. Needs the runs' checkpoints: without them
    the picture stays as it is."""
    import torch

    import pretext

    figure, axes = panels(9, 11, len(PRETEXTS) + 1, 8, dpi=80)
    frames = pretext.pairs_to_probe(2, "cpu")[0][:8, 1]
    for line, name in zip(axes, ["true", *PRETEXTS]):
        images = frames
        if name != "true":
            path = ROOT / RUNS / f"pretext/{name}_d2_s1/checkpoint.pt"
            if not path.exists():
                return print(f"pretext_decoded.png stays as it is: {path} is missing\n")
            saved = torch.load(path, map_location="cpu")
            encoder, decoder = pretext.Encoder(), pretext.Decoder()
            encoder.load_state_dict(saved["encoder"])
            decoder.load_state_dict(saved["decoder"])
            with torch.no_grad():
                images = decoder(encoder(frames))
            images = images.sigmoid() if name == "beta_vae" else images
            images = images / images.amax().clamp(min=1e-6)
        for axis, image in zip(line, images):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    return figure


def pretext_table(curves, finals, distractors):
    """R² by quantity and objective, and the return of PPO on the frozen encoder."""
    returns, lines = [], []
    if (ROOT / RESULTS / "ppo_pretext_final.csv").exists():
        returns = where(read("ppo_pretext_final.csv"), distractors=distractors)
    for label, objective, rows, prefix in kept(finals, distractors):
        own = PRETEXTS[objective]
        met = f"{own} {values_of(rows, own).mean():.4g}" if own else ""
        sd = "" if prefix else f"{values_of(rows, 'z_sd').mean():.2g}"
        things = KEPT[: 5 if distractors else 4]
        cells = [spread(rows, [f"{prefix}r2_{thing}"], 2) for thing in things]
        earned = "" if prefix else mean(where(returns, objective=objective), RETURN, 2, empty="")
        lines.append([label, met, sd, *cells, earned])
    titles = "objective | its own measure | sd of z | agent | agent's displacement | target"
    titles += " | target's velocity" + " | distractors" * bool(distractors)
    return table(f"{titles} | return, PPO on the frozen encoder", lines)


def measured(row, *names):
    """Three significant digits, as in 1,290,000; shares as per cent; nothing if not measured."""
    for name in names:
        value = row.get(name, "")
        number = value if isinstance(value, str) else f"{float(f'{value:.3g}'):,.0f}"
        yield f"{100 * value:.0f} %" if name.startswith("share") else number


def speed_tables(results):
    """What throughput.py measured: {name of a table: its lines}."""
    alone = results["environment"]["one SpritesEnv, image, 1 distractor"]
    lines = [["one `SpritesEnv`", *measured({"images": alone}, "images", "", "", "")]]
    names = ("image, 1 distractors", "state, 1 distractors", "SyncVectorEnv, image, 1 distractor")
    for row in results["environment"]["vector"]:
        first = f"`SpritesVectorEnv`, {row['environments']}"
        lines.append([first, *measured(row, *names, "writing the bytes alone")])
    titles = "steps per second, 1 thread, 1 distractor | images | states"
    titles += " | images, gymnasium's `SyncVectorEnv` | writing as many bytes"
    tables = {"speed of the environment": table(titles, lines)}

    names = [
        f"share {name}" for name in ("environment", "forward, encoder", "backward", "optimiser")
    ]
    names = ["steps/s, threads 1", "steps/s, threads 2", *names]
    lines = [[f"`{row['encoder']}`", *measured(row, *names)] for row in results["ppo"]]
    titles = "PPO, steps per second | 1 thread | 2 threads | environment | encoder forward"
    tables["speed of PPO"] = table(f"{titles} | backward | optimiser", lines)

    names = [name for name in results["scaling"][0] if name != "environments"]
    lines = [[str(row["environments"]), *measured(row, *names)] for row in results["scaling"]]
    titles = " | ".join(["environments in lockstep", *(f"`{name}`" for name in names)])
    tables["speed against environments"] = table(titles, lines)

    names = ("ours", "ordinary", "ratio")
    lines = [[f"`{row['encoder']}`", *measured(row, *names)] for row in results["ordinary"]]
    titles = "PPO, 2 threads | this code | the ordinary way | ratio"
    tables["speed against ordinary code"] = table(titles, lines)

    lines = {}
    for row in sorted(results["pretraining"], key=lambda row: row["threads"]):
        line = lines.setdefault(row["objective"], [f"`{row['objective']}`"])
        line += measured(row, "updates_per_second")
    titles = "pretraining, updates per second | 1 thread | 2 threads"
    tables["speed of pretraining"] = table(titles, lines.values())
    return tables


# --- Everything together ---------------------------------------------------------------------

STUDIES = {  # what is made of its results: figures by file, tables by name
    "ppo_encoder": {
        "learning_curves.png": learning_curves,
        "comparisons.png": comparisons,
        "long_runs.png": long_runs,
        "returns": returns_table,
    },
    "rp_pretrain": {"decoder_probe.png": decoder_probe, "pretraining": pretraining_table},
    "ppo_stack": {"stack.png": stack_figure, "two frames at once": stack_table},
    "ppo_stack_long": {"two frames at once, longer pretraining": stack_table},
    "ppo_rounds": {"rounds.png": rounds_figure, "short rollouts": rounds_table},
    "awac": {"awac.png": awac_figure, "awac": awac_table},
    "awac_narrow": {"awac, narrow data": awac_table},
    "awac_stitched": {
        "stitching.png": stitching_figure,
        "promised.png": promised_figure,
        "stitching": stitching_table,
    },
    "curl": {"curl.png": curl_figure, "contrastive learning": curl_table},
    "psrl": {"psrl.png": psrl_figure, "paired similarity": psrl_table},
    "rig": {"rig.png": rig_figure, "imagined goals": rig_table},
    "skill": {
        "skill.png": skill_figure,
        "skills": library_table,
        "transfer of skills": transfer_table,
    },
    "pretext": {
        "pretext.png": pretext_figure,
        "pretext_decoded.png": pretext_decoded,
        "pretext tasks, 2 distractors": partial(pretext_table, distractors=2),
        "pretext tasks, 0 distractors": partial(pretext_table, distractors=0),
    },
    "cc_rig": {"cc_rig.png": context_figure, "imagined goals in context": context_table},
    "grasp2vec": {"grasp2vec.png": grasp_figure, "objects by subtraction": grasp_table},
}
PICTURES = {  # what runs have drawn: file in the results, and in runs/study/
    "rollout.gif": "ppo_encoder/reward_prediction_d2_s1_n250000/rollout.gif",
    "rig_imagined_goals.png": "rig/push_latent_0.2_0.4_0.4_s1/imagined_goals.png",
    "rig_reached.png": "rig/push_latent_0.2_0.4_0.4_s1/reached.png",
    "rig_latent_walk.png": "rig/push_latent_0.2_0.4_0.4_s1/latent_walk.png",
    "rig_rollout.gif": "rig/push_latent_0.2_0.4_0.4_s1/rollout.gif",
    "skill_library.png": "skill/library_gaussian_0.2_s1/skills.png",
    "skill_generality.png": "skill/generality_gaussian_0.2_s1/skills.png",
    "skill_versatility.png": "skill/versatility_bernoulli_0.5_s1/skills.png",
    "cc_rig_imagined_goals.png": "cc_rig/frame_all_s1/imagined_goals.png",
    "cc_rig_imagined_without.png": "cc_rig/none_all_s1/imagined_goals.png",
    "cc_rig_exchanged.png": "cc_rig/frame_all_s1/exchanged.png",
    "cc_rig_rollout.gif": "cc_rig/frame_all_s1/rollout.gif",
    "psrl_flow.png": "psrl/full_d2_s1/flow.png",
    "psrl_flow.gif": "psrl/full_d2_s1/flow.gif",
    "grasp2vec_heatmaps.png": "grasp2vec/grasp2vec_False_2_l0.0005_s1/heatmaps.png",
    "grasp2vec_neighbours.png": "grasp2vec/grasp2vec_False_2_l0.0005_s1/neighbours.png",
    "skill_transfer.gif": "skill/transfer_gaussian_0.2_s1/rollout.gif",
}


def make(figures):
    """{file: figure} of every figure, or {name: lines} of every table, whose results are there."""
    made = {}
    for study, outputs in STUDIES.items():
        if (ROOT / RESULTS / f"{study}_final.csv").exists():
            results = read(f"{study}.csv"), read(f"{study}_final.csv")
            wanted = {name: f for name, f in outputs.items() if name.endswith(".png") == figures}
            made |= {name: function(*results) for name, function in wanted.items()}
    if not figures and (path := ROOT / RESULTS / "throughput.json").exists():
        made |= speed_tables(json.loads(path.read_text()))
    return made


def fill(page, tables):
    """The text of a page, with each table between its marks, if it has them."""
    for name, lines in tables.items():
        whole = "\n".join([f"<!-- table: {name} -->", "", *lines, "", "<!-- end -->"])
        pattern = rf"(?s)<!-- table: {name} -->\n.*?<!-- end -->"
        page = re.sub(pattern, lambda _, whole=whole: whole, page)
    return page


def main():
    """Draw everything, copy what runs have drawn, put the tables into the pages."""
    for name, figure in make(figures=True).items():
        if figure:
            figure.savefig(ROOT / RESULTS / name)
    for name, drawn in PICTURES.items():
        if (ROOT / RUNS / drawn).exists():
            shutil.copy(ROOT / RUNS / drawn, ROOT / RESULTS / name)
    tables = make(figures=False)
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(), tables))
    print("\n\n".join("\n".join(lines) for lines in tables.values()))


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("error: plot.py takes no arguments")
    try:
        main()
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        sys.exit(f"error: the results are not as study.py writes them: {error!r}"[:200])
