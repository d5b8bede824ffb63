"""curl.py: equations by hand, updates on one batch, data, training in miniature, bad input."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import curl
import sprites_env
from sprites_env import SpritesVectorEnv

TINY = {"total_steps": 160, "num_envs": 2, "initial_steps": 140, "updates": 1, "batch_size": 4}
TINY |= {"hidden": 8, "z_dim": 8, "eval_episodes": 2, "torch_threads": 1, "device": "cpu"}
MODES = curl.Mode.__args__
COLUMN, ROW = torch.zeros(4, 1), torch.zeros(4)


@pytest.fixture(autouse=True)
def small_and_seeded(monkeypatch):
    monkeypatch.setattr(curl, "PROBE_EPISODES", 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run(out, **changes):
    return curl.train(curl.Args(**TINY | changes, out=str(out)))


def no_pictures(monkeypatch):
    """They take longer than the rest of a small run."""
    figure = SimpleNamespace(suptitle=lambda *_, **__: None, savefig=Path.touch)
    monkeypatch.setattr(sprites_env, "draw_curve", lambda *_: figure)
    monkeypatch.setattr(sprites_env, "draw_images", lambda *_: figure)
    monkeypatch.setattr(sprites_env, "save_gif", lambda path, frames: path.touch())


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


# --- Networks --------------------------------------------------------------------------------


def test_networks():
    """Shapes, ranges, and a start at which no signal vanishes."""
    frames, action = torch.rand(5, 3, 64, 64), torch.randn(5, 2)
    with torch.no_grad():
        convolutions, head = curl.patch_convolutions(3), curl.code_head(2048, 7)
        h, z = convolutions(frames), head(convolutions(frames))
        by_hand = convolutions[2](convolutions[0](frames).relu()).relu().flatten(1)
        torch.testing.assert_close(h, by_hand)
        assert h.shape == (5, 2048) and h.mean() > 0.1
        weight = head[0].weight
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(7), atol=1e-4, rtol=0)
        assert z.shape == (5, 7) and z.abs().max() < 1 and z.std(1).min() > 0.4
        torch.testing.assert_close(z.atanh().mean(1), torch.zeros(5), atol=1e-5, rtol=0)

        actor, critic = curl.SquashedActor(7, 16, 2), curl.TwinCritic(7, 16, 2)
        mean, log_std = actor(z)
        assert mean.abs().max() < 0.1 and (log_std + 4).abs().max() < 0.2
        actor.mlp[-1].weight.mul_(1000)
        x = actor.mlp(z)
        mean, log_std = actor(z)
        torch.testing.assert_close(mean, x[:, :2])
        torch.testing.assert_close(log_std, -10 + 6 * (1 + x[:, 2:].tanh()))

        past = torch.randn(5, 4)
        with_head = curl.ActorWithHead(head, 7, 16, 2, past_dim=4)
        expected = with_head.policy(torch.cat([z, past], dim=1))
        torch.testing.assert_close(with_head(h, past), expected)

        q = critic(z, action)
        for i in (0, 1):
            expected = critic.heads[i](torch.cat([z, action], dim=1))[:, 0]
            torch.testing.assert_close(q[i], expected)
    assert q.shape == (2, 5) and not torch.allclose(q[0], q[1])
    one, two, three = critic.heads[0][::2]
    assert all(layer.bias.abs().sum() == 0 for layer in (one, two, three))
    by_hand = three(two(one(torch.cat([z, action], dim=1)).relu()).relu())[:, 0]
    torch.testing.assert_close(q[0], by_hand)


@pytest.mark.parametrize(
    ("patch", "filters", "rows", "columns"), [(4, 16, {7}, {8}), (8, 32, {6, 7}, {7, 8})]
)
def test_patches(patch, filters, rows, columns):
    """A pixel is in one patch of 4 x 4, or in four of 8 x 8, which have the same centres."""
    args = curl.Args(**TINY, patch=patch, frame_stack=2)
    agent = curl.CURLAgent(curl.make_env(args, 1).single_observation_space, 2, args, "cpu")
    frames = torch.zeros(1, 2, 64, 64)
    with torch.no_grad():
        without = agent.convolutions[0](frames)
        frames[:, :, 29, 33] = 1
        changed = agent.convolutions[0](frames) != without
        assert agent.convolutions(frames).shape == (1, 2048)
    assert changed.shape == (1, filters, 16, 16)
    _, _, row, column = changed.nonzero().T
    assert set(row.tolist()) == rows and set(column.tolist()) == columns


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_is_in_exactly_one_optimizer(mode):
    """The actor reads the encoder's convolutions and does not train them; W is trained where there
    is a contrastive loss; slow copies are not trained, and start as what they copy."""
    args = curl.Args(**TINY | {"mode": mode, "learning_rate": 0.5, "alpha": 0.25, "frame_stack": 2})
    space = curl.make_env(args, 1).single_observation_space
    agent = curl.CURLAgent(space, 2, args, torch.device("cpu"))
    learnt = {*agent.critic.parameters(), *agent.encoder.parameters()}
    contrastive = mode in ("curl", "curl_unaugmented_sac", "contrastive_only")
    learnt |= {agent.W} if contrastive else set()
    acting = {*agent.actor.parameters(), agent.log_alpha}
    for optimizer, parameters in ((agent.optimizer, learnt), (agent.actor_optimizer, acting)):
        (group,) = optimizer.param_groups
        assert set(group["params"]) == parameters and group["lr"] == 0.5
    assert not learnt & acting and agent.log_alpha.item() == pytest.approx(math.log(0.25))
    assert torch.equal(agent.W, torch.eye(8)) and agent.encoder[0] is agent.convolutions
    for slow, fast in ((agent.key_encoder, agent.encoder), (agent.critic_target, agent.critic)):
        pairs = list(zip(slow.parameters(), fast.parameters(), strict=True))
        assert all(torch.equal(p, q) and p is not q and not p.requires_grad for p, q in pairs)
    assert len(list(agent.encoder.parameters())) == (0 if mode == "state" else 8)


def test_seeing_and_acting():
    """Frames to [0, 1], states to [-1, 1]; the mean action, or one of the policy's."""
    _, agent, batch = small("curl")
    frames = np.array([0, 51, 255], np.uint8)
    assert agent.see(frames).tolist() == pytest.approx([0, 0.2, 1])
    assert frames.tolist() == [0, 51, 255]  # the caller's own are left alone
    _, agent, _ = small("state")
    low, high = agent.space.low, agent.space.high
    obs = np.stack([low, high, (low + 3 * high) / 4])
    expected = np.repeat([[-1], [1], [0.5]], 8, axis=1)
    np.testing.assert_allclose(agent.see(obs), expected, atol=1e-5)

    past = np.linspace(-1, 1, 12).reshape(3, 4)
    mean, log_std = (x.detach() for x in agent.actor(agent.see(obs), torch.tensor(past).float()))
    torch.manual_seed(1)
    noisy = (mean + log_std.exp() * torch.randn(3, 2)).tanh()
    torch.manual_seed(1)
    np.testing.assert_allclose(agent.act(obs, past), mean.tanh(), atol=1e-6)
    np.testing.assert_allclose(agent.act(obs, past, noise=True), noisy, atol=1e-6)


# --- Equations -------------------------------------------------------------------------------


def random_views(batch=5, size=3):
    shapes = (batch, size), (batch, size), (size, size)
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def test_bilinear_logits_and_loss_by_hand():
    """(1): rows of q W are (1, 2) and (0, 2), products (3, 2) and (2, 2). (2): in the second case
    the second column wins the first row, the first the second, and nobody finds its key."""
    q, k = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1], [0, 1]])
    logits = curl.bilinear_logits(q, k, torch.tensor([[1.0, 2], [0, 1]]))
    assert logits.tolist() == [[0, -1], [0, 0]]
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert curl.info_nce_loss(logits).item() == pytest.approx(expected)
    expected = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 2
    assert curl.info_nce_loss(torch.tensor([[0.0, 2], [1, 0]])).item() == pytest.approx(expected)


def test_a_loss_that_knows_nothing_is_log_b():
    q, k, _ = random_views(batch=7)
    logits = curl.bilinear_logits(q, k, torch.zeros(3, 3, dtype=torch.float64))
    assert curl.info_nce_loss(logits).item() == pytest.approx(math.log(7), abs=1e-12)


def test_the_row_maximum_changes_neither_loss_nor_gradient():
    """And the order of the pairs does not matter."""
    q, k, W = views = random_views()
    loss = curl.info_nce_loss(curl.bilinear_logits(*views))
    plain = torch.nn.functional.cross_entropy(q @ W @ k.T, torch.arange(5))
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, views), torch.autograd.grad(plain, views)):
        torch.testing.assert_close(ours, theirs)
    assert torch.isfinite(curl.info_nce_loss(curl.bilinear_logits(1e3 * q, 1e3 * k, W)))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = curl.info_nce_loss(curl.bilinear_logits(q[order], k[order], W))
    assert shuffled.item() == pytest.approx(loss.item(), abs=1e-12)
    wrong = curl.info_nce_loss(curl.bilinear_logits(q, k[order], W))
    assert abs(loss - wrong) > 0.01


def test_top_1_accuracy():
    logits = torch.tensor([[0.0, -1, -2], [0, -1, -2], [-1, -1, 0]])
    assert curl.top_1_accuracy(logits).item() == pytest.approx(2 / 3)


def test_polyak():
    """(3)"""
    slow, fast = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.75 * s + 0.25 * f for s, f in zip(slow.parameters(), fast.parameters())]
    curl.polyak_(slow, fast, 0.25)
    torch.testing.assert_close(list(slow.parameters()), expected)


def test_soft_actor_critic_by_hand():
    """(4): 1 + .9 * 5, and nothing after a terminal state. (5): (1 + 4) / 2 + (0 + 9) / 2.
    (6): (.5 * -1 - 2 + .5 * 3 - 4) / 2."""
    y = curl.td_target(torch.ones(2), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0), 0.9)
    assert y.tolist() == pytest.approx([5.5, 1.0])
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    assert curl.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7.0)
    loss = curl.soft_actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(-2.5)


@pytest.mark.parametrize(("log_prob", "expected"), [([-1.0, 3.0], 0.5), ([1.0, 5.0], -0.5)])
def test_temperature_by_hand(log_prob, expected):
    """(7): α .5, target entropy -2. The entropy -1 is above its target, -.5 (-3 + 1) / 2, and
    descending lowers α; the entropy -3 is below."""
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    log_prob = torch.tensor(log_prob, requires_grad=True)
    loss = curl.temperature_loss(log_alpha, log_prob, -2)
    loss.backward()
    assert loss.item() == pytest.approx(expected) and log_prob.grad is None
    assert log_alpha.grad.item() == pytest.approx(expected)


def test_squashed_log_prob():
    """(8): u = .5 under N(0, 1): -.9189 - .125 - log(1 - tanh(.5)^2) = -1.0439 + .2402, twice;
    the sum over actions of a density."""
    zero, half = torch.zeros(1, 2), torch.full((1, 2), 0.5)
    assert curl.squashed_log_prob(half, zero, zero).item() == pytest.approx(-1.6074, abs=1e-4)
    a = torch.linspace(-0.9999, 0.9999, 20_001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(a, 0.3), torch.full_like(a, -0.5)
    density = curl.squashed_log_prob(a.atanh(), mean, log_std).exp()
    assert torch.trapezoid(density, a[:, 0]).item() == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(curl.squashed_log_prob(60 * half, zero, zero)).all()


def log_density(u, mean, log_std):
    """(8), in float64."""
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    u = u.double()
    return (normal.log_prob(u) - (1 - u.tanh().square()).log()).sum(-1)


def test_sample_squashed():
    mean, log_std = (0.5 * torch.randn(9999, 2)).requires_grad_(), torch.full((9999, 2), -1.0)
    log_std.requires_grad_()
    a, log_prob = curl.sample_squashed(mean, log_std)
    deviation = (a.atanh() - mean) / math.exp(-1)
    assert deviation.mean(0).tolist() == pytest.approx([0, 0], abs=0.05)
    assert deviation.std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    expected = log_density(a.atanh(), mean, log_std).float()
    torch.testing.assert_close(log_prob, expected, atol=1e-3, rtol=1e-3)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(a.sum(), (mean, log_std)))


def test_ridge_by_hand():
    """(9): x = y = -1, 1. G = ((1, -1), (-1, 1)), penalty 2: the prediction is x / 2. And against
    the primal form, with means that matter."""
    x = torch.tensor([[-1.0], [1.0]])
    assert curl.ridge_r2(x, x, x, x, 2.0).tolist() == pytest.approx([0.75])
    x, y, x_test = (
        3 + torch.randn(shape, dtype=torch.float64) for shape in ((20, 4), (20, 2), (10, 4))
    )
    y_test = torch.cat([x_test[:, :1], x_test[:, 1:2] ** 2], dim=1)
    a = x - x.mean(0)
    penalty = 0.1 * a.square().sum() / 20 * torch.eye(4)
    w = torch.linalg.solve(a.T @ a + penalty, a.T @ (y - y.mean(0)))
    error = y_test - (x_test - x.mean(0)) @ w - y.mean(0)
    expected = 1 - error.square().mean(0) / y_test.var(0, correction=0)
    torch.testing.assert_close(curl.ridge_r2(x, y, x_test, y_test), expected)


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda: curl.td_target(ROW, COLUMN, ROW, 0.9),
        lambda: curl.td_target(ROW, ROW, COLUMN, 0.9),
        lambda: curl.critic_loss(torch.zeros(2, 4, 1), ROW),
        lambda: curl.critic_loss(torch.zeros(2, 4), COLUMN),
        lambda: curl.soft_actor_loss(COLUMN, ROW, 1.0),
        lambda: curl.info_nce_loss(torch.zeros(4, 3)),
        lambda: curl.bilinear_logits(torch.zeros(4, 3), torch.zeros(5, 3), torch.eye(3)),
    ],
)
def test_losses_refuse_to_broadcast(broadcast):
    with pytest.raises(AssertionError):
        broadcast()


# --- Updates ---------------------------------------------------------------------------------


def small(mode, **changes):
    """Arguments, an agent that is told its last two actions and whose networks are all at places of
    their own, and six transitions."""
    args = curl.Args(**TINY | {"mode": mode, "frame_stack": 2, "past_actions": 2} | changes)
    space = curl.make_env(args, 1).single_observation_space
    agent = curl.CURLAgent(space, 2, args, torch.device("cpu"))
    with torch.no_grad():
        for network in networks(agent).values():
            for p in network:
                p.add_(0.1 * torch.randn_like(p))
    shape = (8,) if mode == "state" else (2, 64, 64)
    batch = {name: torch.rand(6, *shape) for name in ("x", "x_next", "query", "key")}
    batch |= {"a": 2 * torch.rand(6, 6) - 1, "r": torch.randn(6)}
    return args, agent, batch | {"terminated": torch.tensor([1.0, 0, 0, 1, 0, 0])}


def networks(agent):
    """All parameters, by name."""
    names = ("encoder", "critic", "actor", "key_encoder", "critic_target")
    return {name: list(getattr(agent, name).parameters()) for name in names} | {
        "W": [agent.W],
        "log_alpha": [agent.log_alpha],
    }


def check_step(loss, optimizer, update, still):
    """From stale gradients, `update` takes one step of Adam down `loss`, and leaves the parameters
    `still` alone. Returns what it returns."""
    moving = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, moving)
    before = [p.detach().clone() for p in (*moving, *still)]
    for p in moving:
        p.grad = torch.full_like(p, 9.0)
    torch.manual_seed(1)
    result = update()
    for p, old, gradient in zip(moving, before, gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
        clear, step = gradient.abs() > 1e-4, optimizer.param_groups[0]["lr"] * gradient.sign()
        assert clear.any()
        torch.testing.assert_close(p.detach()[clear], (old - step)[clear], rtol=0, atol=2e-5)
    assert all(torch.equal(p, old) for p, old in zip(still, before[len(moving) :]))
    return result


def sample_action(agent, h, past):
    """As the update will, from the same noise: an action and those before, and its log density."""
    torch.manual_seed(1)
    mean, log_std = agent.actor(h, past)
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.cat([u.tanh(), past], dim=1), log_density(u, mean, log_std)


@pytest.mark.parametrize("mode", MODES)
def test_update_critic_and_encoder(mode):
    """Critic and encoder descend on (5), with a target (4) of the slow critic, and where there is a
    contrastive loss encoder and W on (2), with keys of the slow encoder."""
    args, agent, batch = small(mode, gamma=0.5, alpha=0.2)
    with torch.no_grad():
        past_next, h_next = batch["a"][:, :4], agent.convolutions(batch["x_next"])
        a_next, log_prob = sample_action(agent, h_next, past_next)
        q_next = agent.critic_target(agent.encoder(batch["x_next"]), a_next).double().numpy()
        keys = agent.key_encoder(batch["key"])
        h = agent.convolutions(batch["x"])
    value = np.minimum(*q_next) - agent.log_alpha.exp().item() * log_prob.numpy()
    y = batch["r"].numpy() + 0.5 * np.where(batch["terminated"], 0, value)
    y, z = torch.from_numpy(y).float(), agent.encoder(batch["x"])
    q = agent.critic(z.detach() if mode == "contrastive_only" else z, batch["a"])
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    expected = {"critic_loss": loss.item(), "entropy": -log_prob.mean().item()}
    trained = {"encoder", "critic"}
    if mode in ("curl", "curl_unaugmented_sac", "contrastive_only"):
        query = agent.encoder(batch["query"]) if mode == "curl_unaugmented_sac" else z
        logits = query @ agent.W @ keys.T
        contrastive_loss = torch.nn.functional.cross_entropy(logits, torch.arange(6))
        loss = loss + contrastive_loss
        found = np.mean([row.argmax().item() == i for i, row in enumerate(logits)])
        expected |= {"contrastive_loss": contrastive_loss.item(), "contrastive_accuracy": found}
        trained |= {"W"}

    def update():
        return curl.update_critic_and_encoder(agent, batch, args)

    still = [p for name, ps in networks(agent).items() if name not in trained for p in ps]
    metrics, h_again = check_step(loss, agent.optimizer, update, still)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-3)
    assert torch.equal(h_again, h) and not h_again.requires_grad
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(p.grad is None for p in still)


@pytest.mark.parametrize("mode", ["state", "curl"])
def test_update_actor_and_alpha(mode):
    """The actor descends on (6), by way of its actions, α on (7); encoder and critic keep still."""
    _, agent, batch = small(mode, alpha=0.2)
    h = agent.convolutions(batch["x"]).detach()
    a, log_prob = sample_action(agent, h, batch["a"][:, 2:])
    alpha = agent.log_alpha.exp()
    q = torch.minimum(*agent.critic(agent.encoder(batch["x"]).detach(), a))
    loss = (alpha.item() * log_prob - q).mean() - alpha * (log_prob.mean().item() - 2)

    def update():
        return curl.update_actor_and_alpha(agent, h, batch["a"][:, 2:])

    trained = ("actor", "log_alpha")
    still = [p for name, ps in networks(agent).items() if name not in trained for p in ps]
    check_step(loss, agent.actor_optimizer, update, still)
    assert all(p.grad is None for p in agent.encoder.parameters())


# --- Data ------------------------------------------------------------------------------------


def test_random_shift():
    """A pixel at (10, 20) moves by pad - offset, in all frames of a stack alike; what leaves the
    frame is gone, what comes in is black."""
    stacks = np.zeros((4, 2, 64, 64), np.uint8)
    stacks[:, :, 10, 20] = stacks[:, 1, 0, 0] = stacks[:, 1, 63, 0] = 255
    shifted = curl.random_shift(stacks, np.array([[4, 0, 8, 3], [4, 0, 8, 6]]), 4)
    assert shifted.dtype == np.uint8 and np.array_equal(shifted[0], stacks[0])
    for moved, (x, y) in zip(shifted[1:], ((14, 24), (6, 16), (11, 18))):
        assert np.argwhere(moved[0]).tolist() == [[x, y]] and moved[1, x, y]
    assert np.argwhere(shifted[1, 1]).tolist() == [[4, 4], [14, 24]]  # row 63 left
    assert shifted[2, 1].sum() == shifted[3, 1].sum() == 255  # column 0 left


SHIFTED = {"state": "", "pixel": "", "rad": "x x_next", "curl": "x x_next key"}
SHIFTED |= {"curl_unaugmented_sac": "query key", "contrastive_only": "x x_next key"}


@pytest.mark.parametrize("mode", MODES)
def test_which_views_are_shifted(mode):
    """Stacks with one bright pixel, at (30, 30) at first, then at (20, 25): where it is in a view
    tells the shift. Every stack has its own, every view too, and both extremes occur."""
    args, agent, _ = small(mode, pad=3, batch_size=300)
    stacks, successors = np.zeros((2, 300, 2, 64, 64), np.uint8)
    stacks[:, :, 30, 30] = successors[:, :, 20, 25] = 255
    if mode == "state":
        stacks, successors = np.zeros((300, 8), np.float32), np.ones((300, 8), np.float32)
    a, r, terminated = np.zeros((300, 2)), np.arange(300.0), np.arange(300) % 2 == 0
    asked = []

    def sample(rng, batch):
        asked.append(batch)
        return stacks, a, r, successors, terminated

    replay = SimpleNamespace(sample=sample, reward_mean=3.0, reward_sd=2.0)
    batch = curl.sample_views(replay, np.random.default_rng(0), agent, args)
    assert asked == [300] and {x.dtype for x in batch.values()} == {torch.float32}
    assert torch.equal(batch.pop("a"), torch.zeros(300, 2))
    assert torch.equal(batch.pop("r"), (torch.arange(300.0) - 3) / 2)
    assert torch.equal(batch.pop("terminated"), (torch.arange(300) % 2 == 0).float())
    shifted = SHIFTED[mode].split()
    assert batch.keys() == {"x", "x_next", *shifted}
    shifts = []
    for name, view in batch.items():
        if name not in shifted:
            assert torch.equal(view, agent.see(successors if name == "x_next" else stacks))
            continue
        assert view.max() == 1 and (view.sum((2, 3)) == 1).all()
        at = np.stack(np.unravel_index(view.flatten(2).argmax(-1).numpy(), (64, 64)))  # (2, B, S)
        assert np.array_equal(at[..., 0], at[..., 1])
        start = [[20], [25]] if name == "x_next" else [[30], [30]]
        shifts += list(at[..., 0] - start)
    assert all(set(x) == set(range(-3, 4)) for x in shifts)
    others = np.corrcoef(shifts) - np.eye(len(shifts)) if shifts else np.zeros(1)
    assert np.abs(others).max() < 0.3


def test_replay_rebuilds_stacks_within_episodes():
    """An observation says where it belongs: 1000 episode + 100 environment + time. Rewards are
    measured once."""
    space = SpritesVectorEnv(1, 0, "state").single_observation_space
    replay = curl.FrameReplay(rounds=2, num_envs=3, horizon=5, space=space, action_dim=2, frames=3)
    for episode in range(2):
        for t in range(5):
            now = 1000 * episode + 100 * np.arange(3)[:, None] + np.full((3, 8), t)
            replay.add(now, now[:, :2], now[:, 0], now + 1, np.array([t == 4, False, t == 2]))
            if (episode, t) == (0, 1):
                replay.measure_rewards()
    assert (replay.reward_mean, replay.reward_sd) == pytest.approx((100.5, 81.6512), rel=1e-5)
    assert replay.size == 30
    stacks, actions, rewards, successors, terminated = replay.sample(np.random.default_rng(0), 2000)
    assert stacks.shape == successors.shape == (2000, 24)
    start, t = rewards // 100 * 100, rewards % 100
    env = rewards // 100 % 10
    assert len(set(rewards)) == 30 and np.array_equal(actions[:, 1], rewards)
    assert np.array_equal(terminated, (env == 0) & (t == 4) | (env == 2) & (t == 2))
    for i in range(3):
        assert np.array_equal(stacks[:, 8 * i], start + np.maximum(t - 2 + i, 0))
        assert np.array_equal(successors[:, 8 * i], start + np.maximum(t - 1 + i, 0))


@pytest.mark.parametrize(
    ("rewards", "terminated", "mean", "sd"),
    [
        ([1, 2, 3, 6], False, 3, 3.5**0.5),
        ([1, 2, 3, 6], True, 0, 3.5**0.5),  # a mean would be worth something to those who live
        ([0, 0, 0, 0], False, 0, 1),
        ([0.0] * 399 + [1.0], False, 1 / 400, 0.1),  # the deviation is 0.05
    ],
)
def test_scale_of_rewards(rewards, terminated, mean, sd):
    space = SpritesVectorEnv(1, 0, "state").single_observation_space
    replay = curl.FrameReplay(1, 1, len(rewards) + 1, space, 2, frames=1)
    for i, reward in enumerate(rewards):
        over = np.array([terminated and i == 1])
        replay.add(np.zeros((1, 8)), np.zeros((1, 2)), np.array([reward]), np.zeros((1, 8)), over)
    replay.measure_rewards()
    assert (replay.reward_mean, replay.reward_sd) == pytest.approx((mean, sd))


def test_states_without_bounds_and_images_of_other_sizes():
    low, high = np.float32([-2, -np.inf, 0, -3e38]), np.float32([2, np.inf, np.inf, 3e38])
    args = curl.Args(**TINY, mode="state")
    agent = curl.CURLAgent(gym.spaces.Box(low, high), 2, args, torch.device("cpu"))
    seen = agent.see(np.array([[1.0, 7.0, -5.0, 9.0]]))  # float64, as MuJoCo has it
    assert seen.tolist() == [[0.5, 7, -5, 9]] and seen.dtype == torch.float32
    space = gym.spaces.Box(0, 255, (3, 84, 60), np.uint8)
    agent = curl.CURLAgent(space, 4, curl.Args(**TINY), torch.device("cpu"))
    assert agent.act(np.zeros((5, 9, 84, 60), np.uint8), np.zeros((5, 0))).shape == (5, 4)


def test_replay_stores_a_frame_once_and_samples_what_there_is():
    space = SpritesVectorEnv(1).single_observation_space
    replay = curl.FrameReplay(rounds=3, num_envs=2, horizon=40, space=space, action_dim=2, frames=3)
    assert replay.observations.nbytes == 3 * 2 * 41 * 4096
    frames = np.full((2, 1, 64, 64), 7, np.uint8)
    replay.add(frames, np.zeros((2, 2)), np.array([5, 6]), frames, np.zeros(2, bool))
    stacks, _, rewards, *_ = replay.sample(np.random.default_rng(0), 50)
    assert set(rewards) == {5, 6} and stacks.shape == (50, 3, 64, 64) and (stacks == 7).all()


def test_a_policy_remembers_what_the_replay_would_show():
    policy = curl.remembering(lambda stacks: stacks[0, :, 0, 0].tolist(), 3)
    seen = [policy(np.full((2, 1, 1, 1), t)) for t in range(4)]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


# --- Measures --------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "first"), [(3, 3), (6, 7)])
def test_random_stacks(frames, first):
    """Every fourth step from where a stack is full, with the states that its last frame shows; not
    of the episodes of the evaluation."""
    stacks, states, shapes = curl.random_stacks(SpritesVectorEnv(5, 1), frames)
    times = range(first, 40, 4)
    assert stacks.shape == (5, len(times), frames, 64, 64)
    assert states.shape == (5, len(times), 3, 4) and shapes.shape == (5, 3)
    env = SpritesVectorEnv(5, 1)
    env.reset(seed=10**9 + 50_000)
    rng, now, drawn = np.random.default_rng(0), [], []
    for _ in range(40):
        now.append(env.states)
        drawn.append(sprites_env.draw(env.states[..., :2], shapes))
        env.step(rng.uniform(-1, 1, (5, 2)))
    for i, t in enumerate(times):
        assert np.array_equal(states[:, i], now[t])
        expected = np.stack(drawn[t + 1 - frames : t + 1], axis=1)
        assert np.array_equal(stacks[:, i], expected)


def test_probe():
    """Codes that hold one quantity are good for that one most, in episodes not fitted to."""
    states = np.random.default_rng(0).random((40, 10, 4, 4))
    agent, target = states[:, :, 0, :2], states[:, :, 1, :2]
    quantities = {"agent": agent, "target": target, "relative_position": target - agent}
    quantities["target_velocity"] = states[:, :, 1, 2:]
    quantities["distractors"] = np.concatenate([states[:, :, 2, :2], states[:, :, 3, :2]], axis=-1)
    for name, quantity in quantities.items():
        code = torch.from_numpy(quantity).float()
        r2 = curl.probe(code, states)
        assert r2.keys() == quantities.keys() and r2[name] > 0.99
        assert all(value < 0.6 for other, value in r2.items() if other != name)
        fit, test = (part.flatten(0, 1) for part in (code[:30], code[30:]))
        expected = curl.ridge_r2(fit, fit, test, test).mean().item()
        assert r2[name] == pytest.approx(expected, rel=1e-6)
    assert "distractors" not in curl.probe(code, states[:, :, :2])
    noise = torch.randn(40, 10, 300)
    assert max(curl.probe(noise, states).values()) < 0.1


def test_probe_encoders(monkeypatch):
    """Numbers and pictures belong to the encoder, the random one and the pixels, in that order."""
    args, agent, _ = small("pixel", distractors=2)
    other = small("pixel")[1].encoder
    env = SpritesVectorEnv(8, 2)
    stacks, states, shapes = curl.random_stacks(env, 2)
    pixels = torch.from_numpy(stacks.reshape(8, -1, 2 * 64 * 64) / np.float32(255))
    codes = {}
    for name, encoder in (("", agent.encoder), ("_random_encoder", other)):
        frames = torch.from_numpy(stacks / np.float32(255)).flatten(0, 1)
        codes[name] = encoder(frames).detach().reshape(8, -1, 8)
    codes["_pixels"] = pixels
    expected = {f"probe_r2{name}": curl.probe(code, states) for name, code in codes.items()}

    saved = {}
    monkeypatch.setattr(sprites_env, "draw_images", lambda rows: rows)
    summary = curl.probe_encoders(SimpleNamespace(save=saved.__setitem__), agent, other, args)
    assert summary.keys() == expected.keys()
    for name, r2 in expected.items():
        assert summary[name] == pytest.approx(r2, abs=2e-3)
    rows = saved["neighbours.png"]
    labels = ["query", "nearest\nin z", "second\nin z", "nearest\nin pixels", "second\nin pixels"]
    assert list(rows) == labels
    by_hand = {"z": codes[""].numpy(), "pixels": pixels.numpy()}
    for i, query in enumerate((0, 1, 2, 4, 5, 7)):
        picture = sprites_env.draw_rgb(states[query, 5, :, :2], shapes[query], scale=2)
        assert np.array_equal(rows["query"][i], picture)
        for space, code in by_hand.items():
            distance = ((code - code[query, 5]) ** 2).sum(-1)
            distance[query] = np.inf
            nearest = np.stack(np.unravel_index(distance.ravel().argsort()[:2], distance.shape)).T
            for label, (e, t) in zip(("nearest", "second"), nearest):
                picture = sprites_env.draw_rgb(states[e, t, :, :2], shapes[e], scale=2)
                assert np.array_equal(rows[f"{label}\nin {space}"][i], picture)


# --- Training --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_runs_and_is_deterministic(tmp_path, monkeypatch, mode, capsys):
    distractors = MODES.index(mode) % 3
    summary = run(tmp_path / "a", mode=mode, distractors=distractors)
    assert f"{2 * 2 * 41 * (32 if mode == 'state' else 4096):,} bytes" in capsys.readouterr().out
    no_pictures(monkeypatch)
    again = run(tmp_path / "b", mode=mode, distractors=distractors)
    assert summary | {"minutes": 0} == again | {"minutes": 0}
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    expected = {"eval_return_mean", "eval_return_std", "eval_episodes", "score"}
    expected |= {"updates", "minutes"}
    files = {"args.json", "checkpoint.pt", "curve.csv", "curve.png", "rollout.gif", "summary.json"}
    columns = {"step", "eval_return", "train_return", "alpha", "critic_loss", "entropy"}
    if mode in curl.CONTRASTIVE:
        expected |= {"contrastive_accuracy"}
        columns |= {"contrastive_accuracy", "contrastive_loss"}
    if mode != "state":
        expected |= {"probe_r2", "probe_r2_random_encoder", "probe_r2_pixels"}
        files |= {"neighbours.png"}
        assert len(summary["probe_r2"]) == 4 + bool(distractors)
    assert summary.keys() == expected and summary["updates"] == 11
    assert untimed_rows(tmp_path / "a")[0].keys() == columns
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert all((tmp_path / "a" / name).stat().st_size > 100 for name in files)
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["actor"].values())


class Terminal(SpritesVectorEnv):
    """Its episodes end in a final state, not at a time limit."""

    def step(self, actions):
        obs, rewards, terminated, truncated, info = super().step(actions)
        return obs, rewards, truncated, terminated, info


class Watched(curl.FrameReplay):
    """It can be looked at after a run."""

    def __init__(self, *args):
        super().__init__(*args)
        Watched.last = self


class Puppet(curl.CURLAgent):
    """An agent that acts .5 with noise and -.25 without, and remembers what it saw."""

    def __init__(self, *args):
        super().__init__(*args)
        Puppet.last, self.seen, self.past = self, {True: [], False: []}, {True: [], False: []}

    def act(self, obs, past, noise=False):
        self.seen[noise].append(obs)
        self.past[noise].append(past.copy())
        return np.full((len(obs), 2), 0.5 if noise else -0.25)


PUPPETS = {"initial_steps": 99, "updates": 3, "seed": 3, "eval_episodes": 5, "tau": 0.3}
PUPPETS |= {"encoder_tau": 0.6, "learning_rate": 0.1, "total_steps": 239, "z_dim": 5}
PUPPETS |= {"past_actions": 2}


@pytest.fixture(scope="module", params=[SpritesVectorEnv, Terminal])
def puppets(request, tmp_path_factory):
    """80 steps of 2 environments, the first 50 at random, then three updates after each, 93 in all.
    The updates only count: the n-th sets a bias of critic and encoder, α and the metrics to n."""
    seen = SimpleNamespace(seeds=set(), rates=[], acting=[], terminal=request.param is Terminal)
    reset, seen.folder = SpritesVectorEnv.reset, tmp_path_factory.mktemp("run")

    def watched_reset(env, seed=None, options=None):
        seen.seeds.add((env.num_envs, seed))
        return reset(env, seed=seed)

    def update_critic_and_encoder(agent, batch, args):
        optimizers = agent.optimizer, agent.actor_optimizer
        seen.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        n = len(seen.rates)
        torch.nn.init.constant_(agent.critic.heads[0][-1].bias, n)
        torch.nn.init.constant_(agent.convolutions[0].bias, n)
        assert len(batch["x"]) == 4
        seen.batch = batch
        return {"critic_loss": torch.tensor(n), "contrastive_accuracy": torch.tensor(1.0 * n)}, n

    def update_actor_and_alpha(agent, h, past):
        assert torch.equal(past, seen.batch["a"][:, 2:])
        seen.acting.append(h)
        torch.nn.init.constant_(agent.log_alpha, math.log(h))

    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.setattr(curl, "PROBE_EPISODES", 8)
        patch.setattr(sprites_env, "SpritesVectorEnv", request.param)
        patch.setattr(SpritesVectorEnv, "reset", watched_reset)
        patch.setattr(curl, "FrameReplay", Watched)
        patch.setattr(curl, "CURLAgent", Puppet)
        patch.setattr(curl, "update_critic_and_encoder", update_critic_and_encoder)
        patch.setattr(curl, "update_actor_and_alpha", update_actor_and_alpha)
        seen.summary = run(seen.folder, **PUPPETS)
    seen.agent, seen.replay = Puppet.last, Watched.last
    seen.rows = [{k: float(v) for k, v in row.items()} for row in untimed_rows(seen.folder)]
    return seen


def test_rates_fall_and_slow_copies_follow_every_second_update(puppets):
    assert puppets.summary["updates"] == len(puppets.rates) == 93
    expected = 0.1 * (1 - np.arange(93) / 93)
    np.testing.assert_allclose(puppets.rates, np.stack([expected, expected], axis=1))
    assert puppets.acting == list(range(2, 93, 2))
    slow_critic = slow_encoder = 0
    for n in puppets.acting:
        slow_critic += 0.3 * (n - slow_critic)
        slow_encoder += 0.6 * (n - slow_encoder)
    bias = puppets.agent.critic_target.heads[0][-1].bias
    assert bias.item() == pytest.approx(slow_critic)
    assert puppets.agent.key_encoder[0][0].bias[0].item() == pytest.approx(slow_encoder)


def test_what_is_seen_done_and_stored(puppets):
    """At random, then with noise. A stack starts anew with its episode, an episode's last frame is
    stored as its own, a time limit is no termination. Evaluation and probe have their own seeds."""
    assert puppets.seeds == {(2, 300_000), (5, 10**9), (4, 10**9), (8, 10**9 + 50_000)}
    replay, stacks = puppets.replay, puppets.agent.seen[True]
    assert replay.size == len(stacks) * 2 == 160
    actions, *past = np.split(replay.actions.reshape(80, 2, 6), 3, axis=2)
    for i, before in enumerate(past, start=1):
        expected = [actions[t - i] if t % 40 >= i else np.zeros((2, 2)) for t in range(80)]
        assert np.array_equal(before, expected)
    assert np.array_equal(np.concatenate(past, 2), np.float32(puppets.agent.past[True]))
    assert (actions[50:] == 0.5).all() and 0.5 < actions[:50].std() < 0.65
    assert np.abs(actions[:50]).max() > 0.95 and not (actions[:50] == 0.5).any()
    episodes = sprites_env.Episodes(SpritesVectorEnv(2), 300_000)
    for t in range(80):
        if t % 40 == 0:
            frames = [episodes.obs] * 3
        assert np.array_equal(stacks[t], np.concatenate(frames[-3:], axis=1))
        successors, rewards, _, truncated = episodes.step(actions[t])
        stored = replay.observations[t // 40, t % 40 : t % 40 + 2]
        assert np.array_equal(stored, [frames[-1], successors])
        frames.append(successors)
        new = slice(2 * t, 2 * t + 2)
        assert replay.rewards[new] == pytest.approx(rewards)
        assert np.array_equal(replay.terminated[new], truncated & puppets.terminal)
    mean = 0 if puppets.terminal else replay.rewards[:100].mean()
    assert replay.reward_mean == pytest.approx(mean)
    assert replay.reward_sd == pytest.approx(replay.rewards[:100].std())


def test_reports(puppets):
    """At the first update, then at every twentieth of the run: metrics of the last update, accuracy
    since the last report, the last episode of each environment, and the acting without noise."""
    rows, summary = puppets.rows, puppets.summary
    steps = [50, *range(52, 81, 4)]
    updates = [3 * (step - 49) for step in steps]
    assert [row["step"] for row in rows] == [2 * step for step in steps]
    assert [row["critic_loss"] for row in rows] == updates
    assert [row["alpha"] for row in rows] == pytest.approx([n // 2 * 2 for n in updates])
    accuracies = [(a + 1 + b) / 2 for a, b in zip([0, *updates], updates)]
    assert [row["contrastive_accuracy"] for row in rows] == pytest.approx(accuracies)
    assert summary["contrastive_accuracy"] == pytest.approx(accuracies[-1])
    returns = puppets.replay.rewards.reshape(2, 40, 2).sum(1).mean(1)
    expected = [returns[step // 80] for step in steps]
    assert [row["train_return"] for row in rows] == pytest.approx(expected)

    returns = sprites_env.evaluate(lambda obs: np.full((5, 2), -0.25), SpritesVectorEnv(5))
    assert [row["eval_return"] for row in rows] == pytest.approx([returns.mean()] * 9)
    expected = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    expected |= {"eval_episodes": 5, "score": (returns.mean() - 28.2) / 10.7}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    stacks = puppets.agent.seen[False]
    assert [len(x) for x in stacks] == [5] * 9 * 40 + [4] * 40
    for first in (0, 40, 360):  # the film's is the last
        past = [x[0].tolist() for x in puppets.agent.past[False][first : first + 3]]
        assert past == [[0] * 4, [-0.25] * 2 + [0] * 2, [-0.25] * 4]
    fresh = [(x[:, 0] == x[:, 2]).all() for x in stacks]
    assert all(fresh[::40]) and sum(fresh) == 10


def test_checkpoint_and_probe_with_the_encoder_of_the_start(puppets):
    saved = torch.load(puppets.folder / "checkpoint.pt", weights_only=True)
    assert saved.keys() == {"encoder", "actor", "step"} and saved["step"] == 160
    torch.manual_seed(3)
    args, space = curl.Args(**TINY | PUPPETS), SpritesVectorEnv().single_observation_space
    agent = curl.CURLAgent(space, 2, args, torch.device("cpu"))
    stacks, states, _ = curl.random_stacks(SpritesVectorEnv(8), 3)
    frames = agent.see(stacks).flatten(0, 1)
    for name in ("probe_r2_random_encoder", "probe_r2"):
        code = agent.encoder(frames).detach().reshape(8, -1, 5)
        expected = curl.probe(code, states)
        assert puppets.summary[name] == pytest.approx(expected, abs=2e-3)
        agent.encoder.load_state_dict(saved["encoder"])
    for name in ("encoder", "actor"):
        expected = dict(getattr(puppets.agent, name).state_dict())
        torch.testing.assert_close(saved[name], expected, rtol=0, atol=0)


def test_an_episode_that_ends_alone_is_refused(tmp_path, monkeypatch):
    """Stacks are rebuilt from episodes of equal length."""

    class Uneven(SpritesVectorEnv):
        def step(self, actions):
            obs, rewards, terminated, truncated, info = super().step(actions)
            terminated[0] = True
            return obs, rewards, terminated, truncated, {"final_obs": obs}

    monkeypatch.setattr(sprites_env, "SpritesVectorEnv", Uneven)
    with pytest.raises(SystemExit, match="error: all episodes must have 40 steps"):
        run(tmp_path, mode="state")


def test_evaluation_does_not_disturb_training(tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    actors = []
    for name, episodes in (("a", 2), ("b", 5)):
        run(tmp_path / name, mode="state", eval_episodes=episodes)
        actors.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["actor"])
    assert all(torch.equal(actors[0][name], x) for name, x in actors[1].items())


def test_the_contrastive_loss_learns_from_pixels(tmp_path, monkeypatch):
    """Seconds: 160 updates, and three of four queries find their keys among 32. Chance is 1/32, but
    the random encoder finds half of them, too."""
    no_pictures(monkeypatch)
    args = {"total_steps": 1000, "num_envs": 25, "initial_steps": 625, "updates": 10}
    args |= {"batch_size": 32, "z_dim": 50}
    summary = run(tmp_path, mode="contrastive_only", **args)
    assert summary["contrastive_accuracy"] > 0.68


def test_learns_from_states(tmp_path, monkeypatch):
    """Seconds: 28.2 is random, 31.2 needs no eyes, chasing is worth 37.95."""
    no_pictures(monkeypatch)
    args = {"total_steps": 4000, "num_envs": 25, "initial_steps": 500, "updates": 5}
    args |= {"hidden": 64, "batch_size": 64, "eval_episodes": 50}
    assert run(tmp_path, mode="state", **args)["eval_return_mean"] > 36.5


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 79}, "--total-steps must be at least 160, in rounds of 80"),
        ({"total_steps": 79, "initial_steps": 10}, "--total-steps must be at least 80"),
        ({"initial_steps": 170}, "--total-steps must be at least 240"),
        ({"frame_stack": 40}, "--frame-stack must be less than the 40"),
        ({"batch_size": 1}, "--batch-size of 2 or more"),
        ({"batch_size": 0, "mode": "rad"}, "--batch-size must be positive"),
        ({"gamma": 1.0}, "--gamma"),
        ({"tau": 1.5}, "--tau"),
        ({"encoder_tau": 1.5}, "--encoder-tau"),
        ({"alpha": 0.0}, "--alpha must be positive"),
        ({"pad": -1}, "--pad"),
        ({"past_actions": -1}, "--past-actions"),
        ({"frame_stack": 0}, "--frame-stack must be positive"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive"),
        ({"seed": -1}, "--seed"),
        ({"seed": 10_000}, "--seed"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    run(tmp_path, mode="state")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path, mode="state")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, mode="state", overwrite=True)


def test_names_and_what_is_allowed():
    args = curl.Args(mode="rad", distractors=2, seed=7)
    assert args.run_name == "rad_d2_s7" and args.frames == 3
    assert args.environment == {"distractors": 2, "observation": "image"}
    args = curl.Args(mode="state")
    assert args.environment == {"distractors": 0, "observation": "state"} and args.frames == 1
    curl.Args(mode="rad", batch_size=1, pad=0, gamma=0.0)
