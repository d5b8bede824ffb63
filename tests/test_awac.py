"""awac.py: equations by hand, updates on one batch, data, training in miniature, bad input."""

import copy
import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import awac
import sprites_env
from sprites_env import SpritesVectorEnv

TINY = {"episodes": 5, "offline_updates": 12, "total_steps": 40, "num_envs": 1, "batch_size": 8}
TINY |= {"eval_episodes": 2, "hidden": 8, "torch_threads": 1, "device": "cpu"}
COLUMN, ROW = torch.zeros(4, 1), torch.zeros(4)


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run(out, **changes):
    return awac.train(awac.Args(**TINY | changes, out=str(out)))


def no_pictures(monkeypatch):
    """They take longer than the rest of a small run. Returns the arguments of `draw_curve`."""
    drawn, figure = [], SimpleNamespace(suptitle=lambda *_, **__: None, savefig=Path.touch)
    monkeypatch.setattr(sprites_env, "draw_curve", lambda *args: drawn.append(args) or figure)
    monkeypatch.setattr(sprites_env, "save_gif", lambda path, frames: path.touch())
    return drawn


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def numbers(row):
    return {name: float(value) for name, value in row.items()}


def collect(counts, seed=3, switch_every=0):
    env = SpritesVectorEnv(sum(counts), 1, "state")
    return awac.collect_dataset(env, [n / sum(counts) for n in counts], seed, switch_every)


# --- Networks --------------------------------------------------------------------------------


def test_policy_and_critic():
    """The mean is a tanh, at first about zero; the twins differ and see features and action."""
    obs, action = torch.randn(9, 8), torch.randn(9, 2)
    policy = awac.GaussianPolicy(*awac.make_features(obs), 16, 2)
    mean, log_std = policy(obs)
    assert mean.abs().max() < 0.1 and log_std.tolist() == [0, 0]
    with torch.no_grad():
        policy.mlp[-1].weight.mul_(1000)
    expected = policy.mlp((obs - obs.mean(0)) / obs.std(0)).tanh()
    torch.testing.assert_close(policy(obs)[0], expected)

    critic = awac.ObservationCritic(*awac.make_features(obs), 16, 2)
    inputs = torch.cat([critic.features(obs), action], dim=1)
    q = critic(obs, action)
    for i in (0, 1):
        one, two, three = critic.twins.heads[i][::2]
        torch.testing.assert_close(q[i], three(two(one(inputs).relu()).relu())[:, 0])
    assert q.shape == (2, 9) and not torch.allclose(q[0], q[1])


def test_features_of_states_and_images():
    """Standardised, an image's by way of an encoder, whose signal must not vanish."""
    states, shapes = sprites_env.sample_states(np.random.default_rng(0), 50, 0)
    images = awac.to_tensor(sprites_env.draw(states[..., :2], shapes)[:, None], "cpu")
    with torch.no_grad():
        for obs, size in ((torch.from_numpy(states[:, 0, :2]), 2), (images, 64)):
            features, width = awac.make_features(obs)
            z = features(obs)
            assert width == size and z.mean(0).abs().max() < 1e-4
            assert z.std(0).max().item() == pytest.approx(1, abs=1e-4)
        encoder = features[0]
        assert encoder.convolutions(images).shape == (50, 128, 1, 1)
        assert encoder(images).std(0).mean() > 0.02  # with default weights 0.0001
        assert sum(layer.bias.abs().sum() for layer in encoder.convolutions[::2]) == 0


def test_standardize():
    """sd √2 and 0: what hardly varied, here the second column, is not blown up."""
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    layer = awac.Standardize(x)
    assert layer(x)[:, 0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert layer.sd[1].item() == pytest.approx(0.1 * math.sqrt(2) / 2)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    assert awac.Standardize(torch.full((3,), 2.0)).sd == 1  # a constant scalar


@pytest.mark.parametrize("shape", [(8,), (1, 64, 64)])
def test_every_parameter_is_in_exactly_one_optimizer(shape):
    obs = np.random.default_rng(0).integers(256, size=(12, *shape)).astype(np.uint8)
    agent = awac.AWACAgent(obs, 2, awac.Args(**TINY, learning_rate=0.5), torch.device("cpu"))
    for network, optimizer in (
        (agent.policy, agent.policy_optimizer),
        (agent.critic, agent.critic_optimizer),
    ):
        assert set(network.parameters()) == set(optimizer.param_groups[0]["params"])
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert not set(agent.policy.parameters()) & set(agent.critic.parameters())
    for slow, fast in zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(slow, fast) and slow is not fast and not slow.requires_grad
    mean = agent.policy.features[1].mean  # of what there was, scaled like what is to come
    if len(shape) == 1:
        torch.testing.assert_close(mean, torch.from_numpy(obs / 255.0).mean(0).float())


def test_acting():
    """The mean action, or one of the Gaussian, clipped to the box."""
    _, agent, (s, *_) = small()
    mean, log_std = (x.detach() for x in agent.policy(s))
    torch.manual_seed(1)
    noisy = (mean + log_std.exp() * torch.randn(16, 2)).clip(-1, 1).numpy()
    torch.manual_seed(1)
    assert np.array_equal(agent.act(s.numpy()), mean.numpy())
    np.testing.assert_allclose(agent.act(s.numpy(), noise=True), noisy, atol=1e-6)
    assert np.abs(noisy).max() == 1


# --- Equations -------------------------------------------------------------------------------


def test_closed_form_by_hand():
    """(1): three actions, π_β (.5, .3, .2), A (1, 0, -1), λ 1. The flipped sign would give
    (.179, .292, .529)."""
    behaviour, advantage = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 0.0, -1.0])
    improved = behaviour * awac.awac_weights(advantage, 1.0)
    assert (improved / improved.sum()).tolist() == pytest.approx([0.7844, 0.1731, 0.0425], abs=1e-4)


@pytest.mark.parametrize(
    ("advantage", "lam", "weighting", "expected"),
    [
        ([1, 0, -1], 1.0, "exp", [math.e, 1, 1 / math.e]),
        ([1, 0, -1], 0.5, "exp", [math.e**2, 1, math.e**-2]),
        ([1, 0.04, 0], 0.01, "exp", [100, math.e**4, 1]),  # at most 100
        ([1, 0, -1], 1.0, "softmax", [1.9957, 0.7342, 0.2701]),  # 3 exp(A) / Σ exp(A)
        ([0, 0, 0], 0.1, "exp", [1, 1, 1]),  # equal advantages are plain cloning
        ([2, 2, 2], 0.1, "softmax", [1, 1, 1]),
    ],
)
def test_weights_by_hand(advantage, lam, weighting, expected):
    advantage = torch.tensor(advantage, dtype=torch.float32, requires_grad=True)
    weights = awac.awac_weights(advantage, lam, weighting)
    assert weights.tolist() == pytest.approx(expected, rel=2e-4) and not weights.requires_grad


def test_weighted_cloning_loss_by_hand():
    """-(2 · -1 + .5 · 4) / 2 = 0, and -w / B is the gradient."""
    log_prob = torch.tensor([-1.0, 4.0], requires_grad=True)
    loss = awac.weighted_cloning_loss(log_prob, torch.tensor([2.0, 0.5]))
    loss.backward()
    assert loss.item() == 0 and log_prob.grad.tolist() == [-1, -0.25]


def test_weighted_maximum_likelihood_by_hand():
    """(2): actions (-.8, 0, .8), A (1, 0, -1), λ .5. The best Gaussian has the moments of the
    weighted data, mean -.681 and sd .319: there the loss is flat."""
    actions, advantage = torch.tensor([[-0.8], [0.0], [0.8]]), torch.tensor([1.0, 0.0, -1.0])
    mean = torch.tensor([-0.6809], requires_grad=True)
    log_std = torch.tensor([math.log(0.3190)], requires_grad=True)
    log_prob = awac.gaussian_log_prob(actions, mean.expand(3, 1), log_std)
    awac.weighted_cloning_loss(log_prob, awac.awac_weights(advantage, 0.5)).backward()
    assert max(mean.grad.abs(), log_std.grad.abs()) < 0.01


def density(x, mean, log_std):
    """Of the Gaussian, its logarithm in float64: (B, A), (B, A), (A,) -> (B,)."""
    x, mean, sd = x.double().numpy(), mean.double().numpy(), log_std.double().exp().numpy()
    return -(0.5 * ((x - mean) / sd) ** 2 + np.log(sd * math.sqrt(2 * math.pi))).sum(-1)


def test_gaussian_by_hand():
    """At the mean -ln √(2π) per dimension, -1/2 one sd off."""
    x, mean, log_std = torch.tensor([[0.0, 0], [1, 0]]), torch.zeros(2, 2), torch.zeros(2)
    log_prob = awac.gaussian_log_prob(x, mean, log_std)
    constant = -math.log(2 * math.pi)
    assert log_prob.tolist() == pytest.approx([constant, constant - 0.5])
    mean, log_std = torch.randn(2, 2), torch.tensor([0.3, -0.7])
    expected = density(x, mean, log_std)
    assert awac.gaussian_log_prob(x, mean, log_std).tolist() == pytest.approx(expected)

    mean, log_std = torch.zeros(9999, 2, requires_grad=True), log_std.requires_grad_()
    sample = awac.sample_gaussian(mean + 3, log_std)
    assert sample.mean(0).tolist() == pytest.approx([3, 3], abs=0.05)
    assert sample.std(0).log().tolist() == pytest.approx([0.3, -0.7], abs=0.05)
    grad_mean, grad_log_std = torch.autograd.grad(sample.sum(), (mean, log_std))
    assert (grad_mean == 1).all() and grad_log_std.abs().min() > 0


def test_td_target_by_hand():
    """(3): 1 + .9 * 5 for an episode that goes on; termination ends the bootstrap."""
    y = awac.td_target(torch.ones(2), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0), 0.9)
    assert y.tolist() == pytest.approx([5.5, 1.0])


def test_critic_and_actor_loss_by_hand():
    """(4): (1 + 4) / 2 + (0 + 9) / 2. (5): (.5 * -1 - 2 + .5 * 3 - 4) / 2."""
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    assert awac.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7)
    loss = awac.soft_actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(-2.5)


def test_effective_sample_size():
    """(5 + 1)^2 / (4 · 26); for lognormal weights, sd 1, e / e^2 with a large B."""
    assert awac.effective_sample_size(torch.full((8,), 3.0)).item() == pytest.approx(1)
    size = awac.effective_sample_size(torch.tensor([5.0, 1, 0, 0]))
    assert size.item() == pytest.approx(36 / 104)
    q = 0.3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    size = awac.effective_sample_size(awac.awac_weights(q, 0.3))
    assert size.item() == pytest.approx(math.exp(-1), abs=0.02)


def test_polyak():
    slow, fast = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = [0.75 * s + 0.25 * f for s, f in zip(slow.parameters(), fast.parameters())]
    awac.polyak_(slow, fast, 0.25)
    torch.testing.assert_close(list(slow.parameters()), expected)


def test_scores_by_hand():
    """5 offline updates; the dip is measured within 2,000 online steps."""
    assert awac.normalized_score(28.2) == pytest.approx(0)
    assert awac.normalized_score(37.95) == pytest.approx(100)
    scores = {1: 5.0, 5: 80.0, 505: 90.0, 2005: 65.0, 2006: 10.0, 3005: 85.0}
    rows = [{"step": step, "eval_score": score} for step, score in scores.items()]
    args = awac.Args(**TINY | {"offline_updates": 5})
    expected = {"offline_score": 80, "online_score": 85, "worst_online_dip": 15}
    assert awac.phase_scores(rows, args) == expected
    assert awac.phase_scores(rows[:2], args) == {"offline_score": 80}
    cloning = awac.Args(**TINY | {"offline_updates": 5, "algorithm": "bc"})
    assert awac.phase_scores(rows[:2], cloning) == {"offline_score": 80, "bc_score": 80}
    online = awac.Args(**TINY | {"offline_updates": 5, "algorithm": "sac"})
    assert awac.phase_scores(rows, online) == {"online_score": 85}


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda: awac.awac_weights(COLUMN, 1.0),
        lambda: awac.weighted_cloning_loss(COLUMN, ROW),
        lambda: awac.critic_loss(torch.zeros(2, 4, 1), ROW),
        lambda: awac.critic_loss(torch.zeros(2, 4), COLUMN),
        lambda: awac.soft_actor_loss(COLUMN, ROW, 1.0),
        lambda: awac.td_target(ROW, COLUMN, ROW, 0.9),
        lambda: awac.td_target(ROW, ROW, COLUMN, 0.9),
    ],
)
def test_losses_refuse_to_broadcast(broadcast):
    with pytest.raises(AssertionError):
        broadcast()


# --- Updates ---------------------------------------------------------------------------------


def small(**changes):
    """Arguments, an agent whose networks are all at places of their own, and 16 transitions."""
    args = awac.Args(**TINY | changes)
    torch.manual_seed(0)
    s, s_next = torch.randn(2, 16, 8)
    agent = awac.AWACAgent(3 * s.numpy() + 1, 2, args, torch.device("cpu"))
    with torch.no_grad():
        for network in (agent.policy, agent.critic, agent.critic_target):
            for p in network.parameters():
                p.add_(0.3 * torch.randn_like(p))
        agent.policy.log_std.copy_(torch.tensor([-0.2, -0.9]))
    a, terminated = 2 * torch.rand(16, 2) - 1, (torch.arange(16) % 3 == 0).float()
    return args, agent, (s, a, torch.randn(16), s_next, terminated)


def check_step(loss, optimizer, update, still):
    """From stale gradients, `update` takes one step of Adam down `loss`, and leaves the parameters
    of the networks `still` alone. Returns what it returns."""
    moving = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, moving)
    still = [p for network in still for p in network.parameters()]
    before = [p.detach().clone() for p in (*moving, *still)]
    for p in moving:
        p.grad = torch.full_like(p, 9.0)
    torch.manual_seed(1)
    result = update()
    for p, old, gradient in zip(moving, before, gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
        clear, step = gradient.abs() > 1e-4, optimizer.param_groups[0]["lr"] * gradient.sign()
        assert clear.any()
        torch.testing.assert_close(p.detach()[clear], (old - step)[clear], rtol=0, atol=1e-5)
    assert all(torch.equal(p, old) for p, old in zip(still, before[len(moving) :]))
    return result


def smaller(q):
    return np.minimum(*q.detach().double().numpy())


@pytest.mark.parametrize("algorithm", ["awac", "sac_from_buffer"])
def test_update_critic(algorithm):
    """Towards (3), from the slow copy, which then follows; the policy gets no gradient."""
    args, agent, batch = small(algorithm=algorithm, gamma=0.5, tau=0.3, alpha=0.2)
    s, a, r, s_next, terminated = batch
    torch.manual_seed(1)
    mean, log_std = (x.detach() for x in agent.policy(s_next))
    a_next = mean + log_std.exp() * torch.randn(16, 2)
    value = smaller(agent.critic_target(s_next, a_next.clip(-1, 1)))
    if algorithm != "awac":
        value -= 0.2 * density(a_next, mean, log_std)
    y = torch.from_numpy(r.numpy() + 0.5 * np.where(terminated, 0, value)).float()
    q, slow = agent.critic(s, a), copy.deepcopy(agent.critic_target)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()

    def update():
        return awac.update_critic(agent, batch, args)

    metrics = check_step(loss, agent.critic_optimizer, update, [agent.policy])
    assert metrics["q"].item() == pytest.approx(q.mean().item(), rel=1e-5)
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert not any(metric.requires_grad for metric in metrics.values())
    networks = agent.critic_target, slow, agent.critic
    for p, old, trained in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(p, 0.7 * old + 0.3 * trained)
    unmoved = (*agent.policy.parameters(), *agent.critic_target.parameters())
    assert all(p.grad is None for p in unmoved)


@pytest.mark.parametrize("weighting", ["exp", "softmax"])
@pytest.mark.parametrize("algorithm", ["awac", "bc", "filtered_bc"])
def test_update_policy(algorithm, weighting):
    """Maximum likelihood with the weights (1), from the present critic; with cloning all are 1."""
    args, agent, batch = small(algorithm=algorithm, weighting=weighting, lam=0.7)
    s, a, *_ = batch
    mean, log_std = agent.policy(s)
    advantage = smaller(agent.critic(s, a)) - smaller(agent.critic(s, mean))
    weights = np.minimum(np.exp(advantage / 0.7), 100)
    if weighting == "softmax":
        weights = 16 * np.exp(advantage / 0.7) / np.exp(advantage / 0.7).sum()
    weights = weights if algorithm == "awac" else np.ones(16)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a).sum(1)
    loss = -(torch.from_numpy(weights).float() * log_prob).mean()

    def update():
        return awac.update_policy(agent, batch, args)

    still = [agent.critic, agent.critic_target]
    metrics = check_step(loss, agent.policy_optimizer, update, still)
    expected = {"policy_loss": loss.item()}
    if algorithm == "awac":
        size = weights.sum() ** 2 / (16 * (weights**2).sum())
        expected |= {"sample_size": size, "advantage_sd": advantage.std(ddof=1)}
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert not metrics["policy_loss"].requires_grad
    assert all(p.grad is None for network in still for p in network.parameters())


def test_update_soft_policy():
    """Up the smaller Q of the present critic, by way of the actions: (5)."""
    args, agent, batch = small(algorithm="sac", alpha=0.2)
    s = batch[0]
    torch.manual_seed(1)
    mean, log_std = agent.policy(s)
    a_new = mean + log_std.exp() * torch.randn(16, 2)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(a_new).sum(1)
    q = torch.minimum(*agent.critic(s, a_new.clip(-1, 1)))
    loss = (0.2 * log_prob - q).mean()

    def update():
        return awac.update_soft_policy(agent, batch, args)

    still = [agent.critic, agent.critic_target]
    metrics = check_step(loss, agent.policy_optimizer, update, still)
    assert metrics.keys() == {"policy_loss"} and not metrics["policy_loss"].requires_grad
    assert metrics["policy_loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("bound", [-6, 0])
def test_sigma_stays_in_its_range_and_can_leave_the_bounds(bound):
    outward, inward = (-1, 1) if bound == 0 else (1, -1)
    _, agent, _ = small(learning_rate=0.1)
    log_std = agent.policy.log_std
    torch.nn.init.constant_(log_std, bound)
    awac.step_policy(agent, (torch.tensor([outward, inward]) * log_std).sum())
    assert log_std[0] == bound and abs(log_std[1].item() - bound) == pytest.approx(0.1)


@pytest.mark.parametrize("algorithm", awac.Algorithm.__args__)
def test_update_is_critic_then_policy(algorithm):
    args, agent, batch = small(algorithm=algorithm)
    other = copy.deepcopy(agent)
    torch.manual_seed(1)
    metrics = awac.update(agent, batch, args)
    torch.manual_seed(1)
    expected = {} if "bc" in algorithm else awac.update_critic(other, batch, args)
    soft = algorithm in ("sac", "sac_from_buffer")
    improve = awac.update_soft_policy if soft else awac.update_policy
    assert metrics == expected | improve(other, batch, args)
    for name in ("policy", "critic", "critic_target"):
        expected = getattr(other, name).state_dict()
        assert all(
            torch.equal(p, expected[k]) for k, p in getattr(agent, name).state_dict().items()
        )


# --- Data ------------------------------------------------------------------------------------


def check_dynamics(data):
    """Successors and rewards are those of the environment, also where an episode ends."""
    states = (
        data["observations"].astype(np.float64).reshape(-1, data["observations"].shape[1] // 4, 4)
    )
    after = sprites_env.act(states, data["actions"])
    np.testing.assert_allclose(after.reshape(len(states), -1), data["next_observations"], atol=1e-5)
    np.testing.assert_allclose(data["rewards"], sprites_env.reward(after), atol=1e-5)


def test_dataset_is_what_the_behaviours_did():
    data = collect((2, 3, 1))
    shapes = {name: (column.shape, column.dtype) for name, column in data.items()}
    assert tuple(shapes) == awac.COLUMNS
    assert shapes["observations"] == shapes["next_observations"] == ((240, 12), np.float32)
    assert shapes["actions"] == ((240, 2), np.float32)
    assert shapes["rewards"] == ((240,), np.float32)
    assert not data["terminated"].any()
    assert np.flatnonzero(data["truncated"]).tolist() == [39, 79, 119, 159, 199, 239]
    check_dynamics(data)
    within = np.flatnonzero(~data["truncated"])
    assert np.array_equal(data["next_observations"][within], data["observations"][within + 1])
    states = data["observations"].astype(np.float64).reshape(6, 40, 3, 4)
    actions = data["actions"].reshape(6, 40, 2)
    for episode, goal in enumerate((1, 1, 2, 2, 2)):  # the target, the first distractor
        expected = sprites_env.toward(states[episode], states[episode, :, goal, :2])
        np.testing.assert_allclose(actions[episode], expected, atol=1e-5)
    assert abs(actions[5].mean()) < 0.2 and 0.5 < actions[5].std() < 0.65  # uniform: .577
    start = SpritesVectorEnv(6, 1, "state").reset(seed=3)[0]
    assert np.array_equal(data["observations"][::40], start)
    others = collect((2, 3, 1), seed=4)["actions"].reshape(6, 40, 2)
    assert not np.array_equal(others[5], actions[5])


def test_behaviours_that_change_within_an_episode():
    """Of 60 episodes about a third chase the target in each stretch of seven steps; who does is
    drawn anew for the next. The mixture's last share is 0: nobody acts at random."""
    data = collect((20, 40, 0), switch_every=7)
    check_dynamics(data)
    states = data["observations"].astype(np.float64).reshape(-1, 3, 4)
    goals = (sprites_env.toward(states, states[:, k, :2]) for k in (1, 2))
    off = [np.abs(data["actions"] - goal).max(1).reshape(60, 40) for goal in goals]
    chases, follows = off[0] < 1e-5, off[1] < 1e-5
    assert (chases | follows).all()
    sure = chases != follows  # elsewhere both do the same
    assert chases[sure].mean() == pytest.approx(1 / 3, abs=0.06)
    for t in range(1, 40):
        both = sure[:, t] & sure[:, t - 1]
        changed = (chases[both, t] != chases[both, t - 1]).mean()
        assert changed > 0.2 if t % 7 == 0 else changed == 0


def test_mixture_gives_the_stated_returns():
    """Chasing is worth 37.95, following a distractor or nothing about 28.3."""
    returns = collect((100, 150, 150))["rewards"].reshape(400, 40).sum(1)
    assert returns[:100].mean() == pytest.approx(37.9, abs=0.4)
    assert returns[100:].mean() == pytest.approx(28.3, abs=1.0)


def test_best_episodes():
    """Returns 3, 5, 4, 4: whole episodes, in their order, the earlier of equals, at least one."""
    data = {"rewards": np.array([1, 2, 5, 0, 0, 4, 4], np.float32), "x": np.arange(7)}
    data["terminated"] = np.array([0, 1, 0, 0, 1, 0, 0], bool)
    data["truncated"] = np.array([0, 0, 0, 0, 0, 1, 1], bool)
    for share, expected in ((0.01, [2, 3, 4]), (0.5, [2, 3, 4, 5]), (0.75, [2, 3, 4, 5, 6])):
        best = awac.best_episodes(data, share)
        assert best["x"].tolist() == expected and best.keys() == data.keys()
        assert best["rewards"].tolist() == data["rewards"][expected].tolist()


def test_replay_keeps_the_data_and_adds_to_it():
    """40 transitions of a dataset, 30 added; of these 70 a batch is drawn, with replacement."""
    data = collect((1, 1, 0))
    data["terminated"][::7] = True
    replay = awac.Replay({name: column[:40] for name, column in data.items()}, room=80)
    for new in (slice(40, 50), slice(50, 70)):
        replay.add(*(column[new] for column in data.values()))
    assert replay.size == 70
    for name, column in data.items():
        assert np.array_equal(replay.columns[name][:70], column[:70])
        assert replay.columns[name].shape == (120, *column.shape[1:])
        assert replay.columns[name].dtype == column.dtype
    batch = replay.sample(np.random.default_rng(0), 999, torch.device("cpu"))
    s, a, r, s_next, terminated = (x.numpy() for x in batch)
    rows = [np.flatnonzero((data["observations"] == x).all(1))[0] for x in s]
    assert set(rows) == set(range(70))  # all of them, and nothing of the empty room
    for name, x in (("actions", a), ("rewards", r), ("next_observations", s_next)):
        assert np.array_equal(x, data[name][rows])
    assert np.array_equal(terminated, data["terminated"][rows]) and terminated.dtype == np.float32


def test_to_tensor():
    frames = np.array([0, 51, 255], np.uint8)
    assert awac.to_tensor(frames, "cpu").tolist() == pytest.approx([0, 0.2, 1])
    assert frames.tolist() == [0, 51, 255]  # the caller's own are left alone
    x = awac.to_tensor(np.array([True, False]), "cpu")
    assert x.tolist() == [1, 0] and x.dtype == torch.float32


def test_save_and_load(tmp_path, monkeypatch):
    """A run saves its data; one that loads them learns the same."""
    no_pictures(monkeypatch)
    path = tmp_path / "data.npz"
    run(tmp_path / "a", save_dataset=str(path))
    env = SpritesVectorEnv(1, 1, "state")
    loaded = awac.load_dataset(path, env.single_observation_space, env.single_action_space)
    for name, column in collect((1, 2, 2), seed=100_000).items():
        assert np.array_equal(loaded[name], column) and loaded[name].dtype == column.dtype
    run(tmp_path / "b", dataset=str(path))
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="exists"):
        run(tmp_path / "c", save_dataset=str(path))
    with pytest.raises(SystemExit, match="cannot write"):
        run(tmp_path / "c", save_dataset=str(tmp_path / "nowhere" / "data.npz"))
    assert sorted(tmp_path.iterdir()) == files
    awac.Args(save_dataset=str(path), overwrite=True)


# --- Training --------------------------------------------------------------------------------


class Terminal(SpritesVectorEnv):
    """Its episodes end in a final state, not at a time limit."""

    def step(self, actions):
        obs, rewards, terminated, truncated, info = super().step(actions)
        return obs, rewards, truncated, terminated, info


def counted_updates(monkeypatch, replay):
    """Updates that do nothing; the size of batch and replay at each."""
    sizes = []

    def update(agent, batch, args):
        sizes.append((len(batch[0]), replay.size))
        return {"updates": len(sizes)}

    monkeypatch.setattr(awac, "update", update)
    return sizes


def test_learn_offline(monkeypatch):
    """25 updates, reported at the first and at every tenth of them, upwards."""
    replay, reports = awac.Replay(collect((1, 1, 0)), room=0), []
    sizes = counted_updates(monkeypatch, replay)
    args, agent, _ = small(offline_updates=25)
    rng = np.random.default_rng(0)
    awac.learn_offline(agent, replay, rng, lambda *x: reports.append(x), args)
    assert sizes == [(8, 80)] * 25
    expected = [1, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert reports == [(step, {"updates": step}) for step in expected]


@pytest.mark.parametrize(("environment", "offline"), [(SpritesVectorEnv, 20), (Terminal, 0)])
def test_learn_online(monkeypatch, environment, offline):
    """Two rounds of 1,000 steps: what was executed joins the data, with the last state of an
    episode as its successor, then come as many updates. A time limit is no termination."""
    options = {"num_envs": 50, "total_steps": 2_999, "offline_updates": offline}
    args, agent, _ = small(**options, distractors=0, mixture=(1, 0, 0))
    data = collect((1, 1, 0))
    data = {k: column[:10, :8] if "obs" in k else column[:10] for k, column in data.items()}
    replay, reports = awac.Replay(data, room=2000), []
    sizes = counted_updates(monkeypatch, replay)
    episodes = sprites_env.Episodes(environment(50, 0, "state", horizon=20), 7)
    rng = np.random.default_rng(0)
    torch.manual_seed(1)
    awac.learn_online(agent, replay, episodes, rng, lambda *x: reports.append(x), args)
    assert sizes == [(8, 1010)] * 1000 + [(8, 2010)] * 1000
    expected = [1] * (offline == 0) + [500, 1000, 1500, 2000]
    assert reports == [(offline + step, {"updates": step}) for step in expected]

    new = {name: column[10:] for name, column in replay.columns.items()}
    check_dynamics(new)
    new = {name: column.reshape(40, 50, *column.shape[1:]) for name, column in new.items()}
    obs, successors = new["observations"], new["next_observations"]
    assert np.array_equal(obs[0], environment(50, 0, "state").reset(seed=7)[0])
    torch.manual_seed(1)
    assert np.array_equal(new["actions"], [agent.act(x, noise=True) for x in obs])
    same = (obs[1:] == successors[:-1]).all((1, 2))
    assert same.tolist() == [t != 19 for t in range(39)]
    ended = np.repeat([t % 20 == 19 for t in range(40)], 50).reshape(40, 50)
    assert np.array_equal(new["terminated"], ended & (environment is Terminal))
    assert np.array_equal(new["truncated"], ended & (environment is SpritesVectorEnv))


def test_what_the_critic_promises_and_what_comes():
    """The smaller of the twins at the first step, and discounted rewards until the horizon."""
    _, agent, _ = small()
    env = SpritesVectorEnv(7, 0, "state", horizon=3)
    obs, _ = env.reset(seed=10**9)
    action = agent.act(obs)
    q = agent.critic(torch.from_numpy(obs), torch.from_numpy(action))
    found = awac.promised_and_earned(agent, env, gamma=0.5)
    assert found["promised"] == pytest.approx(smaller(q).mean(), rel=1e-5)
    obs, _ = env.reset(seed=10**9)
    expected = 0
    for t in range(3):
        obs, reward, *_ = env.step(agent.act(obs))
        expected += 0.5**t * reward.mean()
    assert found["earned"] == pytest.approx(expected, rel=1e-6)


VARIANTS = [{"algorithm": name} for name in awac.Algorithm.__args__]
VARIANTS += [{"weighting": "softmax", "switch_every": 3}]
VARIANTS += [{"observation": "image", "offline_updates": 2, "episodes": 3, "batch_size": 2}]
VARIANTS += [{"distractors": 0, "mixture": (0.5, 0.0, 0.5)}]
VARIANTS += [{"offline_updates": 0}, {"total_steps": 0}]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "_".join(map(str, x.values())))
def test_runs_and_is_deterministic(tmp_path, monkeypatch, changes):
    summary = run(tmp_path / "a", **changes)
    no_pictures(monkeypatch)
    again = run(tmp_path / "b", **changes)
    assert summary | {"minutes": 0} == again | {"minutes": 0}
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    args = awac.Args(**TINY | changes)
    offline, cloning = args.updates_offline, "bc" in args.algorithm
    online = 0 if cloning else args.total_steps
    expected = {"eval_return_mean", "eval_return_std", "eval_episodes", "score", "minutes"}
    expected |= {"offline_score"} if offline else set()
    expected |= {"online_score"} if online else set()
    expected |= {"worst_online_dip"} if offline and online else set()
    expected |= {"bc_score"} if cloning else set()
    assert summary.keys() == expected | {"updates"} and summary["updates"] == offline + online
    files = {"args.json", "checkpoint.pt", "curve.csv", "curve.png", "rollout.gif", "summary.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert all((tmp_path / "a" / name).stat().st_size > 100 for name in files)


class Watched(awac.Replay):
    """It can be looked at after a run, like the agent below."""

    def __init__(self, data, room):
        super().__init__(data, room)
        Watched.last, self.offline = self, self.size


class WatchedAgent(awac.AWACAgent):
    def __init__(self, *args):
        super().__init__(*args)
        WatchedAgent.last = self


def test_what_a_run_stores_and_reports(tmp_path, monkeypatch):
    """Data, online episodes and evaluation have seeds of their own. Numbers are computed again from
    what was stored, and from the networks at the end."""
    seeds, reset, drawn = set(), SpritesVectorEnv.reset, no_pictures(monkeypatch)

    def watched(env, seed=None, options=None):
        seeds.add((env.num_envs, seed))
        return reset(env, seed=seed)

    monkeypatch.setattr(SpritesVectorEnv, "reset", watched)
    monkeypatch.setattr(awac, "Replay", Watched)
    monkeypatch.setattr(awac, "AWACAgent", WatchedAgent)
    changes = {"episodes": 50, "num_envs": 3, "total_steps": 300, "seed": 3, "eval_episodes": 6}
    summary = run(tmp_path, **changes, switch_every=9)
    assert seeds == {(50, 300_000), (3, 350_000), (6, 10**9), (4, 10**9)}
    columns, data = Watched.last.columns, collect((10, 20, 20), 300_000, switch_every=9)
    assert Watched.last.size == len(columns["rewards"]) == 2240
    for name, column in data.items():
        assert np.array_equal(columns[name][:2000], column)

    agent, some = WatchedAgent.last, data["observations"][::3]  # about a thousand of them
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.keys() == {"policy", "critic", "update"}
    for name in ("policy", "critic"):
        network = getattr(agent, name)
        torch.testing.assert_close(saved[name], dict(network.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(network.features[1].mean, torch.from_numpy(some.mean(0)))
    returns = sprites_env.evaluate(agent.act, SpritesVectorEnv(6, 1, "state"))
    expected = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    expected |= {"eval_episodes": 6, "score": (returns.mean() - 28.2) / 10.7}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)

    rows = [numbers(row) for row in untimed_rows(tmp_path)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 252]
    assert saved["update"] == 252
    assert [row["online_step"] for row in rows] == [0] * 11 + [240]
    assert all(math.isnan(row["train_return"]) for row in rows[:-1])
    online = columns["rewards"][2000:].reshape(2, 40, 3).sum(1)
    sd = saved["policy"]["log_std"].exp().mean().item()
    expected = {"eval_return": returns.mean(), "eval_score": (returns.mean() - 28.2) / 0.0975}
    expected |= {"train_return": online[1].mean(), "action_sd": sd}
    expected |= awac.promised_and_earned(agent, SpritesVectorEnv(6, 1, "state"), 0.9)
    assert {name: rows[-1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert rows[-1].keys() == set(curve_columns())
    scores = {"offline_score": rows[10]["eval_score"], "online_score": rows[11]["eval_score"]}
    assert {name: summary[name] for name in scores} == pytest.approx(scores)
    (drawn_rows, panels, *_, offline), *_ = drawn
    assert len(drawn_rows) == 12 and offline == 12
    assert [columns for _, columns in panels] == [("train_return", "eval_return")]


def curve_columns():
    """As the docstring has them."""
    text = awac.__doc__.split("Columns of curve.csv:")[1].split("\n\n")[0]
    return {name for name in text.split("`")[1::2] if "second" not in name}


@pytest.mark.parametrize(("algorithm", "rows"), [("filtered_bc", 40), ("sac", 0)])
def test_which_data_an_algorithm_gets(tmp_path, monkeypatch, algorithm, rows):
    """The best tenth of ten episodes, and nothing; the statistics are those of all."""
    no_pictures(monkeypatch)
    monkeypatch.setattr(awac, "Replay", Watched)
    run(tmp_path, algorithm=algorithm, episodes=10)
    data = collect((2, 4, 4), seed=100_000)
    assert Watched.last.offline == rows
    best = data["rewards"].reshape(10, 40).sum(1).argmax()
    expected = data["actions"].reshape(10, 40, 2)[best][:rows]
    assert np.array_equal(Watched.last.columns["actions"][:rows], expected)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["policy"]
    torch.testing.assert_close(
        saved["features.1.mean"], torch.from_numpy(data["observations"].mean(0))
    )
    final = untimed_rows(tmp_path)[-1]
    assert int(final["online_step"]) == (40 if algorithm == "sac" else 0)


def test_evaluation_does_not_disturb_training(tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    checkpoints = []
    for name, episodes in (("a", 2), ("b", 5)):
        run(tmp_path / name, eval_episodes=episodes)
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        checkpoints.append(saved["policy"] | saved["critic"])
    assert all(torch.equal(checkpoints[0][name], x) for name, x in checkpoints[1].items())


@pytest.mark.parametrize(
    ("algorithm", "updates", "least"),
    [("awac", 1500, 90), ("filtered_bc", 500, 90), ("sac_from_buffer", 1500, 80)],
)
def test_learns_from_the_default_mixture(tmp_path, monkeypatch, algorithm, updates, least):
    """Seconds. Plain cloning reaches about 20, and the flipped sign less."""
    no_pictures(monkeypatch)
    options = {"batch_size": 128, "hidden": 64, "learning_rate": 2e-3, "episodes": 500}
    options |= {"total_steps": 0, "eval_episodes": 100, "offline_updates": updates}
    summary = run(tmp_path, algorithm=algorithm, **options)
    assert summary["offline_score"] > least


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 0.0}, "--lam must be positive"),
        ({"alpha": -1.0}, "--alpha must be 0 or more"),
        ({"learning_rate": math.inf}, "--learning-rate must be"),
        ({"tau": 1.1}, "--tau"),
        ({"mixture": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"mixture": (1.5, -0.5, 0.0)}, "--mixture must be 0 or more"),
        ({"mixture": (math.nan, 0.0, 0.0)}, "--mixture must be 0 or more"),
        ({"total_steps": 39}, "--total-steps must be 0 or at least 40"),
        ({"total_steps": 79, "num_envs": 2}, "--total-steps must be 0 or at least 80"),
        ({"distractors": 0}, "nobody can follow one"),
        ({"gamma": 1.0}, "--gamma"),
        ({"algorithm": "bc", "offline_updates": 0}, "leave nothing to do"),
        ({"algorithm": "sac", "total_steps": 0}, "leave nothing to do"),
        ({"offline_updates": 0, "total_steps": 0}, "leave nothing to do"),
        ({"dataset": "missing.npz"}, "missing.npz"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rewards"), "rewards is not a file in the archive; needed are"),
        (lambda d: d.update(terminated=d["terminated"].astype(float)), "terminated is of type"),
        (lambda d: d.update(rewards=np.float32(3)), "has shape"),
        (lambda d: d.update(rewards=d["rewards"].astype(str)), "rewards is of type"),
        (lambda d: d.update(rewards=d["rewards"].astype(object)), "is no .npz of arrays"),
        (lambda d: d.update(actions=2 * d["actions"]), "actions must be in"),
        (lambda d: d["rewards"].fill(np.nan), "not finite"),
        (lambda d: d.update(rewards=np.full(80, 1e300)), "not finite"),
        (lambda d: d.update(observations=d["observations"][:, :8]), "has shape (80, 8), not"),
        (lambda d: d.update(terminated=d["terminated"][:-1]), "terminated has shape"),
        (lambda d: d.update({k: v[:1] for k, v in d.items()}), "fewer than two"),
    ],
)
def test_bad_datasets(tmp_path, change, message):
    data = collect((1, 1, 0))
    change(data)
    np.savez(tmp_path / "data.npz", **data)
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", dataset=str(tmp_path / "data.npz"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    run(tmp_path, total_steps=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path, total_steps=0)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, total_steps=0, overwrite=True)


def test_names_and_what_needs_no_distractor():
    assert awac.Args().run_name == "awac_d1_s1"
    args = awac.Args(algorithm="bc", observation="image", distractors=2, seed=7)
    assert args.run_name == "bc_image_d2_s7"
    assert args.environment == {"distractors": 2, "observation": "image"}
    awac.Args(distractors=0, mixture=(0.5, 0, 0.5))
    awac.Args(distractors=0, dataset="of_others.npz")
