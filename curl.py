"""CURL: soft actor critic from pixels, whose encoder also learns to match two views of a frame.

What
    An encoder turns a stack of frames into a code z, for the critic; the actor reads the encoder's
    convolutions through a head of its own. Two random shifts of the same stack should get similar
    codes, those of other stacks in the batch different ones: this contrastive loss trains the
    encoder next to the critic's. `--mode` switches, in one loop, what the claim rests on: state;
    pixel: no augmentation; rad: shifts; curl: shifts and the contrastive loss;
    curl_unaugmented_sac: shifts in that loss only; contrastive_only: curl, but the critic's
    gradient stops at z.

Paper
    Laskin, Srinivas & Abbeel, "CURL: Contrastive Unsupervised Representations for Reinforcement
    Learning", 2020, arXiv 2004.04136. Mode rad: Laskin et al., "Reinforcement Learning with
    Augmented Data", 2020, arXiv 2004.14990. Soft actor critic: Haarnoja et al., arXiv 1812.05905.

Algorithm
    repeat until --total-steps:
        act (at random at first), store             one step of N environments
        --updates times:
            batch ← sample_views                    stacks, shifted as the mode has it
            update_critic_and_encoder               one step on (5), and on (2) if contrastive
            every second time:
                update_actor_and_alpha              one step on (6) and (7)
                polyak_                             (3), and the same for the target critic
        twenty times in all: evaluate
    probe                                           what a linear map reads off z, (9)

Equations
    (1)  ℓᵢⱼ = qᵢᵀ W kⱼ − maxₗ qᵢᵀ W kₗ,   q = f(shift(s)) queries,   k = f̄(another shift(s)) keys
    (2)  f, W ← argmin −E[log softmax(ℓᵢ)ᵢ]: key i belongs to query i, the others do not
    (3)  f̄ ← f̄ + τ̄ (f − f̄), a slow copy that no gradient reaches
    (4)  y = r + γ (1 − terminated) V(s'),   V(s') = min Q̄(z',a') − α log π(a'|s'),   a' ~ π
    (5)  Q, f ← argmin Σ E[(Qᵢ(z,a) − y)²],   z = f(s)
    (6)  π ← argmin E[α log π(a|s) − min Q(z,a)],   a ~ π; its convolutions are those of f
    (7)  log α ← argmin E[−α (log π(a|s) − A)]: the entropy is held near −A
    (8)  a = tanh(u), u ~ N(mean, sd²):   log π(a|s) = log N(u) − Σ log(1 − tanh²(u))
    (9)  ŷ(x) = m + g(x)ᵀ (G + c I)⁻¹ (y − m),   R² = 1 − Σ (yₜ − ŷ(xₜ))² / Σ (yₜ − mₜ)²: a ridge
         regression with penalty c on data x, y of mean m, tested on data xₜ, yₜ of mean mₜ; G and g
         are inner products of centred features, divided by the mean of G's diagonal

Notation
    f the encoder, bars: slow copies, prime: next step, τ and τ̄ (--tau, --encoder-tau) how fast
    they follow. N environments, T steps of an episode, B batch, S frames of a stack, Z size of the
    code, A of an action, P past actions (s includes them), F what the convolutions give, K objects,
    E episodes and M frames of the probe.

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
    7. Not in the paper, and off here: --past-actions 2 tells critic and actor what was done between
       the frames of a stack, for these show velocities poorly; --patch 8 has larger patches, which
       overlap, and twice the filters. What they do for DeepMind Control: benchmark/README.md.

Run
    python curl.py
    python curl.py --mode rad
    python curl.py --mode curl_unaugmented_sac --distractors 2

Writes
    to runs/curl/<mode>_d<distractors>_s<seed>/: args.json, curve.csv, curve.png, rollout.gif,
    checkpoint.pt (at every report), neighbours.png (from pixels) and
    summary.json: `eval_return_mean`, `eval_return_std`, `eval_episodes`, `score` (0 random, 1
    chasing with known velocity), `updates`, `minutes`; with a contrastive loss
    `contrastive_accuracy` (mean of the last twentieth of the run; 1/B by guessing, but an untrained
    encoder already finds many keys); from pixels
    `probe_r2`, `probe_r2_random_encoder`, `probe_r2_pixels`: R² by quantity. Columns of curve.csv:
    `step` (of all environments), `seconds`, `steps_per_second`, `eval_return`, `train_return`
    (last N episodes, with noise), `alpha`, `contrastive_accuracy` (since the last report), and of
    the last batch `critic_loss`, `contrastive_loss` and `entropy` (of the policy, at s').

Result
    Returns with 0 distractors, three seeds: state 38.77, rad 37.43, curl 37.10, pixel 36.45. The
    augmentation helps, the contrastive loss does not. All: benchmark/README.md.

Try
    1. --mode rad, then --mode pixel: what did the contrastive loss add, what did the shift?
    2. --distractors 2: which R² change? Does the code drop what earns nothing?
    3. Give the keys the query's own offsets (--out runs/same): what of accuracy and return?
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import Run, require, require_positive

Mode = Literal["state", "pixel", "rad", "curl", "curl_unaugmented_sac", "contrastive_only"]
SHIFTED = ("rad", "curl", "contrastive_only")  # modes in which soft actor critic sees shifts
CONTRASTIVE = ("curl", "curl_unaugmented_sac", "contrastive_only")
ACTOR_EVERY = 2  # updates of the critic to one of actor and slow copies, as in the paper
LOG_STD_LOW, LOG_STD_HIGH = -10, 2  # of the policy, before tanh
PROBE_EPISODES = 160  # of random actions, three quarters of them to fit, the others to test


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
    encoder_tau: float = 0.05  # τ̄, how fast the key encoder follows
    alpha: float = 0.01  # α at the start, for rewards in units of their standard deviation
    frame_stack: int = 3  # frames that the encoder sees at once (S)
    patch: Literal[4, 8] = 4  # pixels of a side of the first patches; at 8 they overlap
    past_actions: int = 0  # that critic and actor are told (P): frames do not show them
    pad: int = 4  # a shift is by at most this many pixels
    z_dim: int = 50  # size of the code (Z)
    hidden: int = 256  # units of each of the two hidden layers of policy and critic
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain little from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="gamma pad past_actions")
        below = self.gamma < 1 and self.tau <= 1 and self.encoder_tau <= 1
        require(below, "--gamma must be below 1, --tau and --encoder-tau not above")
        T = sprites_env.steps_of_episodes(make_env(self, 1))
        least = self.num_envs * T * max(1, math.ceil(self.first_update / T))
        rounds = f"in rounds of {self.num_envs * T}"
        require(self.total_steps >= least, f"--total-steps must be at least {least}, {rounds}")
        require(
            self.frame_stack < T, f"--frame-stack must be less than the {T} steps of an episode"
        )
        others = self.batch_size > 1 or self.mode not in CONTRASTIVE
        require(others, "a contrastive loss needs others: --batch-size of 2 or more")

    @property
    def first_update(self):  # after so many steps of all environments
        return math.ceil(self.initial_steps / self.num_envs)

    @property
    def frames(self):  # S: a state has velocities
        return 1 if self.mode == "state" else self.frame_stack

    @property
    def environment(self):
        observation = "state" if self.mode == "state" else "image"
        return {"distractors": self.distractors, "observation": observation}

    @property
    def run_name(self):
        return f"{self.mode}_d{self.distractors}_s{self.seed}"


# --- Networks --------------------------------------------------------------------------------


def patch_convolutions(channels, patch=4):
    """A patch at every fourth pixel, then 3 x 3 of them at every second: (B, S, 64, 64) ->
    (B, 2048)."""
    first = nn.Conv2d(channels, 4 * patch, patch, stride=4, padding=patch // 2 - 2)
    second = nn.Conv2d(4 * patch, 32, 3, stride=2, padding=1)
    layers = [first, nn.ReLU(), second, nn.ReLU()]  # (B, 16 or 32, 16, 16), (B, 32, 8, 8)
    return orthogonal_(nn.Sequential(*layers, nn.Flatten())).to(memory_format=torch.channels_last)


def code_head(size_in, z_dim):
    """A linear map, normalised and squashed: (B, F) -> (B, Z) in [-1, 1]."""
    linear = orthogonal_(nn.Linear(size_in, z_dim))
    return nn.Sequential(linear, nn.LayerNorm(z_dim), nn.Tanh())


class SquashedActor(nn.Module):
    """π(a|s) before tanh: u ~ N(mean, sd²)."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.mlp = mlp(size_in, hidden, 2 * action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero

    def forward(self, z):  # (B, Z) -> mean (B, A), log_std (B, A)
        mean, x = self.mlp(z).chunk(2, dim=-1)
        return mean, LOG_STD_LOW + (LOG_STD_HIGH - LOG_STD_LOW) / 2 * (x.tanh() + 1)


class ActorWithHead(nn.Module):
    """π(a|s) of what the convolutions gave, by a head of its own, and of past actions."""

    def __init__(self, head, z_dim, hidden, action_dim, past_dim):
        super().__init__()
        self.head, self.policy = head, SquashedActor(z_dim + past_dim, hidden, action_dim)

    def forward(self, h, past):  # (B, F), (B, P A) -> mean (B, A), log_std (B, A)
        return self.policy(torch.cat([self.head(h), past], dim=-1))


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


class CURLAgent:
    """Encoder, critic, actor, W and α, slow copies of the first two, and two optimisers."""

    def __init__(self, space, action_dim, args, device):
        self.space, self.device, pixels = space, device, args.mode != "state"
        z_dim = args.z_dim if pixels else space.shape[0]
        self.convolutions, head = nn.Identity(), nn.Identity
        if pixels:
            stack = args.frames * space.shape[0], *space.shape[1:]  # channels, height, width
            self.convolutions = patch_convolutions(stack[0], args.patch)
            size = self.convolutions(torch.zeros(1, *stack)).shape[1]  # F, for 64 x 64 pixels 2048
            head = lambda: code_head(size, z_dim)  # noqa: E731
        self.head = head()
        self.encoder = nn.Sequential(self.convolutions, self.head).to(device)
        self.action_dim, past_dim = action_dim, args.past_actions * action_dim
        self.critic = TwinCritic(z_dim, args.hidden, action_dim + past_dim).to(device)
        actor = ActorWithHead(head(), z_dim, args.hidden, action_dim, past_dim)
        self.actor = actor.to(device)
        self.W = nn.Parameter(torch.eye(z_dim, device=device))
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        contrast = [self.W] if args.mode in CONTRASTIVE else []
        learnt = [*self.critic.parameters(), *self.encoder.parameters(), *contrast]
        acting = [*self.actor.parameters(), self.log_alpha]
        self.optimizer = torch.optim.Adam(learnt, lr=args.learning_rate, fused=True)
        self.actor_optimizer = torch.optim.Adam(acting, lr=args.learning_rate, fused=True)

    def see(self, obs):  # uint8 stacks to [0, 1], states to [-1, 1] if they have bounds
        if len(self.space.shape) == 3:
            return to_tensor(obs, self.device)
        low, high = (to_tensor(x, self.device) for x in (self.space.low, self.space.high))
        bounded = high - low < 1e6  # what has no bounds is taken as it is
        low, high = low.where(bounded, -1.0), high.where(bounded, 1.0)
        return 2 * (to_tensor(obs, self.device) - low) / (high - low) - 1

    @torch.no_grad()
    def act(self, obs, past, noise=False):  # (N, ...), (N, P A) -> (N, A), arrays
        past = to_tensor(past, self.device)
        mean, log_std = self.actor(self.convolutions(self.see(obs)), past)
        action = sample_squashed(mean, log_std)[0] if noise else mean.tanh()
        return action.cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def random_shift(stacks, offsets, pad):
    """Zero-pad by `pad` pixels and crop to the old size: one offset for all frames of a stack.

    Array (B, S, H, W), offsets (2, B) in 0 ... 2 pad, where `pad` changes nothing."""
    padded = np.pad(stacks, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, stacks.shape[2:], axis=(2, 3))
    return crops[np.arange(len(stacks)), :, *offsets]


def bilinear_logits(query, keys, W):
    """ℓᵢⱼ = qᵢᵀ W kⱼ − maxₗ qᵢᵀ W kₗ, eq. (1). query, keys (B, Z), W (Z, Z) -> (B, B).

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
    """Σᵢ E[(Qᵢ(s,a) − y)²], eq. (5). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def soft_actor_loss(q, log_prob, alpha):
    """E[α log π(a|s) − Q(s,a)], eq. (6), for a ~ π(·|s), reparametrised. Both (B,) -> scalar."""
    assert q.shape == log_prob.shape
    return (alpha * log_prob - q).mean()


def temperature_loss(log_alpha, log_prob, target_entropy):
    """E[−α (log π(a|s) + target entropy)], eq. (7). log_alpha scalar, log_prob (B,) -> scalar."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def squashed_log_prob(u, mean, log_std):
    """log π(a|s) = log N(u) − Σ log(1 − tanh²(u)) for a = tanh(u), eq. (8). (B, A) -> (B,).

    log(1 − tanh²(u)) = 2 (log 2 − u − softplus(−2u)), which stays finite for large u."""
    correction = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return gaussian_log_prob(u, mean, log_std) - correction.sum(-1)


def sample_squashed(mean, log_std):
    """a ~ π(·|s), differentiable in both, and log π(a|s). (B, A), (B, A) -> (B, A), (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return u.tanh(), squashed_log_prob(u, mean, log_std)


def top_1_accuracy(logits):
    """The share of queries that have their own key nearest; 1/B by chance. (B, B) -> scalar."""
    return (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), eq. (3), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_critic_and_encoder(agent, batch, args):
    """One step of critic and encoder on (5) and, in modes with a contrastive loss, of encoder and W
    on (2). Returns metrics, and the convolutions' output (B, F) for the actor, without gradient."""
    past_next = batch["a"][:, : -agent.action_dim]  # a, and all but the last of what preceded it
    h = agent.convolutions(batch["x"])  # (B, F)
    z = agent.head(h)  # (B, Z)
    with torch.no_grad():
        h_next = agent.convolutions(batch["x_next"])
        a_next, log_prob_next = sample_squashed(*agent.actor(h_next, past_next))
        actions_next = torch.cat([a_next, past_next], dim=-1)
        next_value = agent.critic_target(agent.head(h_next), actions_next).amin(0)  # (B,)
        next_value -= agent.log_alpha.exp() * log_prob_next
        y = td_target(batch["r"], batch["terminated"], next_value, args.gamma)
    q = agent.critic(z.detach() if args.mode == "contrastive_only" else z, batch["a"])  # (2, B)
    loss = critic_loss(q, y)
    metrics = {"critic_loss": loss.detach(), "entropy": -log_prob_next.mean()}
    if args.mode in CONTRASTIVE:
        query = z if args.mode in SHIFTED else agent.encoder(batch["query"])
        with torch.no_grad():
            keys = agent.key_encoder(batch["key"])
        logits = bilinear_logits(query, keys, agent.W)
        contrastive_loss = info_nce_loss(logits)
        loss = loss + contrastive_loss
        metrics["contrastive_loss"] = contrastive_loss.detach()
        metrics["contrastive_accuracy"] = top_1_accuracy(logits)
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()
    return metrics, h.detach()


def update_actor_and_alpha(agent, h, past):
    """One step of the actor on (6), of α on (7). h (B, F) is what the convolutions gave, without
    gradient: they learn from update_critic_and_encoder only; past (B, P A). (6) fills the critic's
    .grad as well; its own zero_grad discards that."""
    a, log_prob = sample_squashed(*agent.actor(h, past))
    actions = torch.cat([a, past], dim=-1)
    q = agent.critic(agent.head(h).detach(), actions).amin(0)
    loss = soft_actor_loss(q, log_prob, agent.log_alpha.exp().detach())
    loss = loss + temperature_loss(agent.log_alpha, log_prob, target_entropy=-a.shape[1])
    agent.actor_optimizer.zero_grad()
    loss.backward()
    agent.actor_optimizer.step()


# --- Data ------------------------------------------------------------------------------------


def make_env(args, num_envs, **options):
    """Environments in lockstep. To train on others, change this line: any vector environment will
    do that resets in the step that ends an episode (README.md has an example)."""
    return sprites_env.SpritesVectorEnv(num_envs, **args.environment, **options)


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

    def measure_rewards(self):
        """Mean and deviation of what is there now, to standardise with from now on. No mean where
        episodes terminate: without it a longer life would be worth more, or less. The deviation is
        at least a tenth of the largest reward, for there may have been but one."""
        rewards = self.rewards[: self.size]
        self.reward_mean = 0.0 if self.terminated.any() else np.mean(rewards)
        self.reward_sd = max(np.std(rewards), np.abs(rewards).max() / 10) or 1.0

    def sample(self, rng, batch):
        """B transitions: stacks, actions, rewards, next stacks, terminated."""
        i = rng.integers(self.size, size=batch)
        step, env = np.divmod(i, self.num_envs)
        episode, t = np.divmod(step, self.horizon)
        times = np.maximum(t[:, None] + np.arange(1 - self.frames, 2), 0)  # (B, S + 1)
        x = self.observations[episode[:, None], times, env[:, None]]  # (B, S + 1, ...)
        stacks, successors = (y.reshape(batch, -1, *y.shape[3:]) for y in (x[:, :-1], x[:, 1:]))
        return stacks, self.actions[i], self.rewards[i], successors, self.terminated[i]


def sample_views(replay, rng, agent, args):
    """A batch as `update_critic_and_encoder` takes it: tensors x (B, S, 64, 64) or (B, D), a
    (B, A + P A), the action and those before it, r, x_next, terminated, and views `query` and `key`
    of the same stacks, where the mode needs them. Every view is shifted by offsets of its own."""

    def shift(stacks):
        offsets = rng.integers(2 * args.pad + 1, size=(2, len(stacks)))
        return agent.see(random_shift(stacks, offsets, args.pad))

    s, a, r, s_next, terminated = replay.sample(rng, args.batch_size)
    view = shift if args.mode in SHIFTED else agent.see
    batch = {"x": view(s), "x_next": view(s_next)}
    if args.mode in CONTRASTIVE and args.mode not in SHIFTED:
        batch["query"] = shift(s)
    if args.mode in CONTRASTIVE:
        batch["key"] = shift(s)
    r = (r - replay.reward_mean) / replay.reward_sd
    outcome = {"a": a, "r": r, "terminated": terminated}
    return batch | {name: to_tensor(array, agent.device) for name, array in outcome.items()}


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def remembering(policy, frames):
    """A policy of single observations, for one episode, from one of stacks: it remembers the last
    ones, and repeats the first where there are none yet."""
    memory = []

    def act(obs):
        memory[:] = [*(memory or [obs] * frames), obs][-frames:]
        return policy(np.concatenate(memory, axis=1))

    return act


def without_noise(agent, num_envs, args):
    """The agent's policy of single observations, for one episode of each environment: it remembers
    frames and actions."""
    past = np.zeros((num_envs, args.past_actions * agent.action_dim))

    def act(stacks):
        action = agent.act(stacks, past)
        past[:] = np.concatenate([action, past], axis=1)[:, : past.shape[1]]
        return action

    return remembering(act, args.frames)


# --- Measures: what is in the code? ----------------------------------------------------------


def ridge_r2(x, y, x_test, y_test, penalty=0.1):
    """R² of ŷ(x) = m + g(x)ᵀ (G + c I)⁻¹ (y − m) on test data, eq. (9), c the penalty.

    x (M, D), y (M, C), x_test (L, D), y_test (L, C) -> (C,). This is the dual form: D may be all
    pixels of a stack. G is scaled to a mean of 1 on its diagonal."""
    centre, mean = x.mean(0), y.mean(0)
    a, b = x - centre, x_test - centre
    gram, products = a @ a.T, b @ a.T
    scale = gram.diagonal().mean()
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    weights = torch.linalg.solve(gram / scale + penalty * identity, y - mean)
    predicted = mean + products / scale @ weights
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
def encode(encoder, see, stacks):
    """Codes (E, M, Z) of stacks (E, M, S, 64, 64), one step of all episodes at a time."""
    return torch.stack([encoder(see(x)).cpu() for x in np.swapaxes(stacks, 0, 1)], dim=1)


def probe(codes, states):
    """R² of ridge regressions (9) from codes (E, M, Z) to what the frames show, by quantity: fitted
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


def draw_neighbours(codes, states, shapes):
    """For six query frames, the nearest two of other episodes, in z and in pixels."""
    queries, M = np.linspace(0, len(states) - 1, 6).astype(int), states.shape[1]

    def draw(frames):  # pairs (episode, step) -> (6, 128, 128, 3)
        pairs = ((states[e, t, :, :2], shapes[e]) for e, t in frames)
        return np.stack([sprites_env.draw_rgb(*pair, scale=2) for pair in pairs])

    rows = {"query": draw([(query, M // 2) for query in queries])}
    for name, label in (("encoder", "z"), ("pixels", "pixels")):
        nearest = []
        for query in queries:
            distance = (codes[name] - codes[name][query, M // 2]).square().sum(-1)  # (E, M)
            distance[query] = float("inf")
            nearest.append([divmod(i, M) for i in distance.flatten().argsort()[:2].tolist()])
        first, second = zip(*nearest)
        rows |= {f"nearest\nin {label}": draw(first), f"second\nin {label}": draw(second)}
    return sprites_env.draw_images(rows)


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run; returns the content of summary.json."""
    env = make_env(args, args.num_envs)
    N, T, space = args.num_envs, env.horizon, env.single_observation_space
    rounds, action_dim = args.total_steps // (N * T), env.single_action_space.shape[0]
    run = Run(args, total=rounds * N * T)
    agent = CURLAgent(space, action_dim, args, run.device)
    random_encoder = copy.deepcopy(agent.encoder)  # the probe's control
    past = np.zeros((N, args.past_actions * action_dim))  # latest first; stored with every action
    replay = FrameReplay(rounds, N, T, space, action_dim + past.shape[1], args.frames)
    print(f"replay: {replay.observations.nbytes:,} bytes of observations, each stored once")
    rng, recent, updates = np.random.default_rng(args.seed), [], 0
    total_updates = (rounds * T - args.first_update + 1) * args.updates
    reports = {max(args.first_update, math.ceil(rounds * T * i / 20)) for i in range(1, 21)}
    held_out = make_env(args, args.eval_episodes)
    episodes = sprites_env.Episodes(env, args.seed * 100_000)
    for step in range(1, rounds * T + 1):
        # act
        if (step - 1) % T == 0:  # all environments start an episode together
            past[:] = 0
            act = remembering(lambda stacks: agent.act(stacks, past, noise=True), args.frames)
        obs, action = episodes.obs, act(episodes.obs)
        if step <= args.first_update:
            action = rng.uniform(-1, 1, action.shape)
        successors, reward, terminated, truncated = episodes.step(action)
        ended = terminated | truncated
        require((ended == (step % T == 0)).all(), f"all episodes must have {T} steps")

        # store
        actions = np.concatenate([action, past], axis=1)
        replay.add(obs, actions, reward, successors, terminated)
        past[:] = actions[:, : past.shape[1]]
        if step < args.first_update:
            continue
        if step == args.first_update:
            replay.measure_rewards()

        # learn
        for _ in range(args.updates):
            rate = args.learning_rate * (1 - updates / total_updates)
            for optimizer in (agent.optimizer, agent.actor_optimizer):
                optimizer.param_groups[0]["lr"] = rate
            updates += 1
            batch = sample_views(replay, rng, agent, args)
            metrics, h = update_critic_and_encoder(agent, batch, args)
            recent.append(metrics.get("contrastive_accuracy"))
            if updates % ACTOR_EVERY == 0:
                update_actor_and_alpha(agent, h, batch["a"][:, action_dim:])
                polyak_(agent.critic_target, agent.critic, args.tau)
                polyak_(agent.key_encoder, agent.encoder, args.encoder_tau)

        # report
        if step in reports:
            returns = sprites_env.evaluate(without_noise(agent, args.eval_episodes, args), held_out)
            if args.mode in CONTRASTIVE:
                metrics["contrastive_accuracy"] = torch.stack(recent).mean()
            recent.clear()
            metrics = {name: value.item() for name, value in metrics.items()}
            metrics["alpha"] = agent.log_alpha.exp().item()
            last = np.mean(episodes.finished[-N:] or float("nan"))
            run.report(step * N, eval_return=returns.mean(), train_return=last, **metrics)
            networks = {"encoder": agent.encoder.state_dict(), "actor": agent.actor.state_dict()}
            run.save("checkpoint.pt", networks | {"step": step * N})

    env = make_env(args, 4, render_mode="rgb_array")
    run.save("rollout.gif", sprites_env.film(without_noise(agent, 4, args), env))
    summary = sprites_env.summary(returns) | {"updates": updates}
    panels = [(f"return of a {T}-step episode", ("train_return", "eval_return"))]
    if args.mode in CONTRASTIVE:
        panels += [(f"keys found (1/B: {1 / args.batch_size:.3f})", ("contrastive_accuracy",))]
        summary["contrastive_accuracy"] = metrics["contrastive_accuracy"]
    if args.mode != "state":
        summary |= probe_encoders(run, agent, random_encoder, args)
    levels = sprites_env.REFERENCE_RETURNS["follow"].items()
    return run.finish(summary, panels, "environment steps", levels)


def probe_encoders(run, agent, random_encoder, args):
    """R² by quantity, of the codes and of two controls; draws neighbours.png."""
    env = make_env(args, PROBE_EPISODES)
    stacks, states, shapes = random_stacks(env, args.frames)
    seen = {"encoder": agent.encoder, "random_encoder": random_encoder, "pixels": nn.Flatten()}
    codes = {name: encode(module, agent.see, stacks) for name, module in seen.items()}
    run.save("neighbours.png", draw_neighbours(codes, states, shapes))
    names = {"encoder": "probe_r2", "random_encoder": "probe_r2_random_encoder"}
    names["pixels"] = "probe_r2_pixels"
    return {names[name]: probe(code, states) for name, code in codes.items()}


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
