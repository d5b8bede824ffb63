"""Advantage weighted actor critic (AWAC): learn from mixed offline data, then go on online.

What
    A dataset of episodes, few of them good, teaches a critic; the critic's advantages say which of
    the logged actions to imitate. The policy is never asked to maximise the critic at actions that
    nobody took, and the same update goes on when online episodes join the data.
    Baselines in the same loop: plain cloning, cloning of the best episodes, soft actor critic.

Paper
    Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline
    Datasets", 2020, arXiv 2006.09359. Baseline: Haarnoja et al., "Soft Actor-Critic", 2018,
    arXiv 1801.01290.

Algorithm
    data ← collect_dataset, or load_dataset     episodes of three kinds of behaviour
    learn_offline: --offline-updates times update
        update_critic                           (3), (4): what the present policy is worth
        update_policy                           (2): imitate logged actions, weighted with (1)
    learn_online: until --total-steps
        act, and store in the same replay       one episode in each environment
        as many updates as steps, as above
    Cloning has no critic and equal weights. Soft actor critic has update_soft_policy, (5).

Equations
    Maximise over π  E_π[A(s,a)]  subject to  KL(π ‖ π_β) ≤ ε,  ∫ π(a|s) da = 1:
         L = E_π[A] + λ (ε − E_π[log π − log π_β]) + ν (1 − ∫ π)
         ∂L/∂π = A − λ (log π − log π_β) − λ − ν = 0   ⇒
    (1)  π*(a|s) ∝ π_β(a|s) w,   w = exp(A(s,a) / λ),   A = Q(s,a) − V(s)
    (2)  θ ← argmin E[KL(π* ‖ π_θ)] ≈ argmax E_𝒟[w log π_θ(a|s)]
    (3)  y = r + γ (1 − terminated) V(s'),   V(s') = min Q̄(s',a'),   a' ~ π_θ
    (4)  φ ← argmin Σ E_𝒟[(Qᵢ(s,a) − y)²]
    (5)  soft actor critic: θ ← argmin E[α log π_θ(a|s) − min Q(s,a)],
         and in (3) V(s') = min Q̄(s',a') − α log π_θ(a'|s')
    The constraint's derivative is −λ (log π − log π_β), so better actions get more weight; some
    notes have the wrong sign. λ → ∞ is cloning, λ → 0 a greedy policy. (2) is the forward direction
    of KL: it covers π*, and needs actions of the data 𝒟 only; as in the paper, ≈ drops π*'s
    normaliser.

Notation
    π_β the policy that made the data 𝒟, π_θ ours, Q_φ the critic, Q̄ its slow copy, min the smaller
    of the twins, prime: next step. In shapes: N environments, T steps of an episode, B batch, M
    transitions, D size of an observation, A size of an action, K objects in the frame.

Differs from the paper
    1. λ = 0.03 instead of 0.3 to 2: the scale of advantages decides, and here their standard
       deviation is 0.10 to 0.16. Batches of 256, two hidden layers of 128, learning rate 1e-3,
       10,000 offline updates instead of 1,024, 256, 3e-4, 25,000: minutes a run, not hours.
    2. γ = 0.9 instead of 0.99: episodes have 40 steps, and what an action is worth shows in few.
    3. In (1) Q is the smaller of the twins, and V(s) that at the policy's mean action, not E_π[Q]:
       one of the two estimates in the authors' code; the other is at a sample, as in (3).
    4. Weights are clipped at 100; the authors' softmax over the batch is --weighting softmax.
    5. No weight decay. States are standardised with mean and standard deviation of states of the
       dataset (also for --algorithm sac, which sees nothing else of it).
    6. Soft actor critic has the same policy class (no squashing, one σ for all states) and a fixed
       α, so that the objectives differ and nothing else. Actions are clipped to the box before
       environment and critic see them.
    7. --observation image runs, for hours: about 3 updates a second, 330 MB of frames.

Run
    python awac.py
    python awac.py --algorithm sac_from_buffer
    python awac.py --lam 10 --out runs/cloning

Writes
    to runs/awac/<algorithm>[_image]_d<distractors>_s<seed>/: args.json, curve.csv, curve.png,
    rollout.gif, checkpoint.pt (at every report) and summary.json with `updates`, `minutes`,
    `eval_return_mean`, `eval_return_std`, `eval_episodes`, `score` (0 random, 1 chasing with known
    velocity), and on the scale 100 (return − random) / (the data's expert − random):
    `offline_score` (before the first online step), `online_score` (at the end), `worst_online_dip`
    (from `offline_score` down to the worst evaluation of the first 2,000 online steps) and
    `bc_score` (of cloning). Columns of curve.csv: `step` (updates), `seconds`, `steps_per_second`,
    `eval_return`, `online_step`, `eval_score` (0 to 100, as above), `train_return` (last round),
    `action_sd` (σ), and of the last batch `policy_loss`, `critic_loss`, `q`, `sample_size` (of the
    weights, as a share of B) and `advantage_sd`. With a critic also `promised`, its Q at the first
    step of the evaluated episodes, and `earned`, their discounted return.

Result
    Scores, five seeds: awac 95.5 offline and 98.9 online, cloning 11.1, soft actor critic on the
    same data 96.5 and 105.5: these data do not need the constraint. Those of the second Try do:
    awac 77 after 2,000 updates, cloning 40, soft actor critic 0. All: benchmark/README.md.

Try
    1. --lam 10 --out runs/warm: what happens to `sample_size`, and to the return?
    2. --mixture 0.4 0.6 0 --switch-every 4 --episodes 60 --total-steps 0, with awac and with
       sac_from_buffer: whose critic keeps what it promises?
    3. Flip the sign in `awac_weights`, predict the return, and run it with --out runs/flipped.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import Run, require, require_positive

Algorithm = Literal[
    "awac",  # cloning, weighted with exp(A/λ)
    "bc",  # behaviour cloning: all weights 1; offline only
    "filtered_bc",  # cloning of the tenth of the episodes with the highest returns; offline only
    "sac",  # soft actor critic, online only, from an empty buffer
    "sac_from_buffer",  # soft actor critic on the dataset, then online
]
CLONING = ("bc", "filtered_bc")
BEST_SHARE = 0.1  # of the episodes, for filtered_bc
WEIGHT_CLIP = 100  # of the weights (1)
LOG_STD_RANGE = (-6, 0)  # of the policy
REPORT_EVERY = 500  # online steps
DIP_STEPS = 2000  # online, within which the worst dip is looked for


@dataclass(frozen=True)
class Args:
    algorithm: Algorithm = "awac"  # what to do with the data
    lam: float = 0.03  # λ, in units of the advantage: small is greedy, large is cloning
    weighting: Literal["exp", "softmax"] = "exp"  # exp(A/λ), at most 100; or B softmax(A/λ)
    mixture: tuple[float, float, float] = (0.2, 0.4, 0.4)  # expert, follows a distractor, random
    switch_every: int = 0  # steps after which each episode draws a new behaviour; 0: it has one
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
    alpha: float = 0.01  # α, weight of the entropy in soft actor critic
    hidden: int = 128  # units of each of the two hidden layers of policy and critic
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of data, networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain nothing from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="mixture switch_every offline_updates total_steps gamma alpha")
        require(self.gamma < 1 and self.tau <= 1, "--gamma must be below 1, --tau not above")
        shares = abs(sum(self.mixture) - 1) < 1e-6
        require(shares, "--mixture must be three shares that add up to 1")
        followed = self.distractors or self.dataset or not self.mixture[1]
        require(followed, "with --distractors 0 nobody can follow one: see --mixture")
        learns = self.updates_offline + (0 if self.algorithm in CLONING else self.total_steps)
        require(learns, "--offline-updates and --total-steps leave nothing to do")
        if self.save_dataset:
            path = Path(self.save_dataset)
            writable = path.parent.is_dir() and not path.is_dir()
            require(writable, f"--save-dataset: cannot write {path}")
            new = self.overwrite or not path.exists()
            require(new, f"{path} exists: use --overwrite, or another name")

    @property
    def updates_offline(self):
        return 0 if self.algorithm == "sac" else self.offline_updates

    @property
    def soft(self):
        return self.algorithm.startswith("sac")

    @property
    def environment(self):
        return {"distractors": self.distractors, "observation": self.observation}

    @property
    def run_name(self):
        image = "_image" if self.observation == "image" else ""
        return f"{self.algorithm}{image}_d{self.distractors}_s{self.seed}"


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


class ObservationCritic(nn.Module):
    """Twin Q functions of observations, by way of their features."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features, self.twins = features, TwinCritic(size_in, hidden, action_dim)

    def forward(self, obs, action):  # (B, D), (B, A) -> (2, B)
        return self.twins(self.features(obs), action)


class TwinCritic(nn.Module):
    """Two Q functions of one input. Targets take the smaller of both: a single one is too high
    wherever its error happens to be positive, as that is where the policy goes."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.heads = nn.ModuleList(mlp(size_in + action_dim, hidden, 1) for _ in range(2))

    def forward(self, x, action):  # (B, D), (B, A) -> (2, B)
        inputs = torch.cat([x, action], dim=-1)
        return torch.cat([head(inputs) for head in self.heads], dim=-1).T


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


def strided_convolutions(channels):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Six convolutions, 64 x 64 -> 1 x 1 pixel, and a linear map: an image becomes a vector z."""

    def __init__(self, z_dim=64, frames=1):
        super().__init__()
        self.convolutions = strided_convolutions((frames, 4, 8, 16, 32, 64, 128))
        self.to_z = nn.Linear(128, z_dim)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster

    def forward(self, frames):  # float (B, S, 64, 64) in [0, 1]
        h = self.convolutions(frames)  # (B, 128, 1, 1)
        return self.to_z(h.flatten(1))  # (B, Z)


def make_features(obs):
    """(network, size of its output): standardises states, or what an encoder makes of images.
    `obs`, (M, D) or (M, 1, 64, 64), sets the statistics."""
    encoder = Encoder() if obs.ndim == 4 else nn.Identity()
    with torch.no_grad():
        z = encoder(obs)
    return nn.Sequential(encoder, Standardize(z)), z.shape[1]


class AWACAgent:
    """Policy, critic and its slow copy, and their optimisers."""

    def __init__(self, obs, action_dim, args, device):  # obs (M, D): some, for their statistics
        obs = to_tensor(obs, "cpu")
        self.policy = GaussianPolicy(*make_features(obs), args.hidden, action_dim).to(device)
        self.critic = ObservationCritic(*make_features(obs), args.hidden, action_dim).to(device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        parameters = self.policy.parameters(), self.critic.parameters()
        optimizers = (torch.optim.Adam(p, lr=args.learning_rate, fused=True) for p in parameters)
        self.policy_optimizer, self.critic_optimizer = optimizers
        self.device = device

    @torch.no_grad()
    def act(self, obs, noise=False):  # (N, ...) -> (N, A), arrays
        mean, log_std = self.policy(to_tensor(obs, self.device))
        action = sample_gaussian(mean, log_std).clamp(-1, 1) if noise else mean
        return action.cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def sample_gaussian(mean, log_std):
    """a ~ N(mean, σ²), differentiable in both. (B, A), (A,) -> (B, A)."""
    return mean + log_std.exp() * torch.randn_like(mean)


def awac_weights(advantage, lam, weighting="exp"):
    """w = exp(A(s,a) / λ), eq. (1), at most 100; or B softmax(A / λ), whose mean is 1.

    A = Q(s,a) − V(s). (B,) -> (B,), without gradient: the weights are not what is fitted."""
    assert advantage.ndim == 1
    exponent = (advantage / lam).detach()
    if weighting == "softmax":
        return len(exponent) * exponent.softmax(0)
    return exponent.exp().clamp(max=WEIGHT_CLIP)


def weighted_cloning_loss(log_prob, weights):
    """−E_𝒟[w log π(a|s)], eq. (2): a mean over the batch. Both (B,) -> scalar."""
    assert log_prob.shape == weights.shape
    return -(weights * log_prob).mean()


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) V(s'), eq. (3). All (B,), called without gradient. A time limit
    is not in here: an episode that was cut off goes on, as far as values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(s,a) − y)²], eq. (4). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def soft_actor_loss(q, log_prob, alpha):
    """E[α log π(a|s) − Q(s,a)], eq. (5), for a ~ π(·|s), reparametrised. Both (B,) -> scalar."""
    assert q.shape == log_prob.shape
    return (alpha * log_prob - q).mean()


def effective_sample_size(weights):
    """(Σ w)² / (B Σ w²): the share of the batch (B,) that in effect is imitated, 1/B ... 1."""
    return weights.sum().square() / (len(weights) * weights.square().sum())


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_critic(agent, batch, args):
    """One step of the critic on (4). y (3) takes the smaller value of the slow copy, at an action
    of the present policy; in soft actor critic, with that policy's entropy."""
    s, a, r, s_next, terminated = batch
    with torch.no_grad():
        mean, log_std = agent.policy(s_next)
        a_next = sample_gaussian(mean, log_std)
        next_value = agent.critic_target(s_next, a_next.clamp(-1, 1)).amin(0)  # (B,)
        if args.soft:
            next_value -= args.alpha * gaussian_log_prob(a_next, mean, log_std)
        y = td_target(r, terminated, next_value, args.gamma)
    q = agent.critic(s, a)  # (2, B)
    loss = critic_loss(q, y)
    agent.critic_optimizer.zero_grad()
    loss.backward()
    agent.critic_optimizer.step()
    polyak_(agent.critic_target, agent.critic, args.tau)
    return {"critic_loss": loss.detach(), "q": q.detach().mean()}


def update_policy(agent, batch, args):
    """One step of the policy on (2): imitate the logged actions, the better ones more. The critic
    only gives the weights (1), which are constants, and with cloning all 1."""
    s, a, *_ = batch
    mean, log_std = agent.policy(s)
    weights, metrics = torch.ones(len(a), device=a.device), {}
    if args.algorithm == "awac":
        with torch.no_grad():
            value = agent.critic(s, mean).amin(0)  # V(s), (B,)
            advantage = agent.critic(s, a).amin(0) - value
        weights = awac_weights(advantage, args.lam, args.weighting)
        metrics["sample_size"] = effective_sample_size(weights)
        metrics["advantage_sd"] = advantage.std()
    loss = weighted_cloning_loss(gaussian_log_prob(a, mean, log_std), weights)
    step_policy(agent, loss)
    return {"policy_loss": loss.detach()} | metrics


def update_soft_policy(agent, batch, args):
    """One step of the policy on (5): maximise Q, at actions of its own. This fills the critic's
    .grad as well; its own zero_grad discards that."""
    s, *_ = batch
    mean, log_std = agent.policy(s)
    a_new = sample_gaussian(mean, log_std)
    q = agent.critic(s, a_new.clamp(-1, 1)).amin(0)
    loss = soft_actor_loss(q, gaussian_log_prob(a_new, mean, log_std), args.alpha)
    step_policy(agent, loss)
    return {"policy_loss": loss.detach()}


def step_policy(agent, loss):
    """Descend. σ stays in its range: a clamp in `forward` would stop the gradient at its bounds."""
    agent.policy_optimizer.zero_grad()
    loss.backward()
    agent.policy_optimizer.step()
    with torch.no_grad():
        agent.policy.log_std.clamp_(*LOG_STD_RANGE)


def update(agent, batch, args):
    """All the steps of an algorithm on one batch."""
    metrics = {} if args.algorithm in CLONING else update_critic(agent, batch, args)
    improve = update_soft_policy if args.soft else update_policy
    return improve(agent, batch, args) | metrics


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


def make_env(args, num_envs, **options):
    """Environments in lockstep. To train on others, change this line: any vector environment will
    do that resets in the step that ends an episode (README.md has an example)."""
    return sprites_env.SpritesVectorEnv(num_envs, **args.environment, **options)


def collect_dataset(env, mixture, seed, switch_every=0):
    """One episode of each environment, a share mixture[i] of them controlled by BEHAVIOURS[i]; or
    each by one that is drawn anew, with these probabilities, after every `switch_every` steps: then
    no episode is good from end to end, and good stretches must be told from bad ones.

    Returns COLUMNS; the transitions of an episode follow each other."""
    N, rng = env.num_envs, np.random.default_rng(seed)
    bounds = np.rint(N * np.cumsum(mixture[:-1])).astype(int)
    behaviour = np.searchsorted(bounds, np.arange(N), side="right")  # (N,): who controls which
    rollout, episodes = [], sprites_env.Episodes(env, seed)
    while not episodes.finished:  # in lockstep: all end together
        if switch_every and len(rollout) % switch_every == 0:
            behaviour = rng.choice(len(mixture), N, p=np.divide(mixture, sum(mixture)))
        obs, actions = episodes.obs, np.zeros((N, 2))
        for i, behave in enumerate(BEHAVIOURS):
            if (mine := behaviour == i).any():
                actions[mine] = behave(rng, env.states[mine])
        successors, rewards, terminated, truncated = episodes.step(actions)
        rollout.append((obs, actions, rewards, successors, terminated, truncated))
    columns = [np.stack(column, axis=1) for column in zip(*rollout)]  # each (N, T, ...)
    columns = [column.reshape(-1, *column.shape[2:]) for column in columns]
    return {
        name: column.astype(np.float32) if column.dtype == np.float64 else column
        for name, column in zip(COLUMNS, columns)
    }


def best_episodes(data, share):
    """The transitions of the `share` of the episodes with the highest returns."""
    ended = data["terminated"] | data["truncated"]
    episode = np.cumsum(ended) - ended  # (M,): 0, 0, ..., 1, 1, ...
    returns = np.bincount(episode, data["rewards"])
    keep = np.argsort(-returns, kind="stable")[: max(1, round(share * len(returns)))]
    return {name: column[np.isin(episode, keep)] for name, column in data.items()}


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

    def sample(self, rng, batch, device):
        """B transitions, as tensors: s, a, r, s' and terminated."""
        rows = rng.integers(self.size, size=batch)
        return [to_tensor(self.columns[name][rows], device) for name in COLUMNS[:5]]


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def load_dataset(path, observation_space, action_space):
    """The arrays COLUMNS of an .npz file, checked against the environment's spaces."""
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in COLUMNS}
    except KeyError as error:
        require(False, f"{path}: {error.args[0]}; needed are {', '.join(COLUMNS)}")
    except Exception as error:  # missing, not an .npz, or arrays of objects
        require(False, f"{path} is no .npz of arrays: {' '.join(str(error).split())[:100]}")
    spaces = {"observations": observation_space, "next_observations": observation_space}
    for name, array in data.items():
        space = {**spaces, "actions": action_space}.get(name)
        shape = (data["rewards"].size, *(space.shape if space else ()))
        kind = np.dtype(space.dtype if space else np.float32 if name == "rewards" else bool)
        require(array.shape == shape, f"{path}: {name} has shape {array.shape}, not {shape}")
        same = np.can_cast(array.dtype, kind, "same_kind")
        require(same, f"{path}: {name} is of type {array.dtype}, not {kind}")
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            data[name] = array.astype(kind)
        require(np.isfinite(data[name]).all(), f"{path}: {name} has values that are not finite")
    require(data["rewards"].size > 1, f"{path} holds fewer than two transitions")
    executed = (np.abs(data["actions"]) <= 1).all()
    require(executed, f"{path}: actions must be in [-1, 1]: what was executed, not asked for")
    return data


def save_dataset(path, data):
    """The arrays COLUMNS as an .npz file, whole or not at all."""
    temporary = path.with_name(f"unfinished_{path.name}")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **data)
    temporary.replace(path)


# --- Measures --------------------------------------------------------------------------------


@torch.no_grad()
def promised_and_earned(agent, env, gamma):
    """Means over fresh episodes: Q(s₀, π(s₀)), what the critic promises at their first step, and
    Σₜ γᵗ rₜ, what comes. The sum ends with the episode, where Q does not; but γ = 0.9 discounts
    what follows after 40 steps to 1.5 %."""
    obs, _ = env.reset(seed=10**9)  # as `evaluate` does
    s, a = (to_tensor(x, agent.device) for x in (obs, agent.act(obs)))
    earned = sprites_env.evaluate(agent.act, env, gamma=gamma)
    return {"promised": agent.critic(s, a).amin(0).mean().item(), "earned": earned.mean()}


# --- Training --------------------------------------------------------------------------------


def learn_offline(agent, replay, rng, report, args):
    """--offline-updates on the dataset alone."""
    total = args.updates_offline
    reports = {1} | {math.ceil(total * i / 10) for i in range(1, 11)}
    for step in range(1, total + 1):
        metrics = update(agent, replay.sample(rng, args.batch_size, agent.device), args)
        if step in reports:
            report(step, metrics)


def learn_online(agent, replay, episodes, rng, report, args):
    """Rounds of an episode in each environment and as many updates as it had steps."""
    N, T, offline = args.num_envs, episodes.env.horizon, args.updates_offline
    steps = args.total_steps // (N * T) * N * T  # whole rounds
    reports = {steps, *range(REPORT_EVERY, steps, REPORT_EVERY)}
    reports |= set() if offline else {1}  # the first update of all
    for first in range(1, steps + 1, N * T):
        # act and store
        for _ in range(T):
            obs, action = episodes.obs, agent.act(episodes.obs, noise=True)
            successors, reward, terminated, truncated = episodes.step(action)
            replay.add(obs, action, reward, successors, terminated, truncated)

        # learn
        for step in range(first, first + N * T):
            metrics = update(agent, replay.sample(rng, args.batch_size, agent.device), args)
            if step in reports:
                report(offline + step, metrics)


def train(args):
    """One run, offline then online; returns the content of summary.json."""
    env = make_env(args, args.num_envs)
    steps = args.num_envs * sprites_env.steps_of_episodes(env)  # of a round of episodes
    rounds = args.total_steps // steps
    online = 0 if args.algorithm in CLONING else rounds * steps
    least = f"--total-steps must be 0 or at least {steps}, a round of episodes"
    require(rounds or not args.total_steps, least)
    if args.dataset:
        data = load_dataset(args.dataset, env.single_observation_space, env.single_action_space)
    else:
        env_of_data = make_env(args, args.episodes)
        data = collect_dataset(env_of_data, args.mixture, args.seed * 100_000, args.switch_every)
    run = Run(args, total=args.updates_offline + online)
    if args.save_dataset:
        save_dataset(Path(args.save_dataset), data)

    some = data["observations"][:: len(data["observations"]) // 1000 + 1]
    agent = AWACAgent(some, env.single_action_space.shape[0], args, run.device)
    if args.algorithm == "filtered_bc":
        data = best_episodes(data, BEST_SHARE)
    if args.algorithm == "sac":
        data = {name: column[:0] for name, column in data.items()}
    replay, rng = Replay(data, room=online), np.random.default_rng(args.seed)
    episodes = sprites_env.Episodes(env, args.seed * 100_000 + 50_000)  # not those of the dataset

    def report(step, metrics):
        held_out = make_env(args, args.eval_episodes)
        returns = sprites_env.evaluate(agent.act, held_out)
        metrics = {name: value.item() for name, value in metrics.items()}
        if args.algorithm not in CLONING:
            metrics |= promised_and_earned(agent, held_out, args.gamma)
        run.report(
            step,
            eval_return=returns.mean(),
            online_step=replay.size - len(data["rewards"]),
            eval_score=normalized_score(returns.mean()),
            train_return=np.mean(episodes.finished[-args.num_envs :] or float("nan")),
            action_sd=agent.policy.log_std.exp().mean().item(),
            **metrics,
        )
        networks = {"policy": agent.policy.state_dict(), "critic": agent.critic.state_dict()}
        run.save("checkpoint.pt", networks | {"update": step})

    learn_offline(agent, replay, rng, report, args)
    if online:
        learn_online(agent, replay, episodes, rng, report, args)

    env = make_env(args, 4, render_mode="rgb_array")
    run.save("rollout.gif", sprites_env.film(agent.act, env))
    returns = sprites_env.evaluate(agent.act, make_env(args, args.eval_episodes))
    summary = sprites_env.summary(returns) | phase_scores(run.rows, args)
    panels = [(f"return of a {env.horizon}-step episode", ("train_return", "eval_return"))]
    levels = sprites_env.REFERENCE_RETURNS["follow"].items()
    x_label = "updates (online: as many environment steps)"
    summary["updates"] = run.total
    return run.finish(summary, panels, x_label, levels, args.updates_offline)


def normalized_score(episode_return):
    """100 (R − random) / (expert − random); the expert chases the target's position."""
    levels = sprites_env.REFERENCE_RETURNS["follow"]
    return 100 * (episode_return - levels["random"]) / (levels["chase"] - levels["random"])


def phase_scores(rows, args):
    """Scores at the end of each phase that there was, and the worst dip in between."""
    scores = {row["step"] - args.updates_offline: row["eval_score"] for row in rows}
    early = [score for step, score in scores.items() if 0 < step <= DIP_STEPS]
    offline, online = 0 in scores, max(scores) > 0
    summary = {"offline_score": scores[0]} if offline else {}
    summary |= {"online_score": scores[max(scores)]} if online else {}
    summary |= {"worst_online_dip": scores[0] - min(early)} if offline and online else {}
    return summary | ({"bc_score": scores[0]} if args.algorithm in CLONING else {})


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
