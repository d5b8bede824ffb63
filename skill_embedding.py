"""An embedding space of skills: one policy for many tasks, steered by a latent z.

What
    Several tasks share one policy π(a|s,z), which is never told the task, only a z drawn from
    p(z|t) at the start of an episode. Entropy terms keep many z alive for every task, and a network
    that guesses z from what was done rewards skills that can be distinguished. All is learnt
    off-policy from whole episodes, with Retrace. `--experiment` asks: are four tasks learnt
    (library)? Does one task find several solutions (versatility)? Do equal tasks share their skills
    (generality)? And, the skills frozen, are new tasks learnt faster by choosing z (transfer)?

Paper
    Hausman, Springenberg, Wang, Heess & Riedmiller, "Learning an Embedding Space for Transferable
    Robot Skills", ICLR 2018. Retrace: Munos, Stepleton, Harutyunyan & Bellemare, "Safe and
    efficient off-policy reinforcement learning", 2016, arXiv 1606.02647.

Algorithm
    repeat until --total-steps:
        z ~ p(·|t), roll_out, store                    a whole episode in each of N environments
        --updates times, on B episodes:
            update_inference                           q names the skill that was seen, (5)
            update_skill_critic                        Retrace targets (2) of rewards (1), then (3)
            update_skill_actor                         π and p(z|t) on (4), with new z
        about twenty times in all: evaluate_skills     without noise
    transfer: SkillTasks has the frozen policy, and z as actions; the same loop learns to choose,
        and now and then tries any skill of the library

Equations
    Maximise  E[Σ γⁱ r̂ᵢ] + α₁ E_t H[p(z|t)]  over π and p, by way of Q:
    (1)  r̂ᵢ = r_t(sᵢ,aᵢ) + α₂ clip(log q(z|aᵢ, sᵢ₋w … sᵢ), −3, 3) + α₃ H[π(·|sᵢ,z)]
    (2)  Gⱼ = r̂ⱼ + γ [Vⱼ₊₁ + cⱼ₊₁ (Gⱼ₊₁ − Q̄ⱼ₊₁)],   V = E_π[Q̄],   c = min(1, π(a|s,z) / b(a|s,z))
         Q̄ is a slow copy of Q, b the policy that acted; one sample of π stands for E_π
    (3)  Q ← argmin E[(Q(s,a;z,t) − G)²],   s, a, z, t from the replay
    (4)  π, p ← argmax E[Q(s,a;z,t) + α₃ H[π(·|s,z)] − 0.03 ‖mean of π‖²] + α₁ E_t H[p(z|t)],
         new z ~ p(·|t), a ~ π: p learns through z, into policy and critic
    (5)  q ← argmax E[log q(z|a, s …)],   the likelihood of the z that was acted on

Notation
    t task, i and j steps, H[·] entropy, r_t reward of task t. In shapes: N environments, T steps of
    an episode, B episodes of a batch, Z size of z, A of an action, D of an observation, w steps
    that q looks back, K tasks, L goals of a task, M episodes of an evaluation.

Differs from the paper
    1. (2) is Retrace as Munos et al. have it; the recursion printed in the paper is not.
    2. p(z|t) / b(z|t) is no part of c, as z is given once it is drawn, and c could exceed π / b;
       --z-ratio puts it back.
    3. (4) has the entropy of the policy in it: ∂Q/∂a cannot see that of the present state.
    4. p(z|t) is a table, not a linear network, and its standard deviation is bounded: it widens
       while α₁ > α₂ Σγⁱ, until tasks overlap, and shrinks to a point where it is less. Tasks start
       apart in z (--spread); in the paper they start alike, as in all but library here.
    5. log q is cut off at ±3 in (1): one odd step must not outweigh the task. 0.03 ‖mean‖² is
       subtracted in (4), and α₃ starts large: or else the policy runs into the wall behind the goal
       and stays there, bouncing on the spot. In the second half of the run α₃ falls to zero, α₂ to
       a quarter: skills become different first, and exact afterwards.
    6. Z = 2, in which a skill can say all of z by where it comes to rest; the paper has 3.
    7. A point, the agent of Sprites alone, instead of a robot arm; minutes on one core. In transfer
       the library has sixteen goals on a circle, so that z can be walked from each to the next; a z
       is held for 20 steps, whose rewards are added, and γ is that of 20 steps. The time left is
       seen, and three choices of ten are at first any skill of the library.

Run
    python skill_embedding.py
    python skill_embedding.py --experiment versatility --embedding bernoulli
    python skill_embedding.py --experiment transfer

Writes
    to runs/skill_embedding/<experiment>_<embedding>_s<seed>/: args.json, curve.csv, curve.png,
    skills.png (episodes by z; embedding; a walk in z; KL), rollout.gif, checkpoint.pt (at every
    report) and summary.json: `success_rate`, `worst_task`, `solved_goals` (tasks solved in 90 %),
    `identifiability_top1` (share of 64 episodes whose own z is the likeliest of the 64: 1/64 by
    chance, K/64 if only the task shows, never more than 2^Z / 64 with bits),
    `eval_return_mean`, `eval_return_std`, `eval_episodes`, `minutes`; if gaussian `kl_1_2` ...,
    KL(p(z|1) ‖ p(z|2)); versatility: `solutions_found` (goals that 5 % of the episodes end at),
    `goal_entropy_bits`; generality: `kl_duplicate` (task 3 is task 1), `kl_others` (the smaller).
    Columns of curve.csv: `step`, `seconds`, `steps_per_second`, these, and of the last batch
    `critic_loss`, `log_q` and `entropy_z` (of p(z|t)).
    transfer has the library it learns in library/, no skills.png, and instead `success_skills_...`,
    `success_scratch_...` and `success_random_...` (a random skill at every choice) on the tasks
    interpolation and sequencing, `steps_...` to 80 %, and `transfer_steps_ratio` of these by task
    (if scratch never got there, its budget counts: at least so many times); curve.csv: success.

Result
    Four goals in 97 to 99 % of the episodes (five seeds, 4 minutes). New tasks with skills, three
    seeds: a goal between two after 3,200 to 4,480 steps (from scratch 7,680, 8,320, never), two
    goals in order after 3,840 to 7,680 (once after 14,080, else never). All: benchmark/README.md.

Try
    1. --alpha2 0 --out runs/a, --alpha2 0.3 --out runs/b: what changes in skills.png and in
       identifiability_top1?
    2. --z-ratio --out runs/z: does the critic's loss change, and why where p(z|t) moves?
    3. --experiment transfer --hold 1 --out runs/h: what is lost by choosing at every step?
"""

import copy
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import sprites_env
from sprites_env import AGENT, Run, require, require_positive

ANGLES = np.pi / 8 * np.arange(16)
CIRCLE = 0.5 + 0.3 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)  # (16, 2), goals
GOALS = CIRCLE[::4]  # (4, 2)
TASKS = {  # tasks to learn skills from, (K, L, 2): any of its L goals solves a task
    "library": GOALS[:, None],
    "versatility": GOALS[None],
    "generality": GOALS[[0, 1, 0, 2], None],  # the third task is the first again
    "transfer": CIRCLE[:, None],  # neighbours share skills: z can be walked from one to the next
}
NEW_TASKS = {  # to reuse them for, (1, L, 2): goals to visit one after the other
    "interpolation": CIRCLE[1:3].mean(0)[None, None],  # halfway between two
    "sequencing": CIRCLE[None, [2, 10]],  # opposite to each other
}
RADIUS = {"interpolation": 0.05, "sequencing": 0.1}  # frame widths from a goal, to be near it
COMMON = {"spread": 0.0, "z_sd": 0.2, "alpha1": 2.0, "alpha2": 0.2, "gamma": 0.9}
COMMON |= {"total_steps": 224_000}
USUAL = {  # defaults that depend on the experiment
    "library": COMMON | {"spread": 1.5},
    "generality": COMMON,
    "versatility": COMMON | {"z_sd": 1.0, "alpha1": 5.0, "alpha2": 0.5},  # room for one task
    "transfer": COMMON | {"z_sd": 0.4, "gamma": 0.97, "total_steps": 128_000},  # 20 steps a choice
    "one_hot": {"alpha1": 0.0, "alpha2": 0.0},  # nothing to widen, nothing to tell apart
}
Z_RANGE = 3.0  # bound of the means of p(z|t)
Z_GAIN = 4.5  # of z as an input, so that what differs within a task is not overlooked
TAU = 0.01  # how fast the target critic follows
EFFORT = 0.03  # weight of the squared mean action in (4)
LOG_Q_CLIP = 3.0  # of log q in (1): one odd step must not outweigh the task
EPSILON = 0.3  # share of choices that are any skill of the library, at first
REPLAY_EPISODES = 2000
HELD_STEPS = 5  # at the end, near the goal, to solve a task
REWARD_WIDTH = 0.15  # frame widths


@dataclass(frozen=True)
class Args:
    experiment: Literal["library", "versatility", "generality", "transfer"] = "library"  # see What
    embedding: Literal["gaussian", "bernoulli", "one_hot"] = "gaussian"  # p(z|t); one_hot is fixed
    z_dim: int | None = None  # Z (default: 2; K if one_hot)
    spread: float | None = None  # how far apart tasks start in z (library 1.5, else 0)
    z_sd: float | None = None  # bound of the deviation of p(z|t) (0.2, transfer 0.4, versatility 1)
    alpha1: float | None = None  # α₁, weight of the entropy of p(z|t) (2, versatility 5, one_hot 0)
    alpha2: float | None = None  # α₂, pay for being told apart (0.2, versatility 0.5, one_hot 0)
    alpha3: float = 0.06  # α₃, weight of the entropy of the policy, at first
    window: int = 4  # w, steps that the inference network looks back
    z_ratio: bool = False  # have p(z|t) / b(z|t) in c, as printed in the paper
    gamma: float | None = None  # discount factor per step (0.9; transfer 0.97, its library 0.9)
    total_steps: int | None = None  # environment steps, whole rounds (224,000, transfer 128,000)
    num_envs: int = 16  # episodes of a round, N
    updates: int = 40  # gradient steps after a round
    batch_size: int = 32  # episodes of an update, B (choosing skills: --hold times as many)
    learning_rate: float = 1e-3  # of Adam; falls to zero over the second half
    library: str | None = None  # transfer: a checkpoint.pt of skills (default: learn them first)
    hold: int = 20  # transfer: steps for which a chosen z is acted on
    transfer_steps: int = 25_600  # transfer: environment steps for each new task and learner
    eval_episodes: int = 256  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain nothing from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        usual = USUAL[self.experiment] | (USUAL["one_hot"] if self.embedding == "one_hot" else {})
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # a frozen class allows no other way
        require_positive(self, but="alpha1 alpha2 alpha3 window spread")
        require(self.gamma < 1, "--gamma must be below 1")
        K, T = 1 if self.library else len(self.goals), GoalTasks.steps
        whole = self.num_envs % K == 0 and self.eval_episodes % K == 0
        require(
            whole, f"--num-envs and --eval-episodes must be multiples of {K}, the number of tasks"
        )
        require(self.eval_episodes > 1, "--eval-episodes must be at least 2: their spread is told")
        free = self.z_dim is None or self.embedding != "one_hot"
        require(free, "--z-dim is the number of tasks with --embedding one_hot")
        least = self.num_envs * T
        enough = min(self.total_steps, self.transfer_steps if self.transfers else least) >= least
        require(enough, f"--total-steps, and --transfer-steps, must be at least {least}")
        require(T % self.hold == 0, f"--hold must divide {T}")
        require(self.transfers or not self.library, "--library is for --experiment transfer")
        kinds = [self.embedding, load_skills(self.library).embedding.kind if self.library else None]
        bits = self.transfers and "bernoulli" in kinds
        require(not bits, "--experiment transfer cannot choose bits by degrees")

    @property
    def transfers(self):
        return self.experiment == "transfer"

    @property
    def goals(self):  # (K, L, 2), of the tasks to learn skills from
        return TASKS[self.experiment]

    @property
    def run_name(self):
        return f"{self.experiment}_{self.embedding}_s{self.seed}"


# --- Networks: each returns a distribution ---------------------------------------------------


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

    def forward(self, window):  # (..., (w + 1) D + A) -> a distribution over (..., Z)
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
        one_hot = nn.functional.one_hot(task, self.tasks).expand(*obs.shape[:-1], -1)
        inputs = [obs, action.clamp(-1, 1), Z_GAIN * z.expand(*obs.shape[:-1], -1), one_hot]
        return self.mlp(torch.cat(inputs, dim=-1)).squeeze(-1)


def mlp(size_in, hidden, size_out):
    """A multilayer perceptron of three layers."""
    layers = [nn.Linear(size_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return orthogonal_(nn.Sequential(*layers, nn.Linear(hidden, size_out)))


def orthogonal_(module):
    """Orthogonal weights and zero biases, so that no signal vanishes on its way."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return module


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


class SkillAgent:
    """The networks, the critic's slow copy, and three optimisers."""

    def __init__(self, learner, args):
        self.learner = learner
        self.critic_target = copy.deepcopy(learner.critic).requires_grad_(False)
        acting = [*learner.policy.parameters(), *learner.embedding.parameters()]
        groups = acting, learner.critic.parameters(), learner.inference.parameters()
        made = [torch.optim.Adam(group, lr=args.learning_rate, fused=True) for group in groups]
        self.optimizers = self.actor_optimizer, self.critic_optimizer, self.inference_optimizer = (
            made
        )


# --- Losses: pure functions of tensors -------------------------------------------------------


def skill_reward(reward, log_q, entropy, alpha2, alpha3):
    """r̂ = r + α₂ log q(z|a, s …) + α₃ H[π(·|s,z)], eq. (1); log q is cut off. All (B, T)."""
    assert reward.shape == log_q.shape == entropy.shape
    return reward + alpha2 * log_q.clamp(-LOG_Q_CLIP, LOG_Q_CLIP) + alpha3 * entropy


def retrace_targets(reward, terminated, value, action_value, log_ratio, gamma):
    """Gⱼ = r̂ⱼ + γ [Vⱼ₊₁ + cⱼ₊₁ (Gⱼ₊₁ − Q̄ⱼ₊₁)],   c = min(1, exp(log_ratio)), eq. (2).

    reward, terminated, action_value (Q̄), log_ratio (B, T), value (V) (B, T + 1) -> (B, T); called
    without gradient.
    The last step bootstraps with V alone, and nothing is worth anything after `terminated`."""
    assert reward.shape == terminated.shape == action_value.shape == log_ratio.shape
    assert value.shape == (len(reward), reward.shape[1] + 1)
    trace, going_on = log_ratio.exp().clamp(max=1), gamma * (1 - terminated)
    one_step = reward + going_on * value[:, 1:]
    targets = [one_step[:, -1]]
    for j in reversed(range(reward.shape[1] - 1)):
        correction = trace[:, j + 1] * (targets[-1] - action_value[:, j + 1])
        targets.append(one_step[:, j] + going_on[:, j] * correction)
    return torch.stack(targets[::-1], dim=1)


def skill_critic_loss(action_value, target):
    """E[(Q(s,a;z,t) − G)²], eq. (3). Both (B, T) -> scalar."""
    assert action_value.shape == target.shape
    return (action_value - target).square().mean()


def skill_actor_loss(action_value, mean, policy_entropy, embedding_entropy, alpha1, alpha3):
    """−E[Q + α₃ H[π]] − α₁ E_t H[p(z|t)], eq. (4), and 0.03 E‖mean‖²: beyond the bounds of an
    action, where Q is flat, nothing else would ever bring the mean back.

    action_value, policy_entropy, embedding_entropy (B, T), mean (B, T, A) -> scalar."""
    assert action_value.shape == policy_entropy.shape == embedding_entropy.shape == mean.shape[:-1]
    objective = action_value + alpha3 * policy_entropy + alpha1 * embedding_entropy
    return (EFFORT * mean.square().sum(-1) - objective).mean()


def inference_loss(log_q):
    """−E[log q(z|a, s …)], eq. (5), of the z that was acted on. (B, T) -> scalar."""
    return -log_q.mean()


def windows(obs, actions, steps):
    """What q sees at step i: aᵢ and sᵢ₋w … sᵢ; the first state stands in for those before it.
    obs (B, T + 1, D), actions (B, T, A) -> (B, T, (w + 1) D + A)."""
    T = actions.shape[1]
    at = torch.arange(T)[:, None] + torch.arange(-steps, 1)  # (T, w + 1)
    return torch.cat([obs[:, at.clamp(min=0)].flatten(2), actions], dim=-1)


def straight_through(distribution):
    """A sample that gradients pass: reparametrised, or for bits as if it were their mean."""
    if distribution.has_rsample:
        return distribution.rsample()
    return distribution.sample() + (distribution.mean - distribution.mean.detach())


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each, on a batch of whole episodes (see `roll_out`) -----------


def update_inference(agent, batch, args):
    """One step of q on (5): name the skill that was seen. Returns log q (B, T) without gradient."""
    seen = windows(batch["obs"], batch["action"], args.window)
    log_q = agent.learner.inference(seen).log_prob(batch["z"][:, None])
    loss = inference_loss(log_q)
    if batch["z"].shape[-1]:  # without a z there is nothing to name
        agent.inference_optimizer.zero_grad()
        loss.backward()
        agent.inference_optimizer.step()
    return log_q.detach()


def update_skill_critic(agent, batch, log_q, alpha2, alpha3, gamma, args):
    """One step of the critic on (3): what the present policy would earn, from what others did.
    Rewards (1) are made anew, with log q as it was just before its update; V and Q̄ are those of
    the slow copy."""
    learner, obs, action = agent.learner, batch["obs"], batch["action"]
    before = obs[:, :-1]
    z, t = batch["z"][:, None], batch["task"][:, None]  # the same at every step
    with torch.no_grad():
        pi = learner.policy(obs, z)
        now = gaussian(pi.mean[:, :-1], pi.stddev[:, :-1])
        log_ratio = now.log_prob(action) - batch["log_b"]
        if args.z_ratio:
            log_ratio += learner.embedding(t).log_prob(z) - batch["log_b_z"][:, None]
        r_hat = skill_reward(batch["reward"], log_q, now.entropy(), alpha2, alpha3)
        value = agent.critic_target(obs, pi.sample(), z, t)
        q_bar = agent.critic_target(before, action, z, t)
        target = retrace_targets(r_hat, batch["terminated"], value, q_bar, log_ratio, gamma)
    loss = skill_critic_loss(learner.critic(before, action, z, t), target)
    agent.critic_optimizer.zero_grad()
    loss.backward()
    agent.critic_optimizer.step()
    polyak_(agent.critic_target, learner.critic, TAU)
    return {"critic_loss": loss.detach()}


def update_skill_actor(agent, batch, alpha3, args):
    """One step of policy and embedding on (4): old states, but another skill for every one. This
    fills the critic's .grad as well; its own zero_grad discards that."""
    learner, before = agent.learner, batch["obs"][:, :-1]
    t = batch["task"][:, None].expand(before.shape[:-1])
    p = learner.embedding(t)
    z = straight_through(p)
    pi = learner.policy(before, z)
    action_value = learner.critic(before, pi.rsample(), z, t)
    entropies = pi.entropy(), p.entropy()
    loss = skill_actor_loss(action_value, pi.mean, *entropies, args.alpha1, alpha3)
    agent.actor_optimizer.zero_grad()
    loss.backward()
    agent.actor_optimizer.step()
    return {"entropy_z": entropies[1].detach().mean()}


# --- Data ------------------------------------------------------------------------------------


class GoalTasks:
    """Tasks for the agent alone; for tasks of your own, write a class with the same methods. It
    starts near the centre and sees only itself: only z can tell it which goal to go for. A task
    (N,) is paid exp(−d²/(2·0.15²)), d the distance to the nearest of its goals, and solved if the
    episode's last five steps are within `radius` of one. With `in_order` the goals are to be
    visited one after the other: only being near the last, after the others, pays, 1 a step, and
    solves. The observation then ends with a one-hot of the next goal and with the time left, 1 to
    -1, on which it depends what a choice is worth."""

    action_dim, steps, hold = 2, 40, 1  # A, T, steps of an action
    any_skill = None  # nothing is known that could be tried

    def __init__(self, num_envs, goals, in_order=False, radius=0.1):  # goals (K, L, 2)
        self.num_envs, self.goals, self.in_order, self.radius = num_envs, goals, in_order, radius
        self.num_tasks, self.num_goals = goals.shape[:2]
        self.obs_dim = 4 + (self.num_goals + 1 if in_order else 0)
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
        left = np.full((self.num_envs, 1), 1 - 2 * (len(self.path) - 1) / self.steps)
        parts = [state, next_goal, left]
        return np.concatenate(parts, axis=1, dtype=np.float32)[:, : self.obs_dim]

    def step(self, action):  # (N, A) -> observations (N, D), rewards (N,), terminated (N,)
        _, _, terminated, _, _ = self.env.step(action)
        position = self.env.states[:, AGENT, :2].copy()
        self.path.append(position)
        distance = np.linalg.norm(position[:, None] - self.goals[self.task], axis=-1)  # (N, L)
        if self.in_order:
            here = distance[np.arange(self.num_envs), self.next_goal] < self.radius
            last = self.next_goal == self.num_goals - 1
            near, self.next_goal = here & last, self.next_goal + (here & ~last)
            reward = near.astype(float)
        else:
            self.nearest, distance = distance.argmin(1), distance.min(1)
            near, reward = distance < self.radius, np.exp(-(distance**2) / (2 * REWARD_WIDTH**2))
        self.near = np.where(near, self.near + 1, 0)
        over = self.in_order and len(self.path) > self.steps  # where time is seen, its end is one
        return self.observe(), reward, terminated | over

    @property
    def solved(self):  # (N,) bool
        return self.near >= HELD_STEPS


class SkillTasks:
    """The same tasks on another scale: an action chooses a skill, z = reach · action, and the
    library's frozen policy π(a|s,z) acts on it for `hold` steps, of which the rewards are added.
    reach (Z,) is how far the library goes in z; beyond that its policy knows nothing."""

    def __init__(self, tasks, library, hold):
        self.tasks, self.hold = tasks, hold
        self.policy, self.embedding = library.policy, library.embedding
        with torch.no_grad():
            p = self.embedding(torch.arange(len(self.embedding.place)))
        self.reach = (p.mean.abs() + 2 * p.stddev).amax(0)
        self.action_dim, self.steps = len(self.reach), tasks.steps // hold

    def reset(self, rng, task):
        self.obs = self.tasks.reset(rng, task)
        return self.obs

    def step(self, action):
        device = self.reach.device
        z, total = self.reach * torch.as_tensor(action, device=device).clamp(-1, 1), 0
        for _ in range(self.hold):
            own = torch.as_tensor(self.obs[:, :4], device=device)  # what it was trained to see
            with torch.no_grad():
                action = self.policy(own, z).mean.cpu().numpy()
            self.obs, reward, terminated = self.tasks.step(action)
            total = total + reward
        return self.obs, total, terminated

    def any_skill(self, obs, z):
        """A policy to explore with: a skill of the library, of a task drawn anew for each choice.
        obs (N, D) -> a distribution over actions (N, Z)."""
        p = self.embedding(torch.randint(len(self.embedding.place), (len(obs),)))
        return gaussian(p.mean / self.reach, p.stddev / self.reach)

    def __getattr__(self, name):  # what skills do not change: solved, goals, path ...
        return getattr(self.tasks, name)


def now_and_then(epsilon, other, policy):
    """A policy (N, D), (N, Z) -> over (N, A) that at each choice is `other` with probability ε. It
    returns the distribution of the one that chose, so that log b is its own."""

    def act(obs, z):
        ours, theirs = policy(obs, z), other(obs, z)
        swap = torch.rand(len(obs), 1, device=obs.device) < epsilon
        mean = torch.where(swap, theirs.mean, ours.mean)
        return gaussian(mean, torch.where(swap, theirs.stddev, ours.stddev))

    return act


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


# --- Measures --------------------------------------------------------------------------------


def identified(log_q):
    """Share of episodes whose own z is the likeliest of all: log_q (M, M), row i the episode,
    column j the candidate. By chance 1/M."""
    return (log_q.argmax(1) == torch.arange(len(log_q), device=log_q.device)).float().mean().item()


def divergences(embedding):
    """KL(p(z|i) ‖ p(z|j)) of all tasks i, j: a distribution of shape (K, Z) -> (K, K)."""
    parts = (embedding.base_dist.mean, embedding.base_dist.stddev)
    p = gaussian(*(x[:, None] for x in parts))
    return kl_divergence(p.expand((len(parts[0]),) * 2), embedding.expand((len(parts[0]),) * 2))


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
            guess = learner.inference(seen[:, :, None])  # (M, T, 1), against M candidates
            top1.append(identified(guess.log_prob(z[rows]).mean(1)))
        metrics["identifiability_top1"] = np.mean(top1)
    if tasks.num_goals > 1 and not tasks.in_order:
        shares = np.bincount(tasks.nearest[solved], minlength=tasks.num_goals) / len(z)
        metrics["solutions_found"] = (shares >= 0.05).sum()
        p = shares[shares > 0] / shares.sum()
        metrics["goal_entropy_bits"] = -(p * np.log2(p)).sum()
    if learner.embedding.kind == "gaussian" and K > 1:
        kl = divergences(learner.embedding(torch.arange(K, device=device)))
        metrics |= {f"kl_1_{k + 1}": kl[0, k].item() for k in range(1, K)}
    metrics = {name: float(value) for name, value in metrics.items()}
    metrics |= {"eval_return_mean": returns.mean().item(), "eval_return_std": returns.std().item()}
    return metrics, episodes


# --- Training --------------------------------------------------------------------------------


def learn(tasks, learner, total_steps, reports, args, rng, device):
    """Learn tasks: skills, if they have a z, or to act, or to choose skills, if actions are those.

    A generator: about `reports` times on the way it yields the steps so far, and metrics."""
    N, hold = tasks.num_envs, tasks.hold
    rounds, gamma = total_steps // (N * tasks.steps * hold), args.gamma**hold
    agent, replay = SkillAgent(learner, args), TrajectoryReplay(room=REPLAY_EPISODES)
    task = torch.arange(N, device=device) % tasks.num_tasks

    for rounds_so_far in range(1, rounds + 1):
        left = min(1, 2 - 2 * (rounds_so_far - 1) / rounds)  # 1 for half of the run, then to 0

        # act and store: an episode each, with the same z throughout
        with torch.no_grad():
            p = learner.embedding(task)
            z = p.sample()
            log_b_z = p.log_prob(z)
        policy = learner.policy
        if tasks.any_skill:
            policy = now_and_then(EPSILON * left, tasks.any_skill, policy)
        episodes = roll_out(tasks, policy, rng, task, z)
        replay.add(episodes | {"log_b_z": log_b_z})

        # learn
        alpha2, alpha3 = args.alpha2 * (1 + 3 * left) / 4, args.alpha3 * left
        for optimizer in agent.optimizers:
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
        for _ in range(args.updates):
            batch = replay.sample(rng, args.batch_size * hold)  # as many choices as actions
            log_q = update_inference(agent, batch, args)
            metrics = update_skill_critic(agent, batch, log_q, alpha2, alpha3, gamma, args)
            metrics |= update_skill_actor(agent, batch, alpha3, args) | {"log_q": log_q.mean()}

        # report
        if rounds_so_far % max(1, rounds // reports) == 0 or rounds_so_far == rounds:
            metrics = {name: value.item() for name, value in metrics.items()}
            yield rounds_so_far * N * tasks.steps * hold, metrics


def train(args):
    """One run of an experiment; returns the content of summary.json."""
    return train_transfer(args) if args.transfers else train_skills(args)


def train_skills(args):
    """Learn one policy for all tasks of the experiment, steered by z."""
    N, K = args.num_envs, len(args.goals)
    round_steps = N * GoalTasks.steps
    run = Run(args, total=args.total_steps // round_steps * round_steps)
    device = run.device
    tasks, eval_tasks = (GoalTasks(n, args.goals) for n in (N, args.eval_episodes))
    rng = np.random.default_rng(args.seed)
    z_dim = K if args.embedding == "one_hot" else args.z_dim or 2
    sizes = {"tasks": K, "z_dim": z_dim, "embedding": args.embedding}
    sizes |= {"obs_dim": tasks.obs_dim, "action_dim": tasks.action_dim, "window": args.window}
    sizes |= {"spread": args.spread, "z_sd": args.z_sd}
    learner = SkillLearner(**sizes).to(device)
    for step, learnt in learn(tasks, learner, args.total_steps, 20, args, rng, device):
        metrics, episodes = evaluate_skills(eval_tasks, learner, args.window)
        run.report(step, **metrics, **learnt)
        saved = {"sizes": sizes, "networks": learner.state_dict(), "step": step}
        run.save("checkpoint.pt", saved)

    run.save("skills.png", draw_skills(eval_tasks, learner, episodes["z"]))
    run.save("rollout.gif", draw_film(eval_tasks))
    summary = metrics | {"eval_episodes": args.eval_episodes}
    divergence = tuple(name for name in metrics if name.startswith("kl_1_"))
    if args.experiment == "generality" and divergence:
        summary["kl_duplicate"] = metrics["kl_1_3"]
        summary["kl_others"] = min(metrics["kl_1_2"], metrics["kl_1_4"])
    panels = [("share of episodes", ("success_rate", "identifiability_top1"))]
    panels += [("KL(task 1 ‖ task t), nats", divergence)] if divergence else []
    return run.finish(summary, panels, "environment steps")


def train_transfer(args):
    """Freeze a library of skills; learn each new task by choosing among them, and from scratch."""
    round_steps = args.num_envs * GoalTasks.steps
    run = Run(args, total=args.transfer_steps // round_steps * round_steps)
    device = run.device
    if not args.library:
        folder = run.folder / "library"
        changes = {"gamma": COMMON["gamma"], "out": str(folder), "overwrite": True}
        train_skills(replace(args, **changes))
    library = load_skills(args.library or folder / "checkpoint.pt").to(device)
    run.start = time.perf_counter()  # the library does not count

    def make_tasks(num_envs, name, how):
        tasks = GoalTasks(num_envs, NEW_TASKS[name], in_order=True, radius=RADIUS[name])
        return tasks if how == "scratch" else SkillTasks(tasks, library, args.hold)

    def learn_new_task(name, how):
        """Yields the steps so far, success on held-out episodes, the learner and these episodes."""
        tasks, held_out = (make_tasks(n, name, how) for n in (args.num_envs, args.eval_episodes))
        sizes = {"obs_dim": tasks.obs_dim, "action_dim": tasks.action_dim, "tasks": 1, "z_dim": 0}
        sizes |= {"embedding": "gaussian", "window": args.window, "spread": 0, "z_sd": 1}
        learner, rng = SkillLearner(**sizes).to(device), np.random.default_rng(args.seed)
        for step, _ in learn(tasks, learner, args.transfer_steps, 100, args, rng, device):
            metrics, _ = evaluate_skills(held_out, learner, args.window)
            yield step, metrics["success_rate"], learner, held_out

    names = [(how, name) for name in NEW_TASKS for how in ("skills", "scratch")]
    runs = [own_stream(learn_new_task(name, how), args.seed) for how, name in names]
    names = [f"{how}_{name}" for how, name in names]
    for reports in zip(*runs):  # all four learn side by side
        steps, rates, learners, held_out = zip(*reports)
        run.report(steps[0], **dict(zip(names, rates)))

    saved = {name: learner.state_dict() for name, learner in zip(names, learners)}
    run.save("checkpoint.pt", saved | {"step": run.total})
    films = [draw_film(held_out[i]) for i in (0, 2)]
    run.save("rollout.gif", [left[:2] + right[:2] for left, right in zip(*films)])
    summary = {f"success_{name}": run.rows[-1][name] for name in names}
    summary["transfer_steps_ratio"] = {}
    for name in NEW_TASKS:
        tasks, rng = make_tasks(args.eval_episodes, name, "skills"), np.random.default_rng(10**9)
        task = torch.zeros(args.eval_episodes, dtype=torch.long)
        with torch.random.fork_rng():
            torch.manual_seed(10**9)
            roll_out(tasks, tasks.any_skill, rng, task, torch.zeros(len(task), 0, device=device))
        summary[f"success_random_{name}"] = tasks.solved.mean()
        ours, theirs, ratio = steps_to_solve(run.rows, name)
        summary |= {f"steps_skills_{name}": ours, f"steps_scratch_{name}": theirs}
        summary["transfer_steps_ratio"][name] = ratio
    panels = [(f"success rate, {n}", (f"skills_{n}", f"scratch_{n}")) for n in NEW_TASKS]
    return run.finish(summary, panels, "environment steps of the new task")


def own_stream(generator, seed):
    """What a generator yields, with a stream of torch's random numbers of its own."""
    states = None
    while True:
        with torch.random.fork_rng():
            if states is None:
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(states[0])
                torch.cuda.set_rng_state_all(states[1])  # none without a GPU
            item = next(generator, None)
            states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        if item is None:
            return
        yield item


# --- Appendix: pictures --------------------------------------------------------------------


def load_skills(path):
    """The SkillLearner of a checkpoint, as `train` saved it."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        learner = SkillLearner(**saved["sizes"])
        learner.load_state_dict(saved["networks"])
    except Exception as error:  # whatever a file that is something else may hold
        reason = " ".join(str(error).split())[:100]
        raise SystemExit(f"error: {path} is no checkpoint of skills: {reason}") from None
    return learner


def draw_film(tasks):
    """Four last episodes of `tasks`, a film: the agent, and the goals that it cannot see."""
    goals = tasks.goals[tasks.task[:4]]  # (4, L, 2)
    shapes = [sprites_env.SHAPES.index(s) for s in ("circle", *["square"] * len(goals[0]))]

    def draw(positions):  # (N, 2)
        pairs = zip(positions, goals)
        return tuple(sprites_env.draw_rgb(np.vstack(pair), np.array(shapes)) for pair in pairs)

    return [draw(positions) for positions in tasks.path]


@torch.no_grad()
def draw_skills(tasks, learner, z):
    """Episodes coloured by z; where z is; a walk in z, from the middle of one task's p(z|t) to the
    next one's and back to the first, or if there is one task only along z's first number and back;
    and the divergences."""
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
        at = {"xytext": (10 * (k % 4) - 18, -4), "textcoords": "offset points"}  # side by side
        middle.annotate(k + 1, where[:2], **at, bbox={"fc": "white", "lw": 0, "pad": 1})
    middle.set(xlabel="z1", ylabel="z2", title="the embedding: p(z|t), by task")

    along = 2 * p.stddev[0] * torch.eye(z.shape[1], device=z.device)[0]
    stops = p.mean if K > 1 else torch.stack([p.mean[0] - along, p.mean[0] + along])
    way = torch.linspace(0, len(stops), 49, device=z.device)[:-1, None]
    here, after = (i.flatten().long() % len(stops) for i in (way.floor(), way.floor() + 1))
    walk = stops[here].lerp(stops[after], way % 1)
    walkers, task = GoalTasks(len(walk), tasks.goals), torch.zeros(len(walk), dtype=torch.long)
    roll_out(walkers, learner.policy, np.random.default_rng(0), task, walk, noise=False)
    draw_paths(right, np.stack(walkers.path, axis=1), colour(pad(walk)))
    right.set_title("a walk in z, " + ("from task to task" if K > 1 else "along z1"))
    for axis in more:
        kl = divergences(p).cpu().numpy()
        few = K <= 4  # room for numbers, which must be legible
        axis.imshow(np.log1p(kl), cmap="Blues", vmax=12 if few else None)
        for i, j in np.ndindex((K, K) if few else (0, 0)):
            axis.text(j, i, f"{kl[i, j]:.3g}", ha="center", va="center")
        axis.set_xticks(range(K), range(1, K + 1))
        axis.set_yticks(range(K), range(1, K + 1))
        axis.set(xlabel="task j", ylabel="task i", title="KL(p(z|i) ‖ p(z|j)), nats")
    return figure


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
