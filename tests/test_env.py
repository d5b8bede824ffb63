"""The environment against its specification: geometry, dynamics, gymnasium's interface."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

import sprites_env
from sprites_env import SHAPES, SpritesEnv, SpritesVectorEnv


@pytest.mark.parametrize("observation", ["image", "state"])
@pytest.mark.parametrize("distractors", [0, 2])
def test_gymnasium_checker_is_silent(observation, distractors):
    env = gymnasium.make(
        "Sprites-v0", distractors=distractors, observation=observation, render_mode="rgb_array"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


@pytest.mark.parametrize("observation, stack", [("image", 1), ("image", 3), ("state", 1)])
@pytest.mark.parametrize("task", ["follow", "repel", "reach", "push"])
def test_vector_equals_single_environments(observation, stack, task):
    options = {"distractors": 2, "observation": observation, "task": task, "horizon": 5}
    options |= {"frame_stack": stack}
    vector = gymnasium.make_vec("Sprites-v0", num_envs=3, **options)
    assert isinstance(vector, SpritesVectorEnv)
    singles = [gymnasium.make("Sprites-v0", **options) for _ in range(3)]
    batch, _ = vector.reset(seed=7)
    assert batch.shape == vector.observation_space.shape and vector.observation_space.contains(
        batch
    )
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=7 + i)[0], batch[i])
    rng = np.random.default_rng(0)
    for t in range(1, 13):  # across two episode ends
        actions = rng.uniform(-1.5, 1.5, (3, 2))
        batch, rewards, terminated, truncated, info = vector.step(actions)
        assert not terminated.any() and truncated.tolist() == [t % 5 == 0] * 3
        assert ("final_obs" in info) == (t % 5 == 0)
        for i, env in enumerate(singles):
            obs, reward, term, trunc, _ = env.step(actions[i])
            assert type(reward) is float and term is False and trunc is (t % 5 == 0)
            assert reward == rewards[i]
            if trunc:
                assert info["_final_obs"][i]
                np.testing.assert_array_equal(info["final_obs"][i], obs)
                obs, _ = env.reset()
            np.testing.assert_array_equal(obs, batch[i])


@pytest.mark.parametrize("make", [SpritesEnv, SpritesVectorEnv])
def test_stacked_frames(make):
    """The newest last; at a start, from a given state too, the first frame three times."""
    env, plain = make(horizon=4, frame_stack=3), make(horizon=4)
    single = make is SpritesEnv
    assert getattr(env, "observation_space" if single else "single_observation_space").shape == (
        3,
        64,
        64,
    )
    pixels = lambda obs: obs if single else obs[0]  # noqa: E731
    actions = np.full(2 if single else (1, 2), 0.7)
    state = np.array([[0.2, 0.3, 0, 0], [0.5, 0.6, 0.05, -0.05]])
    for options in (None, {"state": state if single else state[None]}):
        frame = pixels(plain.reset(seed=3, options=options)[0])[0]
        seen = [frame] * 3
        np.testing.assert_array_equal(pixels(env.reset(seed=3, options=options)[0]), seen)
        for t in range(1, 5):
            obs, *_, info = env.step(actions)
            last, *_, told = plain.step(actions)
            if t == 4 and not single:
                obs, last = info["final_obs"], told["final_obs"]
            seen = [*seen[1:], pixels(last)[0]]
            np.testing.assert_array_equal(pixels(obs), seen)
        assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


def test_observations_are_fresh_memory():
    env = SpritesVectorEnv(2, observation="image")
    first, _ = env.reset(seed=0)
    kept = first.copy()
    env.step(np.ones((2, 2)))
    np.testing.assert_array_equal(first, kept)


def test_same_seed_same_episode_and_other_seed_another():
    env = SpritesEnv(distractors=2)
    a, b, c = (env.reset(seed=s)[0] for s in (3, 3, 4))
    assert (a == b).all() and (a != c).any()


def test_dynamics_and_reward_by_hand():
    """One step from a known state: agent moves by 0.05 action; the target bounces off x = 0.9."""
    env = SpritesEnv(observation="state")
    env.reset(options={"state": [[0.50, 0.50, 0.00, 0.00], [0.88, 0.30, 0.05, -0.01]]})
    obs, reward, *_ = env.step([1.0, -0.4])
    expected = [0.55, 0.48, 0.05, -0.02, 0.87, 0.29, -0.05, -0.01]
    np.testing.assert_allclose(obs, expected, atol=1e-6)
    assert reward == pytest.approx(1 - np.hypot(0.32, 0.19) / np.sqrt(2))
    env = SpritesEnv(observation="state", task="repel")
    env.reset(options={"state": [[0.11, 0.5, 0, 0], [0.88, 0.30, 0.05, -0.01]]})
    obs, reward, *_ = env.step([-9.0, 0.0])  # clipped to -1; bounces off x = 0.1
    np.testing.assert_allclose(obs[:4], [0.14, 0.5, 0.05, 0], atol=1e-6)
    assert reward == pytest.approx(np.hypot(0.73, 0.21) / np.sqrt(2))


def test_constant_velocity_is_a_triangle_wave():
    """Many steps against the closed form, and in bounds at any time."""
    rng = np.random.default_rng(0)
    _, states, rewards = sprites_env.sample_trajectories(rng, 50, 60, 2, num_frames=1)
    t = np.arange(60)[None, :, None, None]
    unfolded = states[:, :1, :, :2] - 0.1 + t * states[:, :1, :, 2:]
    phase = unfolded % 1.6
    np.testing.assert_allclose(states[..., :2], 0.1 + np.minimum(phase, 1.6 - phase), atol=1e-9)
    np.testing.assert_allclose(np.abs(states[..., 2:]), np.abs(states[:, :1, :, 2:]).repeat(60, 1))
    distance = np.linalg.norm(states[:, :, 0, :2] - states[:, :, 1, :2], axis=-1)
    np.testing.assert_allclose(rewards["follow"], 1 - distance / np.sqrt(2), atol=1e-6)
    np.testing.assert_array_equal(rewards["agent_x"], states[:, :, 0, 0].astype(np.float32))
    np.testing.assert_array_equal(rewards["target_y"], states[:, :, 1, 1].astype(np.float32))


@pytest.mark.parametrize("hold", [1, 4])
def test_walks(hold):
    """Each action, once for `hold` steps, led from a state to the next; the others drift."""
    states, shapes, actions = sprites_env.sample_walks(np.random.default_rng(2), 300, 11, 2, hold)
    assert states.shape == (300, 11, 4, 4) and shapes.shape == (300, 4)
    assert actions.shape == (300, 10, 2) and actions.dtype == np.float32
    for t in range(10):
        np.testing.assert_array_equal(
            states[:, t + 1], sprites_env.act(states[:, t], actions[:, t])
        )
        assert (actions[:, t] == actions[:, t - t % hold]).all()
    assert len(np.unique(actions)) > 299 * 2 * -(-10 // hold)
    assert abs(actions.mean()) < 0.05 and abs(actions.var() - 1 / 3) < 0.03
    start, shapes_too = sprites_env.sample_states(np.random.default_rng(2), 300, 2)
    np.testing.assert_array_equal(start, states[:, 0])
    np.testing.assert_array_equal(shapes, shapes_too)
    speed = np.abs(states[:, :, 1:, 2:])
    np.testing.assert_allclose(speed, speed[:, :1].repeat(11, axis=1))


def test_trajectory_frames_are_those_of_the_states():
    frames, states, _ = sprites_env.sample_trajectories(
        np.random.default_rng(1), 4, 6, 1, num_frames=3
    )
    assert frames.shape == (4, 3, 64, 64) and frames.dtype == np.uint8
    for b in range(4):  # the target, a full square of 10 x 10 pixels, is where its state says
        for t in range(3):
            i, j = np.floor(63 * states[b, t, 1, :2]).astype(int)
            assert (frames[b, t, i - 5 : i + 5, j - 5 : j + 5] == 255).all()


def test_sprites():
    widths = {
        "circle": [1, 5, 7, 7, 9, 7, 7, 5, 1],
        "square": [10] * 10,
        "triangle_up": [2, 2, 4, 4, 6, 6, 8, 8, 10, 10],
        "triangle_down": [10, 10, 8, 8, 6, 6, 4, 4, 2, 2],
    }
    for name, expected in widths.items():
        frame = sprites_env.draw(np.full((1, 1, 2), 0.5), np.array([[SHAPES.index(name)]]))[0]
        assert set(np.unique(frame)) == {0, 255}
        rows = (frame > 0).sum(1)
        assert rows[rows > 0].tolist() == expected, name
    right, left = (
        sprites_env.draw(np.full((1, 1, 2), 0.5), np.array([[SHAPES.index(f"triangle_{side}")]]))[0]
        for side in ("right", "left")
    )
    assert (right > 0).sum(0)[26:36].tolist() == widths["triangle_down"]
    assert (left > 0).sum(0)[26:36].tolist() == widths["triangle_up"]


def test_draw_equals_drawing_pixel_by_pixel():
    rng = np.random.default_rng(2)
    positions, shapes = rng.random((20, 4, 2)), rng.integers(0, 6, (20, 4))
    positions[0] = 0.0  # sprites cut off by the frame's edges
    positions[1] = 1.0
    sprites = sprites_env.sprites()
    expected = np.zeros((20, 64, 64), np.uint8)
    for n in range(20):
        for k in range(4):
            i0, j0 = np.floor(63 * positions[n, k]).astype(int) - 6
            for i in range(12):
                for j in range(12):
                    inside = 0 <= i0 + i < 64 and 0 <= j0 + j < 64
                    if inside and sprites[shapes[n, k], i, j]:
                        expected[n, i0 + i, j0 + j] = 255
    np.testing.assert_array_equal(sprites_env.draw(positions, shapes), expected)
    packed = sprites_env.draw_packed(positions, shapes)
    assert packed.shape == (20, 64) and packed.dtype == np.uint64
    np.testing.assert_array_equal(sprites_env.unpack(packed), expected)


def test_reset_from_a_given_state():
    state = np.array([[0.2, 0.3, 0.01, 0.02], [0.4, 0.5, 0, 0], [0.6, 0.7, -0.05, 0.05]])
    env = SpritesEnv(distractors=1)
    obs, _ = env.reset(options={"state": state, "shapes": [1, 0, 5]})
    expected = sprites_env.draw(state[None, :, :2], np.array([[1, 0, 5]]))
    np.testing.assert_array_equal(obs, expected)
    vector = SpritesVectorEnv(2, distractors=1, observation="state")
    obs, _ = vector.reset(options={"state": [state, state[:, [1, 0, 3, 2]]]})
    np.testing.assert_allclose(obs[0], state.ravel(), atol=1e-7)
    obs2, _ = vector.reset(options={"state": obs.reshape(2, 3, 4)})  # float32 round trip
    np.testing.assert_array_equal(obs, obs2)
    for bad in (state[:2], state + 1, np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match="reset: "):
            env.reset(options={"state": bad})
    with pytest.raises(ValueError, match="reset: shapes"):
        env.reset(options={"shapes": [1, 0, 6]})


def returns_of(name, task, episodes=4000):
    env = SpritesVectorEnv(episodes, distractors=0, observation="state", task=task)
    env.reset(seed=0)
    rng, total = np.random.default_rng(1), np.zeros(episodes)
    for _ in range(40):
        _, reward, _, truncated, _ = env.step(sprites_env.CONTROLLERS[name](rng, env.states))
        total += reward
    assert truncated.all()
    return total.mean()


@pytest.mark.parametrize("task", ["follow", "repel"])
def test_returns_of_reference_controllers(task):
    for name, expected in sprites_env.REFERENCE_RETURNS[task].items():
        assert returns_of(name, task) == pytest.approx(expected, abs=0.15), name
    assert returns_of("still", "follow") == pytest.approx(28.2, abs=0.15)


def test_score():
    assert sprites_env.score(28.2) == 0
    assert sprites_env.score(38.9) == 1
    assert sprites_env.score(19.1, "repel") == 1


@pytest.mark.parametrize(
    "option",
    [{"distractors": -1}, {"observation": "sound"}, {"task": "sleep"}, {"horizon": 0}]
    + [{"render_mode": "human"}, {"distractors": True}, {"horizon": 4.0}, {"horizon": True}]
    + [{"frame_stack": 0}, {"frame_stack": 2.0}, {"frame_stack": 2, "observation": "state"}],
)
def test_bad_options_are_named(option):
    for make in (SpritesEnv, SpritesVectorEnv):
        with pytest.raises(ValueError, match=next(iter(option))):
            make(**option)


def test_bad_actions_are_refused():
    env, vector = SpritesEnv(), SpritesVectorEnv(2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step([0, 0])
    env.reset(), vector.reset()
    for action in ([0, 0, 0], ["0", "0"], [1j, 0]):
        with pytest.raises(ValueError, match="action must be"):
            env.step(action)
    for action in ([np.nan, 0], [0, np.inf]):  # no mistake of the caller's: a diverged policy
        with pytest.raises(FloatingPointError, match="action must be finite"):
            env.step(action)
    with pytest.raises(ValueError, match="action"):
        vector.step(np.zeros(2))


def test_render():
    env = SpritesEnv(distractors=1, render_mode="rgb_array")
    env.reset(options={"state": [[0.2, 0.2, 0, 0], [0.5, 0.5, 0, 0], [0.8, 0.8, 0, 0]]})
    image = env.render()
    assert image.dtype == np.uint8 and image.shape == (256, 256, 3)
    for position, colour in zip((0.2, 0.5, 0.8), sprites_env.COLOURS):
        at = 4 * int(63 * position) + 2
        assert (image[at, at] == colour).all()
    env = SpritesEnv()
    env.reset()
    assert env.render() is None
    for env in (SpritesEnv(), SpritesVectorEnv(2)):
        with pytest.raises(RuntimeError, match="reset before render"):
            env.render()


# --- Goal tasks ------------------------------------------------------------------------------


def push_from(agent, square, action, steps=1):
    """Positions of agent and square after some steps of `push`."""
    env = SpritesEnv(observation="state", task="push")
    env.reset(options={"state": [[*agent, 0, 0], [*square, 0, 0]]})
    for _ in range(steps):
        obs, reward, *_ = env.step(action)
        assert reward == 0
    return obs[[0, 1, 4, 5]].tolist()


def test_push_by_hand():
    """Squares start .16 away, a step is .05, contact is at .15: the square gives way by .04."""
    apart, moved = ([0.5, 0.34], [0.5, 0.5]), [0.5, 0.39, 0.5, 0.54]
    assert push_from(*apart, [0, 1]) == pytest.approx(moved)
    assert push_from(*apart, [0, -1]) == pytest.approx([0.5, 0.29, 0.5, 0.5])  # away
    # from the other side, and along the other axis; the smaller difference stays as it is
    assert push_from([0.66, 0.55], [0.5, 0.5], [-1, 0]) == pytest.approx([0.61, 0.55, 0.46, 0.5])
    # past a corner: the square gives way along the axis on which they overlap less
    assert push_from([0.36, 0.34], [0.5, 0.5], [0, 0.5]) == pytest.approx([0.36, 0.365, 0.51, 0.5])
    # side by side, .15 apart, they slide along each other
    assert push_from([0.35, 0.4], [0.5, 0.5], [0, 1]) == pytest.approx([0.35, 0.45, 0.5, 0.5])


def test_push_ends_at_the_bound_of_the_square():
    """The square stops at .75, and holds the agent at .60."""
    assert push_from([0.5, 0.5], [0.5, 0.65], [0, 1], 9) == pytest.approx([0.5, 0.6, 0.5, 0.75])


def test_push_never_overlaps_and_only_touch_moves_the_square():
    env = SpritesVectorEnv(200, distractors=1, observation="state", task="push")
    env.reset(seed=3)
    rng, moved = np.random.default_rng(4), np.zeros(200, bool)
    for _ in range(39):
        before = env.states
        action = rng.uniform(-1, 1, (200, 2))
        env.step(action)
        gap = np.abs(env.states[:, 1, :2] - env.states[:, 0, :2]).max(-1)
        assert (gap > 0.15 - 1e-9).all()
        assert (np.abs(env.states[:, 1, :2] - 0.5) <= 0.25 + 1e-9).all()
        assert (np.abs(env.states[:, 0, :2] - 0.5) <= 0.4 + 1e-9).all()
        assert (env.states[:, 1:, 2:] == 0).all() and (env.states[:, 2] == before[:, 2]).all()
        shifted = (env.states[:, 1, :2] != before[:, 1, :2]).any(-1)
        alone = np.abs(sprites_env.act(before, action)[:, 0, :2] - before[:, 1, :2]).max(
            -1
        )  # where the agent would have gone
        assert (alone[shifted] < 0.15).all()
        moved |= shifted
    assert 0.05 < moved.mean() < 0.6


def test_reach_leaves_everything_but_the_agent_at_rest():
    env = SpritesVectorEnv(50, distractors=2, observation="state", task="reach")
    env.reset(seed=0)
    start = env.states
    for _ in range(10):
        _, rewards, *_ = env.step(np.ones((50, 2)))
        assert (rewards == 0).all()
    assert (env.states[:, 1:] == start[:, 1:]).all()
    assert (env.states[:, 0, :2] != start[:, 0, :2]).any()
    assert np.ptp(start[:, 1, 0]) > 0.7  # anywhere


@pytest.mark.parametrize(
    ("task", "state", "message"),
    [
        ("reach", [[0.5, 0.5, 0, 0], [0.5, 0.7, 0, 0.01]], "only the agent moves"),
        ("push", [[0.5, 0.5, 0, 0], [0.5, 0.8, 0, 0]], "the square is in"),
        ("push", [[0.5, 0.5, 0, 0], [0.6, 0.6, 0, 0]], "at least 0.15 from the agent"),
    ],
)
def test_impossible_starts_of_goal_tasks(task, state, message):
    with pytest.raises(ValueError, match=message):
        SpritesEnv(task=task).reset(options={"state": state})


# --- Starts, shapes and options, to the number -----------------------------------------------


@pytest.mark.parametrize("task", ["follow", "reach", "push"])
def test_starts_by_hand(task):
    """Uniform, then everything moves once; in goal tasks only the agent does, and the square of
    push starts inside its bounds."""
    states, _ = sprites_env.sample_states(np.random.default_rng(5), 300, 2, task)
    u = np.random.default_rng(5).random((300, 4, 5))[..., :4]
    x, v = 0.1 + 0.8 * u[..., :2], -0.05 + 0.1 * u[..., 2:]
    if task != "follow":
        v[:, 1:] = 0
    if task == "push":
        x[:, 1] = 0.25 + 0.5 * u[:, 1, :2]
    x = x + v
    v = np.where((x < 0.1) | (x > 0.9), -v, v)
    x = np.where(x < 0.1, 0.2 - x, np.where(x > 0.9, 1.8 - x, x))
    apart = (np.abs(x[:, 0] - x[:, 1]).max(-1) > 0.15) | (task != "push")
    assert apart.mean() > 0.7
    expected = np.concatenate([x, v], axis=-1)
    np.testing.assert_allclose(states[apart], expected[apart], atol=1e-12)


def test_shapes_of_the_objects():
    """A circle, a square, and triangles of all four orientations alike, drawn anew for each."""
    _, shapes = sprites_env.sample_states(np.random.default_rng(0), 2000, 2)
    assert (shapes[:, 0] == SHAPES.index("circle")).all()
    assert (shapes[:, 1] == SHAPES.index("square")).all()
    shares = [(shapes[:, 2:] == SHAPES.index(name)).mean() for name in SHAPES[2:]]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)
    assert (shapes[:, 2] == shapes[:, 3]).mean() == pytest.approx(0.25, abs=0.05)


def test_trajectories_keep_their_shapes():
    frames, states, _ = sprites_env.sample_trajectories(np.random.default_rng(3), 5, 4, 2)
    _, shapes = sprites_env.sample_states(np.random.default_rng(3), 5, 2)
    for t in range(4):
        np.testing.assert_array_equal(frames[:, t], sprites_env.draw(states[:, t, :, :2], shapes))


@pytest.mark.parametrize("make", [SpritesEnv, lambda **kw: SpritesVectorEnv(2, **kw)])
def test_reset_without_a_seed_goes_on(make):
    """It draws the next start of the same stream, and repeats none."""
    env = make(observation="state")
    starts = [env.reset(seed=3)[0], *(env.reset()[0] for _ in range(2))]
    assert not any(np.array_equal(a, b) for a, b in zip(starts, [*starts[1:], starts[0]]))
    again = [env.reset(seed=3)[0], *(env.reset()[0] for _ in range(2))]
    np.testing.assert_array_equal(starts, again)
    assert not np.array_equal(make(observation="state").reset()[0], starts[0])


@pytest.mark.parametrize("velocity", [[0.06, 0], [0, -0.06]])
@pytest.mark.parametrize("k", [0, 1])
def test_velocities_beyond_the_limit_are_refused(k, velocity):
    state = np.full((2, 4), 0.5)
    state[:, 2:] = 0.05
    env = SpritesEnv()
    env.reset(options={"state": state})
    state[k, 2:] = velocity
    with pytest.raises(ValueError, match="velocities within 0.05"):
        env.reset(options={"state": state})


@pytest.mark.parametrize(
    "options",
    [{"state": [["0"] * 4] * 2}, {"state": [[0.5 + 0j] * 4] * 2}, {"shapes": [1.0, 0.0]}],
)
def test_given_starts_are_numbers(options):
    with pytest.raises(ValueError, match="reset: state must be real numbers, shapes must be int"):
        SpritesEnv().reset(options=options)


def test_horizons():
    """Of numpy's integers, too, and under gymnasium's name for it."""
    made = gymnasium.make_vec("Sprites-v0", num_envs=2, max_episode_steps=3)
    for env in (made, SpritesVectorEnv(np.int64(2), horizon=np.int32(3), distractors=np.int8(1))):
        env.reset(seed=0)
        truncated = [bool(env.step(np.zeros((2, 2)))[3].all()) for _ in range(3)]
        assert truncated == [False, False, True]


def test_shapes_alone_may_be_given():
    env, vector = SpritesEnv(distractors=1), SpritesVectorEnv(2, distractors=1)
    env.reset(seed=3)
    states = env.states
    obs, _ = env.reset(seed=3, options={"shapes": [0, 0, 5]})
    assert (env.states == states).all() and env.shapes.tolist() == [[0, 0, 5]]
    np.testing.assert_array_equal(obs, sprites_env.draw(states[..., :2], env.shapes))
    vector.reset(seed=3, options={"shapes": [[0, 0, 5], [1, 1, 2]]})
    assert (vector.states[0] == states).all() and vector.shapes.tolist() == [[0, 0, 5], [1, 1, 2]]


def test_the_agent_is_drawn_over_the_target_over_distractors():
    blue, orange, grey = sprites_env.COLOURS
    shapes = np.array([1, 0, 0, 0])
    for hidden, colour in ((0, blue), (1, orange), (2, grey)):
        positions = np.full((4, 2), 0.5)
        positions[:hidden] = 0.2  # somewhere else
        image = sprites_env.draw_rgb(positions, shapes, scale=1)
        assert (image[31, 31] == colour).all()
    assert (image[0, 0] == 255).all()


# --- Acting and watching ---------------------------------------------------------------------


class Clock(gymnasium.Env):
    """Shows its length and how old the episode is; pays the action; ends after `length` steps,
    terminally or by a time limit."""

    observation_space = gymnasium.spaces.Box(0, 99, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)

    def __init__(self, length, terminal):
        self.length, self.terminal = length, terminal

    def look(self):
        return np.array([self.age, self.length], np.float32)

    def reset(self, *, seed=None, options=None):
        self.age = 0
        return self.look(), {}

    def step(self, action):
        self.age += 1
        ended, limit = self.age == self.length, not self.terminal
        return self.look(), float(action[0]), ended and self.terminal, ended and limit, {}


def clocks(*kinds):
    """gymnasium's own vector of clocks, from pairs (length, terminal)."""
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    makers = [lambda kind=kind: Clock(*kind) for kind in kinds]
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=same_step)


def test_episodes():
    """Each environment ends in its own time; what followed is the old episode's, `obs` the new
    one's; returns are summed up per episode, and kept in order."""
    episodes = sprites_env.Episodes(clocks((2, False), (3, True)), seed=0)
    assert episodes.obs[:, 0].tolist() == [0, 0] and episodes.finished == []
    expected = [  # age followed, age now, terminated, truncated, finished so far
        ([1, 1], [1, 1], [False, False], [False, False], []),
        ([2, 2], [0, 2], [False, False], [True, False], [2 + 3]),
        ([1, 3], [1, 0], [False, True], [False, False], [5, 20 + 30 + 40]),
        ([2, 1], [0, 1], [False, False], [True, False], [5, 90, 4 + 5]),
    ]
    for t, (followed, now, terminated, truncated, finished) in enumerate(expected):
        successors, rewards, *ends = episodes.step(np.array([[t + 2], [10 * (t + 2)]]))
        assert successors[:, 0].tolist() == followed and episodes.obs[:, 0].tolist() == now
        assert rewards.tolist() == [t + 2, 10 * (t + 2)]
        assert [end.tolist() for end in ends] == [terminated, truncated]
        assert episodes.finished == finished


def test_episodes_of_sprites():
    """Starts as seeded; the last observation is that of the state in which the episode ended."""
    episodes = sprites_env.Episodes(SpritesVectorEnv(3, observation="state", horizon=2), seed=6)
    env = SpritesVectorEnv(3, observation="state", horizon=3)
    np.testing.assert_array_equal(episodes.obs, env.reset(seed=6)[0])
    for _ in range(2):
        successors, *_ = episodes.step(np.ones((3, 2)))
        expected, *_ = env.step(np.ones((3, 2)))
        np.testing.assert_array_equal(successors, expected)
    np.testing.assert_array_equal(episodes.obs, env.reset()[0])


def test_evaluation_is_one_episode_each():
    """Paid 1, 2, 3 for its three steps, and 1 to 5 for five: what follows the end is not counted,
    nor does a terminal state end the others' episodes."""
    calls = []

    def policy(obs):
        calls.append(obs)
        assert len(calls) <= 5
        return obs[:, :1] + 1

    env = clocks((3, True), (5, False), (1, False))
    assert sprites_env.evaluate(policy, env).tolist() == [6, 15, 1] and len(calls) == 5
    calls.clear()
    discounted = [1 + 2 / 2 + 3 / 4, 1 + 2 / 2 + 3 / 4 + 4 / 8 + 5 / 16, 1]
    assert sprites_env.evaluate(policy, env, gamma=0.5).tolist() == discounted


def test_evaluation_is_held_out_and_repeats():
    env, seen = SpritesVectorEnv(2, observation="state", horizon=3), []
    env.reset(seed=1)
    policy = lambda obs: seen.append(obs) or np.zeros((2, 2))  # noqa: E731
    first, second = (sprites_env.evaluate(policy, env) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(seen[0], env.reset(seed=10**9)[0])
    np.testing.assert_array_equal(seen[0], seen[3])
    total = sum(env.step(np.zeros((2, 2)))[1] for _ in range(3))
    np.testing.assert_allclose(first, total)


def test_a_film_shows_the_evaluated_episodes():
    """An image per environment and step, of what was there before the step."""
    env = SpritesVectorEnv(2, horizon=3, render_mode="rgb_array")
    film = sprites_env.film(lambda obs: np.ones((2, 2)), env)
    env.reset(seed=10**9)
    assert len(film) == 3
    for row in film:
        np.testing.assert_array_equal(row, env.render())
        env.step(np.ones((2, 2)))


@pytest.mark.parametrize("task, score", [("follow", 0.5), ("repel", (33.55 - 11.8) / 7.3)])
def test_summary(task, score):
    expected = {"eval_return_mean": 33.55, "eval_return_std": 5.35, "eval_episodes": 2}
    told = sprites_env.summary(np.array([28.2, 38.9]), task)
    assert told == pytest.approx(expected | {"score": score})
    assert sprites_env.summary(np.array([38.9]))["score"] == pytest.approx(1)


def test_gif(tmp_path):
    """Side by side, in a black frame of three pixels; ten frames a second, for ever."""
    red, blue = (np.full((4, 5, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 0, 250)))
    sprites_env.save_gif(tmp_path / "film.gif", [(red, blue), (blue, red), (red, red)])
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (22, 10)
        assert film.info["duration"] == 100 and film.info["loop"] == 0
        for frame, colours in enumerate(((red, blue), (blue, red), (red, red))):
            film.seek(frame)
            image = np.asarray(film.convert("RGB")).astype(int)
            for at, expected in zip((3, 14), colours):
                assert np.abs(image[3:7, at : at + 5] - expected).max() < 10
            assert image[:3].max() < 10 and image[:, 8:14].max() < 10


def test_gif_keeps_the_colour_of_small_things(tmp_path):
    """A few orange pixels before a ground of hundreds of blues, as other environments have it."""
    frame = np.random.default_rng(0).integers(0, 100, (64, 64, 3)).astype(np.uint8)
    frame[..., 0] //= 4
    frame[30:32, 30:32] = (230, 120, 30)
    sprites_env.save_gif(tmp_path / "film.gif", [(frame,)])
    with Image.open(tmp_path / "film.gif") as film:
        seen = np.asarray(film.convert("RGB")).astype(int)[33:35, 33:35]
    assert np.abs(seen - (230, 120, 30)).max() < 40


def test_curve():
    rows = [{"step": 10, "mse_a": 4.0, "r2": 0.1}, {"step": 30, "mse_a": 2.0, "r2": 0.3}]
    panels = [("an error", ["mse_a"]), ("R²", ["r2", "mse_a"])]
    figure = sprites_env.draw_curve(rows, panels, "updates", [("chance", 3.0)], offline=20)
    left, right = figure.axes
    (level,), (line,) = (
        [x for x in left.lines if (x.get_ls() == "--") == d] for d in (True, False)
    )
    assert line.get_xdata().tolist() == [10, 30] and line.get_ydata().tolist() == [4, 2]
    assert line.get_label() == "mse a"
    assert list(level.get_ydata()) == [3, 3] and left.texts[0].get_text() == "chance"
    assert left.texts[0].xy == (0, 3.0)
    assert left.patches[0].get_x() == 0 and left.patches[0].get_width() == 20
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert [x.get_ydata().tolist() for x in right.lines] == [[0.1, 0.3], [4, 2]]
    assert not right.patches and not right.texts
    assert [axis.get_ylabel() for axis in figure.axes] == ["an error", "R²"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"updates"}
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names == ["r2", "mse a"]


def test_images():
    """A row per label, one image beside the other, each framed by a pixel of mid-grey."""
    images = np.zeros((3, 64, 64))
    images[1] = 1
    figure = sprites_env.draw_images({"true": images, "decoded": 0.5 * images[:2]})
    assert [axis.get_ylabel() for axis in figure.axes] == ["true", "decoded"]
    assert figure.get_size_inches().tolist() == [3, 2]
    for axis, scale, width in zip(figure.axes, (1, 0.5), (198, 132)):
        (shown,) = axis.get_images()
        row = np.asarray(shown.get_array())
        assert row.shape == (66, width) and shown.get_clim() == (0, 1) and shown.cmap.name == "gray"
        assert row[1, 66:132].tolist() == [0.5 * scale, *[scale] * 64, 0.5 * scale]
        assert not row[1:-1, 1:65].any() and (row[0] == 0.5 * scale).all()
    colour = sprites_env.draw_images({"film": np.ones((2, 128, 128, 3))}).axes[0].get_images()[0]
    assert colour.get_array().shape == (132, 264, 3)
