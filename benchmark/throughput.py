"""How fast is it, and what does the design buy? One command, some minutes, an idle machine.

    python benchmark/throughput.py
    python benchmark/throughput.py --only environment ppo

Prints tables and writes benchmark/results/throughput.json. Every figure is the median of
`--repeats` runs. Each PPO and pretraining measurement is a process of its own.
"""

import functools
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ENCODERS = (
    "oracle",
    "reward_prediction",
    "image_reconstruction",
    "reward_prediction_finetune",
    "image_reconstruction_finetune",
    "image_scratch",
    "cnn",
)


Part = Literal["environment", "ppo", "pretraining", "scaling", "ordinary"]
PARTS = ("environment", "ppo", "pretraining", "scaling", "ordinary")


@dataclass(frozen=True)
class Args:
    only: tuple[Part, ...] = PARTS  # what to measure; the rest of the file is kept
    repeats: int = 3  # runs per figure, of which the median is shown
    seconds: float = 0.5  # of each run of the environment's measurements
    part: str = ""  # internal: measure this one thing in this process and print it as JSON


def rate(f, seconds, per_call):
    """`per_call` things per second of calling f again and again."""
    f()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        f()
        calls += 1
    return calls * per_call / (time.perf_counter() - start)


def median(f, repeats):
    return float(np.median([f() for _ in range(repeats)]))


# --- 1. The environment ----------------------------------------------------------------------


def environment(args):
    """Frames (steps) per second, beside the memory's limit and gymnasium's SyncVectorEnv."""
    import gymnasium

    import sprites_env

    def stepping(env, n):
        env.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-1, 1, (n, 2))
        return median(lambda: rate(lambda: env.step(actions), args.seconds, n), args.repeats)

    rows = []
    for n in (1, 8, 64, 256, 1024):
        row = {"environments": n}
        for observation in ("image", "state"):
            for d in (0, 1, 2):
                env = sprites_env.SpritesVectorEnv(n, d, observation)
                row[f"{observation}, {d} distractors"] = stepping(env, n)

        def write(n=n):  # fresh memory, as an observation must be
            np.empty((n, 1, 64, 64), np.uint8).fill(255)

        row["writing the bytes alone"] = median(
            lambda f=write, n=n: rate(f, args.seconds, n), args.repeats
        )
        if n <= 256:
            sync = gymnasium.make_vec(
                "Sprites-v0", num_envs=n, distractors=1, vectorization_mode="sync"
            )
            row["SyncVectorEnv, image, 1 distractor"] = stepping(sync, n)
        rows.append(row)
    env = sprites_env.SpritesEnv(1)
    env.reset(seed=0)

    def single():
        if env.step((0.5, 0.5))[3]:
            env.reset()

    alone = median(lambda: rate(single, args.seconds, 1), args.repeats)
    return {"vector": rows, "one SpritesEnv, image, 1 distractor": alone}


# --- 2. PPO and 3. pretraining, through the scripts' own train() -----------------------------


class Clock:
    """Adds up the seconds spent in some functions, wrapped in place."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, owner, name, label):
        f = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = f(*args, **kwargs)
            spent = time.perf_counter() - start
            self.seconds[label] = self.seconds.get(label, 0) + spent
            return result

        setattr(owner, name, timed)


def one_ppo(encoder, threads, ordinary=False, envs=128):
    """Steps per second of train(), which evaluates on one episode here, and the shares of time."""
    import contextlib
    import io
    import tempfile

    import torch

    import ppo_encoder
    import rp_pretrain
    import sprites_env

    if ordinary:
        be_ordinary(ppo_encoder, torch)
    steps = {"oracle": 100_000, "reward_prediction": 60_000}.get(encoder, 26_000)
    steps = max(steps, 5 * envs * 40)  # the first rollout and the first report do not count
    clock = Clock()
    clock.wrap(sprites_env.SpritesVectorEnv, "step", "environment")
    clock.wrap(ppo_encoder.ActorCritic, "features", "forward, encoder")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(torch.optim.Adam, "step", "optimiser")
    clock.wrap(sprites_env, "evaluate", "evaluation")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = None
        if encoder.startswith(("reward_prediction", "image_reconstruction")):
            path = f"{folder}/encoder/encoder.pt"
            rp_pretrain.train(
                rp_pretrain.Args(
                    objective=encoder.removesuffix("_finetune"),
                    updates=2,
                    batch_size=2,
                    out=f"{folder}/encoder",
                )
            )
            clock.seconds.clear()
        summary = ppo_encoder.train(
            ppo_encoder.Args(
                encoder=encoder,
                encoder_path=path,
                total_steps=steps,
                num_envs=envs,
                eval_episodes=1,
                torch_threads=threads,
                out=f"{folder}/run",
            )
        )
        rows = (Path(folder) / "run" / "curve.csv").read_text().splitlines()
    first, last = (dict(zip(rows[0].split(","), r.split(","))) for r in (rows[1], rows[-1]))
    seconds = float(last["seconds"]) - float(first["seconds"])  # between two reports: warmed up
    taken = summary["steps"] - float(first["step"])
    whole = float(last["seconds"])
    shares = {k: round(v / whole, 3) for k, v in clock.seconds.items()}
    return {"steps_per_second": taken / seconds, "shares": shares}


def be_ordinary(script, torch):
    """The same work, written the ordinary way: contiguous convolutions, no word to malloc, float32
    rollouts, and a loop over single environments (gymnasium's SyncVectorEnv)."""
    import gymnasium

    import sprites_env

    class Sync(gymnasium.vector.SyncVectorEnv):
        def __init__(self, num_envs, **options):
            makers = [lambda: sprites_env.SpritesEnv(**options)] * num_envs
            mode = gymnasium.vector.AutoresetMode.SAME_STEP
            super().__init__(makers, autoreset_mode=mode)

        def reset(self, **options):
            obs, info = super().reset(**options)
            return as_float(obs), info

        def step(self, actions):
            obs, reward, terminated, truncated, info = super().step(actions)
            if "final_obs" in info:
                info["final_obs"] = as_float(np.stack(info["final_obs"]))
            return as_float(obs), reward, terminated, truncated, info

    def as_float(obs):
        return obs.astype(np.float32) / 255 if obs.dtype == np.uint8 else obs

    script.to_tensor = lambda array, device: torch.as_tensor(array).float()
    script.platform.libc_ver = lambda: ("", "")  # malloc stays as it is
    orthogonal = script.orthogonal_

    def orthogonal_(module, *args):
        return orthogonal(module, *args).to(memory_format=torch.contiguous_format)

    script.orthogonal_ = orthogonal_
    sprites_env.SpritesVectorEnv = Sync


def one_pretraining(objective, threads):
    """Updates per second of rp_pretrain.train() between its twenty evaluations."""
    import contextlib
    import io
    import tempfile

    import rp_pretrain

    stamps, sample_batch = [], rp_pretrain.sample_batch

    def stamped(*args):  # each update begins with it
        stamps.append(time.perf_counter())
        return sample_batch(*args)

    rp_pretrain.sample_batch = stamped

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        updates = 400
        args = rp_pretrain.Args(
            objective=objective, updates=updates, torch_threads=threads, out=folder
        )
        rp_pretrain.train(args)
    seconds = np.sort(np.diff(stamps[1:]))[:-20]  # the longest pauses are the evaluations
    return {"updates_per_second": 1 / seconds.mean()}


@functools.cache  # two tables may ask for the same
def in_a_process(repeats, *part):
    """The medians of `repeats` processes that measure `part`."""
    command = [sys.executable, __file__, "--part", json.dumps(part)]
    results = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    key = next(k for k in results[0] if k.endswith("per_second"))
    return sorted(results, key=lambda r: r[key])[len(results) // 2]


# --- The report ------------------------------------------------------------------------------


def table(rows):
    """Rows of dicts as aligned text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = [columns] + [
        [
            f"{v:,.{2 * (v < 1)}f}" if isinstance(v := row.get(c, ""), float) else str(v)
            for c in columns
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in text)


def main(args):
    """Measure everything, print it, write it."""
    if args.part:
        name, *options = json.loads(args.part)
        print(json.dumps({"ppo": one_ppo, "pretraining": one_pretraining}[name](*options)))
        return
    import gymnasium
    import torch

    path = ROOT / "benchmark" / "results" / "throughput.json"
    result = json.loads(path.read_text()) if path.exists() else {}

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")

    cpu = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():  # Linux: the model's name
        names = [line for line in facts.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    result["machine"] = {"cpu": cpu, "cores": os.cpu_count(), "platform": platform.platform()}
    result["versions"] = {m.__name__: m.__version__ for m in (np, torch, gymnasium)}

    if "environment" in args.only:
        result["environment"] = environment(args)
        print("Environment, steps per second, one thread")
        print(table(result["environment"]["vector"]))
        alone = result["environment"]["one SpritesEnv, image, 1 distractor"]
        print(f"one SpritesEnv, image, 1 distractor: {alone:,.0f}\n")
        save()

    if "ppo" in args.only:
        result["ppo"] = []
        for encoder in ENCODERS:
            row = {"encoder": encoder}
            for threads in (1, 2):
                measured = in_a_process(args.repeats, "ppo", encoder, threads)
                row[f"steps/s, threads {threads}"] = measured["steps_per_second"]
            shares = {f"share {k}": v for k, v in measured["shares"].items()}
            result["ppo"].append(row | shares)
        print("PPO (shares of the time with 2 threads)")
        print(table(result["ppo"]), "\n")
        save()

    if "pretraining" in args.only:
        result["pretraining"] = [
            {"objective": objective, "threads": threads}
            | in_a_process(args.repeats, "pretraining", objective, threads)
            for objective in ("reward_prediction", "image_reconstruction")
            for threads in (1, 2)
        ]
        print("Pretraining")
        print(table(result["pretraining"]), "\n")
        save()

    if "scaling" in args.only:
        result["scaling"] = []
        for envs in (32, 64, 128, 256):
            row = {"environments": envs}
            for encoder in ("oracle", "reward_prediction", "image_scratch"):
                part = ("ppo", encoder, 2) + (False, envs) * (envs != 128)
                row[encoder] = in_a_process(args.repeats, *part)["steps_per_second"]
            result["scaling"].append(row)
        print("PPO steps per second against the number of environments, 2 threads")
        print(table(result["scaling"]), "\n")
        save()

    if "ordinary" in args.only:
        result["ordinary"] = []
        for encoder in ("oracle", "image_scratch", "cnn"):
            row = {"encoder": encoder}
            for name, ordinary in (("ours", False), ("ordinary", True)):
                part = ("ppo", encoder, 2) + (True,) * ordinary
                row[name] = in_a_process(args.repeats, *part)["steps_per_second"]
            row["ratio"] = f"{row['ours'] / row['ordinary']:.1f}"
            result["ordinary"].append(row)
        print("The same work, written the ordinary way, 2 threads")
        print(table(result["ordinary"]))
        save()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
