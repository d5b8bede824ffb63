"""CURL: soft actor critic from pixels, whose encoder also learns to match two views of a frame.

What
    An encoder turns a stack of frames into a code z, for the critic; the actor reads the encoder's
    convolutions through a head of its own. Two random shifts of the same stack should get similar
    codes, those of other stacks in the batch different ones: this contrastive loss trains the
    encoder next to the critic's. `--mode` switches, in one loop, what the claim rests on:
    (a) state, (b) pixel: no augmentation, (c) rad: shifts, (d) curl: shifts and contrastive loss,
    (e) curl_unaugmented_sac: shifts in that loss only, (f) contrastive_only: curl, but the critic's
    gradient stops at z.

Paper
    Laskin, Srinivas & Abbeel, "CURL: Contrastive Unsupervised Representations for Reinforcement
    Learning", 2020, arXiv 2004.04136. Mode rad: Laskin et al., "Reinforcement Learning with
    Augmented Data", 2020, arXiv 2004.14990. Soft actor critic: Haarnoja et al., arXiv 1812.05905.

Equations
    (1)  ℓᵢⱼ = qᵢᵀ W kⱼ − maxⱼ' qᵢᵀ W kⱼ',   q = encoder(shift(s)),   k = encoder'(another shift(s))
    (2)  encoder, W ← argmin −E[log softmax(ℓᵢ)ᵢ]: key i belongs to query i, the others do not
    (3)  encoder' ← encoder' + τ' (encoder − encoder'), a slow copy that no gradient reaches
    (4)  Q, encoder ← argmin Σ E[(Qᵢ(z,a) − y)²],   y = r + γ (1 − terminated) V(s'),
         V(s') = min Q̄(z',a') − α log π(a'|s'),   a' ~ π
    (5)  π ← argmin E[α log π(a|s) − min Q(z,a)],   a ~ π; its convolutions are the encoder's
    (6)  log α ← argmin E[−α (log π(a|s) + H̄)],   H̄ = −A: the entropy is held near H̄
    (7)  a = tanh(u), u ~ N(mean, sd²):   log π(a|s) = log N(u) − Σ log(1 − tanh²(u))
    (8)  ridge probe: ŷ = ȳ + k(x) (K + λ I)⁻¹ (y − ȳ),  R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)²; K and k
         are inner products of centred features x, divided by the mean of K's diagonal

Notation
    N environments, T steps of an episode, B batch, S frames of a stack, Z code, A (in shapes)
    size of an action, H outputs of the convolutions, K (in shapes) objects in the frame.

Differs from the paper
    1. One optimiser for critic, encoder and W, on the sum of both losses; the authors' release
       steps the encoder with two. Rewards are standardised, as nothing here ever terminates.
    2. The target (4) takes codes of the encoder, not of its slow copy, which only makes keys: one
       pass less. The actor's update reuses the critic's pass through the convolutions, made just
       before their step.
    3. A small network (hidden 256, not 1024) and B = 64, not 512: 19 ms an update. Orthogonal
       initialisation; W starts as the identity. LayerNorm and tanh end the code.
    4. Zero-pad by 4 and crop 64, instead of 84 out of 100 pixels: a crop smaller than the frame
       could cut the agent off. Offsets include both extremes; the release never draws the last.
    5. Ten updates for every 50 steps instead of one a step: steps are cheap here, and more updates
       overfit a small replay. Frames are stored once, 4 kB each; stacks are rebuilt.
    6. γ = 0.2 instead of 0.99: the next reward tells nearly all. Learning rate 3e-3, falling to
       zero, instead of 1e-3 (α: 1e-4); α starts at 0.01, not 0.1. No action repeat. All of this
       was chosen with mode curl at 0 distractors.

Run
    python curl.py
    python curl.py --mode rad
    python curl.py --mode curl_unaugmented_sac --distractors 2

Writes
    to runs/curl/<mode>_d<distractors>_s<seed>/: args.json, curve.csv, curve.png, rollout.gif,
    checkpoint.pt (at every report), neighbours.png (from pixels) and
    summary.json: `eval_return_mean`, `eval_return_std`, `eval_episodes`, `score` (0 random, 1
    chasing with known velocity), `updates`, `minutes`; with a contrastive loss
    `contrastive_accuracy` (mean of the last twentieth of the run; 1/B by chance); from pixels
    `probe_r2`, `probe_r2_random_encoder`, `probe_r2_pixels`: R² by quantity.

Result
    Returns, mean ± sd of three seeds (python benchmark/study.py --study curl); minutes on one
    thread of a busy AMD EPYC: a 1, b and c 4, d and f 5, e 7:
      distr.  (a) state     (b) pixel     (c) rad       (d) curl      (e)           (f)
      0       38.77 ± 0.00  36.45 ± 0.20  37.43 ± 0.14  37.10 ± 0.08  36.67 ± 0.26  35.70 ± 0.61
      2       38.76 ± 0.00  31.72 ± 0.49  32.98 ± 0.12  32.63 ± 0.25  31.95 ± 0.24  30.16 ± 0.31
    The augmentation helps, the contrastive loss does not: d is below c in every seed, e above b
    only in some. Yet 97 % of the queries find their key (1/B: 1.6 %).

Try
    1. --mode rad, then --mode pixel: what did the contrastive loss add, what did the shift?
    2. --distractors 2: which R² change? Does the code drop what earns nothing?
    3. Give the keys the query's own offsets (--out runs/same): what of accuracy and return?
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

Mode = Literal["state", "pixel", "rad", "curl", "curl_unaugmented_sac", "contrastive_only"]
SHIFTED = ("rad", "curl", "contrastive_only")  # modes in which soft actor critic sees shifts
CONTRASTIVE = ("curl", "curl_unaugmented_sac", "contrastive_only")


@dataclass(frozen=True)
class Args:
    mode: Mode = "curl"  # what actor and critic see, and what trains the encoder
    distractors: Literal[0, 1, 2] = 0  # other sprites in the frame
    total_steps: int = 60_000  # environment steps, rounded down to rounds of 40 num_envs
    num_envs: int = 50  # episodes side by side
    initial_steps: int = 1_000  # of random actions, before the first update
    updates: int = 10  # gradient steps after each step of all environments
    batch_size: int = 64  # transitions of an update, and keys of the contrastive loss (B)
    learning_rate: float = 3e-3  # of Adam, falls linearly to zero
    gamma: float = 0.2  # discount factor
    tau: float = 0.01  # how fast the target critic follows
    encoder_tau: float = 0.05  # τ', how fast the key encoder follows
    temperature: float = 0.01  # α at the start, for rewards in units of their standard deviation
    frame_stack: int = 3  # frames that the encoder sees at once (S)
    pad: int = 4  # a shift is by at most this many pixels
    z_dim: int = 50  # size of the code (Z)
    hidden: int = 256  # units of each of the two hidden layers of policy and critic
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain little from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks --------------------------------------------------------------------------------


def patch_convolutions(frames):
    """Patches of 4 x 4 pixels, then 3 x 3 of them at every second: (B, S, 64, 64) -> (B, 2048)."""
    layers = [nn.Conv2d(frames, 16, 4, stride=4), nn.ReLU()]  # (B, 16, 16, 16)
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]  # (B, 32, 8, 8)
    return orthogonal_(nn.Sequential(*layers, nn.Flatten())).to(memory_format=torch.channels_last)


def code_head(size_in, z_dim):
    """A linear map, normalised and squashed: (B, H) -> (B, Z) in [-1, 1]."""
    linear = orthogonal_(nn.Linear(size_in, z_dim))
    return nn.Sequential(linear, nn.LayerNorm(z_dim), nn.Tanh())


class SquashedActor(nn.Module):
    """π(a|s): a = tanh(u), u ~ N(mean, sd²), eq. (7). log sd is kept in [-10, 2]."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features, self.mlp = features, mlp(size_in, hidden, 2 * action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero

    def forward(self, h):  # (B, H) -> mean (B, A), log_std (B, A)
        mean, x = self.mlp(self.features(h)).chunk(2, dim=-1)
        return mean, -10 + 6 * (x.tanh() + 1)


class TwinCritic(nn.Module):
    """Two Q functions; the smaller one is believed."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(mlp(size_in + action_dim, hidden, 1) for _ in range(2))

    def forward(self, obs, action):  # (B, D), (B, A) -> (2, B)
        x = torch.cat([self.features(obs), action], dim=-1)
        return torch.cat([head(x) for head in self.heads], dim=-1).T


# --- The algorithm: pure functions of tensors ------------------------------------------------


def random_shift(stacks, offsets, pad):
    """Zero-pad by `pad` pixels and crop to the old size: one offset for all frames of a stack.

    Array (B, S, H, W), offsets (2, B) in 0 ... 2 pad, where `pad` changes nothing."""
    padded = np.pad(stacks, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, stacks.shape[2:], axis=(2, 3))
    return crops[np.arange(len(stacks)), :, *offsets]


def bilinear_logits(query, keys, W):
    """ℓᵢⱼ = qᵢᵀ W kⱼ − maxⱼ' qᵢᵀ W kⱼ', eq. (1). query, keys (B, Z), W (Z, Z) -> (B, B).

    The maximum, there to keep exp(ℓ) finite, changes neither loss nor gradient."""
    assert query.shape == keys.shape
    logits = query @ W @ keys.T
    return logits - logits.amax(1, keepdim=True)


def info_nce_loss(logits):
    """−E[log softmax(ℓᵢ)ᵢ], eq. (2): key i belongs to query i. (B, B) -> scalar."""
    assert logits.shape == (len(logits), len(logits))
    return -logits.log_softmax(1).diagonal().mean()


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) V(s'), eq. (4). All (B,), called without gradient. A time limit
    is not in here: an episode that was cut off goes on, as far as values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(s,a) − y)²], eq. (4). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def soft_actor_loss(q, log_prob, entropy_weight):
    """E[α log π(a|s) − Q(s,a)], eq. (5), for a ~ π(·|s), reparametrised. Both (B,) -> scalar."""
    assert q.shape == log_prob.shape
    return (entropy_weight * log_prob - q).mean()


def temperature_loss(log_alpha, log_prob, target_entropy):
    """E[−α (log π(a|s) + H̄)], eq. (6). log_alpha scalar, log_prob (B,), detached -> scalar."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def squashed_log_prob(u, mean, log_std):
    """log π(a|s) = log N(u) − Σ log(1 − tanh²(u)) for a = tanh(u), eq. (7). (B, A) -> (B,).

    log(1 − tanh²(u)) = 2 (log 2 − u − softplus(−2u)), which stays finite for large u."""
    correction = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return gaussian_log_prob(u, mean, log_std) - correction.sum(-1)


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the target network follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Data ------------------------------------------------------------------------------------


class FrameReplay:
    """Every observation once; stacks are rebuilt when sampled, and never cross an episode's start:
    there, the first frame is repeated. Nothing is ever dropped."""

    def __init__(self, rounds, num_envs, horizon, space, action_dim, frames):
        self.num_envs, self.horizon, self.frames, self.size = num_envs, horizon, frames, 0
        transitions = rounds * horizon * num_envs  # in the order: round, step, environment
        # horizon + 1: the observations of an episode, and what followed its last step
        self.observations = np.zeros((rounds, horizon + 1, num_envs, *space.shape), space.dtype)
        self.actions = np.zeros((transitions, action_dim), np.float32)
        self.rewards = np.zeros(transitions, np.float32)
        self.terminated = np.zeros(transitions, bool)

    def add(self, obs, action, reward, successor, terminated):  # each (N, ...): one step of all
        episode, t = divmod(self.size // self.num_envs, self.horizon)
        self.observations[episode, t], self.observations[episode, t + 1] = obs, successor
        new = slice(self.size, self.size + self.num_envs)
        self.actions[new], self.rewards[new], self.terminated[new] = action, reward, terminated
        self.size = new.stop

    def sample(self, rng, batch):
        """B transitions: stacks, actions, rewards, next stacks, terminated."""
        i = rng.integers(self.size, size=batch)
        step, env = np.divmod(i, self.num_envs)
        episode, t = np.divmod(step, self.horizon)
        times = np.maximum(t[:, None] + np.arange(1 - self.frames, 2), 0)  # (B, S + 1)
        x = self.observations[episode[:, None], times, env[:, None]]  # (B, S + 1, ...)
        stacks, successors = (y.reshape(batch, -1, *y.shape[3:]) for y in (x[:, :-1], x[:, 1:]))
        return stacks, self.actions[i], self.rewards[i], successors, self.terminated[i]


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run; returns the content of summary.json."""
    check(args, "total_steps num_envs initial_steps updates batch_size learning_rate tau")
    check(args, "encoder_tau temperature frame_stack z_dim hidden eval_episodes")
    pixels, shifted = args.mode != "state", args.mode in SHIFTED
    contrastive = args.mode in CONTRASTIVE
    frames = args.frame_stack if pixels else 1  # a state has velocities

    def make_env(num_envs, render_mode=None):
        options = {"distractors": args.distractors, "render_mode": render_mode}
        options["observation"] = "image" if pixels else "state"
        return sprites_env.SpritesVectorEnv(num_envs, **options)

    env = make_env(args.num_envs)
    N, T, space = env.num_envs, env.horizon, env.single_observation_space
    rounds = args.total_steps // (N * T)
    first_update = math.ceil(args.initial_steps / N)  # after this many steps of all environments
    if not (0 <= args.gamma < 1 and args.tau <= 1 and args.encoder_tau <= 1 and args.pad >= 0):
        raise SystemExit(
            "error: --gamma in [0, 1), --tau and --encoder-tau up to 1, --pad from 0 on"
        )
    if rounds * T < max(1, first_update):
        least = N * T * max(1, math.ceil(first_update / T))
        raise SystemExit(f"error: --total-steps must be at least {least}, in rounds of {N * T}")
    if args.frame_stack >= T:
        raise SystemExit(f"error: --frame-stack must be less than the {T} steps of an episode")
    if contrastive and args.batch_size < 2:
        raise SystemExit("error: a contrastive loss needs others: --batch-size of 2 or more")
    device = prepare(args)
    out = open_run(args, f"{args.mode}_d{args.distractors}_s{args.seed}", device)

    def to_tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    def to_input(obs):  # uint8 frames to [0, 1], states to [-1, 1]
        if pixels:
            return to_float(obs, device)
        low, high = to_tensor(space.low), to_tensor(space.high)
        return 2 * (to_tensor(obs) - low) / (high - low) - 1

    A, Z = env.single_action_space.shape[0], args.z_dim if pixels else space.shape[0]
    make_head = (lambda: code_head(2048, Z)) if pixels else nn.Identity
    convolutions, head = patch_convolutions(frames) if pixels else nn.Identity(), make_head()
    encoder = nn.Sequential(convolutions, head).to(device)
    critic = TwinCritic(nn.Identity(), Z, args.hidden, A).to(device)
    actor = SquashedActor(make_head(), Z, args.hidden, A).to(device)
    W = nn.Parameter(torch.eye(Z, device=device))
    log_alpha = nn.Parameter(torch.tensor(math.log(args.temperature), device=device))
    encoder_start = copy.deepcopy(encoder)  # the probe's control
    key_encoder, critic_target = copy.deepcopy((encoder, critic))
    learnt = [*critic.parameters(), *encoder.parameters(), *([W] if contrastive else [])]
    optimizer = torch.optim.Adam(learnt, lr=args.learning_rate, fused=True)
    policy_parameters = [*actor.parameters(), log_alpha]
    policy_optimizer = torch.optim.Adam(policy_parameters, lr=args.learning_rate, fused=True)

    replay, rng = FrameReplay(rounds, N, T, space, A, frames), np.random.default_rng(args.seed)
    print(f"replay: {replay.observations.nbytes:,} bytes of observations, each stored once")

    def shift(stacks):  # each stack by an offset of its own
        return random_shift(stacks, rng.integers(2 * args.pad + 1, size=(2, len(stacks))), args.pad)

    def sampled(mean, log_std):  # a ~ π(·|s), differentiable in both, and log π(a|s)
        u = mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh(), squashed_log_prob(u, mean, log_std)

    def policy(stacks):  # without noise
        return actor(convolutions(to_input(stacks)))[0].tanh()

    @torch.no_grad()
    def explore(stacks):
        return sampled(*actor(convolutions(to_input(stacks))))[0].cpu().numpy()

    log, update, recent = Log(out, rounds * N * T), 0, []  # accuracies since the last report
    total_updates = (rounds * T - first_update + 1) * args.updates
    reports = {max(first_update, math.ceil(rounds * T * i / 20)) for i in range(1, 21)}
    obs, _ = env.reset(seed=args.seed * 100_000)
    train_return = float("nan")  # of the last episodes
    for step in range(1, rounds * T + 1):
        # act
        if (step - 1) % T == 0:
            act, episode_return = remembering(explore, frames), 0
        action = act(obs)
        if step <= first_update:
            action = rng.uniform(-1, 1, action.shape)
        next_obs, reward, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        assert ended.all() == ended.any() == (step % T == 0)  # in lockstep

        # store
        successor = np.stack(info["final_obs"]) if ended.any() else next_obs
        replay.add(obs, action, reward, successor, terminated)
        obs, episode_return = next_obs, episode_return + reward
        if ended.any():
            train_return = episode_return.mean()
        if step < first_update:
            continue
        if step == first_update:  # rewards are standardised with those of random actions
            reward_mean, reward_sd = (f(replay.rewards[: replay.size]) for f in (np.mean, np.std))

        # learn
        for _ in range(args.updates):
            update += 1
            for group in optimizer.param_groups + policy_optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - (update - 1) / total_updates)
            s, a, r, s_next, terminated = replay.sample(rng, args.batch_size)
            a, terminated = to_tensor(a), to_tensor(terminated)
            r = to_tensor((r - reward_mean) / reward_sd)
            x, x_next = (to_input(shift(y) if shifted else y) for y in (s, s_next))
            h = convolutions(x)  # (B, H)
            z = head(h)  # (B, Z)

            with torch.no_grad():  # critic, eq. (4)
                h_next = convolutions(x_next)
                a_next, log_prob_next = sampled(*actor(h_next))
                next_value = critic_target(head(h_next), a_next).amin(0)  # (B,)
                next_value -= log_alpha.exp() * log_prob_next
                y = td_target(r, terminated, next_value, args.gamma)
            q = critic(z.detach() if args.mode == "contrastive_only" else z, a)  # (2, B)
            loss = critic_loss(q, y)
            metrics = {"critic_loss": loss}

            if contrastive:  # eqs. (1), (2)
                query = z if shifted else encoder(to_input(shift(s)))
                with torch.no_grad():
                    keys = key_encoder(to_input(shift(s)))
                logits = bilinear_logits(query, keys, W)
                metrics["contrastive_loss"] = info_nce_loss(logits)
                loss = loss + metrics["contrastive_loss"]
                recent.append(top_1_accuracy(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            if update % 2 == 0:  # every second time, as in the paper
                h = h.detach()  # the convolutions learn from the critic, not from the actor
                a_new, log_prob = sampled(*actor(h))
                q_new = critic(head(h).detach(), a_new).amin(0)
                policy_loss = soft_actor_loss(q_new, log_prob, log_alpha.exp().detach())  # eq. (5)
                policy_loss = policy_loss + temperature_loss(log_alpha, log_prob, -A)  # eq. (6)
                policy_optimizer.zero_grad()
                policy_loss.backward()
                policy_optimizer.step()
                polyak_(critic_target, critic, args.tau)
                polyak_(key_encoder, encoder, args.encoder_tau)  # eq. (3)

        # report
        if step in reports:
            returns = evaluate(remembering(policy, frames), make_env(args.eval_episodes))
            if contrastive:
                metrics["contrastive_accuracy"] = torch.stack(recent).mean()
                recent.clear()
            metrics |= {"temperature": log_alpha.exp(), "entropy": -log_prob_next.mean()}
            metrics = {name: value.item() for name, value in metrics.items()}
            log.report(step * N, eval_return=returns.mean(), train_return=train_return, **metrics)
            saved = {"encoder": encoder.state_dict(), "actor": actor.state_dict(), "step": step * N}
            write_whole(out / "checkpoint.pt", lambda t, saved=saved: torch.save(saved, t))

    summary = {
        "eval_return_mean": returns.mean(),
        "eval_return_std": returns.std(),
        "eval_episodes": args.eval_episodes,
        "score": sprites_env.score(returns.mean()),
        "updates": update,
        "minutes": round(log.minutes(), 2),
    }
    if contrastive:
        summary["contrastive_accuracy"] = metrics["contrastive_accuracy"]
    if pixels:
        stacks, states, shapes = random_stacks(make_env(PROBE_EPISODES), frames)
        seen = {"encoder": encoder, "random_encoder": encoder_start, "pixels": nn.Flatten()}
        codes = {name: encode(module, to_input, stacks) for name, module in seen.items()}
        r2 = {name: probe(code, states) for name, code in codes.items()}
        summary |= {"probe_r2" + f"_{name}" * (name != "encoder"): r2[name] for name in r2}
        plot_neighbours(out / "neighbours.png", codes, states, shapes)
    panels = [("return of a 40-step episode", ("train_return", "eval_return"))]
    if contrastive:
        panels += [(f"keys found (1/B: {1 / args.batch_size:.3f})", ("contrastive_accuracy",))]
    levels = sprites_env.REFERENCE_RETURNS["follow"].items()
    plot_curve(out / "curve.png", log.rows, panels, "environment steps", levels)
    film = []
    evaluate(remembering(policy, frames), make_env(4, "rgb_array"), film)
    save_gif(out / "rollout.gif", film)
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


# --- Appendix: probe, layers, evaluation, pictures, run folder, log --------------------------

PROBE_EPISODES = 160  # of random actions, three quarters of them to fit, the others to test


def remembering(policy, frames):
    """A policy of single observations, for one episode, from one of stacks: it remembers the last
    ones, and repeats the first where there are none yet."""
    memory = []

    def act(obs):
        memory[:] = [*(memory or [obs] * frames), obs][-frames:]
        return policy(np.concatenate(memory, axis=1))

    return act


def top_1_accuracy(logits):
    """The share of queries that have their own key nearest; 1/B by chance. (B, B) -> scalar."""
    return (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()


def ridge_r2(x, y, x_test, y_test, penalty=0.1):
    """R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)² with ŷ = ȳ + k(x) (K + λ I)⁻¹ (y − ȳ), eq. (8).

    x (M, D), y (M, C), x_test (L, D), y_test (L, C) -> (C,). This is the dual form: D may be all
    pixels of a stack. K is scaled to a mean of 1 on its diagonal."""
    centre, mean = x.mean(0), y.mean(0)
    a, b = x - centre, x_test - centre
    K, k = a @ a.T, b @ a.T
    scale = K.diagonal().mean()
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    predicted = mean + k / scale @ torch.linalg.solve(K / scale + penalty * identity, y - mean)
    error, deviation = y_test - predicted, y_test - y_test.mean(0)
    return 1 - error.square().sum(0) / deviation.square().sum(0)


def random_stacks(env, frames):
    """Stacks (E, M, S, 64, 64), states (E, M, K, 4) and shapes (E, K) of E episodes of random
    actions, every fourth step, from where a stack is full."""
    obs, _ = env.reset(seed=10**9 + 50_000)
    rng, stack_of, rows = np.random.default_rng(0), remembering(lambda stacks: stacks, frames), []
    shapes = env.shapes
    for t in range(env.horizon):
        stacks = stack_of(obs)
        if t >= frames - 1 and t % 4 == 3:
            rows.append((stacks, env.states))
        obs, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
    return *(np.stack(column, axis=1) for column in zip(*rows)), shapes


@torch.no_grad()
def encode(encoder, to_input, stacks):
    """Codes (E, M, Z) of stacks (E, M, S, 64, 64), one step of all episodes at a time."""
    return torch.stack([encoder(to_input(x)).cpu() for x in np.swapaxes(stacks, 0, 1)], dim=1)


def probe(codes, states):
    """R² of ridge regressions (8) from codes (E, M, Z) to what the frames show, by quantity: fitted
    on the first three quarters of the episodes, tested on the others."""
    agent, target = states[..., 0, :2], states[..., 1, :2]
    quantities = {"agent": agent, "target": target, "relative_position": target - agent}
    quantities["target_velocity"] = states[..., 1, 2:]
    if states.shape[2] > 2:
        quantities["distractors"] = states[..., 2:, :2].reshape(*states.shape[:2], -1)
    y = torch.cat([torch.from_numpy(q).float() for q in quantities.values()], dim=-1)
    M, widths = len(codes) * 3 // 4, [q.shape[-1] for q in quantities.values()]
    r2 = ridge_r2(*(part.flatten(0, 1) for part in (codes[:M], y[:M], codes[M:], y[M:])))
    return {n: r.mean().item() for n, r in zip(quantities, r2.split(widths))}


def plot_neighbours(path, codes, states, shapes):
    """For six query frames, the nearest two of other episodes, in z and in pixels."""
    from matplotlib.figure import Figure

    queries, M = np.linspace(0, len(states) - 1, 6).astype(int), states.shape[1]
    figure = Figure(figsize=(8.4, 7.2), layout="constrained")
    axes = figure.subplots(5, len(queries))

    def show(axis, episode, t, label):
        axis.imshow(sprites_env.draw_rgb(states[episode, t, :, :2], shapes[episode], scale=2))
        axis.set(xticks=[], yticks=[])
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(label)

    for column, query in zip(axes.T, queries):
        show(column[0], query, M // 2, "query")
        for rows, name, label in ((column[1:3], "encoder", "z"), (column[3:], "pixels", "pixels")):
            distance = (codes[name] - codes[name][query, M // 2]).square().sum(-1)  # (E, M)
            distance[query] = float("inf")
            for axis, near in zip(rows, distance.flatten().argsort()[:2].tolist()):
                show(axis, *divmod(near, M), f"near in {label}")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=80))


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
