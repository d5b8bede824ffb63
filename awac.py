"""Advantage weighted actor critic (AWAC): learn from mixed offline data, then go on online.

What
    A dataset of episodes, few of them good, teaches a critic; the critic's advantages say which of
    the logged actions to imitate. The policy never climbs the critic where nobody has acted, and
    the same update goes on when online episodes join the data.
    Baselines in the same loop: plain cloning, cloning of the best episodes, soft actor critic.

Paper
    Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline
    Datasets", 2020, arXiv 2006.09359. Baseline: Haarnoja et al., "Soft Actor-Critic", 2018,
    arXiv 1801.01290.

Equations
    (1)  maximise over π  E_π[A(s,a)]  subject to  KL(π ‖ π_β) ≤ ε,  ∫ π(a|s) da = 1
    (2)  L = E_π[A] + λ (ε − E_π[log π − log π_β]) + ν (1 − ∫ π)
         ∂L/∂π = A − λ (log π − log π_β) − λ − ν = 0   ⇒   π*(a|s) ∝ π_β(a|s) exp(+A(s,a)/λ)
    (3)  θ ← argmin E[KL(π* ‖ π_θ)] ≈ argmax E_𝒟[exp(A/λ) log π_θ(a|s)],   A = Q(s,a) − V(s)
    (4)  φ ← argmin E_𝒟[(Q(s,a) − y)²],   y = r + γ (1 − terminated) min Q̄(s',a'),   a' ~ π_θ
    (5)  soft actor critic: min Q̄ − α log π_θ(a'|s') in (4); θ ← argmin E[α log π_θ(a|s) − Q(s,a)]

    The sign in (2): the constraint's derivative is −λ (log π − log π_β), so better actions get
    more weight; with those terms flipped, as in some notes, exp(−A/λ) imitates the worst. λ → ∞ is
    cloning, λ → 0 greed. (3) is the forward direction of KL: it covers π*, and needs actions of the
    data 𝒟 only; as in the paper, ≈ drops π*'s Z(s).

Notation
    N environments, T steps of an episode, B batch, M transitions, D size of an observation,
    A (in shapes) size of an action, K objects in the frame.

Differs from the paper
    1. λ = 0.03 instead of 0.3 to 2: the scale of advantages decides, and here their standard
       deviation is 0.10 to 0.16. Batches of 256, two hidden layers of 128, learning rate 1e-3,
       10,000 offline updates instead of 1,024, 256, 3e-4, 25,000: minutes a run, not hours.
    2. γ = 0.9 instead of 0.99: episodes have 40 steps, and what an action is worth shows in few.
    3. Weights are clipped at 100; the authors' softmax over the batch is --weighting softmax.
    4. No weight decay. States are standardised with mean and standard deviation of states of the
       dataset (also for --algorithm sac, which sees nothing else of it).
    5. Soft actor critic has the same policy class (no squashing, one σ for all states) and a fixed
       α, so that the objectives differ and nothing else. Actions are clipped to the box before
       environment and critic see them.
    6. --observation image runs, for hours: about 3 updates a second, 330 MB of frames.

Run
    python awac.py
    python awac.py --algorithm sac_from_buffer
    python awac.py --temperature 10 --out runs/cloning

Writes
    to runs/awac/<algorithm>[_image]_d<distractors>_s<seed>/: args.json, curve.csv, curve.png,
    rollout.gif, checkpoint.pt (at every report) and summary.json with `updates`, `minutes`,
    `eval_return_mean`, `eval_return_std`, `eval_episodes`, `score` (0 random, 1 chasing with known
    velocity), and on the scale 100 (return − random) / (the data's expert − random):
    `offline_score` (before the first online step), `online_score` (at the end), `worst_online_dip`
    (from `offline_score` down to the worst evaluation of the first 2,000 online steps) and
    `bc_score` (of cloning).

Result
    Score after the offline phase, worst dip in the first 2,000 online steps (negative: no dip), and
    score at the end; mean ± sd over seeds 1-5 of python benchmark/study.py --study awac:

        awac             95.5 ± 1.3     1.2 ± 1.9      98.9 ± 0.6
        sac_from_buffer  96.5 ± 0.3     -2.2 ± 0.6     105.5 ± 0.5
        sac              -              -              95.6 ± 0.4
        filtered_bc      100.0 ± 0.2    -              -
        bc               11.1 ± 5.2     -              -

    AWAC took 3.4 minutes (median), cloning 0.3, on one thread of a busy AMD EPYC.
    README.md has the temperatures, narrower data, and what to make of soft actor critic.

Try
    1. --temperature 10 --out runs/warm: what happens to `sample_size`, and to the return?
    2. --mixture 0.2 0.8 0, all algorithms, an --out each: who needs to see what does not work?
    3. Flip the sign in `awac_weights`, predict the return, and run it with --out runs/flipped.
"""

import copy
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

Algorithm = Literal[
    "awac",  # cloning, weighted with exp(A/λ)
    "bc",  # behaviour cloning: all weights 1; offline only
    "filtered_bc",  # cloning of the tenth of the episodes with the highest returns; offline only
    "sac",  # soft actor critic, online only, from an empty buffer
    "sac_from_buffer",  # soft actor critic on the dataset, then online
]
CLONING = ("bc", "filtered_bc")


@dataclass(frozen=True)
class Args:
    algorithm: Algorithm = "awac"  # what to do with the data
    temperature: float = 0.03  # λ, in units of the advantage: small is greedy, large is cloning
    weighting: Literal["exp", "softmax"] = "exp"  # exp(A/λ), at most 100; or B softmax(A/λ)
    value_estimate: Literal["mean", "sample"] = "mean"  # V(s): Q at the mean action, or at a sample
    mixture: tuple[float, float, float] = (0.2, 0.4, 0.4)  # expert, follows a distractor, random
    episodes: int = 500  # of the dataset, 40 transitions each
    dataset: str | None = None  # an .npz of transitions to use instead (see `load_dataset`)
    save_dataset: str | None = None  # write the dataset to this .npz
    observation: Literal["state", "image"] = "state"  # what policy and critic see
    distractors: Literal[0, 1, 2] = 1  # other sprites; the second kind of behaviour follows one
    offline_updates: int = 10_000  # gradient steps before the first online step
    total_steps: int = 20_000  # online environment steps, rounded down to rounds of 40 num_envs
    num_envs: int = 25  # episodes of a round, after which come as many updates as it had steps
    batch_size: int = 256  # transitions per update (B)
    learning_rate: float = 1e-3  # of Adam, for policy and critic
    gamma: float = 0.9  # discount factor
    tau: float = 0.005  # how fast the target critic follows
    entropy_weight: float = 0.01  # α of soft actor critic
    hidden: int = 128  # units of each of the two hidden layers of policy and critic
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of data, networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain nothing from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks --------------------------------------------------------------------------------


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(MLP), σ²): the mean cannot leave the box, and the density is not squashed,
    so that logged actions on the box's edge keep a finite likelihood. One σ for all states."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features, self.mlp = features, mlp(size_in, hidden, action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs):  # (B, D) -> mean (B, A), log_std (A,)
        return self.mlp(self.features(obs)).tanh(), self.log_std


class TwinCritic(nn.Module):
    """Two Q functions; the smaller one is believed."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(mlp(size_in + action_dim, hidden, 1) for _ in range(2))

    def forward(self, obs, action):  # (B, D), (B, A) -> (2, B)
        x = torch.cat([self.features(obs), action], dim=-1)
        return torch.cat([head(x) for head in self.heads], dim=-1).T


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


# --- The algorithm: pure functions of tensors ------------------------------------------------


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) V(s'), eq. (4). All (B,), called without gradient. A time limit
    is not in here: an episode that was cut off goes on, as far as values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(s,a) − y)²], eq. (4). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def awac_weights(advantage, temperature, weighting="exp"):
    """w = exp(A(s,a) / λ), at most 100; or B softmax(A / λ), whose mean is 1; eq. (3).

    A = Q(s,a) − V(s). (B,) -> (B,), without gradient: the weights are not what is fitted."""
    assert advantage.ndim == 1
    exponent = (advantage / temperature).detach()
    if weighting == "softmax":
        return len(exponent) * exponent.softmax(0)
    return exponent.exp().clamp(max=100)


def weighted_cloning_loss(log_prob, weights):
    """−E_𝒟[w log π(a|s)], eq. (3): a mean over the batch. Both (B,) -> scalar."""
    assert log_prob.shape == weights.shape
    return -(weights * log_prob).mean()


def soft_actor_loss(q, log_prob, entropy_weight):
    """E[α log π(a|s) − Q(s,a)], eq. (5), for a ~ π(·|s), reparametrised. Both (B,) -> scalar."""
    assert q.shape == log_prob.shape
    return (entropy_weight * log_prob - q).mean()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the target network follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Data ------------------------------------------------------------------------------------

BEHAVIOURS = (  # in the order of --mixture; (rng, states (N, K, 4)) -> actions (N, 2)
    sprites_env.CONTROLLERS["chase"],
    lambda rng, states: sprites_env.toward(states, states[:, 2, :2]),  # the first distractor
    sprites_env.CONTROLLERS["random"],
)
COLUMNS = (
    "observations",  # float32 (M, D) or uint8 (M, 1, 64, 64)
    "actions",  # float32 (M, A), what the environment executed
    "rewards",  # float32 (M,)
    "next_observations",  # like observations; where an episode ended, its last one
    "terminated",  # bool (M,): the episode ended in a final state, worth nothing from there on
    "truncated",  # bool (M,): the episode was cut off; filtered_bc needs whole ones, in order
)


def collect_dataset(env, mixture, seed):
    """One episode of each environment, a share mixture[i] of them controlled by BEHAVIOURS[i].

    Returns COLUMNS; the transitions of an episode follow each other."""
    if min(mixture) < 0 or not abs(sum(mixture) - 1) < 1e-6:
        raise SystemExit("error: --mixture must be three shares that add up to 1")
    if mixture[1] and not env.distractors:
        raise SystemExit("error: with --distractors 0 nobody can follow one: see --mixture")
    bounds = np.rint(env.num_envs * np.cumsum(mixture[:-1])).astype(int)
    rng, rollout, ended = np.random.default_rng(seed), [], np.zeros(env.num_envs, bool)
    obs, _ = env.reset(seed=seed)
    while not ended.any():  # in lockstep: all end together
        parts = zip(BEHAVIOURS, np.split(env.states, bounds))
        actions = np.concatenate([behave(rng, states) for behave, states in parts if len(states)])
        next_obs, reward, terminated, truncated, info = env.step(actions)
        ended = terminated | truncated
        successor = info["final_obs"] if ended.any() else next_obs
        rollout.append((obs, actions, reward, successor, terminated, truncated))
        obs = next_obs
    columns = [np.stack(column, axis=1) for column in zip(*rollout)]  # each (N, T, ...)
    columns = [column.reshape(-1, *column.shape[2:]) for column in columns]
    return {
        name: column.astype(np.float32) if column.dtype == np.float64 else column
        for name, column in zip(COLUMNS, columns)
    }


class Replay:
    """The dataset, followed by what is added online; nothing is ever dropped."""

    def __init__(self, data, room):
        self.size = len(data["rewards"])
        self.columns = {
            name: np.concatenate([column, np.zeros((room, *column.shape[1:]), column.dtype)])
            for name, column in data.items()
        }

    def add(self, *columns):  # in the order of COLUMNS, each (N, ...)
        new = slice(self.size, self.size + len(columns[0]))
        for name, column in zip(COLUMNS, columns):
            self.columns[name][new] = column
        self.size = new.stop

    def sample(self, rng, batch):
        """B transitions: observations, actions, rewards, next_observations, terminated."""
        rows = rng.integers(self.size, size=batch)
        return [self.columns[name][rows] for name in COLUMNS[:5]]


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run, offline then online; returns the content of summary.json."""
    check(args, "temperature episodes num_envs batch_size learning_rate tau hidden eval_episodes")
    cloning, soft = args.algorithm in CLONING, args.algorithm.startswith("sac")
    images = args.observation == "image"

    def make_env(num_envs, render_mode=None):
        options = {"distractors": args.distractors, "observation": args.observation}
        return sprites_env.SpritesVectorEnv(num_envs, **options, render_mode=render_mode)

    env = make_env(args.num_envs)
    N, T = env.num_envs, env.horizon
    offline = 0 if args.algorithm == "sac" else args.offline_updates
    online = 0 if cloning else args.total_steps // (N * T) * N * T  # whole rounds
    if not (0 <= args.gamma < 1 and args.tau <= 1):
        raise SystemExit("error: --gamma must be in [0, 1) and --tau in (0, 1]")
    if args.offline_updates < 0 or 0 != args.total_steps < N * T or offline + online < 1:
        raise SystemExit(
            f"error: --offline-updates and --total-steps must be 0 or more, --total-steps at least"
            f" {N * T} (a round of episodes) or 0, and not both nothing for this algorithm"
        )
    if args.save_dataset and Path(args.save_dataset).exists() and not args.overwrite:
        raise SystemExit(f"error: {args.save_dataset} exists: use --overwrite, or another name")
    if args.dataset:
        data = load_dataset(args.dataset, env.single_observation_space, env.single_action_space)
    else:
        data = collect_dataset(make_env(args.episodes), args.mixture, args.seed * 100_000)
    if args.save_dataset:
        save_dataset(Path(args.save_dataset), data)
    device = prepare(args)
    name = args.algorithm + "_image" * images
    out = open_run(args, f"{name}_d{args.distractors}_s{args.seed}", device)

    def to_input(obs):  # uint8 frames or float32 states, array or tensor
        return to_float(obs, device) if images else to_tensor(obs)

    def to_tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    def make_features():
        """Standardised states, or the standardised output of a convolutional encoder."""
        encoder = (Encoder() if images else nn.Identity()).to(device)
        with torch.no_grad():
            z = encoder(to_input(data["observations"][:: len(data["observations"]) // 1000 + 1]))
        return nn.Sequential(encoder, Standardize(z)), z.shape[1], args.hidden, action_dim

    action_dim = env.single_action_space.shape[0]
    policy = GaussianPolicy(*make_features()).to(device)
    critic = TwinCritic(*make_features()).to(device)
    critic_target = copy.deepcopy(critic).requires_grad_(False)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.learning_rate, fused=True)

    if args.algorithm == "filtered_bc":
        data = best_episodes(data, 0.1)
    if args.algorithm == "sac":
        data = {name: column[:0] for name, column in data.items()}
    replay, rng = Replay(data, online), np.random.default_rng(args.seed)
    obs, _ = env.reset(seed=args.seed * 100_000 + 50_000)  # not the dataset's episodes

    def sampled(mean, log_std):  # a ~ π(·|s), differentiable in both
        return mean + log_std.exp() * torch.randn_like(mean)

    log, finished = Log(out, offline + online), []
    reports = {1} | {math.ceil(offline * i / 10) for i in range(1, 11)}
    reports |= {offline + i for i in range(500, online, 500)} | {offline + online}
    for update in range(1, offline + online + 1):
        # act and store: one episode in each environment, then as many updates as steps
        if update > offline and (update - offline - 1) % (N * T) == 0:
            episode_return = np.zeros(N)
            for _ in range(T):
                with torch.no_grad():
                    action = sampled(*policy(to_input(obs))).clamp(-1, 1).cpu().numpy()
                next_obs, reward, terminated, truncated, info = env.step(action)
                ended = terminated | truncated
                successor = next_obs.copy()  # what followed: where an episode ended, its last
                if ended.any():
                    successor[ended] = np.stack(info["final_obs"][ended])
                replay.add(obs, action, reward, successor, terminated, truncated)
                obs, episode_return = next_obs, episode_return + reward
            finished = episode_return.tolist()

        # learn
        s, a, r, s_next, terminated = replay.sample(rng, args.batch_size)
        s, s_next = to_input(s), to_input(s_next)
        a, r, terminated = to_tensor(a), to_tensor(r), to_tensor(terminated)
        if not cloning:  # evaluate the policy, eq. (4)
            with torch.no_grad():
                mean, log_std = policy(s_next)
                a_next = sampled(mean, log_std)
                next_value = critic_target(s_next, a_next.clamp(-1, 1)).amin(0)  # (B,)
                if soft:
                    next_value -= args.entropy_weight * gaussian_log_prob(a_next, mean, log_std)
                y = td_target(r, terminated, next_value, args.gamma)
            q = critic(s, a)  # (2, B)
            loss = critic_loss(q, y)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            polyak_(critic_target, critic, args.tau)

        mean, log_std = policy(s)  # improve it
        if soft:
            a_new = sampled(mean, log_std)
            log_prob = gaussian_log_prob(a_new, mean, log_std)
            q_new = critic(s, a_new.clamp(-1, 1)).amin(0)
            policy_loss = soft_actor_loss(q_new, log_prob, args.entropy_weight)
        else:
            weights = torch.ones_like(r)
            if not cloning:  # eq. (3)
                a_new = mean if args.value_estimate == "mean" else sampled(mean, log_std)
                with torch.no_grad():
                    value = critic(s, a_new.clamp(-1, 1)).amin(0)  # (B,)
                    advantage = critic(s, a).amin(0) - value
                weights = awac_weights(advantage, args.temperature, args.weighting)
            policy_loss = weighted_cloning_loss(gaussian_log_prob(a, mean, log_std), weights)
        policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_optimizer.step()
        with torch.no_grad():  # σ in [e⁻⁶, 1]; a clamp in `forward` would have no way back
            policy.log_std.clamp_(-6, 0)

        # report
        if update in reports:
            returns = evaluate(lambda obs: policy(to_input(obs))[0], make_env(args.eval_episodes))
            metrics = {} if cloning else {"critic_loss": loss.item(), "q": q.mean().item()}
            if args.algorithm == "awac":
                metrics["sample_size"] = effective_sample_size(weights).item()
                metrics["advantage_sd"] = advantage.std().item()
            log.report(
                update,
                eval_return=returns.mean(),
                online_step=replay.size - len(data["rewards"]),
                eval_score=normalized_score(returns.mean()),
                train_return=np.mean(finished) if finished else float("nan"),
                action_sd=log_std.exp().mean().item(),
                policy_loss=policy_loss.item(),
                **metrics,
            )
            saved = {"policy": policy.state_dict(), "critic": critic.state_dict(), "update": update}
            write_whole(out / "checkpoint.pt", lambda t, saved=saved: torch.save(saved, t))

    scores = {row["step"] - offline: row["eval_score"] for row in log.rows}  # by online update
    first = [score for update, score in scores.items() if 0 < update <= 2000]
    summary = {
        "eval_return_mean": returns.mean(),
        "eval_return_std": returns.std(),
        "eval_episodes": args.eval_episodes,
        "score": sprites_env.score(returns.mean()),
        "offline_score": scores[0] if offline else None,
        "online_score": scores[online] if online else None,
        "worst_online_dip": scores[0] - min(first) if offline and online else None,
        "bc_score": scores[0] if cloning else None,
        "updates": log.total,
        "minutes": round(log.minutes(), 2),
    }
    summary = {name: value for name, value in summary.items() if value is not None}
    panels = [("return of a 40-step episode", ("train_return", "eval_return"))]
    levels = sprites_env.REFERENCE_RETURNS["follow"].items()
    x_label = "updates (online: as many environment steps)"
    plot_curve(out / "curve.png", log.rows, panels, x_label, levels, offline)
    film = []
    evaluate(lambda obs: policy(to_input(obs))[0], make_env(4, "rgb_array"), film)
    save_gif(out / "rollout.gif", film)
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


# --- Appendix: measures, data files, encoder of images, evaluation, pictures, run folder, log


def effective_sample_size(weights):
    """(Σ w)² / (B Σ w²): the share of the batch (B,) that in effect is imitated, 1/B ... 1."""
    return weights.sum().square() / (len(weights) * weights.square().sum())


def normalized_score(episode_return):
    """100 (R − random) / (expert − random); the expert chases the target's position."""
    levels = sprites_env.REFERENCE_RETURNS["follow"]
    return 100 * (episode_return - levels["random"]) / (levels["chase"] - levels["random"])


def best_episodes(data, share):
    """The transitions of the `share` of the episodes with the highest returns."""
    ended = data["terminated"] | data["truncated"]
    episode = np.cumsum(ended) - ended  # (M,): 0, 0, ..., 1, 1, ...
    returns = np.bincount(episode, data["rewards"])
    keep = np.argsort(-returns, kind="stable")[: max(1, round(share * len(returns)))]
    return {name: column[np.isin(episode, keep)] for name, column in data.items()}


def load_dataset(path, observation_space, action_space):
    """The arrays COLUMNS of an .npz file, checked against the environment's spaces."""

    def refuse(reason):
        raise SystemExit(f"error: {path}: {reason}")

    try:
        with np.load(path) as file:
            data = {name: file[name] for name in COLUMNS}
    except KeyError as error:
        refuse(f"{error.args[0]}; needed are {', '.join(COLUMNS)}")
    except Exception as error:  # missing, not an .npz, or arrays of objects
        refuse(f"is no .npz of arrays: {' '.join(str(error).split())[:100]}")
    spaces = {"observations": observation_space, "next_observations": observation_space}
    for name, array in data.items():
        space = {**spaces, "actions": action_space}.get(name)
        shape = (data["rewards"].size, *(space.shape if space else ()))
        kind = space.dtype if space else np.float32 if name == "rewards" else bool
        if array.shape != shape:
            refuse(f"{name} has shape {array.shape}, not {shape}")
        if not np.can_cast(array.dtype, kind, "same_kind"):
            refuse(f"{name} is of type {array.dtype}, not {np.dtype(kind)}")
        if not np.isfinite(array).all():
            refuse(f"{name} has values that are not finite")
        data[name] = array.astype(kind)
    if data["rewards"].size < 2:
        refuse("holds fewer than two transitions")
    if not (np.abs(data["actions"]) <= 1).all():
        refuse("actions must be in [-1, 1]: what the environment executed, not what was asked for")
    return data


def save_dataset(path, data):
    """The arrays COLUMNS as an .npz file, whole or not at all."""

    def save(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **data)

    try:
        write_whole(path, save)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: cannot write {path}: {error}") from None


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
