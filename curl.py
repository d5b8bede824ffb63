"""DOC"""

import copy
import csv
import ctypes
import json
import math
import os
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

Mode = Literal[
    "state",  # soft actor critic on the state: what pixels could reach
    "pixel",  # ... on stacks of frames as they are
    "rad",  # ... on shifted frames
    "curl",  # ... on shifted frames, and the contrastive loss
    "curl_unaugmented_sac",  # ... on frames as they are, and the contrastive loss on shifted ones
    "contrastive_only",  # like curl, but only the contrastive loss trains the encoder
]
SHIFTED = ("rad", "curl", "contrastive_only")  # what soft actor critic sees is shifted
CONTRASTIVE = ("curl", "curl_unaugmented_sac", "contrastive_only")  # there is a contrastive loss


@dataclass(frozen=True)
class Args:
    mode: Mode = "curl"  # what is switched on: see above
    distractors: Literal[0, 1, 2] = 0  # other sprites in the frame
    total_steps: int = 10_000  # environment steps, rounded down to rounds of 40 num_envs
    num_envs: int = 50  # episodes side by side; each step of all is followed by num_envs updates
    initial_steps: int = 1_000  # uniformly random actions before the first update
    batch_size: int = 64  # transitions of an update, and keys of the contrastive loss (B)
    learning_rate: float = 3e-3  # of Adam, for everything but the temperature
    temperature_rate: float = 1e-3  # learning rate of log α
    initial_temperature: float = 0.01  # α at the start, in units of the standardised reward
    gamma: float = 0.2  # discount factor
    tau: float = 0.01  # how fast the target critic follows
    encoder_tau: float = 0.05  # how fast the key encoder follows
    frame_stack: int = 3  # frames that the encoder sees at once
    pad: int = 4  # pixels of a random shift, at most
    z_dim: int = 50  # size of the code (Z)
    hidden: int = 128  # units of each of the two hidden layers of policy and critic
    updates: int = 10
    rscale: float = 1.0
    cweight: float = 1.0
    decay: bool = True
    tanh: bool = False
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks --------------------------------------------------------------------------------


class StackEncoder(nn.Module):
    """Convolutions, which the actor shares, and a head of its own: images become codes z."""

    def __init__(self, convolutions, head):
        super().__init__()
        self.convolutions, self.head = convolutions, head

    def forward(self, x):  # (B, S, 64, 64) -> (B, Z)
        return self.head(self.convolutions(x))


def patch_convolutions(frames):
    """(B, S, 64, 64) -> (B, 2048): 4 x 4 patches, then two convolutions that halve height and
    width."""
    layers = [nn.Conv2d(frames, 16, 4, stride=4), nn.ReLU()]  # (B, 16, 16, 16)
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]  # (B, 32, 8, 8)
    return orthogonal_(nn.Sequential(*layers, nn.Flatten())).to(memory_format=torch.channels_last)


def code_head(size_in, z_dim):
    """(B, size_in) -> (B, Z)."""
    return nn.Sequential(orthogonal_(nn.Linear(size_in, z_dim)), nn.LayerNorm(z_dim), nn.Tanh())


class SquashedActor(nn.Module):
    """π(a|s): a = tanh(u), u ~ N(mean, sd²), both functions of the state; log sd in [-10, 2]."""

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


def mlp(size_in, hidden, size_out):
    """A multilayer perceptron of three layers."""
    layers = [nn.Linear(size_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return orthogonal_(nn.Sequential(*layers, nn.Linear(hidden, size_out)))


def orthogonal_(module, gain=math.sqrt(2)):
    """Orthogonal weights and zero biases. With PyTorch's default, the signal all but vanishes on
    its way through six stride-2 layers, and nothing is learnt for thousands of updates."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return module


# --- The algorithm: pure functions of tensors ------------------------------------------------


def bilinear_logits(query, keys, W):
    """ℓᵢⱼ = qᵢᵀ W kⱼ − maxⱼ qᵢᵀ W kⱼ, eq. (1). query, keys (B, Z), W (Z, Z) -> (B, B)."""
    logits = query @ W @ keys.T
    return logits - logits.amax(1, keepdim=True)


def info_nce_loss(logits):
    """−E[log softmax(ℓᵢ)ᵢ], eq. (2): key i is the positive of query i. (B, B) -> scalar."""
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
    return -(log_alpha.exp() * (log_prob + target_entropy).detach()).mean()


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def squashed_log_prob(u, mean, log_std):
    """log π(a|s) = log N(u) − Σ log(1 − tanh²(u)) for a = tanh(u), eq. (7). (B, A) -> (B,)."""
    correction = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # the same, stably
    return gaussian_log_prob(u, mean, log_std) - correction.sum(-1)


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the target network follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


def random_shift(stacks, offsets, pad):
    """Zero-pad and crop: one offset per stack. uint8 (B, S, H, W), offsets (2, B) in 0 ... 2 pad."""
    padded = np.pad(stacks, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, stacks.shape[2:], axis=(2, 3))
    return crops[np.arange(len(stacks)), :, offsets[0], offsets[1]]


# --- Data ------------------------------------------------------------------------------------


class EpisodeReplay:
    """Every observation once; stacks of them are rebuilt when sampled."""

    def __init__(self, rounds, horizon, space, action_dim, num_envs, frames):
        self.T, self.N, self.frames, self.size = horizon, num_envs, frames, 0
        self.observations = np.zeros((rounds, horizon + 1, num_envs, *space.shape), space.dtype)
        shape = (rounds * horizon * num_envs,)
        self.actions = np.zeros((*shape, action_dim), np.float32)
        self.rewards, self.terminated = np.zeros(shape, np.float32), np.zeros(shape, bool)

    def add(self, obs, action, reward, successor, terminated):
        """One step of all environments"""
        round, t = divmod(self.size // self.N, self.T)
        self.observations[round, t], self.observations[round, t + 1] = obs, successor
        new = slice(self.size, self.size + self.N)
        self.actions[new], self.rewards[new], self.terminated[new] = action, reward, terminated
        self.size += self.N

    def sample(self, rng, batch):
        i = rng.integers(self.size, size=batch)
        episode, t, n = i // (self.T * self.N), i // self.N % self.T, i % self.N
        times = np.maximum(t[:, None] + np.arange(1 - self.frames, 2), 0)  # (B, S + 1)
        x = self.observations[episode[:, None], times, n[:, None]]  # (B, S + 1, ...)
        stack, successor = (
            y.reshape(batch, -1, *y.shape[3:]) for y in (x[:, :-1], x[:, 1:])
        )  # (B, S, 64, 64)
        return stack, self.actions[i], self.rewards[i], successor, self.terminated[i]


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run; returns the content of summary.json."""
    pixels, shifted = args.mode != "state", args.mode in SHIFTED
    contrastive = args.mode in CONTRASTIVE
    S = args.frame_stack if pixels else 1

    def make_env(num_envs, render_mode=None):
        options = {"distractors": args.distractors, "render_mode": render_mode}
        options["observation"] = "image" if pixels else "state"
        return sprites_env.SpritesVectorEnv(num_envs, **options)

    env = make_env(args.num_envs)
    N, T, A = env.num_envs, env.horizon, env.single_action_space.shape[0]
    rounds = args.total_steps // (N * T)
    device = prepare(args)
    out = open_run(args, f"{args.mode}_d{args.distractors}_s{args.seed}", device)
    space = env.single_observation_space
    replay, rng = EpisodeReplay(rounds, T, space, A, N, S), np.random.default_rng(args.seed)

    def to_tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    if pixels:
        encoder = StackEncoder(patch_convolutions(S), code_head(2048, args.z_dim))
        actor = SquashedActor(code_head(2048, args.z_dim), args.z_dim, args.hidden, A)
        critic = TwinCritic(nn.Identity(), args.z_dim, args.hidden, A)
    else:
        D = space.shape[0]
        encoder = StackEncoder(nn.Identity(), nn.Identity())
        actor = SquashedActor(nn.Identity(), D, args.hidden, A)
        critic = TwinCritic(nn.Identity(), D, args.hidden, A)
    lo, hi = to_tensor(space.low), to_tensor(space.high)

    def to_input(obs):
        return to_float(obs, device) if pixels else (to_tensor(obs) - lo) / (hi - lo) * 2 - 1

    W = nn.Parameter(torch.eye(args.z_dim) * args.cweight)
    log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_temperature)))
    encoder_target, critic_target = copy.deepcopy((encoder, critic))
    fast = [*encoder.parameters(), *critic.parameters(), W]
    optimizer = torch.optim.Adam(fast, lr=args.learning_rate, fused=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.temperature_rate, betas=(0.5, 0.999))

    def shift(stacks):
        return random_shift(stacks, rng.integers(2 * args.pad + 1, size=(2, len(stacks))), args.pad)

    def sampled(mean, log_std):
        u = mean + log_std.exp() * torch.randn_like(mean)
        return u.tanh(), squashed_log_prob(u, mean, log_std)

    @torch.no_grad()
    def explore(stacks):
        return sampled(*actor(encoder.convolutions(to_input(stacks))))[0]

    def policy(stacks):
        return actor(encoder.convolutions(to_input(stacks)))[0].tanh()

    log, update, metrics = Log(out, rounds * N * T), 0, {}
    obs, _ = env.reset(seed=args.seed * 100_000)
    total_updates = (rounds * T - args.initial_steps // N) * args.updates
    for step in range(1, rounds * T + 1):
        # act
        if (step - 1) % T == 0:
            act, episode_return = remembering(explore, S), np.zeros(N)
        action = act(obs).cpu().numpy()
        if replay.size < args.initial_steps:
            action = rng.uniform(-1, 1, (N, A))
        next_obs, reward, terminated, truncated, info = env.step(action)
        ended = terminated | truncated
        successor = np.stack(info["final_obs"]) if ended.any() else next_obs
        # store
        replay.add(obs, action, reward, successor, terminated)
        obs, episode_return = next_obs, episode_return + reward

        # learn
        if replay.size == args.initial_steps:
            rm, rs = replay.rewards[: replay.size].mean(), replay.rewards[: replay.size].std()
            rs = rs / args.rscale
        for _ in range(args.updates if replay.size >= args.initial_steps else 0):
            update += 1
            if args.decay:
                for o in (optimizer, actor_optimizer):
                    o.param_groups[0]["lr"] = args.learning_rate * (1 - update / (total_updates + args.updates + 1))
            s, a, r, s_next, terminated = replay.sample(rng, args.batch_size)
            a, r, terminated = to_tensor(a), to_tensor((r - rm) / rs), to_tensor(terminated)
            anchor = to_input(shift(s) if shifted else s)
            after = to_input(shift(s_next) if shifted else s_next)
            h = encoder.convolutions(anchor)
            z = encoder.head(h)
            with torch.no_grad():
                a_next, log_prob = sampled(*actor(h_next := encoder.convolutions(after)))
                q_next = critic_target(encoder.head(h_next), a_next).amin(0)
                y = td_target(r, terminated, q_next - log_alpha.exp() * log_prob, args.gamma)
            q = critic(z.detach() if args.mode == "contrastive_only" else z, a)
            q_loss = loss = critic_loss(q, y)
            if contrastive:
                query = z if shifted else encoder(to_input(shift(s)))
                with torch.no_grad():
                    keys = encoder_target(to_input(shift(s)))
                logits = bilinear_logits(query, keys, W)
                nce = info_nce_loss(logits)
                loss = loss + nce
                metrics |= {"nce": nce, "acc": logits}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            if update % 2 == 0:
                h = h.detach()
                a_new, log_prob = sampled(*actor(h))
                with torch.no_grad():
                    z = encoder.head(h)
                q_new = critic(z, a_new).amin(0)
                actor_loss = soft_actor_loss(q_new, log_prob, log_alpha.exp().detach())
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                alpha_loss = temperature_loss(log_alpha, log_prob, -A)
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                polyak_(critic_target, critic, args.tau)
                polyak_(encoder_target, encoder, args.encoder_tau)

        # report
        if (step * N * 10) // (rounds*N*T) != ((step - 1) * N * 10) // (rounds*N*T) and update:
            returns = evaluate(remembering(policy, S), make_env(args.eval_episodes))
            acc = float("nan")
            if contrastive:
                acc = (logits.argmax(1) == torch.arange(len(logits))).float().mean().item()
            log.report(
                step * N,
                eval_return=returns.mean(),
                q_loss=q_loss.item(), entropy=-log_prob.mean().item(), alpha=log_alpha.exp().item(),
                 acc=acc, nce=nce.item() if contrastive else 0, ztd=z.std(0).mean().item(), train=episode_return.mean()/((step-1)%T+1)*T
            )
            print(log.rows[-1])
    return returns.mean()


def remembering(policy, frames):
    """A policy of stacks, as a policy of single observations, for one episode: it remembers the
    last ones, and takes the first one for those before it."""
    memory = []

    def act(obs):
        memory[:] = [*(memory or [obs] * frames), obs][-frames:]
        return policy(np.concatenate(memory, axis=1))

    return act


# --- Appendix: 


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


def save_gif(path, film, milliseconds=100):
    """film: a list of tuples of images uint8 (height, width, 3), shown side by side."""
    from PIL import Image

    rows = [np.concatenate([np.pad(i, ((3, 3), (3, 3), (0, 0))) for i in row], 1) for row in film]
    first, *rest = [Image.fromarray(row).quantize(16) for row in rows]
    settings = {"save_all": True, "append_images": rest, "loop": 0, "duration": milliseconds}
    write_whole(path, lambda temporary: first.save(temporary, **settings))


def to_float(frames, device):
    """uint8 (...), array or tensor -> float32 (...) in [0, 1] on the device."""
    return torch.as_tensor(frames, device=device).float().div_(255)


def check(args, positive):
    """End with one line if one of these arguments is not above zero, or the seed is unusable."""
    for name in positive.split():
        if not getattr(args, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"error: {flag} must be positive, not {getattr(args, name)}")
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
        for old in ("summary.json", "encoder.pt", "checkpoint.pt", "curve.csv"):
            (out / old).unlink(missing_ok=True)  # of an earlier run: not to be taken for this one's
        write_whole(out / "args.json", lambda t: t.write_text(json.dumps(facts, indent=1)))
    except OSError as error:
        raise SystemExit(f"error: cannot write to {out}: {error.strerror}") from None
    return out


def write_whole(path, save):
    """Write a file whole or not at all: `save` fills a temporary file, which is then renamed."""
    temporary = path.with_name("unfinished_" + path.name)
    save(temporary)
    os.replace(temporary, path)


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
