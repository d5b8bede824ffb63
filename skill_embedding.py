"""An embedding space of skills: one policy for many tasks, steered by a latent z.

What
    Several tasks share one policy π(a|s,z), which is never told the task, only a z drawn from
    p(z|t) at the start of an episode. Entropy terms keep many z alive for every task, and a network
    that guesses z from what was done rewards skills that can be told apart. All is learnt
    off-policy from whole episodes, with Retrace. `--experiment` asks: are four tasks learnt
    (library)? Does one task find several solutions (versatility)? Do equal tasks share their skills
    (generality)? And, the skills frozen, are new tasks learnt faster by choosing z (transfer)?

Paper
    Hausman, Springenberg, Wang, Heess & Riedmiller, "Learning an Embedding Space for Transferable
    Robot Skills", ICLR 2018. Retrace: Munos, Stepleton, Harutyunyan & Bellemare, "Safe and
    efficient off-policy reinforcement learning", 2016, arXiv 1606.02647.

Equations
    (1)  r̂ᵢ = r_t(sᵢ,aᵢ) + α₂ log q(z|aᵢ, sᵢ₋ₕ … sᵢ) + α₃ H[π(·|sᵢ,z)]
    (2)  maximise  E[Σ γⁱ r̂ᵢ] + α₁ E_t H[p(z|t)]   over π and p, by way of Q:
    (3)  Gⱼ = r̂ⱼ + γ [Vⱼ₊₁ + cⱼ₊₁ (Gⱼ₊₁ − Q̄ⱼ₊₁)],   V = E_π[Q̄],   c = min(1, π(a|s,z) / b(a|s,z))
         Q̄ is a slow copy of Q, b the policy that acted; one sample of π stands for E_π
    (4)  Q ← argmin E[(Q(s,a;z,t) − G)²],   s, a, z, t from the replay
    (5)  π, p ← argmax E[Q(s,a;z,t) + α₃ H[π(·|s,z)]] + α₁ E_t H[p(z|t)],   new z ~ p(·|t), a ~ π
    (6)  q ← argmax E[log q(z|a, s …)],   the likelihood of the z that was acted on

Notation
    N environments, T steps of an episode, B episodes of a batch, Z size of z, A (in shapes) size of
    an action, D size of an observation, H steps that q looks back, K tasks, G goals of a task.

Differs from the paper
    1. (3) is Retrace as Munos et al. have it; the recursion printed in the paper is not.
    2. p(z|t) / b(z|t) is no part of c, as z is given once it is drawn, and c could exceed π / b;
       --z-ratio puts it back.
    3. (5) has the entropy of the policy in it: ∂Q/∂a cannot see that of the present state.
    4. p(z|t) is a table, not a linear network, and its standard deviation is bounded: it widens
       while α₁ > α₂ Σγⁱ, until tasks overlap, and shrinks to a point where it is less. Tasks start
       apart in z (--spread); in the paper they start alike, as in generality here.
    5. log q is cut off at ±3. 0.03 E‖mean‖² is taken off (5), and α₃ starts large: or else the
       policy runs into the wall behind the goal and stays there, bouncing on the spot. In the
       second half of the run α₃ falls to zero, α₂ to a quarter: first be different, then exact.
    6. Z = 2, in which a skill can say all of z by where it comes to rest; the paper has 3.
    7. A point, the agent of Sprites alone, instead of a robot arm; minutes on one core. In transfer
       a z is held for five steps, whose rewards are added, and γ is that of five steps.

Run
    python skill_embedding.py
    python skill_embedding.py --experiment versatility --embedding bernoulli
    python skill_embedding.py --experiment transfer

Writes
    to runs/skill_embedding/<experiment>_<embedding>_s<seed>/: args.json, curve.csv, curve.png,
    skills.png (episodes by z; the embedding; a walk in z), rollout.gif, checkpoint.pt (at every
    report) and summary.json: `success_rate`, `worst_task`, `solved_goals` (tasks solved in 90 %),
    `identifiability_top1` (share of 64 episodes whose own z is the likeliest of the 64: 1/64 by
    chance, K/64 if only the task shows, never more than 2^Z / 64 with bits),
    `eval_return_mean`, `eval_return_std`, `eval_episodes`, `minutes`; if gaussian `kl_1_2` ...,
    KL(p(z|1) ‖ p(z|2)); versatility: `solutions_found` (goals that 5 % of the episodes end at),
    `goal_entropy_bits`; generality: `kl_duplicate` (task 3 is task 1), `kl_others` (the smaller).
    transfer has the library it learns in library/, no skills.png, and instead `success_skills_...`,
    `success_scratch_...` and `success_random_...` (a random skill at every choice) on the tasks
    interpolation and sequencing, `steps_...` to 80 %, and `transfer_steps_ratio` of these by task
    (if scratch never got there, its budget counts: at least so many times).

Result
    Seeds 1, 2, ... (python benchmark/study.py --study skill); a library takes 4 minutes on one
    thread of an AMD EPYC, transfer 1.2 after a shorter one:
      library      worst task 0.97, 0.95, 0.98, 0.95, 0.97; top-1 0.64, 0.52, 0.37, 0.46, 0.56
      generality   KL 0.005, 0.0002, 0.0005 to the same task, 5.7, 4.2, 7.5 to the nearest other one
      versatility  solutions found: bernoulli 4, 4, 3 (success 1.00); gaussian 2, 2, 2 (0.36-0.40)
      transfer     steps to 80 %: sequencing 5,120, 8,320, 7,680, scratch one of six in 25,600;
                   interpolation 3,840, never, never, scratch 3,840, 6,400, 4,480

Try
    1. --alpha2 0 --out runs/a, --alpha2 0.3 --out runs/b: skills.png, identifiability_top1?
    2. --z-ratio --out runs/z: does the critic's loss change, and why where p(z|t) moves?
    3. --experiment transfer --hold 1 --out runs/h: what is lost by choosing at every step?
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import sprites_env
from sprites_env import AGENT

ANGLES = np.pi / 2 * np.arange(4)
GOALS = 0.5 + 0.3 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)  # (4, 2), on a circle
TASKS = {  # tasks to learn skills from, (K, G, 2): any of its G goals solves a task
    "library": GOALS[:, None],
    "versatility": GOALS[None],
    "generality": GOALS[[0, 1, 0, 2], None],  # the third task is the first again
}
NEW_TASKS = {  # to reuse them for, (1, G, 2): goals to visit one after the other
    "interpolation": np.full((1, 1, 2), 0.5 + 0.3 * np.sqrt(0.5)),  # halfway between two
    "sequencing": GOALS[None, [0, 2]],
}
USUAL = {  # defaults that depend on the experiment
    "library": {"spread": 1.5, "z_sd": 0.2, "alpha1": 2.0, "alpha2": 0.2, "total_steps": 224_000},
    "generality": {"spread": 0.0},  # all tasks start alike
    "versatility": {"spread": 0.0, "z_sd": 1.0, "alpha1": 5.0, "alpha2": 0.5},  # room for one task
    "transfer": {"total_steps": 128_000},  # of its library: a longer one serves no better
    "one_hot": {"alpha1": 0.0, "alpha2": 0.0},  # nothing to widen, nothing to tell apart
}
for name in ("generality", "versatility", "transfer"):
    USUAL[name] = USUAL["library"] | USUAL[name]
Z_RANGE = 3.0  # bound of the means of p(z|t)
Z_GAIN = 4.5  # of z as an input, so that what differs within a task is not overlooked
TAU = 0.01  # how fast the target critic follows
EFFORT = 0.03  # weight of the squared mean action in eq. (5)


@dataclass(frozen=True)
class Args:
    experiment: Literal["library", "versatility", "generality", "transfer"] = "library"  # see What
    embedding: Literal["gaussian", "bernoulli", "one_hot"] = "gaussian"  # p(z|t); one_hot is fixed
    z_dim: int | None = None  # Z (default: 2; K if one_hot)
    spread: float | None = None  # how far apart tasks start in z (library, transfer 1.5; else 0)
    z_sd: float | None = None  # bound of the deviation of p(z|t) (versatility 1, else 0.2)
    alpha1: float | None = None  # α₁, weight of the entropy of p(z|t) (2, versatility 5, one_hot 0)
    alpha2: float | None = None  # α₂, pay for being told apart (0.2, versatility 0.5, one_hot 0)
    alpha3: float = 0.06  # α₃, weight of the entropy of the policy, at first
    window: int = 4  # H, steps that the inference network looks back
    z_ratio: bool = False  # have p(z|t) / b(z|t) in c, as printed in the paper
    gamma: float = 0.9  # discount factor per step
    total_steps: int | None = None  # environment steps, whole rounds (224,000, transfer 128,000)
    num_envs: int = 16  # episodes of a round, N
    updates: int = 40  # gradient steps after a round
    batch_size: int = 32  # episodes of an update, B
    learning_rate: float = 1e-3  # of Adam; falls to zero over the second half
    library: str | None = None  # transfer: a checkpoint.pt of skills (default: learn them first)
    hold: int = 5  # transfer: steps for which a chosen z is acted on
    transfer_steps: int = 25_600  # transfer: environment steps for each new task and learner
    eval_episodes: int = 256  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain nothing from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks: each returns a distribution (mlp is in the appendix) --------------------------


def gaussian(mean, sd):
    """N(mean, sd²), both (..., D): one distribution over vectors of D independent numbers."""
    return Independent(Normal(mean, sd, validate_args=False), 1, validate_args=False)


def bernoulli(logits):
    """Independent bits, 1 with probability sigmoid(logits), (..., D)."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def between(low, high, x):
    """A standard deviation between two bounds: low at x = −∞, high at x = ∞, geometrically."""
    return low * (high / low) ** x.sigmoid()


class TaskEmbedding(nn.Module):
    """p(z|t): Gaussian, or Bernoulli, or (nearly) a constant that tells tasks apart."""

    def __init__(self, kind, tasks, z_dim, spread, z_sd):
        super().__init__()
        self.kind, self.z_sd = kind, z_sd
        self.place = nn.Parameter(spread * torch.randn(tasks, z_dim))
        self.width = nn.Parameter(torch.full((tasks, z_dim), -1.5))  # begins narrow
        if kind == "one_hot":
            self.place = nn.Parameter(Z_RANGE * (2 * torch.eye(tasks) - 1), requires_grad=False)

    def forward(self, task):  # (...) -> a distribution over (..., Z)
        place, width = self.place[task], self.width[task]
        if self.kind == "bernoulli":
            return bernoulli(place)
        if self.kind == "one_hot":
            return gaussian(place, torch.full_like(place, 1e-3))
        sd = between(0.35 * self.z_sd, self.z_sd, width)
        return gaussian(Z_RANGE * (place / Z_RANGE).tanh(), sd)


class SkillPolicy(nn.Module):
    """π(a|s,z), Gaussian. It sees the skill and never the task."""

    def __init__(self, obs_dim, z_dim, action_dim):
        super().__init__()
        self.mlp = mlp(obs_dim + z_dim, 128, 2 * action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.1)  # start with actions around zero

    def forward(self, obs, z):  # (..., D), (..., Z) -> a distribution over (..., A)
        inputs = [obs, Z_GAIN * z.expand(*obs.shape[:-1], -1)]
        mean, width = self.mlp(torch.cat(inputs, dim=-1)).chunk(2, dim=-1)
        return gaussian(mean, between(0.05, 1, width + 1))


class SkillInference(nn.Module):
    """q(z|a, s …): what skill was that? It never sees the task either."""

    def __init__(self, size_in, z_dim, bits):
        super().__init__()
        self.bits, self.mlp = bits, mlp(size_in, 64, z_dim if bits else 2 * z_dim)

    def forward(self, window):  # (..., (H + 1) D + A) -> a distribution over (..., Z)
        out = self.mlp(window)
        if self.bits:
            return bernoulli(out)
        mean, width = out.chunk(2, dim=-1)
        return gaussian(mean, between(0.05, 1.5, width))


class SkillCritic(nn.Module):
    """Q(s,a;z,t), which sees everything. Actions are clipped, as the environment does."""

    def __init__(self, obs_dim, action_dim, z_dim, tasks):
        super().__init__()
        self.tasks, self.mlp = tasks, mlp(obs_dim + action_dim + z_dim + tasks, 128, 1)

    def forward(self, obs, action, z, task):  # (..., D), (..., A), (..., Z), (...) -> (...)
        one_hot = F.one_hot(task, self.tasks).expand(*obs.shape[:-1], -1)
        inputs = [obs, action.clamp(-1, 1), Z_GAIN * z.expand(*obs.shape[:-1], -1), one_hot]
        return self.mlp(torch.cat(inputs, dim=-1)).squeeze(-1)


class SkillLearner(nn.Module):
    """The four networks. With Z = 0 it is an ordinary actor and critic."""

    def __init__(self, obs_dim, action_dim, tasks, z_dim, embedding, window, spread, z_sd):
        super().__init__()
        self.embedding = TaskEmbedding(embedding, tasks, z_dim, spread, z_sd)
        self.policy = SkillPolicy(obs_dim, z_dim, action_dim)
        size = (window + 1) * obs_dim + action_dim
        # Without a z it is idle: over no numbers, log q is an empty sum
        self.inference = SkillInference(size, z_dim or 1, bits=embedding == "bernoulli")
        self.critic = SkillCritic(obs_dim, action_dim, z_dim, tasks)


# --- The algorithm: pure functions of tensors ------------------------------------------------


def skill_reward(reward, log_q, entropy, alpha2, alpha3):
    """r̂ = r + α₂ log q(z|a, s …) + α₃ H[π(·|s,z)], eq. (1). All (B, T) -> (B, T).
    log q is cut off at ±3: one step that looks like another skill must not outweigh the task."""
    assert reward.shape == log_q.shape == entropy.shape
    return reward + alpha2 * log_q.clamp(-3, 3) + alpha3 * entropy


def retrace_targets(reward, terminated, value, q, log_ratio, gamma):
    """Gⱼ = r̂ⱼ + γ [Vⱼ₊₁ + cⱼ₊₁ (Gⱼ₊₁ − Q̄ⱼ₊₁)],   c = min(1, exp(log_ratio)), eq. (3).

    reward, terminated, q, log_ratio (B, T), value (B, T + 1) -> (B, T); called without gradient.
    The last step bootstraps with V alone, and nothing is worth anything after `terminated`."""
    assert reward.shape == terminated.shape == q.shape == log_ratio.shape
    assert value.shape == (len(reward), reward.shape[1] + 1)
    trace, going_on = log_ratio.exp().clamp(max=1), gamma * (1 - terminated)
    one_step = reward + going_on * value[:, 1:]
    targets = [one_step[:, -1]]
    for j in reversed(range(reward.shape[1] - 1)):
        correction = trace[:, j + 1] * (targets[-1] - q[:, j + 1])
        targets.append(one_step[:, j] + going_on[:, j] * correction)
    return torch.stack(targets[::-1], dim=1)


def actor_loss(q, mean, policy_entropy, embedding_entropy, alpha1, alpha3):
    """−E[Q + α₃ H[π]] − α₁ E_t H[p(z|t)], eq. (5), and 0.03 E‖mean‖²: beyond the bounds of an
    action, where Q is flat, nothing else would ever bring the mean back.

    q, policy_entropy, embedding_entropy (B, T), mean (B, T, A) -> scalar."""
    assert q.shape == policy_entropy.shape == embedding_entropy.shape == mean.shape[:-1]
    objective = q + alpha3 * policy_entropy + alpha1 * embedding_entropy
    return (EFFORT * mean.square().sum(-1) - objective).mean()


def windows(obs, actions, steps):
    """What q sees at step i: aᵢ and sᵢ₋ₕ … sᵢ; the first state stands in for those before it.
    obs (B, T + 1, D), actions (B, T, A) -> (B, T, (H + 1) D + A)."""
    T = actions.shape[1]
    at = torch.arange(T)[:, None] + torch.arange(-steps, 1)  # (T, H + 1)
    return torch.cat([obs[:, at.clamp(min=0)].flatten(2), actions], dim=-1)


def straight_through(distribution):
    """A sample that gradients pass: reparametrised, or for bits as if it were their mean."""
    if distribution.has_rsample:
        return distribution.rsample()
    return distribution.sample() + (distribution.mean - distribution.mean.detach())


def identified(log_q):
    """Share of episodes whose own z is the likeliest of all: log_q (M, M), row i the episode,
    column j the candidate. By chance 1/M."""
    return (log_q.argmax(1) == torch.arange(len(log_q), device=log_q.device)).float().mean().item()


def divergences(embedding):
    """KL(p(z|i) ‖ p(z|j)) of all tasks i, j: a distribution of shape (K, Z) -> (K, K)."""
    parts = (embedding.base_dist.mean, embedding.base_dist.stddev)
    p = gaussian(*(x[:, None] for x in parts))
    return kl_divergence(p.expand((len(parts[0]),) * 2), embedding.expand((len(parts[0]),) * 2))


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the target network follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Data (GoalTasks is in the appendix) -----------------------------------------------------


class SkillTasks:
    """The same tasks on another scale: an action chooses a skill, z = 3 · action, and the frozen
    policy π(a|s,z) acts on it for `hold` steps, of which the rewards are added."""

    def __init__(self, tasks, policy, z_dim, hold):
        self.tasks, self.policy, self.hold = tasks, policy, hold
        self.action_dim, self.steps = z_dim, tasks.steps // hold

    def reset(self, rng, task):
        self.obs = self.tasks.reset(rng, task)
        return self.obs

    def step(self, action):
        device = next(self.policy.parameters()).device
        z, total = torch.as_tensor(Z_RANGE * action, device=device).clamp(-Z_RANGE, Z_RANGE), 0
        for _ in range(self.hold):
            own = torch.as_tensor(self.obs[:, :4], device=device)  # what it was trained to see
            with torch.no_grad():
                action = self.policy(own, z).mean.cpu().numpy()
            self.obs, reward, terminated = self.tasks.step(action)
            total = total + reward
        return self.obs, total, terminated

    def __getattr__(self, name):  # what skills do not change: solved, goals, path ...
        return getattr(self.tasks, name)


@torch.no_grad()
def roll_out(tasks, policy, rng, task, z, noise=True):
    """An episode in each environment, tasks (N,), skills (N, Z), the mean action without `noise`.

    Returns obs (N, T + 1, D), action (N, T, A), reward, terminated and log_b = log π(a|s,z), the
    behaviour's (N, T), and what was given: task and z."""
    obs, columns = torch.as_tensor(tasks.reset(rng, task.cpu().numpy()), device=z.device), []
    for _ in range(tasks.steps):
        pi = policy(obs, z)
        action = pi.sample() if noise else pi.mean
        after, reward, terminated = tasks.step(action.cpu().numpy())
        outcome = torch.as_tensor(np.stack([reward, terminated]), device=z.device).float()
        columns.append((obs, action, *outcome, pi.log_prob(action)))
        obs = torch.as_tensor(after, device=z.device)
    states, *columns = (torch.stack(column, dim=1) for column in zip(*columns))
    episodes = dict(zip(("action", "reward", "terminated", "log_b"), columns))
    return {"obs": torch.cat([states, obs[:, None]], dim=1)} | episodes | {"task": task, "z": z}


class TrajectoryReplay:
    """The latest episodes, whole: Retrace and the windows never run across a reset. Rewards (1)
    are not stored, for what log q and H say changes with every update."""

    def __init__(self, room):
        self.room, self.columns = room, {}

    def add(self, episodes):  # a dict of tensors (N, ...)
        for name, new in episodes.items():
            self.columns[name] = torch.cat([self.columns.get(name, new[:0]), new])[-self.room :]

    def sample(self, rng, batch):
        rows = torch.as_tensor(rng.integers(len(self.columns["z"]), size=batch))
        return {name: column[rows] for name, column in self.columns.items()}


# --- Training --------------------------------------------------------------------------------


def learn(tasks, learner, total_steps, reports, args, rng, device):
    """Learn tasks: skills, if they have a z, or by choosing among skills, if actions are those.

    A generator: about `reports` times on the way it yields the steps so far, and losses."""
    N, hold = tasks.num_envs, tasks.hold
    rounds, gamma = total_steps // (N * tasks.steps * hold), args.gamma**hold
    critic_target = copy.deepcopy(learner.critic).requires_grad_(False)
    actor = [*learner.policy.parameters(), *learner.embedding.parameters()]
    groups = actor, learner.critic.parameters(), learner.inference.parameters()
    optimizers = [torch.optim.Adam(group, lr=args.learning_rate, fused=True) for group in groups]
    actor_optimizer, critic_optimizer, inference_optimizer = optimizers
    replay = TrajectoryReplay(room=2000)
    task = torch.arange(N, device=device) % tasks.num_tasks

    for rounds_so_far in range(1, rounds + 1):
        # act and store: one skill for a whole episode
        with torch.no_grad():
            p = learner.embedding(task)
            z = p.sample()
            log_b_z = p.log_prob(z)
        episodes = roll_out(tasks, learner.policy, rng, task, z)
        replay.add(episodes | {"log_b_z": log_b_z})

        # learn
        left = min(1, 2 - 2 * (rounds_so_far - 1) / rounds)  # 1 for a while, then falling to 0
        alpha2, alpha3 = args.alpha2 * (1 + 3 * left) / 4, args.alpha3 * left
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
        for _ in range(args.updates):
            batch = replay.sample(rng, args.batch_size)
            obs, action, before = batch["obs"], batch["action"], batch["obs"][:, :-1]
            z, t = batch["z"][:, None], batch["task"][:, None]  # the same at every step

            # inference, eq. (6): name the skill that was seen
            log_q = learner.inference(windows(obs, action, args.window)).log_prob(z)
            inference_loss = -log_q.mean()
            if z.shape[-1]:
                inference_optimizer.zero_grad()
                inference_loss.backward()
                inference_optimizer.step()

            # critic, eq. (4): what the present policy would earn, from what others did
            with torch.no_grad():
                pi = learner.policy(obs, z)
                now = gaussian(pi.mean[:, :-1], pi.stddev[:, :-1])
                log_ratio = now.log_prob(action) - batch["log_b"]
                if args.z_ratio:
                    log_ratio += learner.embedding(t).log_prob(z) - batch["log_b_z"][:, None]
                r_hat = skill_reward(batch["reward"], log_q, now.entropy(), alpha2, alpha3)
                value = critic_target(obs, pi.sample(), z, t)
                q_bar = critic_target(before, action, z, t)
                terminated = batch["terminated"]
                target = retrace_targets(r_hat, terminated, value, q_bar, log_ratio, gamma)
            critic_loss = F.mse_loss(learner.critic(before, action, z, t), target)
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
            polyak_(critic_target, learner.critic, TAU)

            # policy and embedding, eq. (5): another skill for every step, the states are old ones
            t = t.expand(before.shape[:-1])
            p = learner.embedding(t)
            z_new = straight_through(p)
            pi = learner.policy(before, z_new)
            q = learner.critic(before, pi.rsample(), z_new, t)
            entropies = pi.entropy(), p.entropy()
            loss = actor_loss(q, pi.mean, *entropies, args.alpha1, alpha3)
            actor_optimizer.zero_grad()
            loss.backward()
            actor_optimizer.step()

        if rounds_so_far % max(1, rounds // reports) == 0 or rounds_so_far == rounds:
            losses = {"critic_loss": critic_loss.item(), "log_q": -inference_loss.item()}
            losses["entropy_z"] = p.entropy().mean().item()
            yield rounds_so_far * N * tasks.steps * hold, losses


def train(args):
    """One run of an experiment; returns the content of summary.json."""
    usual = USUAL[args.experiment] | (USUAL["one_hot"] if args.embedding == "one_hot" else {})
    args = replace(args, **{k: v for k, v in usual.items() if getattr(args, k) is None})
    check(args, "gamma total_steps num_envs updates batch_size learning_rate eval_episodes")
    check(args, "z_sd hold transfer_steps")
    transfers, N, T = args.experiment == "transfer", args.num_envs, GoalTasks.steps
    K = len(TASKS["library" if transfers else args.experiment])
    rules = {
        "--alpha1, --alpha2, --alpha3, --window and --spread must be 0 or more":
            min(args.alpha1, args.alpha2, args.alpha3, args.window, args.spread) >= 0,
        "--gamma must be below 1": args.gamma < 1,
        f"--num-envs and --eval-episodes must be multiples of {K}, the number of tasks":
            N % K == 0 and args.eval_episodes % K == 0,
        "--z-dim must be positive, and is K with --embedding one_hot":
            args.z_dim is None or (args.z_dim > 0 and args.embedding != "one_hot"),
        f"--total-steps, and --transfer-steps, must be at least {N * T}, a round of episodes":
            min(args.total_steps, args.transfer_steps if transfers else N * T) >= N * T,
        f"--hold must divide {T}": T % args.hold == 0,
        "--library is for --experiment transfer": transfers or not args.library,
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            raise SystemExit(f"error: {rule}")
    device = prepare(args)
    library = load_skills(args.library, device) if args.library else None  # or nothing is touched
    if transfers and "bernoulli" in (args.embedding, library and library.embedding.kind):
        raise SystemExit("error: --experiment transfer cannot choose bits by degrees")
    out = open_run(args, f"{args.experiment}_{args.embedding}_s{args.seed}", device)
    if transfers:
        return train_transfer(args, library, out, device)

    tasks, eval_tasks = (GoalTasks(n, TASKS[args.experiment]) for n in (N, args.eval_episodes))
    rng = np.random.default_rng(args.seed)
    z_dim = K if args.embedding == "one_hot" else args.z_dim or 2
    sizes = {"tasks": K, "z_dim": z_dim, "embedding": args.embedding}
    sizes |= {"obs_dim": tasks.obs_dim, "action_dim": tasks.action_dim, "window": args.window}
    sizes |= {"spread": args.spread, "z_sd": args.z_sd}
    learner = SkillLearner(**sizes).to(device)
    log = Log(out, args.total_steps // (N * T) * N * T)
    for step, losses in learn(tasks, learner, args.total_steps, 20, args, rng, device):
        metrics, episodes = evaluate_skills(eval_tasks, learner, args.window)
        log.report(step, **metrics, **losses)
        saved = {"sizes": sizes, "networks": learner.state_dict(), "step": step}
        write_whole(out / "checkpoint.pt", lambda t, saved=saved: torch.save(saved, t))

    summary = metrics | {"eval_episodes": args.eval_episodes}
    divergence = tuple(name for name in metrics if name.startswith("kl_1_"))
    if args.experiment == "generality" and divergence:
        summary["kl_duplicate"] = metrics["kl_1_3"]
        summary["kl_others"] = min(metrics["kl_1_2"], metrics["kl_1_4"])
    panels = [("share of episodes", ("success_rate", "identifiability_top1"))]
    panels += [("KL(task 1 ‖ task t), nats", divergence)] if divergence else []
    plot_curve(out / "curve.png", log.rows, panels, "environment steps")
    plot_skills(out / "skills.png", eval_tasks, learner, episodes["z"])
    save_gif(out / "rollout.gif", draw_film(eval_tasks))
    return write_summary(out, summary, log)


def train_transfer(args, library, out, device):
    """Freeze a library of skills; learn each new task by choosing among them, and from scratch."""
    if library is None:
        train(replace(args, experiment="library", out=str(out / "library"), overwrite=True))
        library = load_skills(out / "library" / "checkpoint.pt", device)
    skills = library.policy.requires_grad_(False)
    K, z_dim = library.embedding.place.shape

    def make_tasks(num_envs, name, how):
        tasks = GoalTasks(num_envs, NEW_TASKS[name], in_order=True)
        return tasks if how == "scratch" else SkillTasks(tasks, skills, z_dim, args.hold)

    def any_skill(obs, z):
        p = library.embedding(torch.randint(K, (len(obs),), device=device))
        return gaussian(p.mean / Z_RANGE, p.stddev / Z_RANGE)

    counts, names, runs, summary = (args.num_envs, args.eval_episodes), [], [], {}
    for name in NEW_TASKS:
        for how in ("skills", "scratch"):
            tasks, held_out = (make_tasks(n, name, how) for n in counts)
            sizes = {"tasks": 1, "z_dim": 0, "embedding": "gaussian", "window": args.window}
            sizes |= {"obs_dim": tasks.obs_dim, "action_dim": tasks.action_dim}
            sizes |= {"spread": 0, "z_sd": 1}
            learner, rng = SkillLearner(**sizes).to(device), np.random.default_rng(args.seed)
            progress = learn(tasks, learner, args.transfer_steps, 100, args, rng, device)
            names.append(f"{how}_{name}")
            runs.append((held_out, learner, progress))
        held_out = make_tasks(args.eval_episodes, name, "skills")
        rng, task = np.random.default_rng(10**9), torch.zeros(args.eval_episodes, dtype=torch.long)
        with torch.random.fork_rng():
            torch.manual_seed(10**9)
            roll_out(held_out, any_skill, rng, task, torch.zeros(len(task), 0, device=device))
        summary[f"success_random_{name}"] = held_out.solved.mean()

    T = GoalTasks.steps
    log = Log(out, args.transfer_steps // (args.num_envs * T) * args.num_envs * T)
    for reports in zip(*(progress for _, _, progress in runs)):  # all four learn side by side
        found = [evaluate_skills(tasks, learner, args.window) for tasks, learner, _ in runs]
        rates = [metrics["success_rate"] for metrics, _ in found]
        log.report(reports[0][0], **dict(zip(names, rates)))

    summary |= {f"success_{name}": log.rows[-1][name] for name in names}
    summary["transfer_steps_ratio"] = {}
    for name in NEW_TASKS:
        ours, theirs, ratio = steps_to_solve(log.rows, name)
        summary |= {f"steps_skills_{name}": ours, f"steps_scratch_{name}": theirs}
        summary["transfer_steps_ratio"][name] = ratio
    saved = {name: learner.state_dict() for name, (_, learner, _) in zip(names, runs)}
    write_whole(out / "checkpoint.pt", lambda t: torch.save(saved | {"step": log.total}, t))
    panels = [(f"success rate, {n}", (f"skills_{n}", f"scratch_{n}")) for n in NEW_TASKS]
    plot_curve(out / "curve.png", log.rows, panels, "environment steps of the new task")
    films = [draw_film(runs[i][0]) for i in (0, 2)]
    save_gif(out / "rollout.gif", [left[:2] + right[:2] for left, right in zip(*films)])
    return write_summary(out, summary, log)


# --- Appendix: tasks, measures, pictures, shared networks, run folder, log -----------------------


class GoalTasks:
    """Tasks for the agent alone. It starts near the centre and sees only itself: only z can tell it
    which goal to go for. A task (N,) is paid exp(−d²/(2·0.15²)), d the distance to the nearest of
    its goals. With `in_order` its goals are to be visited one after the other, being within 0.1 of
    the last pays 1, nothing else pays, and the observation ends with a one-hot of the next goal.
    Either way it is solved if the episode's last five steps are within 0.1 of the (last) goal."""

    action_dim, steps, hold = 2, 40, 1  # A, T, steps of an action

    def __init__(self, num_envs, goals, in_order=False):  # goals (K, G, 2)
        self.num_envs, self.goals, self.in_order = num_envs, goals, in_order
        self.num_tasks, self.num_goals = goals.shape[:2]
        self.obs_dim = 4 + (self.num_goals if in_order else 0)
        horizon = self.steps + 1  # so that the last state stays to be looked at
        options = {"task": "reach", "observation": "state", "horizon": horizon}
        self.env = sprites_env.SpritesVectorEnv(num_envs, **options)

    def reset(self, rng, task):
        states = np.zeros((self.num_envs, 2, 4))
        states[..., :2] = 0.5
        states[:, AGENT, :2] += rng.uniform(-0.05, 0.05, (self.num_envs, 2))
        self.env.reset(options={"state": states})
        self.task, self.near = task, np.zeros(self.num_envs, int)  # near: for so many steps now
        self.next_goal = np.zeros(self.num_envs, int)
        self.path = [states[:, AGENT, :2]]  # where they went, for pictures
        return self.observe()

    def observe(self):
        state = (self.env.states[:, AGENT] - (0.5, 0.5, 0, 0)) / (0.25, 0.25, 0.05, 0.05)
        next_goal = np.eye(self.num_goals)[self.next_goal]
        return np.concatenate([state, next_goal], axis=1, dtype=np.float32)[:, : self.obs_dim]

    def step(self, action):  # (N, A) -> observations (N, D), rewards (N,), terminated (N,)
        _, _, terminated, _, _ = self.env.step(action)
        position = self.env.states[:, AGENT, :2].copy()
        self.path.append(position)
        distance = np.linalg.norm(position[:, None] - self.goals[self.task], axis=-1)  # (N, G)
        if self.in_order:
            here = distance[np.arange(self.num_envs), self.next_goal] < 0.1
            last = self.next_goal == self.num_goals - 1
            near, self.next_goal = here & last, self.next_goal + (here & ~last)
            reward = near.astype(float)
        else:
            self.nearest, distance = distance.argmin(1), distance.min(1)
            near, reward = distance < 0.1, np.exp(-(distance**2) / (2 * 0.15**2))
        self.near = np.where(near, self.near + 1, 0)
        return self.observe(), reward, terminated

    @property
    def solved(self):  # (N,) bool
        return self.near >= 5


def steps_to_solve(rows, name):
    """Steps to 80 % success on a new task with skills and from scratch, None if never, and how many
    times fewer it were with skills: at least so many, if scratch never got there."""

    def first(how):
        return next((row["step"] for row in rows if row[f"{how}_{name}"] >= 0.8), None)

    ours, theirs = first("skills"), first("scratch")
    return ours, theirs, (theirs or rows[-1]["step"]) / ours if ours else None


@torch.no_grad()
def evaluate_skills(tasks, learner, window):
    """One episode per environment, tasks in turn, a new z each, then the mean of every action.

    Returns metrics and episodes (see `roll_out`). Identifiability: which of 64 episodes was whose?
    The random streams of training stay as they were."""
    device = learner.embedding.place.device
    K, task = tasks.num_tasks, torch.arange(tasks.num_envs, device=device) % tasks.num_tasks
    with torch.random.fork_rng():
        torch.manual_seed(10**9)
        z = learner.embedding(task).sample()
    rng = np.random.default_rng(10**9)
    episodes = roll_out(tasks, learner.policy, rng, task, z, noise=False)
    solved, returns = tasks.solved, episodes["reward"].sum(1)
    rates = [solved[k::K].mean() for k in range(K)]
    metrics = {"success_rate": np.mean(rates), "worst_task": min(rates)}
    metrics["solved_goals"] = sum(rate >= 0.9 for rate in rates)
    if z.shape[-1]:
        top1 = []
        for rows in torch.arange(len(z) // 64 * 64 or len(z)).split(64):
            seen = windows(episodes["obs"][rows], episodes["action"][rows], window)
            q = learner.inference(seen[:, :, None])  # (M, T, 1), against M candidates
            top1.append(identified(q.log_prob(z[rows]).mean(1)))
        metrics["identifiability_top1"] = np.mean(top1)
    if tasks.num_goals > 1 and not tasks.in_order:
        share = np.bincount(tasks.nearest[solved], minlength=tasks.num_goals) / len(z)
        metrics["solutions_found"] = (share >= 0.05).sum()
        share = share[share > 0] / share.sum()
        metrics["goal_entropy_bits"] = -(share * np.log2(share)).sum()
    if learner.embedding.kind == "gaussian" and K > 1:
        kl = divergences(learner.embedding(torch.arange(K, device=device)))
        metrics |= {f"kl_1_{k + 1}": kl[0, k].item() for k in range(1, K)}
    metrics = {name: float(value) for name, value in metrics.items()}
    metrics |= {"eval_return_mean": returns.mean().item(), "eval_return_std": returns.std().item()}
    return metrics, episodes


def load_skills(path, device):
    """The SkillLearner of a checkpoint, as `train` saved it."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        learner = SkillLearner(**saved["sizes"]).to(device)
        learner.load_state_dict(saved["networks"])
    except Exception as error:  # whatever a file that is something else may hold
        raise SystemExit(f"error: {path} is no checkpoint of skills: {error}") from None
    return learner


def draw_film(tasks):
    """Four last episodes of `tasks`, for save_gif: the agent, and the goals that it cannot see."""
    goals = tasks.goals[tasks.task[:4]]  # (4, G, 2)
    shapes = [sprites_env.SHAPES.index(s) for s in ("circle", *["square"] * len(goals[0]))]

    def draw(positions):  # (N, 2)
        pairs = zip(positions, goals)
        return tuple(sprites_env.draw_rgb(np.vstack(pair), np.array(shapes)) for pair in pairs)

    return [draw(positions) for positions in tasks.path]


@torch.no_grad()
def plot_skills(path, tasks, learner, z):
    """Episodes coloured by z; where z is; a walk in z, from the middle of p(z|first task) to that
    of the last one, or along its first number if there is one task only; and the divergences."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Ellipse

    def pad(x):  # (N, Z) -> (N, 3), as an array
        return np.pad(x.cpu().numpy(), ((0, 0), (0, 2)))[:, :3]

    def colour(x):  # (N, 3) -> RGB: what is average is grey
        return 1 / (1 + np.exp(-1.5 * (x - pad(z).mean(0)) / (pad(z).std(0) + 1e-6)))

    def draw_paths(axis, paths, colours):  # (N, T + 1, 2)
        for places, rgb in zip(paths, colours):
            axis.plot(places[:, 1], places[:, 0], color=rgb, lw=0.7)
            axis.plot(*places[-1, ::-1], "o", color=rgb, ms=3)
        for x, y in np.unique(tasks.goals.reshape(-1, 2), axis=0):
            axis.add_patch(Circle((y, x), 0.1, fill=False, ls="--", color="grey"))
        axis.set(xlim=(0.05, 0.95), ylim=(0.95, 0.05), xlabel="y (frame widths)", ylabel="x")
        axis.set_aspect("equal")

    K = tasks.num_tasks
    compares = K > 1 and learner.embedding.kind == "gaussian"
    figure = Figure(figsize=(17.5 if compares else 13.5, 4.5), layout="constrained")
    left, middle, right, *more = figure.subplots(1, 3 + compares)
    places = np.stack(tasks.path, axis=1)
    draw_paths(left, places[:128], colour(pad(z)))
    left.set_title("episodes, coloured by z (dashed: goals)")

    p = learner.embedding(torch.arange(K, device=z.device))
    middle.scatter(*pad(z).T[:2], c=colour(pad(z)), s=8)
    for k, (where, width) in enumerate(zip(pad(p.mean), pad(p.stddev))):
        if learner.embedding.kind == "gaussian":  # two standard deviations to each side
            ellipse = Ellipse(where[:2], *(4 * width[:2]), fill=False, color="black")
            middle.add_patch(ellipse)
        middle.annotate(f"task {k + 1}", where[:2], (0, 10 * k - 15), textcoords="offset points")
    middle.set(xlabel="z1", ylabel="z2", title="the embedding: p(z|t)")

    along = 2 * p.stddev[0] * torch.eye(z.shape[1], device=z.device)[0]
    first, last = (p.mean[0], p.mean[-1]) if K > 1 else (p.mean[0] - along, p.mean[0] + along)
    walk = first + (last - first) * torch.linspace(0, 1, 15, device=z.device)[:, None]
    walkers, task = GoalTasks(15, tasks.goals), torch.zeros(15, dtype=torch.long)
    roll_out(walkers, learner.policy, np.random.default_rng(0), task, walk, noise=False)
    draw_paths(right, np.stack(walkers.path, axis=1), colour(pad(walk)))
    right.set_title("a walk in z, " + (f"task 1 to task {K}" if K > 1 else "along z1"))
    for axis in more:
        kl = divergences(p).cpu().numpy()
        axis.imshow(np.log1p(kl), cmap="Blues", vmax=12)
        for i, j in np.ndindex(K, K):
            axis.text(j, i, f"{kl[i, j]:.3g}", ha="center", va="center")
        axis.set_xticks(range(K), range(1, K + 1))
        axis.set_yticks(range(K), range(1, K + 1))
        axis.set(xlabel="task j", ylabel="task i", title="KL(p(z|i) ‖ p(z|j)), nats")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100))


def write_summary(out, summary, log):
    """Write summary.json, which says that the run has finished; returns its content."""
    summary = summary | {"minutes": round(log.minutes(), 2)}
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


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


def save_gif(path, film):
    """film: a list of tuples of images uint8 (height, width, 3), shown side by side."""
    from PIL import Image

    rows = [np.concatenate([np.pad(i, ((3, 3), (3, 3), (0, 0))) for i in row], 1) for row in film]
    first, *rest = [Image.fromarray(row).quantize(16) for row in rows]
    settings = {"save_all": True, "append_images": rest, "loop": 0, "duration": 100}  # ms
    write_whole(path, lambda temporary: first.save(temporary, **settings))


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
