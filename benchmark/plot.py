"""Every figure and table of the results.

    python benchmark/plot.py

Draws figures from benchmark/results/*.csv, beside them, and writes the tables between the marks
`<!-- table: name -->` and `<!-- end -->` of README.md and benchmark/README.md: each file gets those
whose marks it has. STUDIES, at the end, says what is made of which results; rows.py has what is
compared, tables.py the tables. Intervals are 95 % bootstrap intervals of the mean over seeds
(10,000 resamples, fixed seed); with three to five seeds they are rough, so every seed is drawn as
well. Films, and pictures that need a network, come from the study's runs of seed 1: without their
folders in runs/study/ the old ones stay as they are.
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
from rows import (
    ALGORITHMS,
    CONTEXTS,
    ENCODERS,
    GOALS,
    GRASP_SHARES,
    GRASPS,
    KEPT,
    MODES,
    NEW_TASKS,
    OUTSIDE,
    PARTS,
    PRETEXTS,
    RESULTS,
    RETURN,
    ROOT,
    ROUNDS,
    SKILLS,
    STITCHED,
    from_scratch,
    interval,
    kept,
    outside,
    read,
    runs_of,
    split,
    sprites_env,
    usual,
    values_of,
    where,
)
from tables import (
    awac_table,
    context_table,
    curl_table,
    grasp_table,
    library_table,
    outside_table,
    pretext_table,
    pretraining_table,
    psrl_table,
    returns_table,
    rig_table,
    rounds_table,
    speed_tables,
    stack_table,
    stitching_table,
    transfer_table,
)

RUNS = Path("runs") / "study"  # in ROOT
PAGES = ("README.md", "benchmark/README.md")  # in ROOT
THOUSANDS = "environment steps (thousands)"
BELOW = {"loc": "outside lower center", "ncols": 7, "fontsize": 8}  # a legend of all encoders
# Okabe and Ito's, by the letter of a style.
COLOURS = {"k": "#000000", "r": "#D55E00", "o": "#E69F00", "b": "#0072B2"}
COLOURS |= {"s": "#56B4E9", "g": "#009E73", "p": "#CC79A7"}


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


# --- The studies: figures of (curves, finals) ------------------------------------------------


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


def stack_figure(curves, finals):
    """Three encoders that see two frames at once."""
    figure, axes = panels(10, 4, 1, 2, sharey=True)
    shown = {f"{d} distractors, two frames at once": (d, ENCODERS) for d in (0, 2)}
    draw_encoders(axes, curves, shown, "return of a 40-step episode", size=11)
    figure.legend(*axes[0].get_legend_handles_labels(), **BELOW)
    return figure


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


def outside_figure(curves, finals):
    """Return in DeepMind Control against steps of theirs, and what the papers report at the end."""
    figure, axes = panels(11, 4.2, 1, 2, sharey=True)
    for axis, (task, (repeat, papers)) in zip(axes, OUTSIDE.items()):
        rows = [row | {"step": repeat * row["step"]} for row in outside(curves, task)]
        for mode, style, here in split(rows, MODES):
            draw_curve(axis, here, "eval_return", mode, style)
            x = 103 + 3 * list(MODES).index(mode)  # side by side
            options = {"color": COLOURS[style[0]], "mec": "white", "ms": 7, "zorder": 3}
            axis.plot(x, papers[mode], "D", **options)
        axis.plot([], [], "D", color="grey", label="paper, at 100")
        axis.set(xlabel="DeepMind's steps (thousands)", ylim=(0, 1000))
        axis.set_title(task.replace("_", " "))
    axes[0].set_ylabel("return of an episode")
    figure.legend(*axes[0].get_legend_handles_labels(), **BELOW)
    return figure


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
    "outside": {"outside.png": outside_figure, "outside Sprites": outside_table},
}
PICTURES = {  # what runs have drawn: file in the results, and in runs/study/
    "rollout.gif": "ppo_encoder/reward_prediction_d2_s1_n250000/rollout.gif",
    "rig_imagined_goals.png": "rig/push_latent_0.2_0.4_0.4_s1/imagined_goals.png",
    "rig_reached.png": "rig/push_latent_0.2_0.4_0.4_s1/reached.png",
    "rig_latent_walk.png": "rig/push_latent_0.2_0.4_0.4_s1/latent_walk.png",
    "rig_rollout.gif": "rig/push_latent_0.2_0.4_0.4_s1/rollout.gif",
    "skill_library.png": "skill/library_gaussian_0.2_s1/skills.png",
    "skill_generality.png": "skill/generality_gaussian_0.2_s1/skills.png",
    "skill_walk.png": "skill/transfer_gaussian_0.2_s1/library/skills.png",
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
        results = read(f"{study}.csv"), read(f"{study}_final.csv")
        if results[1]:
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
