"""ppo_encoder.py: equations by hand, networks, the update, data, runs in miniature."""

import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_env import clocks
from torch import nn

import ppo_encoder as ppo
import rp_pretrain
import sprites_env

TINY = {"total_steps": 32, "num_envs": 2, "rollout_steps": 4, "minibatches": 3, "epochs": 2}
TINY |= {"eval_episodes": 3, "torch_threads": 1, "device": "cpu"}
INPUTS = ppo.Input.__args__


def tiny(out="unused", **changes):
    return ppo.Args(**TINY | changes, out=str(out))


def save_encoder(path, objective, batch_norm=False, z_dim=5, **stack):
    """As rp_pretrain.py does (once without a word on stacks), or a script of another objective,
    but without training."""
    args = rp_pretrain.Args(batch_norm=batch_norm, z_dim=z_dim, **stack)
    encoder = rp_pretrain.Model(args, "cpu").encoder
    encoder(torch.rand(9, args.frame_stack, 64, 64))  # running statistics unlike a fresh network's
    saved = {"objective": objective, "z_dim": z_dim, "batch_norm": batch_norm} | stack
    torch.save(saved | {"encoder": encoder.state_dict()}, path)
    return encoder


# --- Equations -------------------------------------------------------------------------------


def test_gaussian_log_prob_by_hand():
    """A standard normal at its mean: -ln sqrt(2 pi) per dimension; one sd off: 1/2 less."""
    mean, log_std = torch.zeros(2, 2), torch.zeros(2)
    actions = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    log_prob = ppo.gaussian_log_prob(actions, mean, log_std)
    constant = -math.log(2 * math.pi)
    np.testing.assert_allclose(log_prob, [constant, constant - 0.5], rtol=1e-6)
    log_std = torch.tensor([0.3, -0.7])
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    np.testing.assert_allclose(ppo.gaussian_log_prob(actions, mean, log_std), expected, rtol=1e-6)


def test_advantages_by_hand():
    """gamma .5, lambda .5; the episode of environment 0 is cut by the time limit after step 1.

    delta = r + .5 V' - V: 1 + .5 * 4 - 2 = 1;  0 + .5 * 6 - 4 = -1;  2 + .5 * 2 - 1 = 2
    A2 = 2;  A1 = -1 (trace cut, but V' = 6 of the final observation counts);  A0 = 1 - .25 = .75
    Environment 1 has no end: A1 = -1 + .25 * 2 = -.5;  A0 = 1 - .125 = .875
    Environment 2 terminates instead: V' = 0, delta1 = -4, A1 = -4, A0 = 1 - 1 = 0"""
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [2, 2, 2]])
    values = torch.tensor([[2.0, 2, 2], [4, 4, 4], [1, 1, 1]])
    next_values = torch.tensor([[4.0, 4, 4], [6, 6, 0], [2, 2, 2]])
    ended = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 0, 0]])
    advantages = ppo.generalized_advantages(rewards, values, next_values, ended, 0.5, 0.5)
    expected = [[0.75, 0.875, 0], [-1, -0.5, -4], [2, 2, 2]]
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_advantages_against_a_sum_over_time():
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode."""
    rng = np.random.default_rng(0)
    r, v, v_next = rng.normal(size=(3, 12, 5))
    ended = (rng.random((12, 5)) < 0.2).astype(float)
    gamma, lam = 0.9, 0.8
    expected = np.zeros((12, 5))
    for n in range(5):
        for t in range(12):
            for k in range(t, 12):
                delta = r[k, n] + gamma * v_next[k, n] - v[k, n]
                expected[t, n] += (gamma * lam) ** (k - t) * delta
                if ended[k, n]:
                    break
    arrays = (torch.from_numpy(x) for x in (r, v, v_next, ended))
    got = ppo.generalized_advantages(*arrays, gamma, lam)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_clipped_objective_by_hand():
    """clip .2, ratios 2, 2, .5, .5, 1.1 with advantages 1, -1, 1, -1, 3:
    min(2, 1.2) = 1.2; min(-2, -1.2) = -2; min(.5, .8) = .5; min(-.5, -.8) = -.8; 3.3; mean .44"""
    old = torch.tensor([0.0, 1, -1, 0, 2])
    log_prob = (old + torch.tensor([2, 2, 0.5, 0.5, 1.1]).log()).requires_grad_()
    advantage = torch.tensor([1.0, -1, 1, -1, 3])
    objective = ppo.clipped_objective(log_prob, old, advantage, 0.2)
    assert objective.item() == pytest.approx(0.44)
    objective.backward()  # no gradient where the clip holds, ratio * advantage / 5 elsewhere
    np.testing.assert_allclose(log_prob.grad, [0, -0.4, 0.1, 0, 0.66], atol=1e-6)


def test_clipped_objective_against_a_loop():
    rng = np.random.default_rng(0)
    log_prob, old, advantage = rng.normal(size=(3, 40))
    total = 0
    for new, past, a in zip(log_prob, old, advantage):
        ratio = math.exp(new - past)
        total += min(ratio * a, min(max(ratio, 0.7), 1.3) * a) / 40
    got = ppo.clipped_objective(*map(torch.from_numpy, (log_prob, old, advantage)), 0.3)
    assert got.item() == pytest.approx(total)


def test_value_loss_by_hand():
    value, target = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 2.0, 1.0])
    assert ppo.value_loss(value, target).item() == pytest.approx(5 / 3)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_losses_refuse_to_broadcast(wrong):
    shapes = [(4, 1) if i == wrong else (4,) for i in range(3)]
    log_prob, old, advantage = map(torch.zeros, shapes)
    with pytest.raises(AssertionError):
        ppo.clipped_objective(log_prob, old, advantage, 0.2)
    if wrong < 2:
        with pytest.raises(AssertionError):
            ppo.value_loss(log_prob, old)


# --- Networks --------------------------------------------------------------------------------


def test_standardize():
    """sd sqrt(2) and 0: what is constant is not blown up. The floor is a tenth of the mean sd."""
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    layer = ppo.Standardize(x)
    np.testing.assert_allclose(layer(x), [[-(0.5**0.5), 0], [0.5**0.5, 0]], rtol=1e-6)
    assert layer.sd.tolist() == pytest.approx([2**0.5, 0.1 * 2**0.5 / 2])
    np.testing.assert_allclose(layer.inverse(layer(x + 1)), x + 1, rtol=1e-6)
    assert ppo.Standardize(torch.tensor([1.0, 3.0]))(torch.tensor(3.0)) == pytest.approx(0.5**0.5)
    assert ppo.Standardize(torch.ones(3))(torch.tensor(3.0)) == 2  # nothing varied: as it is
    assert set(layer.state_dict()) == {"mean", "sd"}


def test_actor_critic():
    """z and returns on one scale; values in units of reward; actions around zero at the start."""
    torch.manual_seed(0)
    z, returns = 3 + 2 * torch.randn(500, 6), 40 + 5 * torch.randn(500)
    model = ppo.ActorCritic(nn.Identity(), z, returns, action_dim=3)
    features = model.features(z.numpy())
    np.testing.assert_allclose(features, (z - z.mean(0)) / z.std(0), atol=1e-5)
    values = model.critic(features)[:, 0] * returns.std() + returns.mean()
    assert torch.allclose(model.value(features), values, atol=1e-4)
    actions = model.policy(z.numpy())
    np.testing.assert_allclose(actions, model.actor(features).detach(), atol=1e-6)
    assert actions.shape == (500, 3) and 0 < np.abs(actions).max() < 0.2
    assert model.log_std.tolist() == [-0.5] * 3
    sizes = [tuple(layer.weight.shape) for layer in model.critic[::2]]
    assert sizes == [(64, 6), (64, 64), (1, 64)]
    apart = [{id(p) for p in part.parameters()} for part in (model.actor, model.critic)]
    assert not apart[0] & apart[1]
    frames = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    model = ppo.ActorCritic(nn.Flatten(), torch.rand(9, 4096), returns, 2)
    expected = model.standardize(frames.flatten(1) / 255)
    torch.testing.assert_close(model.features(frames), expected)
    assert not torch.is_tensor(model.policy(frames))


@pytest.mark.parametrize("encoder, shape", [("cnn", 1024), ("image_scratch", 64), ("oracle", None)])
def test_untrained_encoders(encoder, shape):
    torch.manual_seed(0)
    module, frames = ppo.make_encoder(tiny(encoder=encoder)), torch.rand(2, 1, 64, 64)
    if encoder == "oracle":
        assert module(frames) is frames
        return
    assert module(frames).shape == (2, shape)
    for layer in [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        w = layer.weight.flatten(1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-4)  # gain √2
        assert not layer.bias.any()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["reward_prediction", "image_reconstruction_finetune"])
def test_what_was_pretrained_is_loaded(tmp_path, name, batch_norm):
    path = tmp_path / "encoder.pt"
    before = save_encoder(path, name.removesuffix("_finetune"), batch_norm).eval()
    after = ppo.make_encoder(tiny(encoder=name, encoder_path=str(path))).eval()
    frames = torch.rand(3, 1, 64, 64)
    assert torch.equal(before(frames), after(frames))


def test_stacked_frames(tmp_path):
    """Every network of images sees both frames; a pretrained one as many as it was trained with."""
    path = str(tmp_path / "encoder.pt")
    before = save_encoder(path, "reward_prediction", frame_stack=2).eval()
    frames = torch.rand(3, 2, 64, 64)
    args = tiny(encoder="reward_prediction", encoder_path=path, frame_stack=2)
    assert torch.equal(before(frames), ppo.make_encoder(args).eval()(frames))
    assert ppo.make_env(args, 5).observation_space.shape == (5, 2, 64, 64)
    assert args.run_name == "reward_prediction_stack2_d1_s1"
    for name in ("cnn", "image_scratch"):
        encoder = ppo.make_encoder(tiny(encoder=name, frame_stack=2))
        z = encoder(frames)
        assert all((encoder(frames * mask) != z).any() for mask in (torch.eye(2)[..., None, None]))


@pytest.mark.parametrize("name", ["pretrained", "pretrained_finetune"])
def test_any_objective_will_do_for_pretrained(tmp_path, name):
    """And its run is told apart from those with other encoders."""
    folder = tmp_path / "inverse_d2_s1"
    folder.mkdir()
    before = save_encoder(folder / "encoder.pt", "inverse").eval()
    args = ppo.Args(encoder=name, encoder_path=str(folder / "encoder.pt"), distractors=2, seed=4)
    frames = torch.rand(3, 1, 64, 64)
    assert torch.equal(before(frames), ppo.make_encoder(args).eval()(frames))
    assert args.run_name == f"{name}_inverse_d2_s1_d2_s4"
    assert (name in ppo.FROZEN) == (name == "pretrained")


@pytest.mark.parametrize(
    "name, stack", [("reward_prediction_finetune", 2), ("image_reconstruction", 1)]
)
def test_a_missing_encoder_is_pretrained(tmp_path, monkeypatch, name, stack):
    """By a program of its own, once, with flags that it knows; here it is called in process."""
    monkeypatch.chdir(tmp_path)
    commands, real_run = [], subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:  # git's
            return real_run(command, **options)
        commands.append(command)
        args = rp_pretrain.tyro.cli(rp_pretrain.Args, args=[*command[2:], "--updates=1"])
        rp_pretrain.train(args)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ppo.subprocess, "run", run)
    args = tiny(encoder=name, seed=5, distractors=2, frame_stack=stack)
    encoder = ppo.make_encoder(args)
    (command,) = commands
    assert command[0] == sys.executable
    assert Path(command[1]) == Path(ppo.__file__).with_name("rp_pretrain.py")
    objective = name.removesuffix("_finetune")
    stacked = "_stack2" if stack == 2 else ""
    folder = tmp_path / "runs" / "rp_pretrain" / f"{objective}{stacked}_d2_s5"
    written = json.loads((folder / "args.json").read_text())["arguments"]
    shared = ("distractors", "frame_stack", "seed", "device", "torch_threads")
    assert {k: written[k] for k in shared} == {k: getattr(args, k) for k in shared}
    assert written["objective"] == objective
    saved = torch.load(folder / "encoder.pt")["encoder"]
    assert all(torch.equal(v, saved[k]) for k, v in encoder.state_dict().items())
    ppo.make_encoder(args)
    assert len(commands) == 1  # now it is there


def test_failed_pretraining_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(ppo.subprocess, "run", lambda command: failed)
    with pytest.raises(SystemExit, match="error: pretraining failed, see above"):
        ppo.make_encoder(tiny())
    monkeypatch.setattr(ppo, "__file__", str(tmp_path / "ppo_encoder.py"))  # copied alone
    with pytest.raises(SystemExit, match="reward_prediction needs .*rp_pretrain.py: copy it, too"):
        ppo.make_encoder(tiny())


# --- The update ------------------------------------------------------------------------------

CHANGES = {"clip": 0.05, "value_coefficient": 0.3, "max_grad_norm": 1e9}


@pytest.mark.parametrize("encoder", ["image_scratch", "oracle"])
@pytest.mark.parametrize("change", [{}, {"clip": 0.5}, {"value_coefficient": 2.0}])
def test_update_actor_critic(encoder, change):
    """Compared with one step of gradient descent on a loss that is written out here. A frozen
    encoder is not asked again: x is z."""
    torch.manual_seed(0)
    args = tiny(encoder=encoder, **CHANGES | change)
    model = ppo.ActorCritic(nn.Linear(4, 3), torch.randn(9, 3), torch.randn(9), 2)
    model.encoder.requires_grad_(encoder == "image_scratch")
    nn.init.orthogonal_(model.actor[-1].weight)  # so that the actor's gradients are felt
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for p in trained:
        p.grad = torch.ones_like(p)  # left over from an earlier step

    z = x = torch.randn(6, 3)
    if encoder == "image_scratch":
        x = torch.randn(6, 4)
        z = (model.encoder(x) - model.standardize.mean) / model.standardize.sd
    actions, old, advantage, target = (torch.randn(6, *more) for more in ((2,), (), (), ()))
    normal = torch.distributions.Normal(model.actor(z), model.log_std.exp())
    log_prob = normal.log_prob(actions).sum(-1)
    old = log_prob.detach() + 0.3 * old
    a = advantage.numpy().astype(np.float64)
    standardized = torch.from_numpy((a - a.mean()) / a.std(ddof=1)).float()
    ratio, low, high = (log_prob - old).exp(), 1 - args.clip, 1 + args.clip
    surrogate = torch.minimum(ratio * standardized, ratio.clip(low, high) * standardized)
    critic_loss = ((model.critic(z)[:, 0] - target) ** 2).mean()
    loss = args.value_coefficient * critic_loss - surrogate.mean()
    expected = [p - 0.1 * g for p, g in zip(trained, torch.autograd.grad(loss, trained))]

    got = ppo.update_actor_critic(model, optimizer, (x, actions, old, advantage, target), args)
    for p, goal in zip(trained, expected):
        torch.testing.assert_close(p.detach(), goal.detach(), atol=1e-6, rtol=1e-4)
        assert p.grad.abs().max() > 0
    assert got["value_loss"].item() == pytest.approx(critic_loss.item(), rel=1e-5)
    torch.testing.assert_close(got["log_ratio"], (log_prob - old).detach())
    assert not got["value_loss"].requires_grad and not got["log_ratio"].requires_grad


def test_the_gradient_is_clipped():
    torch.manual_seed(0)
    model = ppo.ActorCritic(nn.Identity(), torch.randn(9, 3), torch.randn(9), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    minibatch = [torch.randn(6, *more) for more in ((3,), (2,), (), (), ())]
    ppo.update_actor_critic(model, optimizer, minibatch, tiny(encoder="oracle", max_grad_norm=0.01))
    change = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


# --- Data ------------------------------------------------------------------------------------


def clock_model(encoder):
    torch.manual_seed(0)
    module = nn.Identity() if encoder == "oracle" else nn.Linear(2, 2)
    return ppo.ActorCritic(module, 5 * torch.rand(9, 2), torch.randn(9), 1)


@pytest.mark.parametrize("encoder", ["oracle", "image_scratch"])
def test_rollouts(encoder):
    """One clock stops by a time limit after 3 steps, one terminally after 4. After a limit the
    value of what was seen last is bootstrapped, after a terminal state 0."""
    env, model = clocks((3, False), (4, True)), clock_model(encoder)
    episodes = sprites_env.Episodes(env, seed=0)
    args = tiny(encoder=encoder, rollout_steps=9, total_steps=36)
    x, actions, log_probs, rewards, values, next_values, ended = ppo.collect_rollout(
        model, episodes, args
    )
    for column in (x, actions, log_probs, rewards, values, next_values, ended):
        assert column.shape[:2] == (9, 2) and not column.requires_grad
    age = torch.tensor([[t % 3, t % 4] for t in range(9)], dtype=torch.float32)
    obs = torch.stack([age, torch.tensor([3.0, 4.0]).expand(9, 2)], dim=-1)
    z = model.features(obs.flatten(0, 1)).unflatten(0, (9, 2)).detach()
    torch.testing.assert_close(x, z if encoder == "oracle" else obs)
    torch.testing.assert_close(rewards, actions[..., 0])  # what is stored is what was done
    mean = model.actor(z).detach()
    normal = torch.distributions.Normal(mean, model.log_std.exp().detach())
    torch.testing.assert_close(log_probs, normal.log_prob(actions).sum(-1))
    value = lambda o: model.value(model.features(o)).detach()  # noqa: E731
    torch.testing.assert_close(values, torch.stack([value(o) for o in obs]))
    limit, terminal = (age[:, 0] == 2), (age[:, 1] == 3)
    torch.testing.assert_close(ended, torch.stack([limit, terminal], dim=1).float())
    last = obs + torch.tensor([1.0, 0.0])  # one step older, at the end as well
    expected = torch.stack([value(o) for o in last])
    expected[terminal, 1] = 0
    torch.testing.assert_close(next_values, expected)
    again = ppo.collect_rollout(model, episodes, args)  # it goes on where it was
    assert not torch.equal(again[0][0], x[0])
    assert (again[1] != actions).all()


def test_exploration_noise():
    """Actions spread by the policy's sd around the mean."""
    model = clock_model("oracle")
    model.log_std.data[:] = 0.3
    episodes = sprites_env.Episodes(clocks(*[(50, False)] * 10), seed=0)
    args = tiny(encoder="oracle", num_envs=10, rollout_steps=100, total_steps=2000)
    z, actions, *_ = ppo.collect_rollout(model, episodes, args)
    deviation = actions - model.actor(z).detach()
    assert deviation.std().item() == pytest.approx(math.exp(0.3), rel=0.06)
    assert abs(deviation.mean()) < 0.1


def test_calibration():
    """Uniform actions of the seed's own stream; discounted returns, to which the mean reward is
    added for ever after where an episode, or the calibration, ends."""
    episodes = sprites_env.Episodes(clocks((3, False), (4, True)), seed=0)
    encoder = nn.Linear(2, 5)
    args = tiny(gamma=0.6, seed=7)
    z, returns = ppo.calibrate(encoder, episodes, 8, args, "cpu")
    rng = np.random.default_rng(7)
    rewards = np.stack([rng.uniform(-1, 1, (2, 1))[:, 0] for _ in range(8)])
    expected = np.zeros((8, 2))
    for n, length in enumerate((3, 4)):
        for t in range(8):
            end = min(7, t - t % length + length - 1)
            discounts = 0.6 ** np.arange(end - t + 2)
            rest = rewards.mean() / 0.4
            expected[t, n] = (discounts * [*rewards[t : end + 1, n], rest]).sum()
    np.testing.assert_allclose(returns, expected.ravel(), atol=1e-5)
    obs = [[t % length, length] for t in range(8) for length in (3, 4)]
    torch.testing.assert_close(z, encoder(torch.tensor(obs, dtype=torch.float32)).detach())
    assert not z.requires_grad


@pytest.mark.parametrize("encoder, observation", [("oracle", "state"), ("cnn", "image")])
def test_make_env(encoder, observation):
    args = tiny(encoder=encoder, task="repel", distractors=2)
    env = ppo.make_env(args, 7, render_mode="rgb_array")
    assert (env.num_envs, env.task, env.distractors) == (7, "repel", 2)
    assert (env.observation, env.render_mode) == (observation, "rgb_array")


# --- Runs ------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch):
    """What is to be drawn; blank pictures are drawn instead."""
    drawn = {}

    def draw_curve(rows, *what):
        drawn["curve"] = what
        return Figure()

    def film(policy, env):
        drawn["film"] = policy, env
        return [(np.zeros((9, 9, 3), np.uint8),)] * 2

    monkeypatch.setattr(sprites_env, "draw_curve", draw_curve)
    monkeypatch.setattr(sprites_env, "film", film)
    return drawn


def by_hand(args):
    """`train` once more, in fewer words, and without any evaluation: the model, what the last
    update told, and the returns of the episodes that it has finished."""
    torch.manual_seed(args.seed)
    encoder = ppo.make_encoder(args).eval().requires_grad_(args.encoder not in ppo.FROZEN)
    env = ppo.make_env(args, args.num_envs)
    episodes, T = sprites_env.Episodes(env, args.seed * 100_000), args.rollout_steps
    z, returns = ppo.calibrate(encoder, episodes, T, args, "cpu")
    model = ppo.ActorCritic(encoder, z, returns, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, eps=1e-5, fused=True)
    rollouts = args.total_steps // (T * args.num_envs) - 1
    for i in range(rollouts):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - i / rollouts)
        x, actions, log_probs, *rest = ppo.collect_rollout(model, episodes, args)
        advantages = ppo.generalized_advantages(*rest, args.gamma, args.gae_lambda)
        targets = (advantages + rest[1] - returns.mean()) / returns.std()
        batch = [c.flatten(0, 1) for c in (x, actions, log_probs, advantages, targets)]
        for _ in range(args.epochs):
            for rows in torch.randperm(len(batch[0])).tensor_split(args.minibatches):
                told = ppo.update_actor_critic(model, optimizer, [c[rows] for c in batch], args)
    return model, told, episodes.finished


@pytest.mark.parametrize(
    "encoder, task", [("oracle", "repel"), *((encoder, "follow") for encoder in INPUTS)]
)
def test_a_run_by_hand(tmp_path, pictures, encoder, task):
    """A run ends with the weights that its updates give one after the other, undisturbed by
    evaluation; it reports twenty times, and what it reports is true of them."""
    changes = {"task": task, "gamma": 0.4, "gae_lambda": 0.7, "seed": 3}
    if encoder.startswith(ppo.PRETRAINED):
        path = tmp_path / "encoder.pt"
        pretrained = save_encoder(path, encoder.removesuffix("_finetune"), batch_norm=True)
        changes |= {"encoder_path": str(path)}
    if encoder == "oracle":
        changes |= {"total_steps": 181}  # 22 rollouts of 8 steps, the first to calibrate
    args = tiny(tmp_path / "run", encoder=encoder, **changes)
    summary = ppo.train(args)

    model, told, finished = by_hand(args)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
    steps = 8 * (args.total_steps // 8)
    assert checkpoint["encoder"] == encoder and checkpoint["step"] == steps
    exactly = {"atol": 1e-7, "rtol": 1e-5}
    torch.testing.assert_close(checkpoint["model"], dict(model.state_dict()), **exactly)
    if encoder.startswith(ppo.PRETRAINED):  # frozen ones stay, the others move; statistics stay
        for name, value in pretrained.state_dict().items():
            moves = "finetune" in encoder and "running" not in name and "tracked" not in name
            assert torch.equal(value, checkpoint["model"][f"encoder.{name}"]) != moves, name

    env = ppo.make_env(args, 3)
    returns, ratio = sprites_env.evaluate(model.policy, env), told["log_ratio"].exp()
    expected = {"eval_return": returns.mean(), "value_loss": told["value_loss"].item()}
    expected |= {"train_return": np.mean(finished[-2:]) if finished else math.nan}
    expected |= {"action_sd": model.log_std.exp().mean().item()}
    expected |= {"kl": (ratio - 1 - told["log_ratio"]).mean().item()}
    expected |= {"clip_fraction": np.mean([r < 0.8 or r > 1.2 for r in ratio.tolist()])}
    with open(tmp_path / "run" / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == [*"step seconds steps_per_second eval_return train_return".split()]
    got = {name: float(rows[-1][name]) for name in expected}
    assert got == pytest.approx(expected, abs=1e-5, nan_ok=True)
    first = 24 if encoder == "oracle" else 16
    assert [int(row["step"]) for row in rows] == list(range(first, steps + 1, 8))
    told = sprites_env.summary(returns, task) | {"steps": steps, "minutes": summary["minutes"]}
    assert summary == pytest.approx(told, abs=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary

    (panels, x_label, levels, *_), (policy, env) = pictures["curve"], pictures["film"]
    assert panels[0][1] == ("train_return", "eval_return") and x_label == "environment steps"
    assert dict(levels) == sprites_env.REFERENCE_RETURNS[task]
    assert (env.num_envs, env.task, env.render_mode) == (4, task, "rgb_array")
    obs, _ = env.reset(seed=0)
    np.testing.assert_allclose(policy(obs), model.policy(obs), atol=1e-5)


def test_a_run_with_its_pictures(tmp_path):
    ppo.train(tiny(tmp_path, encoder="oracle"))
    names = "args.json checkpoint.pt curve.csv curve.png rollout.gif summary.json".split()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Image.open(tmp_path / "curve.png") as image, Image.open(tmp_path / "rollout.gif") as film:
        image.load()
        assert film.n_frames == 40 and film.size == (4 * 262, 262)


def test_acting_and_learning_see_the_same_policy(tmp_path, pictures):
    """Before the first gradient step all ratios are 1: batch normalisation would break this if it
    used the batch's statistics."""
    save_encoder(tmp_path / "encoder.pt", "reward_prediction", batch_norm=True)
    whole = {"epochs": 1, "minibatches": 1, "encoder": "reward_prediction_finetune"}
    ppo.train(tiny(tmp_path / "run", **whole, encoder_path=str(tmp_path / "encoder.pt")))
    with open(tmp_path / "run" / "curve.csv") as file:
        for row in csv.DictReader(file):
            assert abs(float(row["kl"])) < 1e-6 and float(row["clip_fraction"]) == 0


def test_another_scripts_files_stay(tmp_path, pictures):
    """Only --overwrite takes a folder from another script, and even then the encoder stays."""
    facts = {"script": "rp_pretrain"}
    (tmp_path / "args.json").write_text(json.dumps(facts))
    save_encoder(tmp_path / "encoder.pt", "reward_prediction")
    with pytest.raises(SystemExit, match="holds a run of rp_pretrain"):
        ppo.train(tiny(tmp_path, encoder="oracle"))
    assert json.loads((tmp_path / "args.json").read_text()) == facts
    ppo.train(tiny(tmp_path, encoder="oracle", overwrite=True))
    assert (tmp_path / "encoder.pt").exists()


def test_pretraining_is_not_timed(tmp_path, pictures, monkeypatch):
    made, starts, make, report = [], [], ppo.make_encoder, sprites_env.Run.report

    def slow(args):
        encoder = make(args)
        made.append(time.perf_counter())
        return encoder

    def watched(self, *args, **metrics):
        starts.append(self.start)
        report(self, *args, **metrics)

    monkeypatch.setattr(ppo, "make_encoder", slow)
    monkeypatch.setattr(sprites_env.Run, "report", watched)
    ppo.train(tiny(tmp_path, encoder="oracle"))
    assert min(starts) >= made[0]


def test_run_name():
    assert ppo.Args(encoder="cnn").run_name == "cnn_d1_s1"
    args = ppo.Args(encoder="oracle", task="repel", distractors=0, seed=7)
    assert args.run_name == "oracle_repel_d0_s7"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--encoder resnet", "--encoder"),
        ("--distractors 9", "--distractors"),
        ("--total-steps -5", "--total-steps must be positive and below 2**31, not -5"),
        ("--encoder oracle --total-steps 10239", "--total-steps must be at least two rollouts"),
        ("--encoder oracle --gamma 1", "--gamma must be below 1, --gae-lambda not above"),
        ("--gae-lambda 1.1", "--gamma must be below 1, --gae-lambda not above"),
        ("--encoder oracle --clip -1", "--clip must be positive and below 2**31, not -1.0"),
        ("--num-envs 1 --minibatches 21", "--minibatches must be at most half of a rollout, 20"),
        ("--encoder oracle --encoder-path text.pt", "--encoder-path is of no use"),
        ("--encoder oracle --frame-stack 2", "--frame-stack is of no use to --encoder oracle"),
        ("--encoder-path two.pt", "it sees 2 frames at once, --frame-stack 1"),
        ("--encoder oracle --seed -1", "--seed must be 0 or more and below 2**31, not -1"),
        ("--encoder oracle --device cuda", "--device cuda, but PyTorch finds no CUDA device"),
        (f"--encoder oracle --out {'long' * 99}", "cannot write to longlong"),
        ("--encoder oracle --out text.pt/run", "cannot write to text.pt/run: Not a directory"),
        ("--encoder-path nowhere.pt", "nowhere.pt is no file for --encoder reward_prediction: "),
        ("--encoder-path foreign.pt", "foreign.pt is no file for --encoder reward_prediction: "),
        ("--encoder-path text.pt", "text.pt is no file for --encoder reward_prediction: "),
        ("--encoder-path other.pt", "its objective was image_reconstruction"),
        ("--encoder pretrained", "--encoder pretrained needs an --encoder-path"),
        ("--encoder pretrained --encoder-path nan.pt", "its numbers are not finite"),
        ("--encoder-path nan.pt", "its numbers are not finite"),
        ("--encoder-path good.pt --out .", "--out must not be the folder of --encoder-path"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("text.pt").write_text("not a checkpoint")
    save_encoder("good.pt", "reward_prediction")
    save_encoder("other.pt", "image_reconstruction")
    save_encoder("two.pt", "reward_prediction", frame_stack=2)
    good = torch.load("good.pt")
    torch.save(good | {"encoder": {"weight": torch.zeros(3)}}, "foreign.pt")
    good["encoder"]["to_z.bias"][0] = math.nan
    torch.save(good, "nan.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        ppo.train(ppo.tyro.cli(ppo.Args, args=flags.split()))
    if stop.value.code == 2:  # tyro's own
        assert message in capsys.readouterr().err
    else:
        assert stop.value.code.startswith("error: ") and message in stop.value.code
        assert "\n" not in stop.value.code
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- Short, real learning, which neither blind nor half-broken agents reach ------------------


def test_oracle_learns_to_chase(tmp_path, pictures):
    """Chasing is worth 37.95, waiting in the centre 31.2."""
    short = {"total_steps": 20_000, "num_envs": 32, "rollout_steps": 40, "minibatches": 16}
    args = tiny(tmp_path, encoder="oracle", **short, epochs=4, eval_episodes=50)
    assert ppo.train(args)["eval_return_mean"] > 37.4


class Pointing(sprites_env.SpritesVectorEnv):
    """Pays at most 1 a step, for an action that points to where the square is in the frame."""

    def step(self, actions):
        goal = (self.states[:, 1, :2] - 0.5) / 0.4
        obs, _, *ends = super().step(actions)
        return obs, 1 - np.abs(actions - goal).mean(1), *ends


def test_learns_from_pixels(tmp_path, monkeypatch, pictures):
    """From scratch. A blind agent gets 20, half of what there is to get."""
    monkeypatch.setattr(ppo, "make_env", lambda args, n, **_: Pointing(n, **args.environment))
    short = {"total_steps": 6400, "num_envs": 32, "rollout_steps": 10, "minibatches": 8}
    short |= {"epochs": 4, "eval_episodes": 20, "distractors": 0}
    args = tiny(tmp_path, encoder="image_scratch", **short)
    assert ppo.train(args)["eval_return_mean"] > 32


def test_learns_to_follow_from_pixels(tmp_path, pictures):
    """The slowest test, at half a minute: 60,000 steps, above what waiting in the centre earns
    (31.2), so that the target has been seen."""
    few = {"encoder": "image_scratch", "distractors": 0, "total_steps": 60_000}
    args = ppo.Args(**few, torch_threads=1, device="cpu", out=str(tmp_path))
    assert ppo.train(args)["eval_return_mean"] > 32
