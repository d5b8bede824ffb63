"""skill_embedding.py: networks, equations, updates, data, measures, learning, runs, bad input."""

import copy
import csv
import inspect
import json
import math
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import skill_embedding as se
import sprites_env

CPU = torch.device("cpu")
TINY = {"total_steps": 320, "num_envs": 4, "updates": 2, "batch_size": 3, "eval_episodes": 8}
TINY |= {"window": 2, "transfer_steps": 320, "torch_threads": 1, "device": "cpu"}
TRANSFER = {"experiment": "transfer", "num_envs": 16, "eval_episodes": 16}  # 16 goals to learn from
TRANSFER |= {"total_steps": 1280, "transfer_steps": 1280}
SIZES = {"tasks": 4, "z_dim": 2, "embedding": "gaussian", "obs_dim": 4, "action_dim": 2}
SIZES |= {"window": 2, "spread": 1.5, "z_sd": 0.2}  # of a checkpoint
torch.set_num_threads(1)


def make_learner(tasks=4, z_dim=3, embedding="gaussian", obs_dim=4, action_dim=2, window=2):
    torch.manual_seed(0)
    return se.SkillLearner(obs_dim, action_dim, tasks, z_dim, embedding, window, 1.5, 0.2)


def run(out, pictures=False, **changes):
    """A short run; pictures take most of its time."""
    args = se.Args(**TINY | changes, out=str(out))
    if pictures:
        return se.train(args)
    with pytest.MonkeyPatch.context() as patch:
        save = se.Run.save

        def save_no_pictures(run, name, content):
            if not name.endswith(("png", "gif")):
                save(run, name, content)

        patch.setattr(se.Run, "save", save_no_pictures)
        patch.setattr(se, "draw_skills", MagicMock())
        patch.setattr(sprites_env, "draw_curve", MagicMock())
        return se.train(args)


def read_curve(out):
    with open(out / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if "second" not in k} for row in rows]


def load(*path):
    file = path[0].joinpath(*path[1:], "checkpoint.pt")
    return torch.load(file, weights_only=True)


def assert_same(a, b):
    """Two state_dicts are equal, to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- Arguments --------------------------------------------------------------------------------

USUAL = ("spread", "z_sd", "alpha1", "alpha2", "gamma", "total_steps")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (1.5, 0.2, 2, 0.2, 0.9, 224_000)),
        ({"experiment": "generality"}, (0, 0.2, 2, 0.2, 0.9, 224_000)),
        ({"experiment": "versatility"}, (0, 1, 5, 0.5, 0.9, 224_000)),
        ({"experiment": "transfer"}, (0, 0.4, 2, 0.2, 0.97, 128_000)),
        ({"embedding": "bernoulli"}, (1.5, 0.2, 2, 0.2, 0.9, 224_000)),
        ({"embedding": "one_hot"}, (1.5, 0.2, 0, 0, 0.9, 224_000)),
        ({"embedding": "one_hot", "experiment": "versatility"}, (0, 1, 0, 0, 0.9, 224_000)),
        (dict(zip(USUAL, (0.0, 0.3, 0.0, 0.7, 0.8, 900))), (0, 0.3, 0, 0.7, 0.8, 900)),
    ],
)
def test_defaults_of_the_experiments(changes, expected):
    args = se.Args(**changes)
    assert tuple(getattr(args, name) for name in USUAL) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gamma": 1.0}, "--gamma must be below 1"),
        ({"spread": -1.0}, "--spread must be 0 or more"),
        ({"alpha2": -1.0}, "--alpha2"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive"),
        ({"z_sd": 0.0}, "--z-sd must be positive"),
        ({"window": -1}, "--window"),
        ({"total_steps": 159}, "at least 160"),
        (TRANSFER | {"transfer_steps": 639}, "at least 640"),
        ({"hold": 7}, "--hold must divide 40"),
        ({"z_dim": 0}, "--z-dim"),
        ({"embedding": "one_hot", "z_dim": 4}, "--z-dim is the number of tasks"),
        ({"library": "x.pt"}, "--library is for --experiment transfer"),
        ({"experiment": "transfer", "library": "missing.pt"}, "missing.pt is no checkpoint"),
        ({"seed": -1}, "--seed"),
        ({"seed": 10_000}, "--seed must be in 0 ... 9999"),
        ({"num_envs": 6, "total_steps": 960}, "multiples of 4"),
        ({"eval_episodes": 2}, "multiples of 4"),
        (TRANSFER | {"num_envs": 4}, "multiples of 16"),
        (TRANSFER | {"embedding": "bernoulli"}, "bits"),
        ({"device": "cuda"}, "--device cuda"),
    ],
)
def test_bad_input(changes, message, tmp_path, monkeypatch):
    """One line, and no folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path / "out", **changes)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_allowed():
    se.Args(total_steps=160, num_envs=4, transfer_steps=1)  # transfer_steps is of no account here
    se.Args(experiment="transfer", total_steps=640, transfer_steps=640)
    se.Args(experiment="versatility", num_envs=3, eval_episodes=5, window=0, alpha3=0.0, gamma=0.99)
    flags = "--experiment versatility --z-ratio --embedding bernoulli --z-dim 4 --seed 9999"
    args = tyro.cli(se.Args, args=flags.split())
    assert args.z_ratio and args.z_dim == 4 and args.alpha1 == 5
    assert args.run_name == "versatility_bernoulli_s9999"
    with pytest.raises(SystemExit, match="--hold must divide"):
        tyro.cli(se.Args, args=["--hold", "3"])


def test_a_library_that_is_none(tmp_path):
    files = {"a.pt": b"no checkpoint", "b.pt": b"", "c.csv": b"step,seconds", "d.gif": b"GIF89a"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"networks": {}}, tmp_path / "e.pt")
    bits = make_learner(z_dim=2, embedding="bernoulli")
    sizes = SIZES | {"embedding": "bernoulli"}
    torch.save({"sizes": sizes, "networks": bits.state_dict()}, tmp_path / "bits.pt")
    for name in (*files, "e.pt", "bits.pt"):
        with pytest.raises(SystemExit, match="bits" if "bits" in name else "no checkpoint of sk"):
            run(tmp_path / "out", experiment="transfer", library=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


# --- Networks: against numpy ------------------------------------------------------------------


def forward(mlp, *inputs):
    """What a network makes of its inputs side by side, in numpy."""
    inputs = [np.asarray(x, np.float64) for x in inputs]
    shape = np.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    x = np.concatenate([np.broadcast_to(x, (*shape, x.shape[-1])) for x in inputs], axis=-1)
    for i, layer in enumerate(mlp[::2]):
        weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
        x = (np.maximum(x, 0) if i else x) @ weight.T + bias
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def policy_by_hand(policy, obs, z):
    mean, width = np.split(forward(policy.mlp, obs, 4.5 * z), 2, axis=-1)
    return mean, 0.05 * 20 ** sigmoid(width + 1)


def critic_by_hand(critic, obs, action, z, task):
    one_hot = np.eye(critic.tasks)[task]
    return forward(critic.mlp, obs, np.clip(action, -1, 1), 4.5 * z, one_hot)[..., 0]


def log_normal(x, mean, sd):
    """log N(x; mean, sd²) of independent numbers."""
    return (-(((x - mean) / sd) ** 2) / 2 - np.log(sd * math.sqrt(2 * math.pi))).sum(-1)


def entropy_normal(sd):
    return (np.log(sd) + math.log(2 * math.pi * math.e) / 2).sum(-1)


def log_bits(x, logits):
    return np.log(np.where(x == 1, sigmoid(logits), sigmoid(-logits))).sum(-1)


def test_policy_inference_and_critic_by_hand():
    """z is the same at every step of an episode, and the critic clips actions."""
    rng, B, T = np.random.default_rng(0), 2, 5
    learner = make_learner().double()
    for p in learner.parameters():
        p.data += 0.1 * torch.from_numpy(rng.normal(size=p.shape))
    obs, z, task = rng.normal(size=(B, T, 4)), rng.normal(size=(B, 1, 3)), np.array([[2], [0]])
    action, seen = 2 * rng.normal(size=(B, T, 2)), rng.normal(size=(B, T, 14))
    pi = learner.policy(torch.tensor(obs), torch.tensor(z))
    mean, sd = policy_by_hand(learner.policy, obs, z)
    np.testing.assert_allclose(pi.mean.detach(), mean)
    np.testing.assert_allclose(pi.stddev.detach(), sd)
    q = learner.critic(*map(torch.tensor, (obs, action, z, task)))
    expected = critic_by_hand(learner.critic, obs, action, z, task)
    np.testing.assert_allclose(q.detach(), expected)
    guess = learner.inference(torch.tensor(seen))
    mean, width = np.split(forward(learner.inference.mlp, seen), 2, axis=-1)
    np.testing.assert_allclose(guess.mean.detach(), mean)
    np.testing.assert_allclose(guess.stddev.detach(), 0.05 * 30 ** sigmoid(width))
    bits = se.SkillInference(14, 3, bits=True).double()
    logits = forward(bits.mlp, seen)
    np.testing.assert_allclose(bits(torch.tensor(seen)).mean.detach(), sigmoid(logits))


def test_embeddings_by_hand():
    """Means within 3, deviations from 0.35 to 1 times the bound; bits; constants, not learnt."""
    p = make_learner().embedding
    with torch.no_grad():
        p.place[0, 0], p.width[0, 0], p.width[1, 1] = 1000, 50, -50
    task = torch.tensor([0, 3, 1, 1])
    place, width = p.place.detach()[task].numpy(), p.width.detach()[task].numpy()
    np.testing.assert_allclose(p(task).mean.detach(), 3 * np.tanh(place / 3), rtol=1e-5)
    sd = 0.07 * (1 / 0.35) ** sigmoid(width.astype(float))
    np.testing.assert_allclose(p(task).stddev.detach(), sd, rtol=1e-5)
    assert sd.max() == 0.2 and sd.min() == pytest.approx(0.07)
    p = make_learner(embedding="bernoulli").embedding
    probability = sigmoid(p.place.detach()[task].numpy())
    np.testing.assert_allclose(p(task).mean.detach(), probability, rtol=1e-5)
    p = make_learner(3, 3, "one_hot").embedding
    assert p(torch.tensor([1])).mean.tolist() == [[-3, 3, -3]] and not p.place.requires_grad
    assert p(torch.tensor([1])).stddev.flatten().tolist() == pytest.approx([1e-3] * 3)


def test_networks_start_as_they_should():
    """Orthogonal layers without bias, actions near zero, tasks `spread` apart and narrow."""
    learner = make_learner()
    gains = {"policy": 0.1, "inference": math.sqrt(2), "critic": math.sqrt(2)}
    for name, gain in gains.items():
        mlp = getattr(learner, name).mlp
        hidden = 64 if name == "inference" else 128
        assert [layer.out_features for layer in mlp[::2][:2]] == [hidden] * 2
        for layer, scale in zip(mlp[::2], (math.sqrt(2), math.sqrt(2), gain)):
            w = layer.weight.detach()
            square = w @ w.T if len(w) <= w.shape[1] else w.T @ w
            torch.testing.assert_close(square, scale**2 * torch.eye(len(square)), atol=1e-5, rtol=0)
            assert not layer.bias.any()
    many = se.TaskEmbedding("gaussian", 500, 2, spread=0.7, z_sd=1)
    assert many.place.std().item() == pytest.approx(0.7, rel=0.1) and (many.width == -1.5).all()


def test_policy_and_inference_never_see_the_task():
    assert list(inspect.signature(se.SkillPolicy.forward).parameters) == ["self", "obs", "z"]
    assert list(inspect.signature(se.SkillInference.forward).parameters) == ["self", "window"]


def test_agent():
    """A slow copy of its own, which is not learnt; every parameter in exactly one optimiser."""
    learner = make_learner()
    agent = se.SkillAgent(learner, se.Args(**TINY, learning_rate=0.02))
    assert_same(agent.critic_target.state_dict(), learner.critic.state_dict())
    slow = set(agent.critic_target.parameters())
    assert not slow & set(learner.parameters()) and not any(p.requires_grad for p in slow)
    stepped = [p for o in agent.optimizers for p in o.param_groups[0]["params"]]
    assert len(stepped) == len(set(stepped)) and set(stepped) == set(learner.parameters())
    assert [o.param_groups[0]["lr"] for o in agent.optimizers] == [0.02] * 3


# --- Equations --------------------------------------------------------------------------------


def retrace(ratios=(9, 0.5, 4), last=0.0, terminated=(0, 0, 0)):
    """gamma .9, r (1, 0, 2), V1 3, V2 1, Q' (2, 4, 1.5)."""
    reward, q = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[2.0, 4.0, 1.5]])
    value = torch.tensor([[7.0, 3.0, 1.0, last]])  # V0 is of no account
    log_ratio = torch.tensor([ratios]).float().log()
    ended = torch.tensor([terminated]).float()
    return se.retrace_targets(reward, ended, value, q, log_ratio, 0.9)[0].tolist()


def test_retrace_by_hand():
    assert retrace() == pytest.approx([2.5075, 1.35, 2])
    assert retrace(last=2) == pytest.approx([3.2365, 2.97, 3.8])  # a time limit: bootstrap
    assert retrace(ratios=(0, 0, 0)) == pytest.approx([3.7, 0.9, 2])  # one step
    assert retrace(ratios=(1, 1, 1)) == pytest.approx([1.315, 1.35, 2])  # all of the return
    assert retrace(ratios=(0.1, 0.5, 4)) == retrace()  # the first action is given
    assert retrace(last=2, terminated=(0, 0, 1)) == pytest.approx([2.5075, 1.35, 2])
    assert retrace(terminated=(0, 1, 0))[:2] == pytest.approx([1 + 0.9 * (3 + 0.5 * (0 - 4)), 0])


def corrected_errors(r, terminated, v, q, log_ratio, gamma):
    """Munos et al.: G_i = Q_i + sum_j gamma^(j-i) (c_(i+1) ... c_j) (r_j + gamma V_(j+1) - Q_j),
    up to the end of the episode."""
    targets = q.copy()
    for b, i in np.ndindex(q.shape):
        weight = 1.0
        for j in range(i, q.shape[1]):
            weight *= gamma * min(1, math.exp(log_ratio[b, j])) if j > i else 1
            after = 0 if terminated[b, j] else gamma * v[b, j + 1]
            targets[b, i] += weight * (r[b, j] + after - q[b, j])
            if terminated[b, j]:
                break
    return targets


def test_retrace_is_the_sum_of_corrected_errors():
    rng = np.random.default_rng(0)
    r, q, log_ratio = rng.normal(size=(3, 2, 7))
    numbers = r, rng.random((2, 7)) < 0.2, rng.normal(size=(2, 8)), q, log_ratio
    assert numbers[1].any()
    tensors = [torch.tensor(x).double() for x in numbers]
    found = se.retrace_targets(*tensors, 0.95)
    np.testing.assert_allclose(found, corrected_errors(*numbers, 0.95))


def test_divergence_and_entropy_by_hand():
    mean, sd = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[1.0], [1.0], [2.0]])
    kl = se.divergences(se.gaussian(mean, sd))
    assert kl[0, 1].item() == pytest.approx(0.5)
    assert kl[0, 2].item() == pytest.approx(0.318, abs=1e-3)
    assert kl[2, 0].item() == pytest.approx(0.807, abs=1e-3)
    assert kl.diagonal().tolist() == [0, 0, 0]
    two = se.gaussian(torch.zeros(2), torch.tensor([1.0, math.e]))
    assert two.entropy().item() == pytest.approx(2 * 1.4189 + 1, abs=1e-4)
    assert se.bernoulli(torch.zeros(2)).entropy().item() == pytest.approx(math.log(4))
    expected = -0.5 - math.log(2 * math.pi) - 1
    assert two.log_prob(torch.tensor([1.0, 0.0])).item() == pytest.approx(expected)


def test_losses_by_hand():
    """(1), its log q cut off at ±3; (3); (4) with the penalty of the mean; (5)."""
    r_hat = se.skill_reward(*torch.tensor([[[1.0, 1.0]], [[5.0, -9.0]], [[4.0, 5.0]]]), 0.1, 0.01)
    assert r_hat.tolist() == [[pytest.approx(1.34), pytest.approx(1 - 0.3 + 0.05)]]
    loss = se.skill_critic_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
    assert loss.item() == 2.5
    q, entropy, entropy_z = torch.tensor([[[2.0, 0.0]], [[3.0, 0.0]], [[5.0, 0.0]]])
    mean = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    loss = se.skill_actor_loss(q, mean, entropy, entropy_z, 0.1, 0.01)
    assert loss.item() == pytest.approx((-2 - 0.03 - 0.5 + 0.03 * 5) / 2)
    assert se.inference_loss(torch.tensor([[1.0, -4.0]])).item() == 1.5


@pytest.mark.parametrize("wrong", range(5))
def test_losses_refuse_to_broadcast(wrong):
    """(B, 1) against (B, T), at any place."""
    x = [torch.zeros(2, 3) for _ in range(5)]
    x[2] = torch.zeros(2, 4)  # V
    x[wrong] = torch.zeros(2, 1)
    a, b, value, c, d = x
    with pytest.raises(AssertionError):
        se.retrace_targets(a, b, value, c, d, 0.9)
    if wrong < 3:
        x = [torch.zeros(2, 1) if i == wrong else torch.zeros(2, 3) for i in range(3)]
        with pytest.raises(AssertionError):
            se.skill_reward(*x, 1, 1)
        with pytest.raises(AssertionError):
            se.skill_actor_loss(x[0], torch.zeros(2, 3, 2), x[1], x[2], 1, 1)
    with pytest.raises(AssertionError):
        se.skill_actor_loss(*[torch.zeros(2, 3)] * 4, 1, 1)  # a mean without its last axis
    with pytest.raises(AssertionError):
        se.skill_critic_loss(torch.zeros(2, 3), torch.zeros(2, 1))


def test_windows_by_hand_and_without_leaks():
    obs, actions = torch.arange(5.0).view(1, 5, 1), 10 * torch.arange(1, 5.0).view(1, 4, 1)
    seen = se.windows(obs, actions, 2)[0].tolist()
    assert seen == [[0, 0, 0, 10], [0, 0, 1, 20], [0, 1, 2, 30], [1, 2, 3, 40]]
    assert se.windows(obs, actions, 0)[0].tolist() == [[0, 10], [1, 20], [2, 30], [3, 40]]


def test_bits_pass_gradients_straight_through():
    """dz/dlogit is that of the mean, p (1 - p); the value is a bit; Gaussians are shifted noise."""
    logits = torch.tensor([0.0, math.log(3)], requires_grad=True)
    z = se.straight_through(se.bernoulli(logits))
    z.sum().backward()
    assert set(z.tolist()) <= {0, 1} and logits.grad.tolist() == pytest.approx([0.25, 0.1875])
    mean = torch.zeros(2, requires_grad=True)
    se.straight_through(se.gaussian(mean, torch.ones(2))).sum().backward()
    assert mean.grad.tolist() == [1, 1]


def test_polyak():
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before, goal = slow.bias.item(), fast.bias.item()
    se.polyak_(slow, fast, 0.25)
    assert slow.bias.item() == pytest.approx(0.75 * before + 0.25 * goal)
    assert fast.bias.item() == goal


def test_identified():
    log_q = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0], [4.0, 0.0, 3.0]])
    assert se.identified(log_q) == pytest.approx(1 / 3)  # the first one only


# --- Updates: called on a small agent, against float64 by hand --------------------------------


def make_agent(kind="gaussian", z_dim=2, **changes):
    """An agent in double precision whose slow critic differs, and five odd episodes of 6 steps."""
    args = se.Args(**TINY | {"learning_rate": 0.01} | changes)
    learner = make_learner(3, z_dim, kind, window=args.window).double()
    agent, rng = se.SkillAgent(learner, args), np.random.default_rng(1)
    for p in [*learner.parameters(), *agent.critic_target.parameters()]:
        p.data += 0.1 * torch.from_numpy(rng.normal(size=p.shape))
    B, T = 5, 6
    batch = {"obs": rng.normal(size=(B, T + 1, 4)), "action": rng.normal(size=(B, T, 2))}
    batch |= {"reward": rng.normal(size=(B, T)), "task": np.array([0, 2, 1, 1, 2])}
    batch["terminated"] = (rng.random((B, T)) < 0.2).astype(float)
    batch["z"] = rng.normal(size=(B, z_dim))
    if kind == "bernoulli":
        batch["z"] = (batch["z"] > 0).astype(float)
    mean, sd = policy_by_hand(learner.policy, batch["obs"][:, :-1], batch["z"][:, None])
    batch["log_b"] = log_normal(batch["action"], mean, sd) + rng.normal(size=(B, T))
    batch["log_b_z"] = rng.normal(size=B)
    return agent, {name: torch.from_numpy(x) for name, x in batch.items()}, args


def check_update(agent, update, loss, *modules, lr=0.01):
    """`update` is Adam's first step down the gradient of `loss` and moves these modules alone; the
    gradients that others left behind are of no account. Returns what `update` does."""
    moving = [p for module in modules for p in module.parameters()]
    gradients = torch.autograd.grad(loss, moving, allow_unused=True)
    parameters = [*agent.learner.parameters()]
    expected = {p: p.detach().clone() for p in parameters}
    for p, g in zip(moving, gradients):
        expected[p] -= 0 if g is None else lr * g / (g.abs() + 1e-8)
    for p in parameters:
        p.grad = torch.ones_like(p)
    result = update()
    for p in parameters:
        torch.testing.assert_close(p.detach(), expected[p])
    return result


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("window", [0, 2])
def test_inference_update(kind, window):
    """It maximises the likelihood of the z that was acted on, and tells it without gradient."""
    agent, batch, args = make_agent(kind, window=window)
    obs, action, z = (batch[name].numpy() for name in ("obs", "action", "z"))
    log_q = np.zeros(action.shape[:2])
    for b, i in np.ndindex(log_q.shape):
        states = [obs[b, max(0, j)] for j in range(i - window, i + 1)]
        out = forward(agent.learner.inference.mlp, np.concatenate([*states, action[b, i]]))
        mean, width = np.split(out, 2)
        sd = 0.05 * 30 ** sigmoid(width)
        gaussian = kind == "gaussian"
        log_q[b, i] = log_normal(z[b], mean, sd) if gaussian else log_bits(z[b], out)
    seen = se.windows(batch["obs"], batch["action"], window)
    loss = -agent.learner.inference(seen).log_prob(batch["z"][:, None]).mean()
    assert loss.item() == pytest.approx(-log_q.mean())
    found = check_update(
        agent,
        lambda: se.update_inference(agent, batch, args),
        loss,
        agent.learner.inference,
    )
    np.testing.assert_allclose(found, log_q)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "kind, z_ratio", [("gaussian", False), ("gaussian", True), ("bernoulli", True)]
)
def test_critic_update(kind, z_ratio):
    """Its target is (2) of (1), all by hand: V and Q̄ of the slow critic, H and c of the policy as
    it is, and one sample of it for V. Nothing but the critic learns, and the slow one follows."""
    agent, batch, args = make_agent(kind, z_ratio=z_ratio)
    learner, numbers = agent.learner, {name: x.numpy() for name, x in batch.items()}
    obs, action, z = numbers["obs"], numbers["action"], numbers["z"][:, None]
    task, log_q = numbers["task"][:, None], 3 * np.random.default_rng(2).normal(size=(5, 6))
    mean, sd = policy_by_hand(learner.policy, obs, z)
    torch.manual_seed(3)
    sampled = mean + sd * torch.randn(mean.shape, dtype=torch.float64).numpy()
    v = critic_by_hand(agent.critic_target, obs, sampled, z, task)
    q_bar = critic_by_hand(agent.critic_target, obs[:, :-1], action, z, task)
    mean, sd = mean[:, :-1], sd[:, :-1]
    r_hat = numbers["reward"] + 0.3 * np.clip(log_q, -3, 3) + 0.2 * entropy_normal(sd)
    log_ratio = log_normal(action, mean, sd) - numbers["log_b"]
    if z_ratio:
        place, width = (
            p[batch["task"]] for p in (learner.embedding.place, learner.embedding.width)
        )
        place, width = place.detach().numpy(), width.detach().numpy()
        z_sd = 0.07 * (1 / 0.35) ** sigmoid(width)
        is_gaussian = kind == "gaussian"
        z = numbers["z"]
        log_p = log_normal(z, 3 * np.tanh(place / 3), z_sd) if is_gaussian else log_bits(z, place)
        log_ratio += (log_p - numbers["log_b_z"])[:, None]
    target = corrected_errors(r_hat, numbers["terminated"], v, q_bar, log_ratio, 0.7)
    t_z, t_task = batch["z"][:, None], batch["task"][:, None]
    q = learner.critic(batch["obs"][:, :-1], batch["action"], t_z, t_task)
    loss = (q - torch.from_numpy(target)).square().mean()
    slow = [p.clone() for p in agent.critic_target.parameters()]

    def update():
        torch.manual_seed(3)
        return se.update_skill_critic(agent, batch, torch.from_numpy(log_q), 0.3, 0.2, 0.7, args)

    metrics = check_update(agent, update, loss, learner.critic)
    assert metrics["critic_loss"].item() == pytest.approx(loss.item())
    assert not metrics["critic_loss"].requires_grad
    for p, old, new in zip(agent.critic_target.parameters(), slow, learner.critic.parameters()):
        torch.testing.assert_close(p, 0.99 * old + 0.01 * new.detach())
    for network in (learner.policy, learner.embedding, learner.inference):  # none got a gradient
        assert all((p.grad == 1).all() for p in network.parameters())


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_actor_update(kind):
    """The value of the critic itself, not of its slow copy, at another z for every step, teaches
    policy and embedding through both samples."""
    agent, batch, args = make_agent(kind, alpha1=0.4)
    learner, task = agent.learner, batch["task"][:, None].expand(5, 6)
    torch.manual_seed(3)
    p, obs = learner.embedding(task), batch["obs"][:, :-1]
    if kind == "gaussian":
        z = p.mean + p.stddev * torch.randn(5, 6, 2, dtype=torch.float64)
        entropy_z = p.stddev.log().sum(-1) + math.log(2 * math.pi * math.e)
    else:
        z = torch.bernoulli(p.mean.detach()) + p.mean - p.mean.detach()
        entropy_z = -(p.mean * p.mean.log() + (1 - p.mean) * (1 - p.mean).log()).sum(-1)
    pi = learner.policy(obs, z)
    action = pi.mean + pi.stddev * torch.randn(5, 6, 2, dtype=torch.float64)
    entropy = pi.stddev.log().sum(-1) + math.log(2 * math.pi * math.e)
    loss = 0.03 * pi.mean.square().sum(-1) - learner.critic(obs, action, z, task)
    loss = (loss - 0.2 * entropy - 0.4 * entropy_z).mean()

    def update():
        torch.manual_seed(3)
        return se.update_skill_actor(agent, batch, 0.2, args)

    metrics = check_update(agent, update, loss, learner.policy, learner.embedding)
    assert metrics["entropy_z"].item() == pytest.approx(entropy_z.mean().item())
    assert not metrics["entropy_z"].requires_grad


def test_without_a_z_there_is_nothing_to_name():
    """The updates of an ordinary actor and critic: log q is 0, and nobody learns to guess."""
    agent, batch, args = make_agent(z_dim=0)
    before = copy.deepcopy(agent.learner.inference.state_dict())
    log_q = se.update_inference(agent, batch, args)
    assert log_q.shape == (5, 6) and not log_q.any()
    se.update_skill_critic(agent, batch, log_q, 0.3, 0.2, 0.7, args)
    se.update_skill_actor(agent, batch, 0.2, args)
    assert_same(agent.learner.inference.state_dict(), before)
    assert not agent.inference_optimizer.state  # not even for a gradient of zero


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_value_teaches_policy_and_embedding(kind):
    """dQ/da reaches the policy, and dQ/dz the embedding, of the task in question only."""
    learner = make_learner(embedding=kind)
    t, obs = torch.full((2, 5), 1), torch.randn(2, 5, 4)
    z = se.straight_through(learner.embedding(t))
    learner.critic(obs, learner.policy(obs, z).rsample(), z, t).mean().backward()
    assert learner.policy.mlp[0].weight.grad.abs().sum() > 0
    gradient = learner.embedding.place.grad.abs().sum(1)
    assert gradient[1] > 0 and gradient[[0, 2, 3]].sum() == 0


# --- Tasks and data ---------------------------------------------------------------------------


def place(tasks, x, y):
    """Put every agent at (x, y) and let it rest for a step."""
    states = np.zeros((tasks.num_envs, 2, 4))
    states[..., :2] = x, y
    tasks.env.reset(options={"state": states})
    return tasks.step(np.zeros((tasks.num_envs, 2)))


def make_tasks(num_envs, goals, task=0, **options):
    tasks = se.GoalTasks(num_envs, goals, **options)
    tasks.reset(np.random.default_rng(0), np.broadcast_to(task, (num_envs,)))
    return tasks


def test_goals_are_on_the_circle():
    expected = [[0.8, 0.5], [0.5, 0.8], [0.2, 0.5], [0.5, 0.2]]
    np.testing.assert_allclose(se.GOALS, expected, atol=1e-12)
    np.testing.assert_allclose(se.TASKS["library"][:, 0], se.GOALS)
    np.testing.assert_allclose(se.TASKS["versatility"][0], se.GOALS)
    np.testing.assert_allclose(se.TASKS["generality"][:, 0], se.GOALS[[0, 1, 0, 2]])
    many = se.TASKS["transfer"]
    assert many.shape == (16, 1, 2)
    np.testing.assert_allclose(np.linalg.norm(many - 0.5, axis=-1), 0.3)
    np.testing.assert_allclose(many[2, 0], 0.5 + 0.3 * np.sqrt([0.5, 0.5]))
    between, goals = se.NEW_TASKS["interpolation"], se.NEW_TASKS["sequencing"]
    np.testing.assert_allclose(between[0], (many[1] + many[2]) / 2)
    np.testing.assert_allclose(goals[0], 0.5 + 0.3 * np.sqrt([[0.5] * 2] * 2) * [[1], [-1]])
    # where every wall is too far to be run into instead
    assert (abs(np.stack([between[0, 0], *goals[0]]) - 0.5) < 0.9 - 0.5 - 0.1 - 0.04).all()
    assert se.RADIUS == {"interpolation": 0.05, "sequencing": 0.1}


def test_rewards_and_what_is_seen():
    tasks = se.GoalTasks(2, se.TASKS["library"])
    obs = tasks.reset(np.random.default_rng(0), np.array([0, 1]))
    start = np.random.default_rng(0).uniform(-0.05, 0.05, (2, 2))
    np.testing.assert_allclose(obs, np.hstack([start / 0.25, np.zeros((2, 2))]), rtol=1e-5)
    assert obs.dtype == np.float32
    obs, reward, terminated = place(tasks, 0.8, 0.5)
    np.testing.assert_allclose(obs, [[1.2, 0, 0, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(reward, [1, math.exp(-0.18 / 0.045)])
    assert not terminated.any()
    np.testing.assert_allclose(tasks.step(np.array([[1, -0.5]] * 2))[0][0, 2:], [1, -0.5])
    any_goal = make_tasks(1, se.TASKS["versatility"])
    assert place(any_goal, 0.5, 0.65)[1] == pytest.approx(math.exp(-0.5))
    assert any_goal.nearest.tolist() == [1]


def test_solved_takes_the_last_five_steps():
    tasks = make_tasks(1, se.TASKS["library"], 2)
    for count in range(1, 7):
        place(tasks, 0.2, 0.59)
        assert tasks.solved.tolist() == [count >= 5]
    place(tasks, 0.2, 0.61)
    assert not tasks.solved.any()
    place(tasks, 0.2, 0.5)
    tasks.reset(np.random.default_rng(0), np.array([2]))
    assert tasks.near.tolist() == [0] and len(tasks.path) == 1  # nothing leaks across a reset


def run_out(tasks):
    """What the last step of an episode says of its end."""
    ends = [tasks.step(np.zeros((tasks.num_envs, 2)))[2].tolist() for _ in range(tasks.steps)]
    assert not np.any(ends[:-1])
    return ends[-1]


def test_goals_in_order():
    """Near the last one pays; what is seen ends with the next goal and the time that is left."""
    goals = np.array([[[0.8, 0.5], [0.2, 0.5]]])
    tasks = make_tasks(1, goals, in_order=True)
    assert tasks.obs_dim == 7 and tasks.observe()[0, 4:].tolist() == [1, 0, 1]
    assert place(tasks, 0.2, 0.5)[1] == 0  # the last one first: nothing
    obs, reward, _ = place(tasks, 0.8, 0.59)
    assert reward == 0 and obs[0, 4:].tolist() == [0, 1, pytest.approx(0.9)]  # on to the next
    assert place(tasks, 0.8, 0.5)[1] == 0
    for count in range(1, 6):
        assert place(tasks, 0.2, 0.41)[1] == 1 and tasks.solved.tolist() == [count == 5]
    assert place(tasks, 0.2, 0.39)[1] == 0 and not tasks.solved.any()
    for _ in range(31):
        obs, _, _ = place(tasks, 0.5, 0.5)
    assert obs[0, 6] == -1
    assert make_tasks(2, goals, in_order=True).step(np.zeros((2, 2)))[2].tolist() == [False] * 2
    assert run_out(make_tasks(2, goals, in_order=True)) == [True] * 2  # time is seen: an end
    assert run_out(make_tasks(2, se.TASKS["library"])) == [False] * 2  # it is not: go on
    obs = tasks.reset(np.random.default_rng(0), np.array([0]))
    assert obs[0, 4:].tolist() == [1, 0, 1]
    small = make_tasks(1, goals, in_order=True, radius=0.03)
    assert place(small, 0.8, 0.54)[0][0, 4] == 1 and place(small, 0.8, 0.52)[0][0, 4] == 0


def test_skills_as_actions():
    """One z, within reach, for `hold` steps of the mean action; rewards add up; the skill does
    not see the phase."""
    seen = []

    class Policy(torch.nn.Linear):
        def forward(self, obs, z):
            seen.append((obs, z))
            return se.gaussian(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2))

    inner = se.GoalTasks(1, np.array([[[0.8, 0.5], [0.2, 0.5]]]), in_order=True)
    library = make_learner(tasks=2)
    library.policy = Policy(1, 1)
    with torch.no_grad():  # reach: of the mean and two deviations, each 0.1
        library.embedding.place[:] = 3 * (torch.tensor([[2.8, 0.1, 0], [0, 0.3, -1.8]]) / 3).atanh()
        library.embedding.width[:] = math.log((x := math.log(0.1 / 0.07, 1 / 0.35)) / (1 - x))
    tasks = se.SkillTasks(inner, library, hold=5)
    np.testing.assert_allclose(tasks.reach, [3, 0.5, 2], rtol=1e-5)
    assert (tasks.steps, tasks.action_dim, tasks.obs_dim, tasks.num_envs) == (8, 3, 7, 1)
    start = tasks.reset(np.random.default_rng(0), np.array([0]))
    obs, reward, _ = tasks.step(np.array([[0.5, -2.0, 2.0]], np.float32))
    assert len(seen) == 5 and all(o.shape == (1, 4) for o, _ in seen)
    np.testing.assert_allclose([o[0, 0] for o, _ in seen], start[0, 0] + 0.2 * np.arange(5), 1e-5)
    assert all(z.tolist() == [pytest.approx([1.5, -0.5, 2], rel=1e-5)] for _, z in seen)
    assert obs[0, 0] - start[0, 0] == pytest.approx(1, abs=1e-5) and reward == 0
    place(inner, 0.8, 0.5)
    for _ in range(6):
        place(inner, 0.2, 0.5)
    assert tasks.solved.all()
    inner.env.reset(options={"state": np.array([[[0.16, 0.5, 0, 0], [0.5, 0.5, 0, 0]]])})
    assert tasks.step(np.zeros((1, 3), np.float32))[1] == 2  # x .21, .26 (near), .31 and on
    torch.manual_seed(5)
    p, task = tasks.any_skill(torch.zeros(200, 7), None), torch.tensor([[0.0], [1.0]])
    mean = torch.tensor([[2.8, 0.1, 0], [0, 0.3, -1.8]]) / tasks.reach
    torch.manual_seed(5)
    task = torch.randint(2, (200,))
    torch.testing.assert_close(p.mean, mean[task])
    torch.testing.assert_close(p.stddev, (0.1 / tasks.reach).expand(200, 3))


def test_now_and_then():
    """Each row its own coin; what the density says is of the one that acts."""
    ours = lambda obs, z: se.gaussian(torch.zeros_like(obs), torch.ones_like(obs))  # noqa: E731
    other = lambda obs, z: se.gaussian(obs, 0.1 * torch.ones_like(obs))  # noqa: E731
    obs = torch.full((4000, 2), 7.0)
    torch.manual_seed(0)
    pi = se.now_and_then(0.25, other, ours)(obs, None)
    swapped = pi.mean[:, 0] == 7
    assert swapped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(pi.mean, torch.where(swapped[:, None], 7.0, torch.zeros(4000, 2)))
    torch.testing.assert_close(pi.stddev, torch.where(swapped[:, None], 0.1, torch.ones(4000, 2)))
    assert not se.now_and_then(0.0, other, ours)(obs, None).mean.any()


@pytest.mark.parametrize("noise", [True, False])
def test_what_is_stored_is_what_happened(noise):
    """Every state follows from the one before it by the action that is stored, the last one too;
    rewards are those of where it led, and log b is what the policy said of the action."""
    tasks, learner = se.GoalTasks(3, se.TASKS["library"]), make_learner()
    task, z = torch.tensor([3, 0, 2]), torch.randn(3, 3)
    episodes = se.roll_out(tasks, learner.policy, np.random.default_rng(0), task, z, noise=noise)
    assert {name: tuple(x.shape) for name, x in episodes.items()} == {
        "obs": (3, 41, 4), "action": (3, 40, 2), "reward": (3, 40), "terminated": (3, 40),
        "log_b": (3, 40), "task": (3,), "z": (3, 3),
    }  # fmt: skip
    obs, action = (episodes[name].double().numpy() for name in ("obs", "action"))
    mean, sd = policy_by_hand(learner.policy, obs[:, :-1], z[:, None].numpy())
    np.testing.assert_allclose(episodes["log_b"], log_normal(action, mean, sd), atol=1e-4)
    if noise:
        assert ((action - mean) / sd).std() == pytest.approx(1, abs=0.2)
    else:
        np.testing.assert_allclose(action, mean, atol=1e-5)
    step = 0.05 * np.clip(action, -1, 1)
    position = 0.5 + 0.25 * obs[..., :2]
    ahead = position[:, :-1] + step
    expected = np.where(ahead > 0.9, 1.8 - ahead, np.where(ahead < 0.1, 0.2 - ahead, ahead))
    np.testing.assert_allclose(position[:, 1:], expected, atol=1e-5)
    np.testing.assert_allclose(np.stack(tasks.path, axis=1), position, atol=1e-5)
    distance = np.linalg.norm(position[:, 1:] - se.GOALS[task][:, None], axis=-1)
    reward = np.exp(-(distance**2) / (2 * 0.15**2))
    np.testing.assert_allclose(episodes["reward"], reward, atol=1e-5)
    assert not episodes["terminated"].any()  # a time limit is no end
    assert torch.equal(episodes["task"], task) and torch.equal(episodes["z"], z)


def test_terminal_states_are_told():
    class Counting:
        """It counts to three, and there it ends."""

        steps = 3

        def reset(self, rng, task):
            self.count = 0
            return np.zeros((1, 1), np.float32)

        def step(self, action):
            self.count += 1
            return np.full((1, 1), self.count, np.float32), [10.0 * self.count], [self.count == 3]

    policy = lambda obs, z: se.gaussian(obs, torch.ones_like(obs))  # noqa: E731
    episodes = se.roll_out(Counting(), policy, None, torch.zeros(1), torch.zeros(1, 0))
    assert episodes["obs"].flatten().tolist() == [0, 1, 2, 3]
    assert episodes["reward"].tolist() == [[10, 20, 30]]
    assert episodes["terminated"].tolist() == [[0, 0, 1]]


def test_replay_keeps_whole_episodes():
    """Rows stay together, the oldest leave first, and z stays with what it did."""
    replay = se.TrajectoryReplay(room=5)
    for i in range(4):
        number = torch.full((2,), 2.0 * i) + torch.arange(2)
        replay.add({"obs": number[:, None, None].expand(2, 3, 1), "z": number[:, None]})
    batch = replay.sample(np.random.default_rng(0), 100)
    assert batch["obs"].shape == (100, 3, 1)
    assert set(batch["z"].flatten().tolist()) == {3, 4, 5, 6, 7}
    assert (batch["obs"] == batch["z"][:, None]).all()


# --- Measures ---------------------------------------------------------------------------------


def planted(goals, solved, nearest=None):
    """Tasks of which it is known in advance what is solved, and at which goal."""
    where = property(lambda self: np.array(nearest), lambda self, value: None)
    kind = type("Planted", (se.GoalTasks,), {"solved": np.array(solved), "nearest": where})
    return kind(len(solved), goals)


def test_success_is_counted_by_task():
    """Of ten episodes each 10, 9, 5 and 0 are solved."""
    solved = [i // 4 < (10, 9, 5, 0)[i % 4] for i in range(40)]
    metrics, _ = se.evaluate_skills(planted(se.TASKS["library"], solved), make_learner(), 2)
    assert metrics["success_rate"] == pytest.approx(0.6) and metrics["worst_task"] == 0
    assert metrics["solved_goals"] == 2 and "solutions_found" not in metrics


def test_solutions_are_counted_by_goal():
    """Of 40 episodes 20 end at goal 0, 8 at goal 3, 2 (5 %) at goal 1, 1 at goal 2; not solved
    are nine near goal 2."""
    nearest = [0] * 20 + [3] * 8 + [1] * 2 + [2] * 10
    tasks = planted(se.TASKS["versatility"], [i < 31 for i in range(40)], nearest)
    metrics, _ = se.evaluate_skills(tasks, make_learner(1), 2)
    assert metrics["solutions_found"] == 3
    p = np.array([20, 8, 2, 1]) / 31
    assert metrics["goal_entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert not [name for name in metrics if name.startswith("kl")]
    in_order = se.GoalTasks(4, se.NEW_TASKS["sequencing"], in_order=True)
    learner = make_learner(1, 0, obs_dim=7)
    metrics, _ = se.evaluate_skills(in_order, learner, 2)
    expected = {"success_rate", "worst_task", "solved_goals", "eval_return_mean", "eval_return_std"}
    assert set(metrics) == expected


def test_evaluation():
    """Starts and skills come from a stream of their own, tasks come in turn, the mean acts, and
    nobody's random numbers are used up."""
    learner, tasks = make_learner(), se.GoalTasks(12, se.TASKS["library"])
    learner.embedding.width.data[:] = torch.randn(4, 3)
    state = torch.random.get_rng_state()
    metrics, episodes = se.evaluate_skills(tasks, learner, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert se.evaluate_skills(tasks, learner, 2)[0] == metrics
    task = torch.arange(12) % 4
    torch.manual_seed(10**9)
    z = learner.embedding(task).sample()
    assert torch.equal(episodes["task"], task) and torch.equal(episodes["z"], z)
    start = np.random.default_rng(10**9).uniform(-0.05, 0.05, (12, 2))
    np.testing.assert_allclose(episodes["obs"][:, 0, :2], start / 0.25, rtol=1e-4)
    mean, _ = policy_by_hand(learner.policy, episodes["obs"][:, :-1].numpy(), z[:, None].numpy())
    np.testing.assert_allclose(episodes["action"], mean, atol=1e-5)
    returns = episodes["reward"].double().numpy().sum(1)
    assert metrics["eval_return_mean"] == pytest.approx(returns.mean())
    assert metrics["eval_return_std"] == pytest.approx(returns.std(ddof=1), rel=1e-4)
    p = learner.embedding(torch.arange(4))
    (m, *means), (s, *sds) = p.mean.detach().double(), p.stddev.detach().double()
    for k, (mean, sd) in enumerate(zip(means, sds), start=2):
        kl = ((sd / s).log() + (s**2 + (m - mean) ** 2) / (2 * sd**2) - 0.5).sum()
        assert metrics[f"kl_1_{k}"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("episodes", [8, 130])  # 130: two times 64, and two that are left out
def test_identifiability_is_a_share_of_64(episodes):
    """Who could read z off the actions, but for some that are too much alike, against a loop."""
    learner, window = make_learner(1, 2), 3
    learner.policy.forward = lambda obs, z: se.gaussian(0.2 * z, torch.ones_like(z))

    def guess(seen):  # (M, T, 1, 4 D + A): the action, and a little of the oldest state
        mean = 5 * seen[..., -2:] + 0.02 * seen[..., :2]
        return se.gaussian(mean, 0.1 * torch.ones_like(mean))

    learner.inference.forward = guess
    tasks = se.GoalTasks(episodes, se.TASKS["versatility"])
    metrics, seen = se.evaluate_skills(tasks, learner, window)
    obs, z = seen["obs"].double().numpy(), seen["z"].double().numpy()
    oldest = obs[:, np.maximum(np.arange(40) - window, 0), :2]
    mean = 5 * seen["action"].double().numpy() + 0.02 * oldest
    right = []
    for i in range(min(episodes, 128)):
        rivals = range(64 * (i // 64), 64 * (i // 64) + min(episodes, 64))
        log_q = [log_normal(z[j], mean[i], np.full(2, 0.1)).mean() for j in rivals]
        right.append(rivals[np.argmax(log_q)] == i)
    assert metrics["identifiability_top1"] == pytest.approx(np.mean(right))
    assert 0.1 < np.mean(right) < 1


def test_ratio_of_steps():
    """Steps to 80 %: the first report that has it. If scratch never does, the budget stands in."""
    curve = [{"step": s, "skills_a": x, "scratch_a": y} for s, x, y in
             ((10, 0.1, 0), (20, 0.8, 0.5), (30, 0.7, 0.79), (40, 1, 0.9))]  # fmt: skip
    assert se.steps_to_solve(curve, "a") == (20, 40, 2.0)
    assert se.steps_to_solve(curve[:3], "a") == (20, None, 1.5)
    assert se.steps_to_solve(curve[:1], "a") == (None, None, None)


# --- Learning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["actions", "held_skills"])
def test_learn_is_these_steps(held, monkeypatch):
    """Five rounds of `learn` against the same steps written down: what falls in the second half
    and how far, a replay of the latest ten episodes. For held skills: the γ of five steps, five
    times as many episodes, which have as many choices, and any skill now and then."""
    monkeypatch.setattr(se, "REPLAY_EPISODES", 10)
    torch.manual_seed(1)
    if held:
        inner = se.GoalTasks(8, se.NEW_TASKS["sequencing"], in_order=True)
        tasks = se.SkillTasks(inner, make_learner(z_dim=2).requires_grad_(False), hold=5)
    else:
        tasks = se.GoalTasks(8, se.TASKS["library"])
    assert tasks.num_tasks == (1 if held else 4)
    learner = make_learner(tasks.num_tasks, 0 if held else 2, obs_dim=tasks.obs_dim)
    args = se.Args(**TINY | {"learning_rate": 0.01, "z_ratio": True})
    agent = se.SkillAgent(copy.deepcopy(learner), args)

    torch.manual_seed(2)
    found = list(se.learn(tasks, learner, 5 * 320 + 319, 2, args, np.random.default_rng(3), CPU))
    assert [step for step, _ in found] == [640, 1280, 1600]

    torch.manual_seed(2)
    rng, stored, metrics = np.random.default_rng(3), [], []
    task = torch.tensor([0] * 8 if held else [0, 1, 2, 3] * 2)
    for left, share in ((1, 1), (1, 1), (1, 1), (0.8, 0.85), (0.4, 0.55)):
        with torch.no_grad():
            p = agent.learner.embedding(task)
            z = p.sample()
        policy = agent.learner.policy
        if held:
            policy = se.now_and_then(0.3 * left, tasks.any_skill, policy)
        episodes = se.roll_out(tasks, policy, rng, task, z)
        stored.append(episodes | {"log_b_z": p.log_prob(z)})
        for optimizer in agent.optimizers:
            optimizer.param_groups[0]["lr"] = 0.01 * left
        for _ in range(2):
            columns = {name: torch.cat([e[name] for e in stored])[-10:] for name in stored[0]}
            rows = rng.integers(min(10, 8 * len(stored)), size=15 if held else 3)
            batch = {name: column[rows] for name, column in columns.items()}
            log_q = se.update_inference(agent, batch, args)
            gamma = 0.9**5 if held else 0.9
            weights = share * 0.2, left * 0.06
            latest = se.update_skill_critic(agent, batch, log_q, *weights, gamma, args)
            latest |= se.update_skill_actor(agent, batch, weights[1], args)
        metrics.append({n: x.item() for n, x in (latest | {"log_q": log_q.mean()}).items()})
    assert [m for _, m in found] == [pytest.approx(metrics[i]) for i in (1, 3, 4)]
    for name, value in agent.learner.state_dict().items():
        torch.testing.assert_close(learner.state_dict()[name], value, msg=name)


def test_learns_four_tasks():
    """25,600 steps: without its z a policy solves one task of four at most."""
    goals, learner, rng = se.TASKS["library"], make_learner(z_dim=2), np.random.default_rng(1)
    changes = {"total_steps": 25_600, "num_envs": 16, "updates": 20, "batch_size": 16}
    args = se.Args(**TINY | changes, learning_rate=2e-3)
    list(se.learn(se.GoalTasks(16, goals), learner, args.total_steps, 1, args, rng, CPU))
    metrics, _ = se.evaluate_skills(se.GoalTasks(64, goals), learner, 2)
    assert metrics["success_rate"] > 0.75 and metrics["worst_task"] > 0.4, metrics


# --- Runs -------------------------------------------------------------------------------------

ALL = [(x, y) for x in ("library", "versatility", "generality")
       for y in ("gaussian", "bernoulli", "one_hot")]  # fmt: skip


@pytest.mark.parametrize("experiment, embedding", ALL)
def test_a_run(experiment, embedding, tmp_path, capsys):
    """It is `learn` from the seed, with an evaluation now and then that it does not notice; twice
    it is the same; what it tells is of the networks it saves."""
    changes = {"experiment": experiment, "embedding": embedding, "seed": 7, "total_steps": 350}
    if experiment == "generality" and embedding != "one_hot":
        changes["z_dim"] = 3
    drawn = experiment != "generality" or embedding == "gaussian"
    summary = run(tmp_path / "a", drawn, **changes)
    assert capsys.readouterr().out.splitlines()[-1].startswith("320/320 ")
    again = run(tmp_path / "b", **changes)
    assert summary | {"minutes": 0} == again | {"minutes": 0}
    curve = read_curve(tmp_path / "a")
    assert curve == read_curve(tmp_path / "b") and [row["step"] for row in curve] == [160, 320]

    args, K = se.Args(**TINY | changes), 1 if experiment == "versatility" else 4
    torch.manual_seed(7)
    z_dim = K if embedding == "one_hot" else changes.get("z_dim", 2)
    sizes = 4, 2, K, z_dim, embedding, 2, args.spread, args.z_sd
    learner = se.SkillLearner(*sizes)
    tasks, rng = se.GoalTasks(4, se.TASKS[experiment]), np.random.default_rng(7)
    *_, (_, learnt) = se.learn(tasks, learner, 350, 2, args, rng, CPU)
    assert_same(load(tmp_path / "a")["networks"], learner.state_dict())
    saved = se.load_skills(tmp_path / "a" / "checkpoint.pt")
    assert_same(saved.state_dict(), learner.state_dict())
    held_out = se.GoalTasks(8, se.TASKS[experiment])
    metrics, _ = se.evaluate_skills(held_out, saved, 2)
    assert curve[-1] == pytest.approx({"step": 320} | metrics | learnt)
    expected = metrics | {"eval_episodes": 8, "minutes": summary["minutes"]}
    if experiment == "generality" and embedding == "gaussian":
        expected["kl_duplicate"] = metrics["kl_1_3"]
        expected["kl_others"] = min(metrics["kl_1_2"], metrics["kl_1_4"])
        assert metrics["kl_1_3"] < metrics["kl_1_2"] < metrics["kl_1_4"]  # so that swaps show
    assert summary == expected and load(tmp_path / "a")["step"] == 320
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == summary
    if drawn:
        names = "args.json curve.csv curve.png skills.png rollout.gif checkpoint.pt summary.json"
        assert {path.name for path in (tmp_path / "a").iterdir()} == set(names.split())
        with Image.open(tmp_path / "a" / "rollout.gif") as film:
            assert film.size[0] > 4 * 256 - 1


def test_twenty_reports(tmp_path):
    changes = {"experiment": "versatility", "num_envs": 1, "eval_episodes": 2, "updates": 1}
    run(tmp_path, **changes, total_steps=41 * 40)
    steps = [row["step"] for row in read_curve(tmp_path)]
    assert steps == [*range(80, 1601, 80), 1640]
    header = (tmp_path / "curve.csv").read_text().split("\n")[0]
    assert header.startswith("step,seconds,steps_per_second,success_rate")


def test_films(tmp_path):
    """The agent over the goals of its task, from its start to its last step."""
    tasks = make_tasks(5, se.TASKS["library"], [3, 2, 1, 0, 0])
    tasks.step(np.ones((5, 2)))
    film = se.draw_film(tasks)
    assert len(film) == 2 and {len(row) for row in film} == {4}
    for frame, positions in zip(film, tasks.path):
        pair = np.stack([positions[1], se.GOALS[2]])
        np.testing.assert_array_equal(frame[1], sprites_env.draw_rgb(pair, np.array([1, 0])))


def test_picture_of_skills():
    """Two deviations around the mean of each task, the divergences, and a walk from task to task
    and back to the first: 48 steps, of which every twelfth is at a task."""
    tasks, learner = se.GoalTasks(8, se.TASKS["library"]), make_learner(z_dim=2)
    _, episodes = se.evaluate_skills(tasks, learner, 2)
    left, middle, right, table = se.draw_skills(tasks, learner, episodes["z"]).axes
    p = learner.embedding(torch.arange(4))
    for ellipse, mean, sd in zip(middle.patches, p.mean.tolist(), p.stddev.tolist()):
        assert list(ellipse.center) == pytest.approx(mean)
        assert [ellipse.width, ellipse.height] == pytest.approx([4 * x for x in sd])
    assert [text.get_text() for text in middle.texts] == ["1", "2", "3", "4"]
    kl = se.divergences(p).flatten().tolist()
    assert [text.get_text() for text in table.texts] == [f"{x:.3g}" for x in kl]
    assert len(left.lines) == 16 and len(right.lines) == 96  # a path and its end
    np.testing.assert_allclose(left.lines[6].get_xydata(), np.stack(tasks.path)[:, 3, ::-1])
    walkers, rng = se.GoalTasks(48, tasks.goals), np.random.default_rng(0)
    first, second, *_, last = p.mean.detach()
    for i, z in ((0, first), (3, 0.75 * first + 0.25 * second), (12, second), (36, last),
                 (42, (first + last) / 2)):  # fmt: skip
        task = torch.zeros(48, dtype=torch.long)
        rng = np.random.default_rng(0)
        se.roll_out(walkers, learner.policy, rng, task, z.expand(48, 2), noise=False)
        expected = np.stack(walkers.path)[:, i, ::-1]
        np.testing.assert_allclose(right.lines[2 * i].get_xydata(), expected, atol=1e-5)
    many, learner = se.GoalTasks(16, se.TASKS["transfer"]), make_learner(16, 2)
    _, episodes = se.evaluate_skills(many, learner, 2)
    assert not se.draw_skills(many, learner, episodes["z"]).axes[3].texts  # no room for 256


# --- Transfer ---------------------------------------------------------------------------------


def test_a_stream_of_its_own():
    """A generator draws what its seed says, whatever others draw in between, and nobody notices."""
    torch.manual_seed(7)
    alone = [torch.rand(1).item() for _ in range(6)]
    draws = lambda: ((torch.rand(1).item(), torch.rand(1).item()) for _ in range(3))  # noqa: E731
    torch.manual_seed(1)
    expected = torch.rand(9).tolist()
    torch.manual_seed(1)
    found, between = [], []
    for a, b in zip(se.own_stream(draws(), 7), se.own_stream(draws(), 8)):
        found += a
        between += torch.rand(3).tolist()
        assert a != b
    assert found == alone and between == expected


@pytest.fixture
def library(tmp_path):
    """A library of skills that go where z points, fast."""
    learner = make_learner(z_dim=2)
    obs, z = torch.randn(500, 4), 2 * torch.randn(500, 2)
    hidden = learner.policy.mlp[:-1](torch.cat([obs, 4.5 * z], dim=-1))
    weight = torch.linalg.lstsq(hidden, z).solution.T
    learner.policy.mlp[-1].weight.data[:2] = weight
    file = tmp_path / "library.pt"
    torch.save({"sizes": SIZES, "networks": learner.state_dict()}, file)
    return str(file), learner


def test_transfer(tmp_path, library, monkeypatch):
    """Each of the four is learnt as if it were alone, with frozen skills or from scratch, and is
    measured on the tasks that it was learnt on. (They are easier here, so that some are solved.)"""
    nearby = {"interpolation": [[[0.35, 0.65]]], "sequencing": [[[0.3, 0.5], [0.5, 0.7]]]}
    monkeypatch.setattr(se, "NEW_TASKS", {name: np.array(x) for name, x in nearby.items()})
    monkeypatch.setattr(se, "RADIUS", {"interpolation": 0.25, "sequencing": 0.26})
    changes = {"hold": 4, "transfer_steps": 500, "eval_episodes": 32, "learning_rate": 3e-4}
    changes |= {"experiment": "transfer", "library": library[0], "seed": 3}
    films = []
    monkeypatch.setattr(se, "draw_film", lambda tasks: films.append(tasks) or [("abcd")])
    summary = run(tmp_path / "new", **changes)
    args, skills = se.Args(**TINY | changes), library[1].requires_grad_(False)
    curve, saved = read_curve(tmp_path / "new"), load(tmp_path / "new")
    assert [row["step"] for row in curve] == [160, 320, 480] and saved["step"] == 480
    expected, rates = {"transfer_steps_ratio": {}, "minutes": summary["minutes"]}, set()
    for name, goals in se.NEW_TASKS.items():
        for how in ("skills", "scratch"):

            def make(n, name=name, goals=goals, how=how):
                tasks = se.GoalTasks(n, goals, in_order=True, radius=se.RADIUS[name])
                return se.SkillTasks(tasks, skills, 4) if how == "skills" else tasks

            torch.manual_seed(3)
            sizes = (6 if name == "interpolation" else 7), 2, 1, 0, "gaussian", 2, 0, 1
            learner, rng, held_out = se.SkillLearner(*sizes), np.random.default_rng(3), make(32)
            for row, (step, _) in zip(
                curve, se.learn(make(4), learner, 500, 9, args, rng, CPU), strict=True
            ):
                rate = se.evaluate_skills(held_out, learner, 2)[0]["success_rate"]
                assert row["step"] == step and row[f"{how}_{name}"] == pytest.approx(rate)
            assert_same(saved[f"{how}_{name}"], learner.state_dict())
            expected[f"success_{how}_{name}"] = rate
            rates.add(rate)
        tasks = make(32, how="skills")
        tasks.reset(np.random.default_rng(10**9), np.zeros(32, int))
        torch.manual_seed(10**9)
        for _ in range(10):
            p = skills.embedding(torch.randint(4, (32,)))
            tasks.step(se.gaussian(p.mean / tasks.reach, p.stddev / tasks.reach).sample().numpy())
        expected[f"success_random_{name}"] = tasks.solved.mean()
        assert 0 < tasks.solved.mean() < 1
        ours, theirs, ratio = se.steps_to_solve(curve, name)
        expected |= {f"steps_skills_{name}": ours, f"steps_scratch_{name}": theirs}
        expected["transfer_steps_ratio"][name] = ratio
    assert summary == expected and len(rates) == 4, rates
    for film, goals in zip(films, se.NEW_TASKS.values(), strict=True):
        assert isinstance(film, se.SkillTasks) and film.goals is goals and film.num_envs == 32


def test_transfer_learns_a_library_first(tmp_path):
    """Of sixteen goals; it is the same to be given it."""
    summary = run(tmp_path / "both", pictures=True, **TRANSFER)
    file = tmp_path / "both" / "library" / "checkpoint.pt"
    assert len(load(file.parent)["networks"]["embedding.place"]) == 16
    arguments = json.loads((file.parent / "args.json").read_text())["arguments"]
    changes = {"out": str(file.parent), "overwrite": True, "gamma": 0.9}
    assert arguments == json.loads(json.dumps(vars(se.Args(**TINY | TRANSFER | changes))))
    torch.manual_seed(1)
    args = se.Args(**TINY | TRANSFER, gamma=0.9)
    learner = se.SkillLearner(4, 2, 16, 2, "gaussian", 2, 0, 0.4)
    tasks, rng = se.GoalTasks(16, se.TASKS["transfer"]), np.random.default_rng(1)
    list(se.learn(tasks, learner, 1280, 2, args, rng, CPU))
    assert_same(load(file.parent)["networks"], learner.state_dict())
    again = run(tmp_path / "new", **TRANSFER, library=str(file))
    assert summary | {"minutes": 0} == again | {"minutes": 0}
    assert read_curve(tmp_path / "both") == read_curve(tmp_path / "new")
    assert json.loads((tmp_path / "both" / "summary.json").read_text()) == summary
    names = "args.json curve.csv curve.png rollout.gif checkpoint.pt summary.json library"
    assert {path.name for path in (tmp_path / "both").iterdir()} == set(names.split())
    assert not (tmp_path / "new" / "library").exists()
    with Image.open(tmp_path / "both" / "rollout.gif") as film:
        assert film.size[0] > 4 * 256 - 1
    (tmp_path / "both" / "summary.json").unlink()  # as if it had been interrupted
    run(tmp_path / "both", **TRANSFER)


def test_finished_runs_are_kept(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, overwrite=True, seed=2)
    assert json.loads((tmp_path / "args.json").read_text())["arguments"]["seed"] == 2
