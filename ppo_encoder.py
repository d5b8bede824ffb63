"""Proximal policy optimisation (PPO) on Sprites, seen through seven encoders.

What
    An agent learns to follow a target among distractors. What it sees decides how well: the true
    states, images through a network trained from scratch, or images through an encoder pretrained
    by rp_pretrain.py to predict rewards or to reconstruct images, frozen or trained on.
    Everything else - heads, losses, settings, budget - is the same for all seven.

Paper
    Schulman, Wolski, Dhariwal, Radford & Klimov, "Proximal Policy Optimization Algorithms", 2017,
    arXiv 1707.06347; advantages: Schulman et al. 2015, arXiv 1506.02438. The comparison of
    encoders: Jain, Lee & Pertsch, "Reward-Induced Representation Learning", and Yamada et al.,
    "Task-Induced Representation Learning", ICLR 2022, arXiv 2204.11827.

Equations
    (1)  Âₜ = δₜ + γλ (1 − endedₜ) Âₜ₊₁,   δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ)
    (2)  maximise  E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)],   ρ = π(a|s) / π_old(a|s)
    (3)  minimise  E[(V(s) − (Â + V_old(s)))²]

Notation
    N environments, T steps of a rollout, B minibatch, Z size of the representation z, A action,
    M = N T samples of the calibration, D dimensions of whatever is standardised.

Differs from the paper
    1. γ = 0.2 instead of 0.95-0.99. Chasing is a greedy business: the next reward tells all.
       Looking further only adds noise to the advantages, which pixels pay for most.
    2. Learning rate 4e-3, 32 minibatches, 4 epochs instead of 3e-4 and 10 epochs: the convolutions
       need many and large steps. 250,000 environment steps instead of 2 to 5 million.
    3. z and the returns are standardised by constants measured in a first, random rollout, so
       that critic, actor and encoder start on one scale, whatever the encoder.
    4. Orthogonal initialisation everywhere, no batch normalisation (it makes the ratio differ
       from 1 before any learning), two hidden layers of 64 units in actor and critic, not 32.
    5. The 40-step limit truncates: it ends the advantage's trace, not the bootstrap.
    6. All seven get one frame and the same settings, chosen for image_scratch and oracle.

Run
    python ppo_encoder.py --encoder reward_prediction
    python ppo_encoder.py --encoder image_scratch --distractors 0

Writes
    to runs/ppo_encoder/<encoder>[_repel]_d<distractors>_s<seed>/: args.json, curve.csv, curve.png,
    rollout.gif (four episodes), checkpoint.pt (at every report) and summary.json with
    `eval_return_mean`, `eval_return_std` (over episodes), `eval_episodes`, `score` (0 random, 1
    chasing with known velocity), `steps` and `minutes`.

Result
    Returns with 0, 1 and 2 distractors, mean ± sd over seeds 1-5, of
    python benchmark/study.py (random 28.2, chasing 37.95, with velocity 38.9):

        oracle                         38.84 ± 0.01    38.84 ± 0.00    38.83 ± 0.00
        reward_prediction_finetune     37.89 ± 0.06    37.57 ± 0.09    37.50 ± 0.10
        reward_prediction              37.68 ± 0.12    37.33 ± 0.15    37.26 ± 0.09
        image_scratch                  37.65 ± 0.09    36.31 ± 0.31    35.95 ± 0.30
        cnn                            37.64 ± 0.09    36.88 ± 0.18    36.30 ± 0.17
        image_reconstruction_finetune  37.68 ± 0.08    36.66 ± 0.78    36.10 ± 0.71
        image_reconstruction           34.29 ± 2.32    29.63 ± 0.17    28.66 ± 0.21

    On one thread: seconds (oracle), half a minute (frozen), two to four minutes (the others).

Try
    1. --encoder oracle --gamma 0.95 --out runs/a, image_scratch in runs/b: who needs the future?
    2. --task repel: does an encoder that was pretrained for positions serve another task?
    3. Delete the line with `orthogonal_` in `Encoder`, run --encoder image_scratch --out runs/init.
"""

import csv
import ctypes
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn

import sprites_env

Input = Literal[
    "oracle",  # the objects' states
    "cnn",  # a small convolutional network, from scratch
    "image_scratch",  # the encoder of rp_pretrain.py, from scratch
    "image_reconstruction",  # the same, pretrained to reconstruct images, frozen
    "image_reconstruction_finetune",  # the same, trained on
    "reward_prediction",  # the same, pretrained to predict rewards, frozen
    "reward_prediction_finetune",  # the same, trained on
]


@dataclass(frozen=True)
class Args:
    encoder: Input = "reward_prediction"  # true states, or images through this encoder
    distractors: Literal[0, 1, 2] = 1  # triangles in the frame
    task: Literal["follow", "repel"] = "follow"  # what the agent is paid for
    total_steps: int = 250_000  # environment steps, all environments together
    num_envs: int = 128  # environments in lockstep (N)
    rollout_steps: int = 40  # steps of each environment between two rounds of learning (T)
    epochs: int = 4  # passes over each rollout
    minibatches: int = 32  # gradient steps per pass
    learning_rate: float = 4e-3  # of Adam at the start; falls linearly to zero
    gamma: float = 0.2  # discount factor
    gae_lambda: float = 0.95  # decay of the advantage's trace
    clip: float = 0.2  # how far the probability ratio may move from 1
    value_coefficient: float = 1.0  # weight of the critic's loss
    max_grad_norm: float = 0.5  # clipping of the gradient's norm
    encoder_path: str | None = None  # an encoder.pt (default: of this seed, made if missing)
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 when several runs share a machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks --------------------------------------------------------------------------------


def strided_convolutions(channels, batch_norm=False):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), *norm, nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Six convolutions, 64 x 64 -> 1 x 1 pixel, and a linear map: an image becomes a vector z."""

    def __init__(self, z_dim=64, batch_norm=False):
        super().__init__()
        self.convolutions = strided_convolutions((1, 4, 8, 16, 32, 64, 128), batch_norm)
        self.to_z = nn.Linear(128, z_dim)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster

    def forward(self, frames):  # float (B, 1, 64, 64) in [0, 1]
        h = self.convolutions(frames)  # (B, 128, 1, 1)
        return self.to_z(h.flatten(1))  # (B, Z)


class Standardize(nn.Module):
    """(x - mean) / sd, with constants measured once, at the start."""

    def __init__(self, x):  # (M, D), or (M,) for a scalar
        super().__init__()
        sd = x.std(0)
        floor = 0.1 * sd.mean().item() or 1.0  # what hardly varied is not blown up
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("sd", sd.clamp(min=floor))

    def forward(self, x):
        return (x - self.mean) / self.sd

    def inverse(self, y):
        return y * self.sd + self.mean


def mlp(size_in, hidden, size_out):
    """A multilayer perceptron of three layers."""
    layers = [nn.Linear(size_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return orthogonal_(nn.Sequential(*layers, nn.Linear(hidden, size_out)))


def orthogonal_(module):
    """Orthogonal weights and zero biases. With PyTorch's default, the signal all but vanishes on
    its way through six stride-2 layers, and nothing is learnt for thousands of updates."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return module


class ActorCritic(nn.Module):
    """Two separate MLPs on the same standardised z; the policy's sd does not depend on z."""

    def __init__(self, encoder, z, returns, action_dim):  # z (M, Z) and returns (M,) to calibrate
        super().__init__()
        self.encoder = encoder
        self.standardize, self.return_scale = Standardize(z), Standardize(returns)
        self.actor, self.critic = mlp(z.shape[1], 64, action_dim), mlp(z.shape[1], 64, 1)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # start with actions around zero
        self.log_std = nn.Parameter(torch.full((action_dim,), -0.5))

    def features(self, x):  # (B, 1, 64, 64) in [0, 1], or states (B, 4 K)
        return self.standardize(self.encoder(x))  # (B, Z)

    def value(self, z):  # (B, Z)
        return self.return_scale.inverse(self.critic(z)[:, 0])  # (B,), in units of reward


# --- The algorithm: pure functions of tensors ------------------------------------------------


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def generalized_advantages(rewards, values, next_values, ended, gamma, lam):
    """Âₜ = δₜ + γλ (1 − endedₜ) Âₜ₊₁ with δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ), eq. (1).

    All (T, N). `next_values` are those of the state that followed, the last one of an episode
    included: a time limit ends the trace (`ended` 1), not the bootstrap."""
    delta = rewards + gamma * next_values - values
    advantages, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = delta[t] + gamma * lam * (1 - ended[t]) * following
        advantages[t] = following
    return advantages


def clipped_objective(log_prob, old_log_prob, advantage, clip):
    """E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)] with ρ = π(a|s) / π_old(a|s), eq. (2); maximise.

    All (B,) -> scalar; old_log_prob and advantage carry no gradient."""
    assert log_prob.shape == old_log_prob.shape == advantage.shape
    ratio = (log_prob - old_log_prob).exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value, target):
    """E[(V(s) − target)²], eq. (3). Both (B,), in units of the calibrated return's sd."""
    assert value.shape == target.shape
    return (value - target).square().mean()


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One PPO run; returns the content of summary.json."""
    check(args, "total_steps num_envs rollout_steps epochs minibatches learning_rate clip")
    check(args, "value_coefficient max_grad_norm eval_episodes")
    N, T = args.num_envs, args.rollout_steps
    iterations = args.total_steps // (N * T) - 1  # the first rollout is the calibration
    if not (0 <= args.gamma < 1 and 0 <= args.gae_lambda <= 1):
        raise SystemExit("error: --gamma must be in [0, 1) and --gae-lambda in [0, 1]")
    if iterations < 1:
        raise SystemExit(f"error: --total-steps must be at least two rollouts, {2 * N * T}")
    if N * T < 2 * args.minibatches:
        raise SystemExit(f"error: --minibatches must be at most half of a rollout, {N * T // 2}")
    images = args.encoder != "oracle"
    pretrained = args.encoder.startswith(("reward_prediction", "image_reconstruction"))
    frozen = not images or pretrained and not args.encoder.endswith("_finetune")
    if args.encoder_path:
        if not pretrained:
            raise SystemExit(f"error: --encoder-path is of no use to --encoder {args.encoder}")
        load_encoder(args.encoder_path, args.encoder, announce=False)  # or end before writing
    device = prepare(args)
    task = "_repel" * (args.task == "repel")
    out = open_run(args, f"{args.encoder}{task}_d{args.distractors}_s{args.seed}", device)

    def make_env(num_envs, render_mode=None):
        options = {"distractors": args.distractors, "task": args.task, "render_mode": render_mode}
        options["observation"] = "image" if images else "state"
        return sprites_env.SpritesVectorEnv(num_envs, **options)

    def to_input(obs):  # uint8 frames or float32 states, array or tensor
        return to_float(obs, device) if images else torch.as_tensor(obs, device=device)

    if not images:
        encoder = nn.Identity()
    elif args.encoder == "cnn":
        encoder = nn.Sequential(strided_convolutions((1, 16, 16, 16)), nn.Flatten())
        orthogonal_(encoder).to(memory_format=torch.channels_last)
    elif args.encoder == "image_scratch":
        encoder = Encoder()
    else:
        encoder = load_encoder(args.encoder_path or find_or_pretrain(args), args.encoder)
    encoder.to(device).eval()  # eval: batch normalisation, if any, keeps its pretraining statistics
    encoder.requires_grad_(not frozen)
    log, env = Log(out, (iterations + 1) * N * T), make_env(N)
    obs, _ = env.reset(seed=args.seed * 100_000)
    obs, z, returns = calibrate(env, obs, lambda obs: encoder(to_input(obs)), T, args)
    model = ActorCritic(encoder, z, returns, env.single_action_space.shape[0]).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=True)

    @torch.no_grad()
    def features(obs):  # (N, ...) -> (N, Z)
        return model.features(to_input(obs))

    def policy(obs):  # (N, ...) -> (N, A), without noise
        return model.actor(features(obs))

    def to_tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    episode_return, finished = np.zeros(N), []
    reports = {math.ceil(iterations * i / 20) for i in range(1, 21)}  # every 5 %
    for iteration in range(1, iterations + 1):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)

        # act
        rollout, z = [], features(obs)
        for _ in range(T):
            with torch.no_grad():
                mean, value = model.actor(z), model.value(z)
                action = mean + model.log_std.exp() * torch.randn_like(mean)
                log_prob = gaussian_log_prob(action, mean, model.log_std)
            next_obs, reward, terminated, truncated, info = env.step(action.cpu().numpy())
            ended = terminated | truncated
            successor = next_obs.copy()  # what followed: where an episode ended, its last frame
            if ended.any():
                successor[ended] = np.stack(info["final_obs"][ended])
            z_next = features(successor)
            with torch.no_grad():
                next_value = model.value(z_next) * to_tensor(~terminated)

            # store
            x = z if frozen else torch.as_tensor(obs, device=device)  # frozen: encoded only once
            row = x, action, log_prob, to_tensor(reward), value, next_value, to_tensor(ended)
            rollout.append(row)
            obs = next_obs
            z = features(obs) if ended.any() else z_next
            episode_return += reward
            finished += episode_return[ended].tolist()
            episode_return[ended] = 0
        columns = [torch.stack(column) for column in zip(*rollout)]  # each (T, N, ...)
        x, actions, old_log_probs, rewards, values, next_values, ended = columns
        advantages = generalized_advantages(
            rewards, values, next_values, ended, args.gamma, args.gae_lambda
        )
        targets = model.return_scale(advantages + values)
        batch = [c.flatten(0, 1) for c in (x, actions, old_log_probs, advantages, targets)]

        # learn
        for _ in range(args.epochs):
            for rows in torch.randperm(T * N, device=device).tensor_split(args.minibatches):
                x, action, old_log_prob, advantage, target = (c[rows] for c in batch)  # (B, ...)
                z = x if frozen else model.features(to_input(x))
                log_prob = gaussian_log_prob(action, model.actor(z), model.log_std)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                objective = clipped_objective(log_prob, old_log_prob, advantage, args.clip)
                critic_loss = value_loss(model.critic(z)[:, 0], target)
                loss = args.value_coefficient * critic_loss - objective
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()

        # report
        if iteration in reports:
            step = (iteration + 1) * N * T
            eval_returns = evaluate(policy, make_env(args.eval_episodes))
            ratio = (log_prob - old_log_prob).detach().exp()  # of the last minibatch
            log.report(
                step,
                eval_return=eval_returns.mean(),
                train_return=np.mean(finished[-N:]) if finished else float("nan"),
                action_sd=model.log_std.exp().mean().item(),
                value_loss=critic_loss.item(),
                kl=(ratio - 1 - ratio.log()).mean().item(),
                clip_fraction=((ratio - 1).abs() > args.clip).float().mean().item(),
            )
            saved = {"model": model.state_dict(), "encoder": args.encoder, "step": step}
            write_whole(out / "checkpoint.pt", lambda t, saved=saved: torch.save(saved, t))

    summary = {
        "eval_return_mean": eval_returns.mean(),
        "eval_return_std": eval_returns.std(),
        "eval_episodes": args.eval_episodes,
        "score": sprites_env.score(eval_returns.mean(), args.task),
        "steps": log.total,
        "minutes": round(log.minutes(), 2),
    }
    panels = [("return of a 40-step episode", ("train_return", "eval_return"))]
    levels = sprites_env.REFERENCE_RETURNS[args.task].items()
    plot_curve(out / "curve.png", log.rows, panels, "environment steps", levels)
    film = []
    evaluate(policy, make_env(4, "rgb_array"), film)
    save_gif(out / "rollout.gif", film)
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


@torch.no_grad()
def calibrate(env, obs, encode, steps, args):
    """A rollout of random actions, to measure how z and the discounted returns are distributed.

    Returns the observation it ends at, z (M, Z) and returns (M,)."""
    rng, z, rewards = np.random.default_rng(args.seed), [], []
    for _ in range(steps):
        z.append(encode(obs))
        obs, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        rewards.append(torch.as_tensor(reward, dtype=torch.float32, device=z[0].device))
    rewards = torch.stack(rewards)  # (T, N)
    # with V = 0 and lambda = 1 the advantage is the discounted return
    zeros, next_values = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_values[-1] = rewards.mean() / (1 - args.gamma)  # roughly the return from there on
    returns = generalized_advantages(rewards, zeros, next_values, zeros, args.gamma, 1)
    return obs, torch.cat(z), returns.flatten()


# --- Appendix: pretrained encoder, evaluation, run folder, log, pictures ---------------------


def find_or_pretrain(args):
    """The encoder.pt of this objective, number of distractors and seed; if there is none yet,
    rp_pretrain.py is run, as a program of its own, so that neither script imports the other."""
    objective = args.encoder.removesuffix("_finetune")
    folder = Path("runs") / "rp_pretrain" / f"{objective}_d{args.distractors}_s{args.seed}"
    if not (folder / "encoder.pt").exists():
        script = Path(__file__).with_name("rp_pretrain.py")
        if not script.exists():
            raise SystemExit(f"error: --encoder {args.encoder} needs {script}: copy it, too")
        print(f"{folder / 'encoder.pt'} is missing: running {script.name} first", flush=True)
        command = [sys.executable, str(script), "--objective", objective, "--out", str(folder)]
        for flag in ("distractors", "seed", "device", "torch_threads"):
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
        if subprocess.run(command).returncode:
            raise SystemExit("error: pretraining failed, see above")
    return folder / "encoder.pt"


def load_encoder(path, name, announce=True):
    """An encoder from a file that rp_pretrain.py wrote; its objective must be that of `name`."""
    try:
        saved = torch.load(path, map_location="cpu")
        if not name.startswith(saved["objective"]):
            raise ValueError(f"its objective was {saved['objective']}")
        encoder = Encoder(saved["z_dim"], saved["batch_norm"])
        encoder.load_state_dict(saved["encoder"])
    except Exception as error:  # missing, not a checkpoint, or of another architecture
        reason = " ".join(str(error).split())[:100]
        raise SystemExit(f"error: {path} is no file for --encoder {name}: {reason}") from None
    if announce:
        how = "distractors: {distractors}, updates: {update}".format(**saved)
        print(f"encoder: {path} ({how})", flush=True)
    return encoder


@torch.no_grad()
def evaluate(policy, env, film=None):
    """Returns (num_envs,) of one fresh episode per environment. `policy` maps observations to
    actions; a list as `film` collects what `env.render()` shows before each step."""
    obs, _ = env.reset(seed=10**9)
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    while running.any():
        if film is not None:
            film.append(env.render())
        obs, reward, terminated, truncated, _ = env.step(policy(obs).cpu().numpy())
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns


def save_gif(path, film):
    """film: a list of tuples of images uint8 (height, width, 3), shown side by side."""
    from PIL import Image

    rows = [np.concatenate([np.pad(i, ((3, 3), (3, 3), (0, 0))) for i in row], 1) for row in film]
    first, *rest = [Image.fromarray(row).quantize(16) for row in rows]
    settings = {"save_all": True, "append_images": rest, "loop": 0, "duration": 100}  # ms
    write_whole(path, lambda temporary: first.save(temporary, **settings))


def plot_curve(path, rows, panels, x_label, levels=(), offline=0):
    """A panel for each (y label, columns of curve.csv); dashed: levels (name, y); grey: offline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * max(1.2, len(panels)), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    axes[0].axvspan(0, offline, color="grey", alpha=0.15, lw=0)
    for name, y in levels:
        axes[0].axhline(y, color="grey", lw=0.8, ls="--", zorder=0)
        axes[0].annotate(name, (0, y), xycoords=("axes fraction", "data"), color="grey", size=8)
    for axis, (y_label, names) in zip(axes, panels):
        for name in names:
            values = [row[name] for row in rows]
            axis.plot([row["step"] for row in rows], values, label=name.replace("_", " "))
        axis.set(xlabel=x_label, ylabel=y_label, yscale="log" if "error" in y_label else "linear")
        axis.legend(fontsize=8)
    figure.suptitle(path.parent.name, fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100))


def to_float(frames, device):
    """uint8 (...), array or tensor -> float32 (...) in [0, 1] on the device."""
    return torch.as_tensor(frames, device=device).to(torch.float32, copy=True).div_(255)


def check(args, positive):
    """End with one line if one of these arguments is not above zero, or the seed is unusable."""
    for name in positive.split():
        if not getattr(args, name) > 0:
            flag = name.replace("_", "-")
            raise SystemExit(f"error: --{flag} must be positive, not {getattr(args, name)}")
    if not 0 <= args.seed < 10_000:  # evaluation and held-out data use seeds from 10**9 on
        raise SystemExit(f"error: --seed must be in 0 ... 9999, not {args.seed}")


def prepare(args):
    """Threads, seed and memory; returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but this PyTorch finds no CUDA device")
    if args.torch_threads > 0:
        torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    if platform.libc_ver()[0] == "glibc":
        # Large activations come and go with every update. By default glibc hands them back to
        # the system each time and maps them anew, page by page: up to half of the time.
        for option, value in ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 30)):
            ctypes.CDLL(None).mallopt(option, value)  # M_TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD
    cuda = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def open_run(args, name, device):
    """Make the run's folder and write args.json; a finished run is not overwritten unasked."""
    out = Path(args.out or Path("runs") / Path(__file__).stem / name)
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    facts = {"arguments": asdict(args), "git_commit": (commit or "").strip() or None}
    facts |= {module.__name__: module.__version__ for module in (np, torch, gymnasium)}
    facts |= {"python": platform.python_version(), "device": str(device)}
    facts |= {"threads": torch.get_num_threads()}
    try:
        if (out / "summary.json").exists() and not args.overwrite:
            raise SystemExit(f"error: {out} holds a finished run: use --overwrite, or --out FOLDER")
        out.mkdir(parents=True, exist_ok=True)
        for old in ("summary.json", "checkpoint.pt", "curve.csv"):
            (out / old).unlink(missing_ok=True)  # of an earlier run: not to be taken for this one's
        write_whole(out / "args.json", lambda t: t.write_text(json.dumps(facts, indent=1)))
    except OSError as error:
        raise SystemExit(f"error: cannot write to {out}: {error.strerror}") from None
    return out


def write_whole(path, save):
    """Write a file whole or not at all: `save` fills a temporary file, which is then renamed."""
    temporary = path.with_name("unfinished_" + path.name)
    save(temporary)
    temporary.replace(path)


class Log:
    """Appends a row to curve.csv and prints a line of progress at every report."""

    def __init__(self, out, total):
        self.path, self.total = out / "curve.csv", total
        self.start, self.rows = time.perf_counter(), []

    def minutes(self):
        return (time.perf_counter() - self.start) / 60

    def report(self, step, **metrics):
        seconds = 60 * self.minutes()
        row = {"step": step, "seconds": round(seconds, 2)}
        row |= {"steps_per_second": round(step / seconds, 1)} | metrics
        with open(self.path, "a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        left = seconds * (self.total / step - 1)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        line = f"{step:,}/{self.total:,}  {step / seconds:,.0f}/s  {left:.0f} s left  {shown}"
        live = sys.stdout.isatty()  # one line that changes, or else one line a report
        end = "" if live and step < self.total else "\n"
        print(f"\r\033[K{line}" if live else line, end=end, flush=True)


if __name__ == "__main__":
    try:
        train(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: curve.csv and checkpoint.pt hold what was reported, if anything")
