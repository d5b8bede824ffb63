"""cc_rig.py: equations by hand, networks, updates, data, measures, the story of a run, learning.

What cc_rig.py shares with rig_td3.py is compared with it, and tested in test_rig.py. Numbers that a
test compares with are worked by hand or in plain numpy (float64)."""

import ast
import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import cc_rig
import rig_td3
import sprites_env
from cc_rig import Args

TINY = {"scenes": 40, "vae_updates": 3, "total_steps": 120, "num_envs": 1, "batch_size": 8}
TINY |= {"eval_episodes": 3, "torch_threads": 1, "device": "cpu", "z_dim": 3, "context_dim": 5}
SHARED = "strided_convolutions GoalActor TwinCritic mlp orthogonal_ GoalAgent kl_divergence "
SHARED += "goal_reward relabel smoothed td_target critic_loss deterministic_actor_loss polyak_ "
SHARED += "update_goal_critic update_goal_actor make_env to_tensor position_probe draw_reached"


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(cc_rig, "PROBED", 20)


def run(out, **changes):
    return cc_rig.train(Args(**TINY | changes, out=str(out)))


def without_pictures(patch):
    for name in ("draw_reached", "draw_imagined_here"):
        patch.setattr(cc_rig, name, lambda *args: None)
    patch.setattr(sprites_env, "draw_curve", lambda *args: Figure(figsize=(1, 1)))


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def close(actual, expected, atol=1e-5):
    """Equal within `atol`, and of the same shape."""
    actual, expected = (np.asarray(torch.as_tensor(x).detach()) for x in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=1e-5)


def tiny_vae(**changes):
    return cc_rig.CCVAE(Args(**TINY | changes), torch.device("cpu"))


def some_frames(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=(*shape, 1, 64, 64), dtype=np.uint8)


def code(module):
    """name -> source of each top-level definition, without docstrings."""
    sources = {}
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
                    part.body = part.body[1:] or [ast.Pass()]
            sources[node.name] = ast.unparse(node)
    return sources


# --- Arguments, and what is shared -----------------------------------------------------------


def test_what_is_shared_is_rig_td3s():
    own, relative = code(cc_rig), code(rig_td3)
    for name in SHARED.split():
        assert own[name] == relative[name], name
    for name in "TARGET_NOISE NOISE_CLIP RANDOM_STEPS ACTOR_EVERY SUCCESS".split():
        assert getattr(cc_rig, name) == getattr(rig_td3, name)
    own, relative = Args(), rig_td3.Args()
    for name in "goal_fractions num_envs noise batch_size gamma tau".split():
        assert getattr(own, name) == getattr(relative, name)


def test_defaults():
    args = Args(context="none", appearances="4", seed=3)
    assert args.run_name == "none_4_d2_s3" and (args.z_dim, args.context_dim) == (4, 64)
    env = cc_rig.make_env(args, 2)
    assert (env.task, env.distractors, env.observation, env.num_envs) == ("reach", 2, "image", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal_fractions": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"goal_fractions": (1.5, -0.5, 0.0)}, "--goal-fractions must be 0 or more"),
        ({"total_steps": 119, "num_envs": 3}, "--total-steps must be at least 120"),
        ({"gamma": 1.0}, "--gamma must be below 1"),
        ({"tau": 1.1}, "--tau not above"),
        ({"tau": 0.0}, "--tau must be positive"),
        ({"beta": 0.0}, "--beta must be positive"),
        ({"context_dim": 0}, "--context-dim must be positive"),
        ({"noise": math.inf}, "--noise must be"),
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
    Args(gamma=0.0, tau=1.0, noise=0.0, seed=0, goal_fractions=(0.0, 0.0, 1.0), total_steps=400)


# --- Equations -------------------------------------------------------------------------------


def test_kl_by_hand():
    """mu (1, 0), variance (1, .25): .8181; of any leading shape."""
    mean, log_var = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, math.log(0.25)]]])
    close(cc_rig.kl_divergence(mean, log_var), torch.tensor([[0.8181]]), atol=1e-4)


def test_loss_by_hand():
    """Two scenes of three images. A pixel at logit 0 costs ln 2, sums over pixels, a mean over six
    images and, apart, over two contexts: 3 pixels of one image differ by 4 each -> 12 / 6 more, two
    of a context -> 8 / 2 more. KL .8181 in one image of six counts beta times."""
    logits, first_logits = torch.zeros(2, 3, 1, 64, 64), torch.zeros(2, 1, 64, 64)
    frames, first = torch.zeros_like(logits), torch.ones_like(first_logits)
    mean, log_var = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    parts = frames, first_logits, first, mean, log_var, 6.0
    usual = 2 * 4096 * math.log(2)
    assert cc_rig.cc_vae_loss(logits, *parts).item() == pytest.approx(usual, rel=1e-6)
    extra = math.log1p(math.exp(4)) - math.log(2)  # white expected, black seen
    logits[1, 2].view(-1)[:3] = 4.0
    loss = cc_rig.cc_vae_loss(logits, *parts).item()
    assert loss == pytest.approx(usual + 3 * extra / 6, abs=2e-3)
    first_logits[0].view(-1)[:2] = -4.0  # black expected, white seen: dearer, not cheaper
    loss = cc_rig.cc_vae_loss(logits, *parts).item()
    assert loss == pytest.approx(usual + 3 * extra / 6 + 2 * extra / 2, abs=2e-3)
    mean[0, 1, 0], log_var[0, 1, 1] = 1.0, math.log(0.25)
    loss = cc_rig.cc_vae_loss(logits, *parts).item()
    assert loss == pytest.approx(usual + 3 * extra / 6 + extra + 6 * 0.8181 / 6, abs=2e-3)


@pytest.mark.parametrize("part", range(4))
def test_loss_refuses_to_broadcast(part):
    shapes = [(2, 3, 1, 64, 64)] * 2 + [(2, 1, 64, 64)] * 2
    shapes[part] = (*shapes[part][:-1], 1)
    with pytest.raises(AssertionError):
        cc_rig.cc_vae_loss(*map(torch.zeros, shapes), torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), 1)


def test_goals_are_imagined_in_the_present_context():
    """z_g ~ N(0, I), each its own; z_c as it is."""
    context = 100 + torch.arange(40_000.0).view(-1, 2)
    goals = cc_rig.imagine_here(context, 3)
    assert torch.equal(goals[:, 3:], context)
    assert goals[:, :3].mean(0).tolist() == pytest.approx([0] * 3, abs=0.03)
    close(goals[:, :3].T.cov(), torch.eye(3), atol=0.04)


def test_reward_is_the_distance_in_z():
    """From (3, 4) to the origin -5, in any context that both share."""
    context = torch.full((1, 7), 50.0)
    here, goal = (torch.cat([x, context], 1) for x in (torch.tensor([[3.0, 4]]), torch.zeros(1, 2)))
    assert cc_rig.goal_reward(here, goal).tolist() == [-5]


# --- Networks --------------------------------------------------------------------------------


def is_orthogonal(weight, gain):
    w = weight.detach().flatten(1).double()
    w = w if len(w) <= w.shape[1] else w.T
    close(w @ w.T, gain**2 * torch.eye(len(w)).double())


@pytest.mark.parametrize("channels", [1, 2])
def test_encoder(channels):
    """Three convolutions, each halving the side, then a linear map of 8 x 8."""
    encoder, x = cc_rig.FramesEncoder(channels, 6), torch.rand(2, channels, 64, 64)
    answer, sides = encoder(x), []
    for conv in encoder.convolutions[::2]:
        is_orthogonal(conv.weight, math.sqrt(2))
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).relu()
        sides.append(tuple(x.shape[1:]))
    assert sides == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
    close(answer, x.flatten(1) @ encoder.head.weight.T + encoder.head.bias)
    is_orthogonal(encoder.head.weight, math.sqrt(2))


def plain_drawing(decoder, context, z=None):
    """One image in float64, patch by patch."""
    d = {name: p.detach().double().numpy() for name, p in decoder.state_dict().items()}
    image, axis = np.zeros((64, 64)), np.linspace(-1.7, 1.7, 16)
    read = (d["from_context.weight"] @ context + d["from_context.bias"]).reshape(256, -1)
    for i in range(16):
        for j in range(16):
            h = read[16 * i + j] + d["from_place.weight"] @ [axis[i], axis[j]]
            h = h + d["from_place.bias"]
            if z is not None:
                h = h + d["from_z.weight"] @ z + d["from_z.bias"]
            h = d["head.1.weight"] @ np.maximum(h, 0) + d["head.1.bias"]
            patch = d["head.3.weight"] @ np.maximum(h, 0) + d["head.3.bias"]
            image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = patch.reshape(4, 4)
    return image


def test_decoders():
    """Each image from its own z and the context of its own scene; each patch in its place."""
    decoder, first = cc_rig.SceneDecoder(2, 3, hidden=8), cc_rig.ContextDecoder(3, hidden=8)
    for network in (decoder, first):
        torch.nn.init.normal_(network.from_context.bias)
    z, context = torch.randn(2, 3, 2), torch.randn(2, 3)
    images, drawn = decoder(z, context), first(context)
    assert images.shape == (2, 3, 1, 64, 64)
    x, c = z.double().numpy(), context.double().numpy()
    for e, f in ((0, 0), (0, 2), (1, 1)):
        close(images[e, f, 0].double(), plain_drawing(decoder, c[e], x[e, f]))
    close(drawn[:, 0].double(), np.stack([plain_drawing(first, c[e]) for e in range(2)]))


def test_decoders_start_black_and_read_the_context():
    decoder = cc_rig.ContextDecoder(32)
    assert decoder(torch.randn(4, 32)).sigmoid().mean() < 0.2
    weight = decoder.from_context.weight
    assert weight.shape == (256 * 64, 32) and (decoder.from_context.bias == 0).all()
    assert weight.std().item() == pytest.approx(0.25, rel=0.02)
    is_orthogonal(decoder.head[1].weight, math.sqrt(2))
    is_orthogonal(cc_rig.SceneDecoder(2, 3).from_z.weight, math.sqrt(2))


def test_vae_encodes_in_pieces():
    """mu(s, s0), s before s0, without noise or gradient, 500 at a time; z_c is a small part of
    codes, but not in images."""
    vae, frames, first = tiny_vae(), some_frames(502), some_frames(502, seed=1)
    some = [0, 499, 500, 501]
    s, s0 = (torch.tensor(x[some]).float() / 255 for x in (frames, first))
    z, context = vae.encode(frames, first), vae.encode_context(first)
    close(z[some], vae.encoder(torch.cat([s, s0], 1))[:, :3])
    close(context[some], 0.03 * vae.context_encoder(s0))
    codes = torch.cat([z, context], 1)
    drawn = vae.decode(codes[:252])
    expected = vae.decoder(z[[0, 251], None], context[[0, 251]] / 0.03)[:, 0].sigmoid()
    close(drawn[[0, 251]], expected)
    assert z.shape == (502, 3) and context.shape == (502, 5) and drawn.shape == (252, 1, 64, 64)
    assert not (z.requires_grad or context.requires_grad or drawn.requires_grad)
    is_orthogonal(vae.encoder.head.weight, 0.05 * math.sqrt(2))
    is_orthogonal(vae.context_encoder.head.weight, math.sqrt(2))


def test_vae_has_four_networks_and_one_optimiser():
    vae = tiny_vae(vae_learning_rate=0.07)
    names = ["encoder", "context_encoder", "decoder", "context_decoder"]
    assert vae.networks == {name: getattr(vae, name) for name in names}
    [group] = vae.optimizer.param_groups
    every = [p for network in vae.networks.values() for p in network.parameters()]
    assert list(map(id, group["params"])) == list(map(id, every)) and group["lr"] == 0.07


def test_a_blank_context_says_nothing():
    """Whatever the first frame is, the codes are those of a black one; with --context frame both
    depend on it."""
    frames, first, other = some_frames(2), some_frames(2, seed=1), some_frames(2, seed=2)
    for context in ("none", "frame"):
        vae = tiny_vae(context=context)
        pairs = [(vae.encode(frames, x), vae.encode_context(x)) for x in (first, other, 0 * first)]
        same = [torch.equal(a, b) for x in pairs[:2] for a, b in zip(x, pairs[2])]
        assert same == [context == "none"] * 4
        assert not torch.equal(pairs[0][0], vae.encode(other, first))


# --- Updates ---------------------------------------------------------------------------------


def step(vae, frames, beta):
    torch.manual_seed(1)
    return cc_rig.update_cc_vae(vae, frames, beta)


@pytest.mark.parametrize("context", ["frame", "none"])
def test_update_cc_vae(context):
    """(1) at a z with noise, with each scene's first image as the context of the others; all four
    networks move, and it helps."""
    vae, frames = tiny_vae(context=context), some_frames(2, 3) // 255 * 255
    with torch.no_grad():
        vae.encoder.head.bias.copy_(torch.tensor([0.5, -1.0, 0.2, 1.0, -2.0, 0.5]))
    torch.manual_seed(1)
    noise, s = torch.randn(2, 2, 3), torch.tensor(frames) / 255
    first = s[:, 0] * (context == "frame")
    image_loss, kl, first_loss = 0.0, 0.0, 0.0
    for e in range(2):
        c = vae.context_encoder(first[e : e + 1])
        p = vae.context_decoder(c).double().sigmoid()[0]
        first_loss -= (first[e] * p.log() + (1 - first[e]) * (1 - p).log()).sum() / 2
        for f in (1, 2):
            mean, log_var = vae.encoder(torch.cat([s[e, f], first[e]])[None])[0].split(3)
            z = mean + log_var.exp().sqrt() * noise[e, f - 1]
            p = vae.decoder(z[None, None], c).double().sigmoid()[0, 0]
            image_loss -= (s[e, f] * p.log() + (1 - s[e, f]) * (1 - p).log()).sum() / 4
            kl += 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum() / 4
    expected = image_loss + first_loss + 30 * kl
    named = [vae.encoder.head.bias, vae.context_encoder.head.bias]
    gradients = torch.autograd.grad(expected, named)
    before = [[p.detach().clone() for p in n.parameters()] for n in vae.networks.values()]
    loss = step(vae, frames, 30.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and not loss.requires_grad
    for p, gradient in zip(named, gradients):
        close(p.grad, gradient, atol=0.02 * gradient.abs().max().item())
    for old, network in zip(before, vae.networks.values()):
        assert all(not torch.equal(a, b) for a, b in zip(old[-1:], list(network.parameters())[-1:]))
    assert step(vae, frames, 30.0) < loss


def test_gradients_do_not_pile_up():
    vae, frames, seen = tiny_vae(vae_learning_rate=1e-30), some_frames(2, 2), []
    for _ in range(2):
        step(vae, frames, 1.0)
        seen.append([p.grad.clone() for n in vae.networks.values() for p in n.parameters()])
    for first, second in zip(*seen):
        assert first.abs().sum() > 0
        close(second, first, atol=1e-3 * first.abs().max().item())


def test_the_context_costs_nothing():
    """Beta changes the gradient of the encoder of z, not that of the context's or a decoder's."""
    gradients = []
    for beta in (1.0, 50.0):
        torch.manual_seed(0)
        vae = tiny_vae()
        with torch.no_grad():
            vae.encoder.head.bias.fill_(0.5)
        step(vae, some_frames(2, 2), beta)
        gradients.append([n.head.bias.grad for n in (vae.encoder, vae.context_encoder)])
        gradients[-1].append(vae.decoder.from_z.weight.grad)
    (z, context, decoder), (z_50, context_50, decoder_50) = gradients
    assert torch.equal(context, context_50) and torch.equal(decoder, decoder_50)
    assert (z - z_50).abs().max() > 1


# --- Data ------------------------------------------------------------------------------------


def scene_of(states, shapes):
    """What identifies a scene: everything but the agent."""
    return {(*s[1:, :2].ravel(), *k) for s, k in zip(states, shapes)}


@pytest.mark.parametrize(("appearances", "count"), [("1", 1), ("4", 4), ("all", 200)])
def test_scenes_of_training(appearances, count):
    """So many scenes, in which the agent is anywhere, no triangle points up, and all is at rest."""
    args = Args(appearances=appearances, seed=5)
    scenes, other = cc_rig.Scenes(args, 1), cc_rig.Scenes(args, 2)
    (states, shapes), (more, more_shapes) = scenes.start(200), other.start(200)
    assert states.shape == (200, 4, 4) and shapes.shape == (200, 4)
    found = scene_of(states, shapes)
    assert len(found) == count
    assert (found == scene_of(more, more_shapes)) == (appearances != "all")  # of any stream
    assert len({tuple(s[0]) for s in states} | {tuple(s[0]) for s in more}) == 400
    assert states[:, 0, :2].std(0) == pytest.approx([0.23] * 2, abs=0.03)
    assert (shapes[:, :2] == [1, 0]).all() and not states[:, 1:, 2:].any()
    pointing = {sprites_env.SHAPES[k] for k in shapes[:, 2:].flat}
    assert "triangle_up" not in pointing and (len(pointing) == 3 or appearances != "all")
    if appearances != "all":
        another = cc_rig.Scenes(Args(appearances=appearances, seed=6), 1).start(200)
        assert not found & scene_of(*another)


@pytest.mark.parametrize("appearances", ["1", "all"])
def test_unseen_scenes(appearances):
    """All new, both triangles up; the same ones whatever training sees."""
    states, shapes = cc_rig.Scenes(Args(appearances=appearances, seed=5), 3, unseen=True).start(50)
    assert len(scene_of(states, shapes)) == 50
    assert {sprites_env.SHAPES[k] for k in shapes[:, 2:].flat} == {"triangle_up"}
    same, _ = cc_rig.Scenes(Args(), 3, unseen=True).start(50)
    assert np.array_equal(states, same)


def test_elsewhere_moves_the_agent_alone():
    scenes = cc_rig.Scenes(Args(), 0)
    states, _ = scenes.start(50)
    before = states.copy()
    moved = scenes.elsewhere(states)
    assert np.array_equal(states, before) and np.array_equal(moved[:, 1:], states[:, 1:])
    assert np.linalg.norm((moved - states)[:, 0, :2], axis=-1).mean() > 0.3
    assert not np.array_equal(scenes.elsewhere(states), moved)


def test_images_of_short_episodes():
    """Five images of a scene, drawn as the environment does, the agent somewhere else in each."""
    args = Args()
    images, states, shapes = cc_rig.collect_scenes(cc_rig.Scenes(args, 0), 6)
    assert images.shape == (6, 5, 1, 64, 64) and images.dtype == np.uint8
    assert states.shape == (6, 5, 4, 4) and shapes.shape == (6, 4)
    env = cc_rig.make_env(args, 6)
    for f in range(5):
        seen, _ = env.reset(options={"state": states[:, f], "shapes": shapes})
        assert np.array_equal(images[:, f], seen)
        assert np.array_equal(states[:, f, 1:], states[:, 0, 1:])
    assert len(np.unique(states[:, :, 0, 0])) == 30


@pytest.fixture
def replay():
    """Four episodes of five steps, in which everything says where it is: z = 10 e + t, z_c 0.1 e,
    actions -z, the practised goal -10 e - 7; the last step of the first episode is terminal."""
    replay = cc_rig.ContextReplay(6, 5, 2, 3, 2)
    for e in (0, 2):
        z = 10.0 * np.array([[[e]], [[e + 1]]]) + np.arange(6)[None, :, None] + np.zeros(3)
        terminated = np.zeros((2, 5), bool)
        terminated[0, -1] = e == 0
        contexts = torch.tensor([[e, e], [e + 1, e + 1]]) / 10
        replay.add(torch.tensor(z), contexts, -z[:, 0] - 7, -z[:, :-1, :2], terminated)
    return replay


def test_replay_stores_side_by_side(replay):
    expected = (10 * np.arange(4)[:, None] + np.arange(6)).astype(np.float32)
    assert replay.size == 4
    close(replay.z[:4, :, 2], expected)
    close(replay.contexts[:4, 1], np.arange(4, dtype=np.float32) / 10)
    close(replay.actions[:4, :, 1], -expected[:, :5])
    close(replay.goals[:4, 0], -expected[:, 0] - 7)
    assert replay.terminated.sum() == replay.terminated[0, 4] == 1 and not replay.z[4:].any()


def test_future_goals_stay_in_their_episode(replay):
    """Every step occurs and every later one, the last too, and none before."""
    e, t, h = replay.sample(np.random.default_rng(0), 3000)
    pairs = {(a, b) for a in range(5) for b in range(a + 1, 6)}
    assert set(zip(e, t, h)) == {(k, a, b) for k in range(4) for a, b in pairs}


def test_contextual_batch(replay):
    """z̄ before and after, the action between; one goal in both, in the stated shares; the context
    of its own episode everywhere; paid by the distance in z."""
    shares = (0.2, 0.5, 0.3)
    args = Args(goal_fractions=shares, batch_size=4000, z_dim=3, context_dim=2)
    batch = cc_rig.contextual_batch(replay, np.random.default_rng(0), args, "cpu")
    x = {name: column.double().numpy() for name, column in batch.items()}
    z, context, goal, goal_context = np.split(x["before"], [3, 5, 8], axis=1)
    z_next, *rest = np.split(x["after"], [3, 5, 8], axis=1)
    e, t = z[:, 0] // 10, z[:, 0] % 10
    assert np.array_equal(z_next, z + 1) and np.array_equal(rest[1], goal)
    for c in (context, goal_context, rest[0], rest[2]):
        np.testing.assert_allclose(c, np.stack([e, e], 1) / 10, atol=1e-6)
    assert np.array_equal(x["action"], -z[:, :2])
    assert np.array_equal(x["terminated"], (e == 0) & (t == 4)) and x["terminated"].any()
    practised, imagined = goal[:, 0] == -10 * e - 7, goal[:, 0] % 1 != 0
    later = (goal[:, 0] // 10 == e) & (goal[:, 0] % 10 > t) & (goal[:, 0] % 1 == 0)
    assert (practised ^ imagined ^ later).all()
    assert set((goal[:, 0] % 10 - t)[later]) == {1, 2, 3, 4, 5}
    found = [practised.mean(), imagined.mean(), later.mean()]
    assert found == pytest.approx(shares, abs=0.03)
    assert goal[imagined].mean(0) == pytest.approx([0] * 3, abs=0.1)
    assert goal[imagined].std(0) == pytest.approx([1] * 3, abs=0.1)
    np.testing.assert_allclose(x["reward"], -np.linalg.norm(z_next - goal, axis=1), rtol=1e-5)


# --- Measures --------------------------------------------------------------------------------


def one_scene(agent=(0.5, 0.5)):
    """A square and two triangles, far from each other."""
    states = np.zeros((1, 4, 4))
    states[0, :, :2] = [agent, (0.2, 0.2), (0.2, 0.8), (0.8, 0.2)]
    return states, np.array([[1, 0, 2, 5]])


def test_scenes_without_the_agent_and_where_they_are_judged():
    states, shapes = one_scene(agent=(0.22, 0.22))  # over the square
    scenes, region = cc_rig.scenes_without_agent(states, shapes)
    assert np.array_equal(scenes, sprites_env.draw(states[:, 1:, :2], shapes[:, 1:]) / 255)
    assert region.sum() == 300 and region[0, 12, 12] and region[0, 7:17, 7:17].all()
    assert region[scenes > 0].all() and not region[0, 30:35, 30:35].any()


def test_scene_error_by_hand():
    """Two of four pixels count: (.5² + 1²) / 2."""
    images, scenes = np.array([[[0.5, 0.0], [1, 1]]]), np.array([[[1.0, 1.0], [0, 0]]])
    region = np.array([[[True, True], [False, False]]])
    assert cc_rig.scene_error(images, scenes, region) == pytest.approx(0.625)
    with pytest.raises(AssertionError):
        cc_rig.scene_error(images[0], scenes, region)


def test_centre_of_mass_by_hand():
    """Three white pixels, two of them in one place's row: rows (0 + 0 + 63) / 3 of 63."""
    scenes = np.zeros((2, 64, 64))
    scenes[0, 0, 63] = scenes[0, 0, 0] = scenes[0, 63, 0] = 1
    scenes[1, 21, 42] = 1
    close(cc_rig.centre_of_mass(scenes), np.array([[1 / 3, 1 / 3], [1 / 3, 2 / 3]]))


class Knowing:
    """A VAE that decodes z̄ to what it was encoded from: z is the agent's place, z_c the scene's
    index (or its centre of mass); imagined goals are the scenes without the agent."""

    z_dim = 2

    def __init__(self, images, states, shapes):
        self.scenes = cc_rig.scenes_without_agent(states[:, 0], shapes)[0]
        self.images, self.states = images, states

    def encode_context(self, first):
        assert np.array_equal(first, self.images[:, 0])
        centre = cc_rig.centre_of_mass(self.scenes)
        return torch.tensor(np.concatenate([centre, np.arange(len(first))[:, None]], 1))

    def encode(self, frames, first):
        assert np.array_equal(frames, self.images[:, 1])
        assert np.array_equal(first, self.images[:, 0])
        return torch.tensor(self.states[:, 1, 0, :2])

    def decode(self, codes):
        self.goals = codes[:, :2]
        return torch.tensor(self.scenes[codes[:, 4].long()])[:, None]


@pytest.mark.parametrize("appearances", ["1", "all"])
def test_look_around(appearances, monkeypatch):
    """Perfect knowledge: no error, all R² 1, but nothing of the scene from z. The mean image's
    error is that of black here. Where the scene never varies, nothing is told."""
    new = cc_rig.collect_scenes(cc_rig.Scenes(Args(appearances=appearances), 0), 400)
    vae, probe, halves = Knowing(*new), cc_rig.position_probe, []
    monkeypatch.setattr(cc_rig, "position_probe", lambda *x: halves.append(x) or probe(*x))
    found = cc_rig.look_around(vae, *new, np.zeros((64, 64)))
    assert tuple(found) == cc_rig.MEASURES
    for z, places, z_new, new_places in halves:  # fitted on one half, judged on the other
        assert [len(x) for x in (z, places, z_new, new_places)] == [200] * 4
        assert np.array_equal(np.concatenate([places, new_places])[:, :2], new[1][:, 1, 0, :2])
        assert not (z == z_new).all()
    assert found["imagined_scene_error"] == 0
    scenes, region = cc_rig.scenes_without_agent(new[1][:, 0], new[2])
    assert found["mean_scene_error"] == pytest.approx(scenes[region].mean())
    assert found["probe_r2_agent"] == pytest.approx(1)
    told = [found["probe_r2_scene_z"], found["probe_r2_scene_context"]]
    assert told == pytest.approx([0, float(appearances == "all")], abs=0.1)
    assert vae.goals.std(0).tolist() == pytest.approx([1, 1], abs=0.15)


@pytest.fixture
def held_out():
    args = Args(eval_episodes=50)
    return cc_rig.HeldOutScenes(args, cc_rig.Scenes(args, 9, unseen=True))


def test_goals_are_the_same_scene_with_the_agent_elsewhere(held_out):
    differs = (held_out.start[..., :2] != held_out.goal[..., :2]).any(-1)
    assert differs.all(0).tolist() == differs.any(0).tolist() == [True, False, False, False]
    for images, states in ((held_out.first, held_out.start), (held_out.goal_images, held_out.goal)):
        assert np.array_equal(images[:, 0], sprites_env.draw(states[..., :2], held_out.shapes))
    assert (held_out.shapes[:, 2:] == 5).all()


def test_reach_shows_codes_in_context(held_out):
    """The policy is given (mu(s, s0), z_c) and (mu(s_g, s0), z_c) of each step; straight on, it
    arrives. `distance` is the agent's."""
    held_out.env.reset()
    states = lambda: torch.tensor(held_out.env.states[:, 0, :2])  # noqa: E731
    asked = []

    class Seer:
        def encode(self, frames, first):
            assert np.array_equal(first, held_out.first)
            if frames is held_out.goal_images:
                return torch.tensor(held_out.goal[:, 0, :2])
            shown = sprites_env.draw(held_out.env.states[..., :2], held_out.shapes)
            assert np.array_equal(frames[:, 0], shown)
            return states()

        def encode_context(self, first):
            assert np.array_equal(first, held_out.first)
            return torch.arange(50)[:, None] + torch.zeros(50, 3).double()

    def act(codes, goals):
        asked.append((codes, goals))
        return ((goals - codes)[:, :2] / sprites_env.MAX_SPEED).clamp(-1, 1).numpy()

    path = held_out.reach(SimpleNamespace(act=act), Seer())
    assert path.shape == (41, 50, 4, 2) and len(asked) == 40
    assert np.array_equal(path[0], held_out.start[..., :2])
    assert held_out.distance(path[-1]).max() < 0.01 and held_out.distance(path[0]).mean() > 0.3
    for step, (codes, goals) in enumerate(asked):
        close(codes[:, :2], path[step, :, 0])
        close(goals[:, :2], held_out.goal[:, 0, :2])
        assert torch.equal(codes[:, 2:], goals[:, 2:]) and (codes[7, 2:] == 7).all()
    away = held_out.goal[..., :2] + np.array([[0.03, 0.04], [9, 9], [9, 9], [9, 9]])
    close(held_out.distance(away), np.full(50, 0.05))


# --- Phases of a run -------------------------------------------------------------------------


def test_see_lowers_beta_in_equal_ratios(monkeypatch):
    """From 16 to 1 in four steps: 16, 8, 4, 2; whole scenes, drawn anew each time."""
    calls, images = [], np.arange(100)[:, None] + 100 * np.arange(4)
    monkeypatch.setattr(cc_rig, "update_cc_vae", lambda *args: calls.append(args))
    args = Args(vae_updates=4, beta_start=16.0, beta=1.0)
    cc_rig.see_scenes("vae", images, np.random.default_rng(0), args)
    assert [beta for *_, beta in calls] == pytest.approx([16, 8, 4, 2])
    for vae, frames, _ in calls:
        assert vae == "vae" and frames.shape == (32, 4)
        assert np.array_equal(frames, frames[:, :1] + 100 * np.arange(4))
    assert len({tuple(frames[:, 0]) for _, frames, _ in calls}) == 4


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


class Checksum:
    """Codes that tell which images they are of: z of the image and its s0, z_c of s0."""

    weights = torch.linspace(0.5, 1.5, 4096) / 1e5

    def __init__(self):
        self.seen = []

    def sums(self, frames):
        return torch.tensor(frames).float().flatten(1) @ self.weights

    def encode_context(self, first):
        return torch.stack([self.sums(first)] * 2, 1)

    def encode(self, frames, first):
        self.seen.append((frames.copy(), first.copy()))
        return torch.stack([self.sums(frames), self.sums(first)], 1)


def practice(monkeypatch, env_class=Ending, noise=0.3):
    """Two episodes a round; random ones in the first. The policy always does (0, .9)."""
    monkeypatch.setattr(cc_rig, "RANDOM_STEPS", 2 * 100)
    args = Args(noise=noise, num_envs=2, z_dim=2, context_dim=2, appearances="4")
    env = env_class(2, distractors=2, task="reach", horizon=100)
    episodes, rng = sprites_env.Episodes(env, 7), np.random.default_rng(0)
    scenes, asked, vae = cc_rig.Scenes(args, 0), [], Checksum()
    act = np.tile(np.float32([0, 0.9]), (2, 1))
    agent = SimpleNamespace(act=lambda *x: asked.append(x) or act)
    replay = cc_rig.ContextReplay(4, 100, 2, 2, 2)
    for _ in range(2):
        cc_rig.practise_here(agent, vae, episodes, scenes, replay, rng, args)
    return replay, asked, vae.seen, scenes


def test_practise_stores_codes_in_the_context_of_their_own_episode(monkeypatch):
    """Every image is encoded beside the first one of its episode, the last one too; scenes are
    those of training; goals are those that the policy was asked for, in the same context."""
    replay, asked, seen, scenes = practice(monkeypatch)
    assert replay.size == 4 and len(asked) == 200 and len(seen) == 202
    for r, new in enumerate((slice(0, 2), slice(2, 4))):
        own, first = seen[101 * r : 101 * (r + 1)], seen[101 * r][0]
        assert all(np.array_equal(s0, first) for _, s0 in own)
        sums = [Checksum().sums(s) for s, _ in own]
        close(replay.z[new, :, 0], torch.stack(sums, 1))
        close(replay.contexts[new, 0], sums[0])
        still = sprites_env.draw(scenes.fixed[0][:, 1:, :2], scenes.fixed[1][:, 1:])
        for image in np.stack([s for s, _ in own]).reshape(-1, 64, 64):
            assert any((image[x > 0] == 255).all() for x in still)
        for t, (codes, goals) in enumerate(asked[100 * r : 100 * (r + 1)]):
            close(codes[:, :2], replay.z[new, t])
            close(goals[:, :2], replay.goals[new])
            close(codes[:, 2:], replay.contexts[new])
            close(goals[:, 2:], replay.contexts[new])
    assert len(np.unique(replay.goals)) == 8
    assert not np.array_equal(seen[100][0], seen[101][0])


def test_practise_a_time_limit_is_not_terminal(monkeypatch):
    replay, *_ = practice(monkeypatch)
    assert replay.terminated[[0, 2], -1].all() and replay.terminated.sum() == 2
    with pytest.raises(AssertionError):
        practice(monkeypatch, Ragged)


def test_practise_explores(monkeypatch):
    """Uniformly at first; then what the policy does, with noise of the stated size, in the box."""
    replay, *_ = practice(monkeypatch)
    random, noisy = replay.actions[:2], replay.actions[2:]
    assert random.std() == pytest.approx(1 / math.sqrt(3), abs=0.04)
    assert abs(random.mean()) < 0.1 and np.abs(random).max() <= 1
    assert noisy[..., 0].std() == pytest.approx(0.3, abs=0.05) and abs(noisy[..., 0].mean()) < 0.07
    assert noisy[..., 1].max() == 1
    replay, *_ = practice(monkeypatch, noise=0.0)
    close(replay.actions[2:], np.tile(np.float32([0, 0.9]), (2, 100, 1)))


# --- The story of a run ----------------------------------------------------------------------


def load(out, **changes):
    """The networks of a run's checkpoint."""
    args, saved = Args(**TINY | changes), torch.load(out / "checkpoint.pt", weights_only=True)
    vae = cc_rig.CCVAE(args, torch.device("cpu"))
    agent = cc_rig.GoalAgent(args.z_dim + args.context_dim, 2, args, "cpu")
    for name, network in (vae.networks | {"actor": agent.actor, "critic": agent.critic}).items():
        network.load_state_dict(saved[name])
    return vae, agent, saved["step"]


PHASES = "collect_scenes see_scenes look_around practise_here contextual_batch update_goal_critic "
PHASES += "update_goal_actor"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run in episodes of four steps, two environments, three rounds, of which every call of a
    phase is written down: (name, arguments, result)."""
    out, calls, make_env = tmp_path_factory.mktemp("story"), [], cc_rig.make_env
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cc_rig, "make_env", lambda *a, **k: make_env(*a, **{"horizon": 4} | k))
        patch.setattr(cc_rig, "REPORT_EVERY", 15)
        patch.setattr(cc_rig, "PROBED", 20)
        without_pictures(patch)
        curve = []  # the arguments of draw_curve
        patch.setattr(sprites_env, "draw_curve", lambda *a: curve.append(a) or Figure((1, 1)))
        for name in PHASES.split():

            def call(*args, name=name, f=getattr(cc_rig, name)):
                calls.append((name, args, f(*args)))
                return calls[-1][2]

            patch.setattr(cc_rig, name, call)
        changes = {"num_envs": 2, "total_steps": 31, "gamma": 0.7, "tau": 0.3, "seed": 2}
        changes |= {"appearances": "4"}
        summary = run(out, **changes)
        args = Args(**TINY | changes)
        vae, agent, step = load(out, **changes)
    of = {name: [(a, r) for n, a, r in calls if n == name] for name in PHASES.split()}
    return SimpleNamespace(**locals())


def test_story_order(story):
    """See, look at both kinds, then rounds: updates as many as steps, every second one with an
    actor's; reported after 15 steps and at the end."""
    letters = dict(zip(PHASES.split(), "CSLpbca"))
    names = "".join(letters[name] for name, *_ in story.calls)
    assert names == "CSCLCL" + 3 * ("p" + 4 * "bcabc")
    assert [row["step"] for row in untimed_rows(story.out)] == ["16", "24"] and story.step == 24


def test_story_who_learns_from_what(story):
    """The VAE from the scenes of training; both kinds are measured; the batch just made, for both
    updates; gamma and tau; scenes of the same stream for images and practice."""
    (own, own_result), (seen, _), (unseen, _) = story.of["collect_scenes"]
    [((vae, images, *_), _)] = story.of["see_scenes"]
    assert images is own_result[0] and len(images) == 40
    assert [x[0].unseen for x in (own, seen, unseen)] == [False, False, True]
    measured = [args for args, _ in story.of["look_around"]]
    close(measured[0][4], own_result[0][:, :, 0].reshape(-1, 64, 64).mean(0) / 255)
    assert measured[0][4] is measured[1][4]
    for args, made in zip(measured, story.of["collect_scenes"][1:]):
        assert args[0] is vae and all(map(np.array_equal, args[1:4], made[1]))
    again = cc_rig.collect_scenes(cc_rig.Scenes(story.args, 200_000), 40)
    assert np.array_equal(images, again[0])
    for (args, _), unseen in zip(story.of["collect_scenes"][1:], (False, True)):
        scenes = cc_rig.Scenes(story.args, 10**9 + 50_000, unseen)
        scenes.start(args[1])
        for _ in range(4):
            scenes.elsewhere(np.zeros((args[1], 4, 4)))
        assert scenes.rng.bit_generator.state == args[0].rng.bit_generator.state
    for args, _ in story.of["practise_here"]:
        assert args[1] is vae and args[3] is own[0]
    batches = [result for _, result in story.of["contextual_batch"]]
    for (args, _), batch in zip(story.of["update_goal_critic"], batches):
        assert args[1] is batch and args[2] == 0.7
    for (args, _), batch in zip(story.of["update_goal_actor"], batches[::2]):
        assert args[1] is batch and args[2] == 0.3


@pytest.mark.parametrize("unseen", [False, True])
def test_story_measured_again(story, unseen):
    """The saved networks reach for goals once more, in the environment itself."""
    scenes = cc_rig.Scenes(story.args, 10**9, unseen)
    start, shapes = scenes.start(3)
    goal = scenes.elsewhere(start)
    goals, first = (sprites_env.draw(x[..., :2], shapes)[:, None] for x in (goal, start))
    env = sprites_env.SpritesVectorEnv(3, 2, task="reach", horizon=5)
    obs, _ = env.reset(options={"state": start, "shapes": shapes})
    context = story.vae.encode_context(first)
    codes = lambda frames: torch.cat([story.vae.encode(frames, first), context], 1)  # noqa: E731
    for _ in range(4):
        obs, *_ = env.step(story.agent.act(codes(obs), codes(goals)))
    far = np.linalg.norm((env.states - goal)[:, 0, :2], axis=-1)
    last, name = untimed_rows(story.out)[-1], "unseen_agent" if unseen else "final_agent"
    for found in (story.summary, last):
        assert float(found[f"{name}_distance"]) == pytest.approx(far.mean(), abs=1e-5)
        success = "unseen_success_rate" if unseen else "success_rate"
        assert float(found[success]) == (far < 0.05).mean()
    if not unseen:
        untouched = np.linalg.norm((start - goal)[:, 0, :2], axis=-1).mean()
        assert story.summary["untouched_agent_distance"] == pytest.approx(untouched)
    else:
        untouched = np.linalg.norm((start - goal)[:, 0, :2], axis=-1).mean()
        assert story.summary["unseen_untouched_distance"] == pytest.approx(untouched)
        [(_, panels, x_label, levels, *_)] = story.curve
        assert levels == [("untouched", story.summary["unseen_untouched_distance"])]
        assert panels[0][1] == ["final_agent_distance", "unseen_agent_distance"]
        assert x_label == "environment steps"


def test_story_last_batch_and_summary(story):
    last = untimed_rows(story.out)[-1]
    _, critic = story.of["update_goal_critic"][-1]
    _, actor = story.of["update_goal_actor"][-1]
    _, batch = story.of["contextual_batch"][-1]
    assert float(last["critic_loss"]) == critic["critic_loss"].item()
    assert float(last["q"]) == actor["q"].item()
    assert float(last["reward"]) == pytest.approx(batch["reward"].mean().item())
    assert story.summary["eval_episodes"] == 3
    assert 0 <= story.summary["vae_minutes"] <= story.summary["minutes"]
    for prefix, (_, found) in zip(("", "unseen_"), story.of["look_around"]):
        for name, x in found.items():
            assert story.summary[prefix + name] == x


@pytest.mark.parametrize("changes", [{}, {"context": "none", "appearances": "1", "num_envs": 2}])
def test_runs_and_is_deterministic(tmp_path, monkeypatch, changes):
    """The second time without pictures."""
    a, b = tmp_path / "a", tmp_path / "b"
    summary = run(a, **changes)
    without_pictures(monkeypatch)
    again = run(b, **changes)
    assert untimed_rows(a) == untimed_rows(b)
    assert summary == json.loads((a / "summary.json").read_text())
    expected = {"final_agent_distance", "unseen_agent_distance", "success_rate", "eval_episodes"}
    expected |= {"unseen_success_rate", "untouched_agent_distance", "unseen_untouched_distance"}
    expected |= {kind + name for kind in ("", "unseen_") for name in cc_rig.MEASURES}
    assert summary.keys() == again.keys() == expected | {"minutes", "vae_minutes"}
    assert all(summary[name] == again[name] for name in expected)
    assert all(f"`{name}`" in cc_rig.__doc__ for name in summary)
    pictures = {"curve.png", "imagined_goals.png", "exchanged.png", "reached.png", "rollout.gif"}
    for name in pictures:
        with Image.open(a / name) as image:
            image.load()
    files = pictures | {"args.json", "curve.csv", "summary.json", "checkpoint.pt"}
    assert {file.name for file in a.iterdir()} == files
    saved = torch.load(a / "checkpoint.pt", weights_only=True)
    names = {"encoder", "context_encoder", "decoder", "context_decoder", "actor", "critic", "step"}
    assert saved.keys() == names


OTHER = {"context": "none", "appearances": "1", "z_dim": 2, "context_dim": 4, "beta": 3.0}
OTHER |= {"beta_start": 9.0, "scenes": 41, "vae_updates": 4, "vae_learning_rate": 1e-3}
OTHER |= {"total_steps": 30, "num_envs": 2, "goal_fractions": (0.0, 0.0, 1.0), "noise": 0.5}
OTHER |= {"batch_size": 9, "learning_rate": 2e-3, "gamma": 0.5, "tau": 0.5, "seed": 2}


def test_every_flag_has_an_effect(tmp_path, monkeypatch):
    """On the weights of the actor, which come last. (Shorter episodes: ten steps.)"""
    without_pictures(monkeypatch)
    make_env = cc_rig.make_env
    monkeypatch.setattr(cc_rig, "make_env", lambda *a, **k: make_env(*a, **{"horizon": 10} | k))
    monkeypatch.setattr(sprites_env.subprocess, "getoutput", lambda command: "")
    monkeypatch.setattr(cc_rig, "RANDOM_STEPS", 10)
    monkeypatch.setattr(cc_rig, "VAE_SCENES", 2)

    def weights(name, **changes):
        short = {"total_steps": 20, "eval_episodes": 2} | changes
        run(tmp_path / name, **short)
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["actor"]

    before = weights("before")
    for name, value in OTHER.items():
        after = weights(name, **{name: value})
        assert any(
            a.shape != b.shape or not torch.equal(a, b)
            for a, b in zip(before.values(), after.values())
        ), name
    same = weights("same", eval_episodes=5)  # measuring does not disturb training
    assert all(map(torch.equal, before.values(), same.values()))


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    run(tmp_path, total_steps=40)
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path, total_steps=40)
    run(tmp_path, total_steps=40, overwrite=True)


# --- Learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["frame", "none"])
def test_the_vae_learns_what_stays(context, monkeypatch):
    """Three seconds, in scenes never seen: imagined goals keep much of the scene; another
    context is another scene. Without a context, no more than the mean image."""
    monkeypatch.setattr(cc_rig, "VAE_SCENES", 16)
    args = Args(context=context, scenes=1000, vae_updates=60, vae_learning_rate=4e-3)
    scenes, rng = cc_rig.Scenes(args, 0), np.random.default_rng(0)
    images, *_ = cc_rig.collect_scenes(scenes, args.scenes)
    vae = cc_rig.CCVAE(args, torch.device("cpu"))
    cc_rig.see_scenes(vae, images, rng, args)
    new, mean_image = cc_rig.collect_scenes(scenes, 600), images.mean((0, 1, 2)) / 255
    found = cc_rig.look_around(vae, *new, mean_image)
    context = vae.encode_context(new[0][:, 0])
    still, region = cc_rig.scenes_without_agent(new[1][:, 0], new[2])
    drawn = vae.decode(cc_rig.imagine_here(context.roll(1, 0), args.z_dim))[:, 0].numpy()
    exchanged = cc_rig.scene_error(drawn, np.roll(still, 1, 0), np.roll(region, 1, 0))
    kept = found["imagined_scene_error"] / found["mean_scene_error"]
    if args.context == "frame":
        assert kept < 0.75 and exchanged < 0.75 * found["mean_scene_error"]
        assert found["probe_r2_scene_context"] > 0.5
    else:
        assert kept > 0.9


class Matched:
    """In place of the CC-VAE: z is where a disc fits best, z_c how many pixels of s0 are white."""

    networks = {}

    def __init__(self, args, device):
        self.z_dim = 2
        disc = np.zeros((12, 12)) + sprites_env.sprites()[1]
        self.kernel = torch.tensor(2 * disc - 1).float()[None, None]

    def encode(self, frames, first):
        score = F.conv2d(torch.as_tensor(frames) / 255, self.kernel, padding=6)[:, 0, :64, :64]
        best = score.flatten(1).argmax(1)
        return (torch.stack([best // 64, best % 64], 1) / 63 - 0.5) / 0.23

    def encode_context(self, first):
        return (torch.as_tensor(first) / 2550).mean((1, 2, 3))[:, None] + torch.zeros(1, 5)


def test_the_agent_learns_to_reach(tmp_path, monkeypatch):
    """Three seconds, places found by a fitting disc. Doing nothing leaves .4."""
    without_pictures(monkeypatch)
    monkeypatch.setattr(cc_rig, "CCVAE", Matched)
    monkeypatch.setattr(cc_rig, "see_scenes", lambda *args: None)
    monkeypatch.setattr(cc_rig, "look_around", lambda *args: {})
    monkeypatch.setattr(cc_rig, "HIDDEN", 64)
    monkeypatch.setattr(cc_rig, "RANDOM_STEPS", 400)
    changes = {"total_steps": 1200, "num_envs": 5, "batch_size": 64, "eval_episodes": 50}
    summary = run(tmp_path, **changes, z_dim=2, learning_rate=1e-3)
    assert summary["untouched_agent_distance"] > 0.3
    assert summary["final_agent_distance"] < 0.2 and summary["unseen_agent_distance"] < 0.2


# --- Pictures --------------------------------------------------------------------------------


def test_pictures_of_what_is_imagined(monkeypatch):
    """Below each scene goals in its own context, all of them different; in the other picture one
    z_g for each row."""
    monkeypatch.setattr(sprites_env, "draw_images", lambda rows: rows)
    files, asked, first = {}, [], some_frames(9)
    decode = lambda codes: asked.append(codes) or torch.zeros(len(codes), 1, 64, 64)  # noqa: E731
    context = lambda first: torch.as_tensor(first[:, 0, 0, :5]).float()  # noqa: E731
    vae = SimpleNamespace(z_dim=3, decode=decode, encode_context=context)
    cc_rig.draw_imagined_here(SimpleNamespace(save=files.__setitem__), vae, first)
    for name in ("imagined_goals.png", "exchanged.png"):
        rows = files[name]
        assert [len(row) for row in rows.values()] == [8] * 4
        assert np.array_equal(rows["s₀"], first[:8, 0] / 255)
    assert len(asked) == 6
    for codes in asked:
        assert torch.equal(codes[:, 3:], context(first[:8]))
    for fresh, same in zip(asked[:3], asked[3:]):
        assert len(fresh[:, :3].unique()) == 24 and len(same[:, :3].unique()) == 3
        assert torch.equal(same[0, :3], fresh[0, :3])
