"""The tables of the results, as lines of markdown."""

import numpy as np
from rows import (
    ALGORITHMS,
    ATTRIBUTES,
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
    RETURN,
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


# --- The studies: tables of (curves, finals) -------------------------------------------------


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
    for z_dim in (4, 16):
        if rows := where(read("rig_scenes_final.csv"), z_dim=z_dim):
            cells = ["", "", mean(rows, "probe_r2_agent", 3), "", ""]
            cells += [mean(rows, "final_agent_distance", 3), "", "", minutes(rows)]
            lines.append(["ever new", f"`rig_td3.py`, z of {z_dim}", *cells])
    titles = "scenes in training | method | error of imagined scenes, as in training | unseen"
    titles += " | R² agent from z | R² scene from z | R² scene from z_c"
    titles += " | distance, scenes as in training | unseen | success, unseen | minutes"
    return table(titles, lines)


def pretext_table(curves, finals, distractors):
    """R² by quantity and objective, and the return of PPO on the frozen encoder."""
    returns, lines = where(read("ppo_pretext_final.csv"), distractors=distractors), []
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


def outside_table(curves, finals):
    """Returns in DeepMind Control, beside the papers'."""
    lines = []
    for task, (_, papers) in OUTSIDE.items():
        for mode, _, rows in split(outside(finals, task), MODES):
            returns, lengths = (values_of(rows, name) for name in ("return_of_20", "minutes"))
            name = f"{task.replace('_', ' ')}, `{mode}`"
            cells = [name, each(rows, "return_of_20", "0f"), f"{returns.mean():.0f}"]
            lines.append([*cells, str(papers[mode]), f"{min(lengths):.0f} to {max(lengths):.0f}"])
    return table(f"| returns, seeds {seeds(finals)} | mean | paper | minutes", lines)


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
