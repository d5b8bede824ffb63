"""rig_td3.py: equations by hand, networks, updates, data, the story of a run, learning, bad input.

Numbers that a test compares with are worked by hand or in plain numpy (float64)."""

import contextlib
import csv
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import rig_td3
import sprites_env
from rig_td3 import Args

TINY = {"images": 100, "vae_updates": 4, "total_steps": 120, "num_envs": 1, "batch_size": 8}
TINY |= {"finetune_every": 2, "finetune_updates": 2, "eval_episodes": 3, "torch_threads": 1}
TINY |= {"device": "cpu"}
IMAGE = sprites_env.SpritesVectorEnv(1).single_observation_space


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run(out, **changes):
    return rig_td3.train(Args(**TINY | changes, out=str(out)))


def without_pictures(patch):
    for name in ("draw_reached", "draw_imagination"):
        patch.setattr(rig_td3, name, lambda *args: None)
    patch.setattr(sprites_env, "draw_curve", lambda *args: Figure(figsize=(1, 1)))


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def close(actual, expected, atol=1e-5):
    """Equal within `atol`, and of the same shape."""
    actual, expected = (np.asarray(torch.as_tensor(x).detach()) for x in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=1e-5)


def snapshot(*networks):
    """Copies of all parameters, one list per network."""
    return [[p.detach().clone() for p in network.parameters()] for network in networks]


def moved(before, *networks):
    """For each network, whether each of its parameters differs from the snapshot, or none does."""
    answers = []
    for old, network in zip(before, networks):
        changed = {not torch.equal(a, b) for a, b in zip(old, network.parameters())}
        assert len(changed) == 1
        answers.append(changed.pop())
    return answers


def gradients_do_not_pile_up(update, optimizer, network):
    """A second time with the same noise and, as nothing is learnt, the same network: the same."""
    optimizer.param_groups[0]["lr"] = 0.0
    seen = []
    for _ in range(2):
        torch.manual_seed(1)
        update()
        seen.append([p.grad.clone() for p in network.parameters()])
    for first, second in zip(*seen):
        assert first.abs().sum() > 0
        close(second, first, atol=1e-7)


def numpy_mlp(layers, x):
    """A multilayer perceptron in float64."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            x = x @ weight.T + bias
        else:
            assert isinstance(layer, torch.nn.ReLU)
            x = np.maximum(x, 0)
    return x


# --- Arguments -------------------------------------------------------------------------------


def test_defaults_depend_on_the_task():
    reach, push = Args(), Args(task="push", goals="oracle", distractors=2, seed=7)
    assert (reach.total_steps, reach.gamma, reach.moved) == (20_000, 0.9, 1)
    assert (push.total_steps, push.gamma, push.moved) == (100_000, 0.98, 2)
    near = Args(task="push", gamma=0.0, total_steps=400)
    assert (near.gamma, near.total_steps) == (0, 400)
    assert reach.environment == {"task": "reach", "distractors": 0, "observation": "image"}
    assert push.environment == {"task": "push", "distractors": 2, "observation": "state"}
    assert push.run_name == "push_oracle_d2_s7"
    assert Args(goals="pixel").environment == reach.environment
    env = rig_td3.make_env(push, 3, horizon=9)
    assert (env.num_envs, env.horizon, env.task) == (3, 9, "push")
    assert (env.distractors, env.observation) == (2, "state")
    assert reach.learning_rate == 2e-3
    assert (rig_td3.RANDOM_STEPS, rig_td3.REPORT_EVERY) == (800, 2000)  # as the docstring says


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal_fractions": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"goal_fractions": (0.2, 0.4, 0.3)}, "add up to 1"),
        ({"goal_fractions": (1.5, -0.5, 0.0)}, "--goal-fractions must be 0 or more"),
        ({"goal_fractions": (math.nan, 0.5, 0.5)}, "--goal-fractions must be"),
        ({"total_steps": 39}, "--total-steps must be at least 40"),
        ({"total_steps": 119, "num_envs": 3}, "--total-steps must be at least 120"),
        ({"total_steps": 0}, "--total-steps must be positive"),
        ({"finetune_every": -1}, "--finetune-every must be 0 or more"),
        ({"gamma": 1.0}, "--gamma must be below 1"),
        ({"gamma": -0.1}, "--gamma must be 0 or more"),
        ({"tau": 1.1}, "--tau not above"),
        ({"tau": 0.0}, "--tau must be positive"),
        ({"beta": 0.0}, "--beta must be positive"),
        ({"noise": math.inf}, "--noise must be"),
        ({"images": 9}, "--images must be at least 10"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"seed": 10_000}, "--seed must be in 0 ... 9999"),
    ],
    ids=lambda x: x if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_extreme_input_is_taken():
    Args(gamma=0.0, tau=1.0, noise=0.0, finetune_every=0, finetune_updates=0, images=10, seed=0)
    Args(total_steps=400, goal_fractions=(0.0, 0.0, 1.0), seed=9999)


# --- Equations -------------------------------------------------------------------------------


def test_kl_by_hand():
    """mu (1, 0), variance (1, .25): (1 + 1 - 0 - 1) / 2 + (0 + .25 + ln 4 - 1) / 2 = .8181."""
    mean = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    log_var = torch.tensor([[0.0, math.log(0.25)], [0.0, 0.0]])
    close(rig_td3.kl_divergence(mean, log_var), torch.tensor([0.8181, 0.0]), atol=1e-4)
    p, q = torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0, 1)
    expected = torch.distributions.kl_divergence(p, q).sum(-1)
    close(rig_td3.kl_divergence(mean, log_var), expected)


def test_vae_loss_sums_over_pixels():
    """An agent of 50 pixels that is missed (logit -3 everywhere): each costs 3 more than if it were
    black, so the image 150; KL .8181 counts beta times; mean over images."""
    mean, log_var = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, math.log(0.25)]] * 2)
    logits, frames = torch.full((2, 1, 64, 64), -3.0), torch.zeros(2, 1, 64, 64)
    empty = 4096 * math.log1p(math.exp(-3)) + 2 * 0.8181
    loss = rig_td3.vae_loss(logits, frames, mean, log_var, 2)
    assert loss.item() == pytest.approx(empty, abs=0.01)
    frames[0].view(-1)[:50] = 1
    loss = rig_td3.vae_loss(logits, frames, mean, log_var, 2)
    assert loss.item() == pytest.approx(empty + 150 / 2, abs=0.01)


def test_prior_by_hand():
    """{0, 2} has mean 1 and standard deviation 1; a dimension asleep stays asleep."""
    mean, sd = prior = rig_td3.fit_prior(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    assert mean.tolist() == [1, 5] and sd.tolist() == [1, 0]
    goals = rig_td3.imagine((mean, 3 * sd), 20_000)
    assert goals.shape == (20_000, 2) and (goals[:, 1] == 5).all()
    assert goals[:, 0].mean().item() == pytest.approx(1, abs=0.1)
    assert goals[:, 0].std().item() == pytest.approx(3, abs=0.1)
    assert rig_td3.imagine(prior, 1)[0, 0] != rig_td3.imagine(prior, 1)[0, 0]


def test_reward_is_the_distance_not_squared():
    """From (3, 4) to the origin -5."""
    reached, goal = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert rig_td3.goal_reward(reached, goal).tolist() == [-5, 0]


def test_relabel_by_hand():
    """0 practised, 1 prior, 2 future; each row from its own place."""
    practised, prior, future = (10 * i + torch.arange(6.0).view(3, 2) for i in range(3))
    chosen = rig_td3.relabel(practised, prior, future, torch.tensor([2, 0, 1]))
    assert chosen.tolist() == [[20, 21], [2, 3], [14, 15]]


def test_smoothed_action_by_hand():
    """Noise .9 counts as .5, and the action stays in the box."""
    action = torch.tensor([[0.2, 0.8, -1.0, 0.0]])
    noise = torch.tensor([[0.9, 0.4, -0.1, -0.7]])
    close(rig_td3.smoothed(action, noise), torch.tensor([[0.7, 1.0, -1.0, -0.5]]))


def test_td_target_by_hand():
    """1 + .9 * 5 for an episode that goes on; termination ends the bootstrap."""
    r, terminated, value = torch.ones(2), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0)
    close(rig_td3.td_target(r, terminated, value, 0.9), torch.tensor([5.5, 1.0]))


def test_critic_loss_by_hand():
    """Errors (1, -2) and (0, 3): (1 + 4) / 2 + (0 + 9) / 2 = 7."""
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    assert rig_td3.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7)


def test_actor_loss_by_hand():
    """The first critic counts, and what is better has the smaller loss."""
    q = torch.tensor([[2.0, 4.0, 0.0], [9.0, 9.0, 9.0]])
    assert rig_td3.deterministic_actor_loss(q).item() == pytest.approx(-2)


def test_polyak_by_hand():
    """From 1 a tenth of the way to 3."""
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for network, value in ((slow, 1.0), (fast, 3.0)):
        for p in network.parameters():
            torch.nn.init.constant_(p, value)
    rig_td3.polyak_(slow, fast, 0.1)
    assert [p.item() for p in slow.parameters()] == pytest.approx([1.2, 1.2])
    assert [p.item() for p in fast.parameters()] == [3, 3]


@pytest.mark.parametrize(
    ("f", "shapes", "more"),
    [
        (rig_td3.goal_reward, [(4, 2), (2,)], []),
        (rig_td3.relabel, [(4, 1), (4, 1), (4,)], [torch.zeros(4, dtype=int)]),
        (rig_td3.relabel, [(4, 1), (1,), (4, 1)], [torch.zeros(4, dtype=int)]),
        (rig_td3.vae_loss, [(4,), (4, 1), (4, 1), (4, 1)], [1.0]),
        (rig_td3.critic_loss, [(2, 4, 1), (4,)], []),
        (rig_td3.critic_loss, [(1, 4), (4,)], []),
        (rig_td3.deterministic_actor_loss, [(4, 2)], []),
        (rig_td3.td_target, [(4,), (4, 1), (4,)], [0.9]),
        (rig_td3.td_target, [(4,), (4,), (4, 1)], [0.9]),
    ],
)
def test_losses_refuse_to_broadcast(f, shapes, more):
    with pytest.raises(AssertionError):
        f(*map(torch.zeros, shapes), *more)


# --- Networks --------------------------------------------------------------------------------


def is_orthogonal(weight, gain):
    w = weight.detach().flatten(1).double()
    w = w if len(w) <= w.shape[1] else w.T
    close(w @ w.T, gain**2 * torch.eye(len(w)).double())


def test_encoder():
    """Three convolutions, each halving the side, then a linear map; all noise at first."""
    encoder, frames = rig_td3.GridEncoder(6), torch.rand(2, 1, 64, 64)
    sides, x = [], frames
    for conv in encoder.convolutions[::2]:
        is_orthogonal(conv.weight, math.sqrt(2))
        x = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).relu()
        sides.append(tuple(x.shape[1:]))
    assert sides == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
    close(encoder(frames), x.flatten(1) @ encoder.head.weight.T)
    is_orthogonal(encoder.head.weight, 0.05 * math.sqrt(2))
    assert encoder(frames).shape == (2, 6)


@pytest.mark.parametrize("axis", [0, 1])
def test_decoder_draws_each_patch_in_its_place(axis):
    """A head that shows its own input, z + place: rows or columns of places, one z per image."""
    decoder = rig_td3.BroadcastDecoder(2, hidden=2)
    assert [type(layer).__name__ for layer in decoder.head] == ["ReLU", "Linear", "ReLU", "Linear"]
    with torch.no_grad():
        decoder.from_z.weight.copy_(10 * torch.eye(2))
        decoder.from_place.weight.copy_(torch.eye(2))
        decoder.head = torch.nn.Linear(2, 16)
        decoder.head.weight.zero_()[:, axis] = 1
        decoder.head.bias.copy_(torch.arange(16) / 1000)
        z = torch.randn(5, 2)
        image = decoder(z)
    place = torch.linspace(-1.7, 1.7, 16).repeat_interleave(4)
    place = place[:, None] if axis == 0 else place[None]
    within = (torch.arange(16).view(4, 4) / 1000).tile(16, 16)
    close(image, (10 * z[:, axis, None, None] + place + within)[:, None])


def test_decoder_starts_black_with_places_of_unit_variance():
    decoder = rig_td3.BroadcastDecoder(3)
    assert decoder.places.var(0, unbiased=False).tolist() == pytest.approx([1.09] * 2, abs=0.01)
    assert decoder(torch.randn(4, 3)).sigmoid().mean() < 0.2
    is_orthogonal(decoder.from_z.weight, math.sqrt(2))
    is_orthogonal(decoder.head[1].weight, math.sqrt(2))


def test_actor_and_critic():
    """An actor around zero that cannot leave the box; two critics with weights of their own."""
    actor, critic = rig_td3.GoalActor(4, 8, 2), rig_td3.TwinCritic(4, 8, 2)
    x, action = torch.randn(5, 4), torch.rand(5, 2)
    close(actor(x), np.tanh(numpy_mlp(actor.mlp, x.double().numpy())))
    assert [layer.weight.shape for layer in actor.mlp[::2]] == [(8, 4), (8, 8), (2, 8)]
    is_orthogonal(actor.mlp[-1].weight, 0.01)
    is_orthogonal(actor.mlp[2].weight, math.sqrt(2))
    assert all((layer.bias == 0).all() for layer in actor.mlp[::2])
    both = torch.cat([x, action], 1).double().numpy()
    q = critic(x, action)
    close(q, np.stack([numpy_mlp(head, both)[:, 0] for head in critic.heads]))
    assert not torch.allclose(q[0], q[1])


def test_vae_encodes_to_the_mean_in_pieces():
    """z is mu, without noise; a thousand frames at a time; no gradient; any leading shape."""
    vae = rig_td3.VAE(Args(z_dim=3, vae_learning_rate=0.07), torch.device("cpu"))
    frames = np.random.default_rng(0).integers(256, size=(1002, 1, 64, 64), dtype=np.uint8)
    some = [0, 999, 1000, 1001]
    with torch.no_grad():
        expected = vae.encoder(torch.tensor(frames[some]).double().div(255).float())[:, :3]
    z = vae.encode(frames)
    close(z[some], expected)
    close(vae.encode(frames[:6].reshape(2, 3, 1, 64, 64)), z[:6].view(2, 3, 3))
    drawn = vae.decode(z[:501])
    close(drawn[[0, 500]], vae.decoder(z[[0, 500]]).sigmoid())
    assert not z.requires_grad and not drawn.requires_grad and drawn.shape == (501, 1, 64, 64)
    stepped = vae.optimizer.param_groups[0]
    both = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    assert list(map(id, stepped["params"])) == list(map(id, both)) and stepped["lr"] == 0.07
    assert vae.networks == {"encoder": vae.encoder, "decoder": vae.decoder}


@pytest.mark.parametrize("task", ["reach", "push"])
def test_true_positions(task):
    """Positions of the agent (and the square) around the centre, in standard deviations."""
    positions = np.random.default_rng(0).uniform(size=(50, 4))
    seer = rig_td3.TruePositions(Args(task=task, goals="oracle"), torch.device("cpu"), positions)
    states = np.random.default_rng(1).uniform(size=(2, 3, 12)).astype(np.float32)  # K = 3
    expected = np.concatenate([states[..., :2], states[..., 4:6]], -1) - 0.5
    expected = (expected / positions.std(0))[..., : 2 if task == "reach" else 4]
    close(seer.encode(states), expected)
    assert seer.z_dim == expected.shape[-1] and seer.networks == {}


# --- Updates ---------------------------------------------------------------------------------


@pytest.fixture
def agent():
    """z has one number; the fast networks are not their slow copies, and the actor does move."""
    agent = rig_td3.GoalAgent(1, 2, Args(learning_rate=1e-3), "cpu")
    for network in (agent.actor, agent.actor_target, agent.critic):
        for p in network.parameters():
            torch.nn.init.normal_(p, 0, 0.2)
    return agent


@pytest.fixture
def batch():
    x, terminated = torch.randn, (torch.arange(64) % 4 == 0).float()
    batch = {"before": x(64, 2), "action": torch.rand(64, 2), "after": x(64, 2), "reward": x(64)}
    return batch | {"terminated": terminated}


def test_agent_starts_with_slow_copies_and_an_optimiser_for_each_network():
    agent = rig_td3.GoalAgent(3, 2, Args(learning_rate=0.07), "cpu")
    pairs = ("actor", "actor_target"), ("critic", "critic_target")
    for fast, slow in ((getattr(agent, a), getattr(agent, b)) for a, b in pairs):
        assert moved(snapshot(fast), slow) == [False] and fast is not slow
        assert all(p.requires_grad for p in fast.parameters())
        assert not any(p.requires_grad for p in slow.parameters())
        assert not {p.data_ptr() for p in fast.parameters()} & {
            p.data_ptr() for p in slow.parameters()
        }
    for name in ("actor", "critic"):
        group = getattr(agent, f"{name}_optimizer").param_groups[0]
        own = getattr(agent, name).parameters()
        assert list(map(id, group["params"])) == list(map(id, own)) and group["lr"] == 0.07
    z, goals = torch.randn(4, 3), torch.randn(4, 3)
    side_by_side = torch.cat([z, goals], 1).double().numpy()
    close(agent.act(z, goals), np.tanh(numpy_mlp(agent.actor.mlp, side_by_side)))
    for mlp, size in ((agent.actor.mlp, 2), *((head, 1) for head in agent.critic.heads)):
        assert [layer.out_features for layer in mlp[::2]] == [256, 256, size]


def test_update_vae():
    """(1) at a z with noise, a step of encoder and decoder that helps."""
    vae = rig_td3.VAE(Args(z_dim=2), torch.device("cpu"))
    frames = (torch.rand(4, 1, 64, 64) < 0.1).float()
    with torch.no_grad():
        vae.encoder.head.bias.copy_(torch.tensor([0.5, -1.0, 1.0, -2.0]))
    mean, log_var = vae.encoder(frames).split(2, -1)
    torch.manual_seed(1)
    z = mean + log_var.exp().sqrt() * torch.randn(4, 2)
    p = vae.decoder(z).double().sigmoid()
    likelihood = frames * p.log() + (1 - frames) * (1 - p).log()
    kl = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(1)
    expected = (30 * kl - likelihood.flatten(1).sum(1)).mean()
    gradient, *_ = torch.autograd.grad(expected, vae.encoder.head.bias)
    before = snapshot(vae.encoder, vae.decoder)
    torch.manual_seed(1)
    loss = rig_td3.update_vae(vae, frames, 30.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and not loss.requires_grad
    close(vae.encoder.head.bias.grad, gradient, atol=1e-3)
    assert moved(before, vae.encoder, vae.decoder) == [True, True]
    torch.manual_seed(1)
    assert rig_td3.update_vae(vae, frames, 30.0) < loss
    update = lambda: rig_td3.update_vae(vae, frames, 30.0)  # noqa: E731
    gradients_do_not_pile_up(update, vae.optimizer, vae.encoder)
    gradients_do_not_pile_up(update, vae.optimizer, vae.decoder)


def test_update_goal_critic(agent, batch):
    """y from the slow copies, the smaller value of both, at a smoothed action; terminated or not;
    only the critic moves."""
    x = {name: column.double().numpy() for name, column in batch.items()}
    torch.manual_seed(1)
    noise = (0.2 * torch.randn(64, 2)).double().numpy().clip(-0.5, 0.5)
    action = np.tanh(numpy_mlp(agent.actor_target.mlp, x["after"])) + noise
    after = np.concatenate([x["after"], action.clip(-1, 1)], 1)
    value = np.min([numpy_mlp(head, after)[:, 0] for head in agent.critic_target.heads], 0)
    y = x["reward"] + 0.7 * (1 - x["terminated"]) * value
    before = np.concatenate([x["before"], x["action"]], 1)
    errors = [numpy_mlp(head, before)[:, 0] - y for head in agent.critic.heads]
    networks = agent.actor, agent.actor_target, agent.critic_target, agent.critic
    frozen = snapshot(*networks)
    for p in agent.actor.parameters():
        p.grad = torch.ones_like(p)  # of an earlier step of its own

    def update():
        torch.manual_seed(1)
        return rig_td3.update_goal_critic(agent, batch, 0.7)["critic_loss"]

    loss = update()
    assert loss.item() == pytest.approx(np.square(errors).mean(1).sum(), rel=1e-5)
    assert moved(frozen, *networks) == [False, False, False, True] and not loss.requires_grad
    assert update() < loss
    assert all((p.grad == 1).all() for p in agent.actor.parameters())
    gradients_do_not_pile_up(update, agent.critic_optimizer, agent.critic)


def test_update_goal_actor(agent, batch):
    """The actor climbs the first critic; the critic stays; both slow copies follow by tau."""
    x = batch["before"].double().numpy()
    action = np.tanh(numpy_mlp(agent.actor.mlp, x))
    expected = numpy_mlp(agent.critic.heads[0], np.concatenate([x, action], 1)).mean()
    (critic, slow_actor, slow_critic, actor), networks = (
        snapshot(*(agent.critic, agent.actor_target, agent.critic_target, agent.actor)),
        (agent.critic, agent.actor),
    )
    q = rig_td3.update_goal_actor(agent, batch, 0.3)["q"]
    assert q.item() == pytest.approx(expected, rel=1e-4) and not q.requires_grad
    assert moved([critic, actor], *networks) == [False, True]
    for old, slow, fast in (
        (slow_actor, agent.actor_target, agent.actor),
        (slow_critic, agent.critic_target, agent.critic),
    ):
        for before, now, new in zip(old, slow.parameters(), fast.parameters()):
            close(now, 0.7 * before + 0.3 * new)
    assert rig_td3.update_goal_actor(agent, batch, 0.3)["q"] > q
    update = lambda: rig_td3.update_goal_actor(agent, batch, 0.3)  # noqa: E731
    gradients_do_not_pile_up(update, agent.actor_optimizer, agent.actor)


def test_what_the_actors_step_leaves_in_the_critic_is_not_used(agent, batch):
    def gradients():
        torch.manual_seed(1)
        rig_td3.update_goal_critic(agent, batch, 0.7)
        return [p.grad.clone() for p in agent.critic.parameters()]

    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        optimizer.param_groups[0]["lr"] = 0.0
    clean = gradients()
    rig_td3.update_goal_actor(agent, batch, 1e-9)
    for a, b in zip(clean, gradients()):
        close(b, a)


# --- Data ------------------------------------------------------------------------------------


def test_to_tensor():
    frames = np.array([0, 51, 255], np.uint8)
    close(rig_td3.to_tensor(frames, "cpu"), torch.tensor([0, 0.2, 1]))
    already = torch.tensor([51.0])
    assert frames[1] == 51 and rig_td3.to_tensor(already, "cpu").item() == 51
    assert rig_td3.to_tensor(np.array([0.5]), "cpu").dtype == torch.float32


def test_images_are_of_many_scenes_and_of_what_random_actions_do():
    env = sprites_env.SpritesVectorEnv(4, task="push", horizon=5)
    images, positions = rig_td3.collect_images(env, 90, np.random.default_rng(0), seed=3)
    assert images.shape == (90, 1, 64, 64) and positions.shape == (90, 4)
    drawn = sprites_env.draw(positions.reshape(-1, 2, 2), np.array([[1, 0]] * 90))
    assert np.array_equal(images[:, 0], drawn)
    assert np.array_equal(images[:4], env.reset(seed=3)[0])
    scenes = positions[:80].reshape(4, 5, 4, 2, 2)  # (scene, frame, environment, object, 2)
    steps = np.diff(scenes[..., 0, :], axis=1)
    assert 0.02 < np.abs(steps).mean() < 0.03  # uniform in -1 ... 1, times .05
    assert abs(steps.mean()) < 0.005
    square = scenes[..., 1, :]
    assert (square.std(1).max(-1) < 1e-9).mean() > 0.6  # at rest, unless pushed
    assert len(np.unique(square[:, 0].reshape(-1, 2), axis=0)) == 16


@pytest.fixture
def replay():
    """Four episodes of five steps, in which everything says where it is: z = 10 e + t, and so do
    pixels; actions are -z, the goal that was practised is -10 e - 7; only the last step of the
    first episode is terminal. Two more episodes fit in."""
    replay = rig_td3.EpisodeReplay(6, 5, IMAGE, 2, 3)
    for e in (0, 2):
        z = 10.0 * np.array([[[e]], [[e + 1]]]) + np.arange(6)[None, :, None] + np.zeros(3)
        frames = z[..., :1, None, None] + np.zeros((1, 64, 64))
        terminated = np.zeros((2, 5), bool)
        terminated[0, -1] = e == 0
        replay.add(frames, -z[:, :-1, :2], terminated, -z[:, 0] - 7, torch.tensor(z))
    return replay


def test_replay_stores_side_by_side(replay):
    expected = 10 * np.arange(4)[:, None] + np.arange(6)
    assert replay.size == 4 and replay.observations.dtype == np.uint8
    close(replay.z[:4, :, 2], expected.astype(np.float32))
    close(replay.observations[:4, :, 0, 63, 63], expected.astype(np.uint8))
    close(replay.actions[:4, :, 1], -expected[:, :5].astype(np.float32))
    close(replay.goals[:4, 0], -expected[:, 0].astype(np.float32) - 7)
    assert replay.terminated.sum() == replay.terminated[0, 4] == 1
    assert not replay.z[4:].any()


def test_future_goals_stay_in_their_episode(replay):
    """Every step occurs and every later one, the last too, and none before."""
    e, t, h = replay.sample(np.random.default_rng(0), 3000)
    assert len(e) == len(t) == len(h) == 3000
    pairs = {(a, b) for a in range(5) for b in range(a + 1, 6)}
    assert set(zip(e, t, h)) == {(k, a, b) for k in range(4) for a, b in pairs}


@pytest.mark.parametrize("goals", ["latent", "pixel"])
def test_relabelled_batch(replay, goals):
    """z before and after, the action between; one goal in both; in the stated shares; paid by the
    next state, or by its pixels and those of the decoded goal."""
    seer = SimpleNamespace(
        device="cpu", decode=lambda z: z[:, :1, None, None].expand(-1, 1, 64, 64)
    )
    shares = (0.2, 0.5, 0.3)
    args = Args(goals=goals, goal_fractions=shares, batch_size=4000)
    prior = torch.full((3,), 1000.0), torch.full((3,), 3.0)
    batch = rig_td3.relabelled_batch(replay, np.random.default_rng(0), seer, prior, args)
    x = {name: column.double().numpy() for name, column in batch.items()}
    (z, way), (z_next, way_next) = (np.split(x[name], 2, axis=1) for name in ("before", "after"))
    goal = z + way
    e, t = z[:, 0] // 10, z[:, 0] % 10
    assert np.array_equal(z_next, z + 1)
    np.testing.assert_allclose(z_next + way_next, goal, rtol=1e-5)
    assert np.array_equal(x["action"], -z[:, :2])
    assert np.array_equal(x["terminated"], (e == 0) & (t == 4)) and x["terminated"].any()
    practised, imagined = goal[:, 0] == -10 * e - 7, goal[:, 0] > 900
    later = (goal[:, 0] // 10 == e) & (goal[:, 0] % 10 > t) & (goal[:, 0] % 10 <= 5)
    assert (practised ^ imagined ^ later).all()
    assert set((goal[:, 0] % 10 - t)[later]) == {1, 2, 3, 4, 5}
    found = [practised.mean(), imagined.mean(), later.mean()]
    assert found == pytest.approx(shares, abs=0.03)
    assert goal[imagined].std(0) == pytest.approx([3] * 3, abs=0.2)
    expected = -np.linalg.norm(z_next - goal, axis=1)
    if goals == "pixel":
        expected = -0.2 * np.abs(z_next[:, 0] / 255 - goal[:, 0]) * 64
    np.testing.assert_allclose(x["reward"], expected, rtol=1e-5)


# --- Measures --------------------------------------------------------------------------------


def test_probe():
    """A linear map is found, noise is not, even where there is enough of it to fit."""
    z, z_new = torch.randn(60, 30), torch.randn(500, 30)
    weights = torch.randn(30, 3).double()
    data = []
    for x in (z, z_new):
        linear = x.double() @ weights + torch.tensor([1, 2, 3])
        data.append(torch.cat([linear, torch.randn(len(x), 1).double()], 1).numpy())
    agent, square = rig_td3.position_probe(z, data[0], z_new, data[1])
    inputs, new = (np.c_[x.double().numpy(), np.ones(len(x))] for x in (z, z_new))
    error = new @ np.linalg.lstsq(inputs, data[0], rcond=None)[0] - data[1]
    r2 = 1 - (error**2).mean(0) / data[1].var(0)
    assert agent == pytest.approx(1) and square == pytest.approx(r2[2:].mean())
    assert r2[3] < 0.1


def test_look_fits_on_old_images_and_judges_new_ones():
    """z of an image is the image itself here. Old ones show the agent and, off by one, the square;
    new ones only the agent."""
    seer = SimpleNamespace(encode=torch.as_tensor)
    images, new_images = torch.randn(50, 4), 3 * torch.randn(60, 4)
    positions = images.numpy() + [0, 0, 1, 1]
    new_positions = np.concatenate([new_images[:, :2], np.random.normal(size=(60, 2))], 1)
    prior, r2 = rig_td3.look(seer, images, positions, new_images, new_positions)
    for actual, expected in zip(prior, rig_td3.fit_prior(images)):
        close(actual, expected)
    assert r2[0] == pytest.approx(1) and r2[1] < 0


@pytest.fixture(params=["reach", "push"])
def held_out(request):
    args = Args(goals="oracle", task=request.param, distractors=1, eval_episodes=50)
    return rig_td3.HeldOut(args)


def test_goals_are_the_same_scene_with_something_elsewhere(held_out):
    """Always the same ones, of which nobody knows from training; nothing overlaps."""
    task = held_out.env.task
    differs = (held_out.start[..., :2] != held_out.goal[..., :2]).any(-1)
    assert differs.all(0).tolist() == differs.any(0).tolist() == [True, task == "push", False]
    env = sprites_env.SpritesVectorEnv(50, 1, "state", task=task)
    env.reset(seed=10**9)
    assert np.array_equal(env.states, held_out.start) and np.array_equal(
        env.shapes, held_out.shapes
    )
    env.reset()
    assert np.array_equal(env.states[:, 0], held_out.goal[:, 0])
    obs, _ = env.reset(options={"state": held_out.goal, "shapes": held_out.shapes})
    assert np.array_equal(held_out.goal_images, obs)


def test_reach_follows_the_policy_from_the_given_start(held_out):
    held_out.env.reset()  # whatever happened in between
    task, places = held_out.env.task, held_out.goal[:, 0, :2]
    seen = []

    def straight(obs, goals):
        seen.append(obs.reshape(-1, 3, 4)[..., :2])
        return sprites_env.toward(obs.reshape(-1, 3, 4).astype(float), goals)

    path = held_out.reach(straight, places)
    assert path.shape == (41, 50, 3, 2) and np.array_equal(path[0], held_out.start[..., :2])
    np.testing.assert_allclose(path[:-1], np.stack(seen), atol=1e-6)
    assert np.array_equal(held_out.env.shapes, held_out.shapes)
    left = np.linalg.norm(path[-1, :, 0] - places, axis=-1)
    assert (left < 0.01).mean() > (0.99 if task == "reach" else 0.6)  # the square is in the way
    path = held_out.reach(lambda obs, goals: np.zeros((50, 2)), places)
    assert np.array_equal(path[-1], held_out.start[..., :2])


def test_measure_by_hand(held_out):
    """The agent is (.03, .04) away; the square .3, or .02 in one of the fifty."""
    positions = held_out.goal[..., :2].copy()
    positions[:, 0] += [0.03, 0.04001]
    positions[0, 0] -= [0.0, 0.02]  # one agent is near enough
    positions[:, 1, 0] += 0.3
    positions[:2, 1, 0] -= 0.28
    distances, success = held_out.measure(positions, "some")
    agent, block = distances["some_agent_distance"], distances["some_block_distance"]
    assert agent == pytest.approx(0.05, abs=4e-4) and block == pytest.approx(0.3 - 0.28 / 25)
    assert success == (1 / 50 if held_out.env.task == "reach" else 2 / 50)


# --- Phases of a run -------------------------------------------------------------------------


def test_see_lowers_beta_in_equal_ratios(monkeypatch):
    """From 16 to 1 in four steps: 16, 8, 4, 2; on what is sampled, in [0, 1]."""
    calls = []
    monkeypatch.setattr(rig_td3, "update_vae", lambda *args: calls.append(args))
    vae, samples = SimpleNamespace(device="cpu"), iter(np.arange(4, dtype=np.uint8)[:, None])
    rig_td3.see(vae, lambda: next(samples), 4, 16.0, 1.0)
    assert [beta for *_, beta in calls] == pytest.approx([16, 8, 4, 2])
    assert [frames.item() for _, frames, _ in calls] == pytest.approx(
        [0, 1 / 255, 2 / 255, 3 / 255]
    )
    assert all(x is vae for x, *_ in calls)


class Ending(sprites_env.SpritesVectorEnv):
    """The first environment's episodes end in a terminal state, the second's at a time limit."""

    def step(self, actions):
        *x, terminated, truncated, info = super().step(actions)
        first = np.array([True, False])
        return *x, truncated & first, truncated & ~first, info


class Ragged(sprites_env.SpritesVectorEnv):
    """Only one of them ends."""

    def step(self, actions):
        *x, terminated, truncated, info = super().step(actions)
        return *x, terminated, truncated & np.array([True, False]), info


def practice(env_class, monkeypatch, noise=0.3, rounds=2):
    """Two episodes a round; random ones in the first. The policy always does (0, .9)."""
    monkeypatch.setattr(rig_td3, "RANDOM_STEPS", 2 * 200)
    args = Args(goals="oracle", task="push", noise=noise, num_envs=2)
    env = env_class(2, observation="state", task="push", horizon=200)
    episodes = sprites_env.Episodes(env, 7)
    rng = np.random.default_rng(0)
    seer = rig_td3.TruePositions(args, "cpu", rng.uniform(size=(50, 4)))
    asked, act = [], np.tile(np.float32([0, 0.9]), (2, 1))
    agent = SimpleNamespace(act=lambda *args: asked.append(args) or act)
    replay = rig_td3.EpisodeReplay(4, 200, env.single_observation_space, 2, 4)
    prior = torch.arange(4.0), torch.ones(4)
    for _ in range(rounds):
        rig_td3.practise(agent, seer, episodes, replay, prior, rng, args)
    return replay, asked, seer


def test_practise_stores_what_was_seen_done_and_aimed_at(monkeypatch):
    """Every observation follows from the one before by the action beside it, the last one too; the
    next episode starts anew; the goals are those that the policy was asked for."""
    replay, asked, seer = practice(Ending, monkeypatch)
    assert replay.size == 4 and len(asked) == 400
    states = replay.observations[:, :-1].reshape(-1, 2, 4).astype(float)
    after = sprites_env.act(states, replay.actions.reshape(-1, 2), "push")
    close(after.reshape(4, 200, 8).astype(np.float32), replay.observations[:, 1:])
    assert not np.allclose(replay.observations[:2, -1], replay.observations[2:, 0], atol=0.05)
    first, _ = Ending(2, observation="state", task="push").reset(seed=7)
    assert np.array_equal(replay.observations[:2, 0], first)
    close(replay.z, seer.encode(replay.observations))
    for k, (z, ways) in enumerate(asked):
        new = slice(0, 2) if k < 200 else slice(2, 4)
        close(z, replay.z[new, k % 200])
        close(z + ways, replay.goals[new])
    assert len(np.unique(replay.goals)) == 16  # each environment and each round has its own


def test_practise_a_time_limit_is_not_terminal(monkeypatch):
    replay, *_ = practice(Ending, monkeypatch)
    assert replay.terminated[[0, 2], -1].all() and replay.terminated.sum() == 2
    with pytest.raises(AssertionError):
        practice(Ragged, monkeypatch)


def test_practise_explores(monkeypatch):
    """Uniformly at first; then what the policy does, with noise of the stated size, in the box."""
    replay, *_ = practice(Ending, monkeypatch)
    random, noisy = replay.actions[:2], replay.actions[2:]
    assert random.std() == pytest.approx(1 / math.sqrt(3), abs=0.03)
    assert abs(random.mean()) < 0.1 and np.abs(random).max() <= 1
    assert noisy[..., 0].std() == pytest.approx(0.3, abs=0.03) and abs(noisy[..., 0].mean()) < 0.05
    assert noisy[..., 1].max() == 1 and (noisy[..., 1] < 1).mean() == pytest.approx(0.63, abs=0.07)
    replay, *_ = practice(Ending, monkeypatch, noise=0.0)
    close(replay.actions[2:], np.tile(np.float32([0, 0.9]), (2, 200, 1)))


def test_see_again_carries_goals_over_and_encodes_anew(monkeypatch, replay):
    """Half of each batch is old images, half new ones. The old decoder draws the goals; everything
    else is what the new encoder says. Room that is still empty stays so."""
    args = Args(z_dim=3, beta=0.5, finetune_updates=4)
    vae, batches = rig_td3.VAE(args, torch.device("cpu")), []
    old_images = np.tile(np.arange(200, 210, dtype=np.uint8)[:, None, None, None], (1, 1, 64, 64))
    replay.goals[:4] = np.random.default_rng(0).normal(size=(4, 3))
    drawn = vae.decode(torch.tensor(replay.goals[:4]))

    def update(vae, frames, beta):
        batches.append(frames[:, 0, 0, 0].mul(255).round().int())
        assert beta == pytest.approx(0.5) and frames.shape == (128, 1, 64, 64)
        with torch.no_grad():
            vae.encoder.head.bias.add_(1)
            vae.decoder.head[-1].bias.add_(1)

    monkeypatch.setattr(rig_td3, "update_vae", update)
    rig_td3.see_again(vae, old_images, replay, np.random.default_rng(0), args)
    old, new = torch.stack(batches).split(64, dim=1)
    assert len(batches) == 4 and set(old.flatten().tolist()) == set(range(200, 210))
    assert set(new.flatten().tolist()) == {10 * e + t for e in range(4) for t in range(6)}
    close(replay.z[:4], vae.encode(replay.observations[:4]))
    close(replay.goals[:4], vae.encode((drawn * 255).round().byte()))
    assert not replay.z[4:].any() and not replay.goals[4:].any()


# --- The story of a run ----------------------------------------------------------------------

PHASES = "collect_images see look practise relabelled_batch update_goal_critic update_goal_actor"
PHASES = (*PHASES.split(), "see_again")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run in episodes of four steps, two environments, five rounds, of which every call of a
    phase is written down: (name, arguments, result)."""
    out, calls, make_env = tmp_path_factory.mktemp("story"), [], rig_td3.make_env
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig_td3, "make_env", lambda *a, **k: make_env(*a, **{"horizon": 4} | k))
        patch.setattr(rig_td3, "REPORT_EVERY", 15)
        without_pictures(patch)
        curve, rates = [], []  # the arguments of draw_curve; learning rates
        patch.setattr(sprites_env, "draw_curve", lambda *a: curve.append(a) or Figure((1, 1)))
        for name in PHASES:

            def call(*args, name=name, f=getattr(rig_td3, name)):
                if name == "update_goal_critic":
                    optimizers = args[0].actor_optimizer, args[0].critic_optimizer
                    rates.append([x.param_groups[0]["lr"] for x in optimizers])
                calls.append((name, args, f(*args)))
                return calls[-1][2]

            patch.setattr(rig_td3, name, call)
        changes = {"task": "push", "distractors": 1, "z_dim": 3, "seed": 2, "images": 250}
        changes |= {"num_envs": 2, "total_steps": 47, "finetune_every": 3, "gamma": 0.7, "tau": 0.3}
        changes |= {"learning_rate": 1e-3}
        args = Args(**TINY | changes, beta=0.5, out=str(out))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            summary = rig_td3.train(args)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    vae = rig_td3.VAE(args, torch.device("cpu"))
    agent = rig_td3.GoalAgent(3, 2, args, "cpu")
    for network in (vae.encoder, vae.decoder, agent.actor, agent.critic):
        name = next(k for k, v in ({**vars(vae), **vars(agent)}).items() if v is network)
        network.load_state_dict(saved[name])
    of = {name: [(a, r) for n, a, r in calls if n == name] for name in PHASES}
    return SimpleNamespace(**locals())


def test_story_order(story):
    """Updates as many as steps, every second one with an actor's; fine-tuned when three episodes
    are full, not at the end; reported every 15 steps and at the end."""
    names = "".join(dict(zip(PHASES, "CSLpbcaF"))[name] for name, *_ in story.calls)
    round = "p" + 4 * "bcabc"
    assert names == "CCSL" + round + round + "SFL" + round + "SFL" + round + round
    assert [row["step"] for row in untimed_rows(story.out)] == ["16", "32", "40"]
    assert story.saved["step"] == 40


def test_story_rate_falls_in_the_second_half(story):
    """Five rounds of eight updates: half of the way is reached within the third."""
    expected = 1e-3 * np.repeat([1, 1, 1, 0.8, 0.4], 8)
    np.testing.assert_allclose(story.rates, np.stack([expected] * 2, axis=1))


def test_story_who_learns_from_what(story):
    """The batch just made, by both; the present prior; gamma and tau; one agent, one replay."""
    prior = batch = None
    for name, args, result in story.calls:
        if name == "look":
            prior = result[0]
        elif name == "practise":
            assert args[4] is prior
        elif name == "relabelled_batch":
            batch = result
            assert args[3] is prior and len(batch["reward"]) == 8
        elif name == "update_goal_critic":
            assert args[1] is batch and args[2] == 0.7
        elif name == "update_goal_actor":
            assert args[1] is batch and args[2] == 0.3
    assert [args[2:] for args, _ in story.of["see"]] == [(4, 20, 0.5), (2, 0.5, 0.5), (2, 0.5, 0.5)]


def test_story_images(story):
    """The VAE trains on the run's own images; they, practice and new images are of other scenes."""
    env = sprites_env.SpritesVectorEnv(100, 1, task="push", horizon=5)
    own = rig_td3.collect_images(env, 250, np.random.default_rng(2), 200_000)
    new = rig_td3.collect_images(env, 2000, np.random.default_rng(0), 10**9 + 50_000)
    (_, collected), (_, collected_new) = story.of["collect_images"]
    for expected, found in ((own, collected), (new, collected_new)):
        assert all(map(np.array_equal, expected, found))
    first = story.of["see"][0][0]
    sampled, more = ({frame.tobytes() for frame in first[1]()} for _ in range(2))
    assert len(first[1]()) == 128 and sampled != more
    assert sampled | more <= {frame.tobytes() for frame in own[0]}
    for args, _ in story.of["look"]:
        assert all(map(np.array_equal, (*own, *new), args[1:]))
    for args, _ in story.of["see_again"]:
        assert np.array_equal(args[1], own[0])
    replay = story.of["practise"][0][0][3]
    practised = sprites_env.SpritesVectorEnv(2, 1, task="push").reset(seed=250_000)[0]
    assert np.array_equal(replay.observations[:2, 0], practised)
    # what was read before the last fine-tuning has been read again
    assert replay.size == 10
    close(replay.z, story.vae.encode(replay.observations))
    z, z_new = story.vae.encode(own[0]), story.vae.encode(new[0])
    close(story.saved["prior_mean"], z.mean(0))
    close(story.saved["prior_sd"], z.std(0, unbiased=False))
    r2 = rig_td3.position_probe(z, own[1], z_new, new[1])
    for found in (story.summary, untimed_rows(story.out)[-1]):
        assert float(found["probe_r2_agent"]) == pytest.approx(r2[0], abs=1e-4)
        assert float(found["probe_r2_square"]) == pytest.approx(r2[1], abs=1e-4)
    assert story.summary["probe_r2"] == pytest.approx(min(r2), abs=1e-4)


def test_story_measured_again(story):
    """The saved networks reach for images of goals once more, in the environment itself."""
    env = sprites_env.SpritesVectorEnv(3, 1, task="push", horizon=5)
    env.reset(seed=10**9)
    start, shapes = env.states, env.shapes
    env.reset()
    goal = np.concatenate([env.states[:, :2], start[:, 2:]], 1)
    images = sprites_env.draw(goal[..., :2], shapes)[:, None]
    obs, _ = env.reset(options={"state": start, "shapes": shapes})
    for _ in range(4):
        z = story.vae.encode(obs)
        obs, *_ = env.step(story.agent.act(z, story.vae.encode(images) - z))
    last = untimed_rows(story.out)[-1]
    for name, states in (("final", env.states), ("untouched", start)):
        agent, block, _ = np.linalg.norm((states - goal)[..., :2], axis=-1).mean(0)
        assert story.summary[f"{name}_agent_distance"] == pytest.approx(agent, abs=1e-5)
        assert story.summary[f"{name}_block_distance"] == pytest.approx(block, abs=1e-5)
        if name == "final":
            assert float(last["final_agent_distance"]) == pytest.approx(agent, abs=1e-5)
            near = np.linalg.norm((states - goal)[:, 1, :2], axis=-1) < 0.05
            assert story.summary["success_rate"] == near.mean()
    _, critic = story.of["update_goal_critic"][-1]
    _, actor = story.of["update_goal_actor"][-1]
    _, batch = story.of["relabelled_batch"][-1]
    assert float(last["critic_loss"]) == critic["critic_loss"].item()
    assert float(last["q"]) == actor["q"].item()
    assert float(last["reward"]) == pytest.approx(batch["reward"].mean().item())
    assert story.summary["eval_episodes"] == 3
    assert "40/40" in story.printed.getvalue()


def test_story_curve_and_minutes(story):
    """Agent and block, each beside the line of doing nothing; the VAE's time within the run's."""
    [(rows, panels, x_label, levels, *_)] = story.curve
    assert [row["step"] for row in rows] == [16, 32, 40] and x_label == "environment steps"
    [(_, columns)] = panels
    assert columns == ["final_agent_distance", "final_block_distance"]
    untouched = [story.summary[f"untouched_{name}_distance"] for name in ("agent", "block")]
    assert levels == list(zip(("agent, untouched", "block, untouched"), untouched))
    assert 0 <= story.summary["vae_minutes"] <= story.summary["minutes"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "push", "z_dim": 5, "num_envs": 2, "total_steps": 160},
        {"goals": "oracle"},
        {"goals": "oracle", "task": "push", "distractors": 1},
        {"goals": "pixel"},
        {"goal_fractions": (1.0, 0.0, 0.0), "distractors": 2, "finetune_every": 0},
    ],
    ids=lambda changes: "_".join(map(str, changes.values())) or "default",
)
def test_runs_and_is_deterministic(tmp_path, monkeypatch, capsys, changes):
    """The second time without pictures."""
    a, b = tmp_path / "a", tmp_path / "b"
    summary, printed = run(a, **changes), capsys.readouterr().out
    without_pictures(monkeypatch)
    again = run(b, **changes)
    assert untimed_rows(a) == untimed_rows(b)
    assert summary == json.loads((a / "summary.json").read_text())
    expected = {"final_agent_distance", "final_block_distance", "success_rate", "minutes"}
    expected |= {"untouched_agent_distance", "untouched_block_distance", "eval_episodes"}
    pictures = {"curve.png", "reached.png", "rollout.gif"}
    with_vae = changes.get("goals") != "oracle"
    if with_vae:
        expected |= {"probe_r2", "probe_r2_agent", "probe_r2_square", "vae_minutes"}
        pictures |= {"imagined_goals.png", "latent_walk.png"}
    assert summary.keys() == again.keys() == expected
    for name in expected - {"minutes", "vae_minutes"}:
        assert summary[name] == again[name]
    assert ("warning: z does not tell places" in printed) == with_vae
    saved = torch.load(a / "checkpoint.pt", weights_only=True)
    networks = {"actor", "critic"} | ({"encoder", "decoder"} if with_vae else set())
    assert saved.keys() == networks | {"prior_mean", "prior_sd", "step"}
    assert all(torch.isfinite(v).all() for name in networks for v in saved[name].values())
    for name in pictures:
        with Image.open(a / name) as image:
            image.load()
    files = pictures | {"args.json", "curve.csv", "summary.json", "checkpoint.pt"}
    assert {file.name for file in a.iterdir()} == files
    arguments = json.loads((a / "args.json").read_text())["arguments"]
    assert arguments["images"] == 100 and arguments["gamma"] > 0.8


@pytest.mark.parametrize("flag", ["finetune_every", "finetune_updates"])
def test_the_vae_can_be_left_as_it_was(tmp_path, monkeypatch, flag):
    without_pictures(monkeypatch)
    monkeypatch.setattr(rig_td3, "see_again", None)
    run(tmp_path, total_steps=120, **{flag: 0})


def test_measuring_does_not_disturb_training(tmp_path, monkeypatch):
    """Three times as often, on more episodes."""
    without_pictures(monkeypatch)
    run(tmp_path / "a", goals="oracle")
    monkeypatch.setattr(rig_td3, "REPORT_EVERY", 40)
    run(tmp_path / "b", goals="oracle", eval_episodes=5)
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True)["actor"] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(untimed_rows(tmp_path / "b")) == 3 > len(untimed_rows(tmp_path / "a"))


def test_seeds_differ_and_finished_runs_are_kept(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    args = {"goals": "oracle", "total_steps": 40}
    first, second = (run(tmp_path / str(seed), **args, seed=seed) for seed in (1, 2))
    assert torch.initial_seed() == 2
    assert first["final_agent_distance"] != second["final_agent_distance"]
    before = (tmp_path / "1" / "curve.csv").read_text()
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path / "1", **args)
    assert (tmp_path / "1" / "curve.csv").read_text() == before
    run(tmp_path / "1", **args, overwrite=True)
    assert len(untimed_rows(tmp_path / "1")) == 1


# --- Learning --------------------------------------------------------------------------------


def test_the_agent_learns_to_reach(tmp_path, monkeypatch):
    """Two seconds, true positions: about .02 from the goal. Doing nothing leaves .37."""
    without_pictures(monkeypatch)
    monkeypatch.setattr(rig_td3, "HIDDEN", 64)
    monkeypatch.setattr(rig_td3, "RANDOM_STEPS", 400)
    changes = {"goals": "oracle", "total_steps": 1200, "num_envs": 5, "batch_size": 64}
    summary = run(tmp_path, **changes, eval_episodes=50)
    assert summary["untouched_agent_distance"] > 0.3
    assert summary["final_agent_distance"] < 0.05 and summary["success_rate"] > 0.8


def test_the_vae_learns_where_a_square_is():
    """Two seconds, beta from 20 to 5: R2 .996 on new images (.97 after half as long), which it also
    draws; some of z is not needed, and falls asleep."""
    rng, vae = np.random.default_rng(0), rig_td3.VAE(Args(vae_learning_rate=4e-3), "cpu")
    places = rng.uniform(0.1, 0.9, (2500, 2))
    images = sprites_env.draw(places[:, None], np.zeros((2500, 1), int))[:, None]
    rig_td3.see(vae, lambda: images[rng.integers(2000, size=32)], 140, 20.0, 5.0)
    places = np.tile(places, 2)
    old, new = slice(0, 2000), slice(2000, None)
    (_, sd), r2 = rig_td3.look(vae, images[old], places[old], images[new], places[new])
    assert min(r2) > 0.985
    assert sd.max() > 1 and sd.min() < 0.3
    drawn = vae.decode(vae.encode(images[new])).numpy()
    white = images[new] == 255
    assert drawn[white].mean() > 0.45 and drawn[~white].mean() < 0.02


# --- Pictures --------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What would be written, by name: the rows of images, not the figure."""
    monkeypatch.setattr(sprites_env, "draw_images", lambda rows: rows)
    files = {}
    return SimpleNamespace(save=files.__setitem__, files=files)


def test_latent_walk_and_imagined_goals(drawn):
    """One dimension of z at a time, from -2 to 2 standard deviations around the mean."""
    asked = []
    decode = lambda z: asked.append(z) or z[:, :1, None, None].expand(-1, 1, 64, 64)  # noqa: E731
    mean, sd = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    vae = SimpleNamespace(decode=decode, device="cpu")
    rig_td3.draw_imagination(drawn, vae, (mean, sd))
    samples, walk = asked
    assert samples.shape == (16, 2) and (samples[:, 1] == 2).all() and samples[:, 0].std() > 0.2
    close(walk[:9, 0], torch.linspace(0, 2, 9))
    close(walk[9:], mean.expand(9, 2))
    assert (walk[:, 1] == 2).all()
    assert {name: len(x) for name, x in drawn.files["latent_walk.png"].items()} == {
        "z1": 9,
        "z2": 9,
    }
    assert [len(row) for row in drawn.files["imagined_goals.png"].values()] == [8, 8]


def test_reached_and_the_ghost(drawn):
    """Start, goal and reached in their rows; in the film the goal shines through, the rest is as
    it is."""
    held_out = rig_td3.HeldOut(Args(eval_episodes=9))
    path = held_out.start[None, ..., :2] + np.array([0.0, 0.001])[:, None, None, None]
    rig_td3.draw_reached(drawn, held_out, path)
    rows = drawn.files["reached.png"]
    assert list(rows) == ["start", "goal", "reached"]
    for name, states in (("start", held_out.start), ("goal", held_out.goal), ("reached", path[1])):
        expected = [sprites_env.draw_rgb(states[i, :, :2], held_out.shapes[i]) for i in range(8)]
        assert np.array_equal(rows[name], expected)
    film = drawn.files["rollout.gif"]
    assert len(film) == 2 and film[0].shape == (4, 256, 256, 3) and film[0].dtype == np.uint8
    plain, goal = rows["start"][:4], rows["goal"][:4]
    white = (plain == 255).all(-1)
    assert np.array_equal(film[0][~white], plain[~white])
    assert np.array_equal(film[0][white], (0.65 * 255 + 0.35 * goal).astype(np.uint8)[white])
