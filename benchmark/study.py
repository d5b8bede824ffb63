"""The studies: variants x seeds, each run a process of its own, resumable.

    python benchmark/study.py --jobs 2                     encoders x distractors x seeds: hours
    python benchmark/study.py --study single_task          pretraining on one reward alone
    python benchmark/study.py --study awac                 offline data, then online
    python benchmark/study.py --study stitching            offline data without a good episode
    python benchmark/study.py --study rig                  imagined goals
    python benchmark/study.py --study curl                 contrastive loss or augmentation?
    python benchmark/study.py --study psrl                 what do features learn from a flow?
    python benchmark/study.py --study skill                skills: four experiments, reuse
    python benchmark/study.py --study grasp2vec            objects by subtraction
    python benchmark/study.py --study pretext              what each pretext task keeps, and earns
    python benchmark/study.py --study cc_rig               goals imagined in this scene, or in any
    python benchmark/study.py --study stack                two frames at once: beyond chasing
    python benchmark/study.py --study rounds               short rollouts: fewer steps
    python benchmark/study.py --seeds 1 --distractors 0 2  a part of it
    python benchmark/study.py --dry-run --stage pretrain   its commands, one a line, for xargs -P,
    python benchmark/study.py --dry-run --stage ppo        GNU parallel or a Slurm array
    python benchmark/study.py --stage gather               only collect what has finished

Runs live in runs/study/. What has finished is gathered into benchmark/results/*.csv, which is
also what counts as finished: a run whose rows are there is not run again, even on a machine that
never saw its folder. An interrupted run starts over. Stop with Ctrl-C at any time.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "benchmark" / "results", Path("runs") / "study"
Study = Literal[
    "encoders",
    "single_task",
    "awac",
    "stitching",
    "curl",
    "rig",
    "skill",
    "grasp2vec",
    "pretext",
    "cc_rig",
    "psrl",
    "stack",
    "rounds",
]
Encoder = Literal[
    "oracle",
    "reward_prediction",
    "reward_prediction_finetune",
    "image_reconstruction",
    "image_reconstruction_finetune",
    "image_scratch",
    "cnn",
]
ENCODERS = get_args(Encoder)
KEYS = {  # table of results: the flags that tell its runs apart
    "rp_pretrain": ("objective", "distractors", "seed"),
    "ppo_encoder": ("encoder", "distractors", "seed", "total_steps"),
    "rp_single_task": ("tasks", "distractors", "seed"),
    "awac": ("algorithm", "lam", "seed", "total_steps"),
    "awac_narrow": ("algorithm", "mixture", "seed", "total_steps"),
    "awac_stitched": (
        "algorithm",
        "mixture",
        "switch_every",
        "episodes",
        "offline_updates",
        "seed",
        "total_steps",
    ),
    "curl": ("mode", "distractors", "seed"),
    "psrl": ("mode", "distractors", "seed"),
    "rig": ("task", "goals", "goal_fractions", "seed"),
    "skill": ("experiment", "embedding", "alpha2", "seed"),
    "grasp2vec": ("objective", "same_place", "jitter", "lam", "seed"),
    "cc_rig": ("context", "appearances", "seed"),
    "rig_scenes": ("distractors", "z_dim", "finetune_every", "total_steps", "seed"),
    "pretext": ("objective", "distractors", "seed"),
    "ppo_pretext": ("objective", "distractors", "seed", "total_steps"),
    "rp_stack": ("objective", "frame_stack", "distractors", "seed"),
    "ppo_stack": ("encoder", "frame_stack", "distractors", "seed", "total_steps"),
    "rp_stack_long": ("objective", "frame_stack", "updates", "distractors", "seed"),
    "ppo_stack_long": ("encoder", "frame_stack", "distractors", "seed", "total_steps"),
    "ppo_rounds": ("encoder", "rollout_steps", "minibatches", "distractors", "seed", "total_steps"),
}
OBJECTIVES = (  # of pretext.py
    "inverse",
    "forward",
    "forward_slow_target",
    "forward_inverse",
    "time_contrast",
    "shuffle",
    "temporal_disentanglement",
    "autoencoder",
    "beta_vae",
    "augmentation_contrast",
    "reward_prediction",
    "none",
)
LAM, LAMS = 0.03, (0.1, 0.3, 1, 3, 10)  # λ of awac.py: its default, and others
LAM_NORMS = 0.0005  # λ of grasp2vec.py: its default
SCRIPTS = {
    "rp_single_task": "rp_pretrain",
    "awac_narrow": "awac",
    "awac_stitched": "awac",
    "rig": "rig_td3",
    "rig_scenes": "rig_td3",
    "skill": "skill_embedding",
    "ppo_pretext": "ppo_encoder",
    "rp_stack": "rp_pretrain",
    "ppo_stack": "ppo_encoder",
    "rp_stack_long": "rp_pretrain",
    "ppo_stack_long": "ppo_encoder",
    "ppo_rounds": "ppo_encoder",
}
RELABEL = {  # of rig_td3.py: shares of goals as practised, from the prior, from the future
    "mix": "0.2 0.4 0.4",
    "none": "1 0 0",
    "prior": "0.2 0.8 0",
    "future": "0.2 0 0.8",
}
SHORT = {"distractors": "d", "seed": "s", "total_steps": "n", "lam": "l"}


@dataclass(frozen=True)
class Args:
    study: Study = "encoders"  # which of the studies
    encoders: tuple[Encoder, ...] = ENCODERS  # which of the seven (study of encoders)
    distractors: tuple[Literal[0, 1, 2], ...] = (
        0,
        1,
        2,
    )  # how many (of encoders; of curl, psrl: 0, 2)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run each; some studies take three at most
    total_steps: int = 250_000  # environment steps of each PPO run
    jobs: int = os.cpu_count() or 1  # processes at a time, one thread each
    stage: Literal["all", "pretrain", "ppo", "gather"] = "all"  # what to do
    dry_run: bool = False  # print the commands instead


@dataclass(frozen=True)
class Job:
    """One run: the table that it goes to, the values of that table's KEYS, and the encoder that
    it waits for."""

    table: str
    key: tuple
    needs: Path | None = None

    @property
    def out(self):
        names = [SHORT.get(k, "") + str(v) for k, v in zip(KEYS[self.table], self.key)]
        return RUNS / self.table / "_".join(names).replace(" ", "_")

    @property
    def command(self):
        flags = ["--torch-threads", "1", "--overwrite", "--out", self.out.as_posix()]
        if self.table == "ppo_pretext":  # whose encoder: --encoder-path says so
            flags += ["--encoder", "pretrained"]
        for name, value in zip(KEYS[self.table], self.key):
            if (self.table, name) == ("ppo_pretext", "objective"):
                continue
            words = [] if value is True else str(value).split()
            flags += ["--" + name.replace("_", "-"), *words] if value is not False else []
        if self.needs:
            flags += ["--encoder-path", self.needs.as_posix()]
        return ["python", f"{SCRIPTS.get(self.table, self.table)}.py", *flags]


def plan(args):
    """The jobs of a study, seed by seed: an early stop leaves whole seeds."""
    return globals()[f"plan_{args.study}"](args)


def plan_encoders(args):
    """Seven encoders, and the pretraining that four of them need."""
    jobs = []
    for seed, distractors in product(args.seeds, args.distractors):
        for encoder in args.encoders:
            needs, pretrained = None, encoder.removesuffix("_finetune")
            if pretrained in ("reward_prediction", "image_reconstruction"):
                pretraining = Job("rp_pretrain", (pretrained, distractors, seed))
                needs = pretraining.out / "encoder.pt"
                jobs += [pretraining] if pretraining not in jobs else []
            jobs.append(Job("ppo_encoder", (encoder, distractors, seed, args.total_steps), needs))
    return jobs


def plan_single_task(args):
    """Pretraining on one reward alone: what does the decoder that looks on still see?"""
    return [Job("rp_single_task", ("agent_x", distractors, 1)) for distractors in (0, 2)]


def plan_awac(args):
    """Five algorithms, offline and then online; other λ, offline only; narrow data."""
    algorithms = ("awac", "bc", "filtered_bc", "sac", "sac_from_buffer")
    keys = [(name, LAM, seed, 20_000) for seed in args.seeds for name in algorithms]
    keys += [("awac", lam, seed, 0) for seed in args.seeds for lam in LAMS]
    jobs = [Job("awac", key) for key in keys]
    narrow, pair = "0.2 0.8 0", ("awac", "sac_from_buffer")  # nobody acts at random
    keys = [(name, narrow, seed, 5_000) for seed in args.seeds for name in pair]
    return jobs + [Job("awac_narrow", key) for key in keys]


def plan_stitching(args):
    """Behaviours change within episodes, so that none is good from end to end: 200 such episodes,
    2,000 updates, then online; the same for 10,000 updates; and 60 episodes."""
    algorithms = ("awac", "bc", "filtered_bc", "sac_from_buffer")
    many, few = ("0.2 0.8 0", 4, 200), ("0.4 0.6 0", 4, 60)
    runs = ((many, 2_000, 20_000), (many, 10_000, 0), (few, 10_000, 0))
    keys = [(*data, updates, seed, n) for seed in args.seeds for data, updates, n in runs]
    return [Job("awac_stitched", (name, *key)) for key in keys for name in algorithms]


def plan_curl(args):
    """Six modes at 0 and 2 distractors."""
    modes = ("state", "pixel", "rad", "curl", "curl_unaugmented_sac", "contrastive_only")
    wanted = [d for d in (0, 2) if d in args.distractors]
    return [Job("curl", (m, d, seed)) for seed in args.seeds[:3] for d in wanted for m in modes]


def plan_psrl(args):
    """Soft actor critic alone, each part by itself, all of them, and with actions shuffled."""
    modes = ("rad", "aat", "cat", "correspondence", "full", "full_shuffled_actions")
    wanted = [d for d in (0, 2) if d in args.distractors]
    return [Job("psrl", (m, d, s)) for s in args.seeds[:3] for d in wanted for m in modes]


def plan_rig(args):
    """Imagined goals on both tasks; on reach, for three seeds, what else could be tried: true
    positions, the distance between pixels, other ways to relabel; true positions on push."""
    some = args.seeds[:3]
    keys = [("reach", "latent", "mix", seed) for seed in args.seeds]
    keys += [("push", "latent", "mix", seed) for seed in some]
    for seed in some:
        keys += [("reach", "latent", how, seed) for how in ("none", "prior", "future")]
        keys += [("reach", goals, "mix", seed) for goals in ("pixel", "oracle")]
    keys += [("push", "oracle", "mix", seed) for seed in some]
    return [Job("rig", (task, goals, RELABEL[how], seed)) for task, goals, how, seed in keys]


def plan_skill(args):
    """What skills are learnt, and, for three seeds, what they are worth on new tasks, beside a
    policy steered by one-hot codes and skills that nobody asked to be told apart (α₂ = 0)."""
    kinds = [("library", "gaussian", 0.2), ("generality", "gaussian", 0.2)]
    kinds += [("versatility", name, 0.5) for name in ("gaussian", "bernoulli")]
    kinds += [("transfer", "gaussian", alpha2) for alpha2 in (0.2, 0.0)]
    kinds += [("transfer", "one_hot", 0.0)]
    jobs = [Job("skill", (*kind, seed)) for seed in args.seeds[:3] for kind in kinds]
    return jobs + [Job("skill", (*kinds[0], seed)) for seed in args.seeds[3:]]


def plan_grasp2vec(args):
    """Subtraction and, for three seeds, reconstruction; outcomes that lie where the object was;
    scenes that do not move; norms that cost nothing."""
    keys = [("grasp2vec", False, 2, LAM_NORMS, seed) for seed in args.seeds]
    for seed in args.seeds[:3]:
        keys += [("reconstruction", False, 2, LAM_NORMS, seed)]
        keys += [("grasp2vec", True, 2, LAM_NORMS, seed), ("grasp2vec", False, 0, LAM_NORMS, seed)]
        keys += [("grasp2vec", False, 2, 0.0, seed)]
    return [Job("grasp2vec", key) for key in keys]


def plan_cc_rig(args):
    """With the first frame and without it, in ever new scenes, in four, in one; and rig_td3.py
    among the same sprites, with a z of the same size and with one that has room for them all."""
    variants = list(product(("all", "4", "1"), ("frame", "none")))
    jobs = []
    for seed in args.seeds[:3]:
        jobs += [Job("cc_rig", (context, scenes, seed)) for scenes, context in variants]
        jobs += [Job("rig_scenes", (2, z_dim, 0, 8_000, seed)) for z_dim in (4, 16)]
    return jobs


def plan_pretext(args):
    """Twelve ways to make an encoder at 2 and 0 distractors and, for three seeds, PPO on each."""
    jobs, wanted = [], [d for d in (2, 0) if d in args.distractors]
    for seed in args.seeds:
        pretraining = [Job("pretext", (o, d, seed)) for d, o in product(wanted, OBJECTIVES)]
        jobs += pretraining
        for job in pretraining if seed in args.seeds[:3] else []:
            jobs.append(Job("ppo_pretext", (*job.key, args.total_steps), job.out / "encoder.pt"))
    return jobs


def plan_stack(args):
    """Two frames at once, which show velocities, take an image policy beyond chasing; with two
    distractors, pretraining for three times as long, too."""
    jobs, frozen = [], "reward_prediction"
    for seed, distractors in product(args.seeds[:3], [d for d in (0, 2) if d in args.distractors]):
        jobs.append(Job("ppo_stack", ("image_scratch", 2, distractors, seed, args.total_steps)))
        short = Job("rp_stack", (frozen, 2, distractors, seed))
        pairs = [(short, "ppo_stack")]
        if distractors:
            long = Job("rp_stack_long", (frozen, 2, 24_000, distractors, seed))
            pairs.append((long, "ppo_stack_long"))
        for pretraining, table in pairs:
            jobs.append(pretraining)
            for encoder in (frozen, frozen + "_finetune"):
                key = (encoder, 2, distractors, seed, args.total_steps)
                jobs.append(Job(table, key, pretraining.out / "encoder.pt"))
    return jobs


def plan_rounds(args):
    """A round of learning after 8 steps of each environment instead of 40."""
    keys = [("oracle", 8, 8, 2, seed, 40_000) for seed in args.seeds]
    keys += [("oracle", 40, 32, 2, seed, 40_000) for seed in args.seeds]
    keys += [("image_scratch", 8, 8, 2, seed, args.total_steps) for seed in args.seeds[:3]]
    return [Job("ppo_rounds", key) for key in keys]


def read(path):
    """The rows of a CSV file as dicts of text; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file, restkey="too many", strict=True)
        rows = list(reader)
    if not rows or any("too many" in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is not a table")
    return rows


def write(path, rows):
    """Sorted, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(f"unfinished_{os.getpid()}_{path.name}")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def finished(table):
    """Keys of the runs whose results have been gathered, as tuples of text."""
    rows = read(RESULTS / f"{table}_final.csv")
    return {tuple(row[name] for name in KEYS[table]) for row in rows}


def gather(jobs):
    """Add the jobs that have finished since to the two files of their table: the curves
    (`<table>.csv`) and the last numbers (`<table>_final.csv`)."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for table in {job.table for job in jobs}:
        names = KEYS[table]
        curves, finals = read(RESULTS / f"{table}.csv"), read(RESULTS / f"{table}_final.csv")
        have = finished(table)
        for job in jobs:
            key = tuple(map(str, job.key))
            if job.table != table or key in have or not (job.out / "summary.json").exists():
                continue
            try:
                summary = json.loads((job.out / "summary.json").read_text())
                commit = json.loads((job.out / "args.json").read_text())["git_commit"] or ""
                rows = read(job.out / "curve.csv")
                rows[-1]["step"] = summary.get("steps", rows[-1]["step"])  # taken, not asked for
            except (OSError, ValueError, LookupError) as error:
                print(f"left out: {job.out} is not as a finished run leaves it ({error})")
                continue
            finals.append(dict(zip(names, key)) | short(summary) | {"git_commit": commit[:9]})
            # an earlier gathering may have been interrupted between the two files
            curves = [row for row in curves if tuple(row[name] for name in names) != key]
            curves += [dict(zip(names, key)) | short(row) for row in rows]
        order = lambda row, names=names: tuple(row[name].zfill(9) for name in names)  # noqa: E731
        for name, rows in ((f"{table}.csv", curves), (f"{table}_final.csv", finals)):
            if rows:  # sorted() is stable: the steps of a run keep their order
                write(RESULTS / name, sorted(rows, key=order))


def short(row):
    """Numbers to five significant digits: small files that diff well. What is nested becomes
    columns: {"probe_r2": {"agent": 1}} is probe_r2_agent."""
    flat = {}
    for name, value in row.items():
        nested = value.items() if isinstance(value, dict) else [(None, value)]
        flat |= {f"{name}_{key}" if key else name: v for key, v in nested}
    flat = {name: "" if value is None else value for name, value in flat.items()}
    return {k: f"{float(v):.5g}" if "." in str(v) else str(v) for k, v in flat.items()}


def run(jobs, parallel):
    """Run the jobs, `parallel` at a time; a job waits for the encoder that it needs."""
    waiting, running, failed, start, total = list(jobs), {}, [], time.time(), len(jobs)
    shown = None
    try:
        while waiting or running:
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        failed.append(job)
                        print(f"\nfailed: {' '.join(job.command)}; see {job.out}/log.txt")
                    gather(jobs)
            ready = (j for j in waiting if not j.needs or (ROOT / j.needs).exists())
            job = next(ready, None) if len(running) < parallel else None
            if job:
                waiting.remove(job)
                (ROOT / job.out).mkdir(parents=True, exist_ok=True)
                with open(ROOT / job.out / "log.txt", "w") as log:
                    command = [sys.executable, *job.command[1:]]
                    running[job] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
                continue
            if waiting and not running:
                print(f"\n{len(waiting)} runs lack an encoder (failed, or not planned)")
                failed += waiting
                break
            count = total - len(waiting) - len(running)
            if count != shown:
                shown = count
                names = ", ".join(job.out.name for job in running)
                left = (time.time() - start) / max(count, 1) * (total - count) / 60
                print(f"{count}/{total}  running {names}  {left:.0f} min left", flush=True)
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        gather(jobs)
    return failed


def main(args):
    """Plan, skip what is finished, then print or run."""
    if args.jobs < 1 or args.total_steps < 1 or not args.seeds or min(args.seeds) < 0:
        raise SystemExit("error: --jobs and --total-steps are at least 1, --seeds 0 or more")
    os.chdir(ROOT)
    jobs = plan(args)
    gather(jobs)
    left = [job for job in jobs if tuple(map(str, job.key)) not in finished(job.table)]
    needed = {job.needs for job in left}
    for job in jobs:  # finished elsewhere, but the encoder is not on this machine
        path = job.out / "encoder.pt"
        left += [job] if job not in left and path in needed and not path.exists() else []
    if args.stage != "all":
        tables = {"pretrain": ("rp_pretrain", "pretext", "rp_stack", "rp_stack_long")}
        tables["ppo"] = ("ppo_encoder", "ppo_pretext", "ppo_stack", "ppo_stack_long")
        left = [job for job in left if job.table in tables.get(args.stage, ())]
    if args.dry_run:
        print("\n".join(" ".join(job.command) for job in left))
    elif args.stage != "gather" and run(left, args.jobs):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: ends its runs, too
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")
    except (OSError, ValueError, LookupError, csv.Error) as error:  # results that are no tables
        sys.exit(f"error: {' '.join(str(error).split())[:200]}")
