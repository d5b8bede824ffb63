"""Sprites: a moving-shapes environment for representation learning, in one file.

A round agent moves in a frame where a square target and up to several triangular distractors
drift and bounce off the walls. The agent is paid for being close to the target (`follow`) or
far from it (`repel`). Everything a policy needs is visible, everything else is there to distract.
In the goal tasks `reach` and `push` the others are at rest, and there is no reward.

Source: the environment of Jain, Lee & Pertsch, "Reward-Induced Representation Learning", and of
its successor Yamada et al. 2022 (arXiv 2204.11827); dynamics and sizes are theirs, code is ours.

**Objects.** K = 2 + distractors, always in this order: agent (circle), target (square),
distractors (triangles of four orientations, drawn with replacement). Object k has the state
(x, y, vx, vy): position in frame widths, inside [0.1, 0.9], and velocity in frame widths per
step, inside [-0.05, 0.05]. x counts pixel rows (downwards), y counts pixel columns (rightwards).

**Observation.** `observation="image"`: uint8 (1, 64, 64), white (255) sprites on black, each
centred on pixel floor(63 * position); overlapping sprites merge. With `frame_stack=S` it is
(S, 64, 64), the last S frames, the newest last; before an episode's start there was its first.
`observation="state"`: float32 (4 K,), the states of the objects one after the other, in raw units.

**Action.** Box(-1, 1, (2,)), clipped: 0.05 * action becomes the agent's velocity for this step.

**Dynamics.** Every object moves by its velocity; one that crosses a wall of [0.1, 0.9] is
reflected, position and velocity both. Nothing collides with anything else, but see `push`.

**Reward**, after the step, with d the distance of agent and target: follow 1 - d / sqrt(2),
repel d / sqrt(2); reach and push 0: there the learner sets the goals and pays itself.

**Goal tasks.** In `reach` and `push` only the agent moves, everything else is at rest. In `push`
the agent pushes the square, which stays inside [0.25, 0.75], so that there is room behind it on
every side. They touch where both coordinates of their centres differ by less than 0.15: then the
square gives way along the axis in which they differ more, until they no longer overlap, and where
it cannot, at its bound, the agent is put back along that axis instead, even if that is sideways to
its way (its velocity stays what it was).

**Start and end.** All states are drawn uniformly (what rests has velocity 0, the square of `push`
is inside its bounds), then everything moves once, and in `push` what overlaps is parted. An episode
is truncated, never terminated, after `horizon` (40) steps: bootstrap its last value.

**Returns of reference controllers** over 40 steps (`CONTROLLERS`; means over 4,000 episodes,
regenerate with `python sprites_env.py`):

    follow   random 28.2   still 28.2   centre 31.2   chase 37.95   chase_velocity 38.9
    repel    random 11.8   still 11.8   centre  8.8   flee 19.1

A return of 31 proves nothing about seeing the target. `score` maps random to 0 and
chase_velocity (flee) to 1.

**Use.** `import sprites_env`, then `gymnasium.make("Sprites-v0", distractors=1)` or
`gymnasium.make_vec("Sprites-v0", num_envs=64, distractors=1)`. The vector environment equals
single ones seeded seed, seed + 1, ... frame by frame. It resets in the step that ends an episode
(`AutoresetMode.SAME_STEP`): that step returns the next episode's first observation, and
`info["final_obs"]` (N, ...) holds the last of the old one wherever `info["_final_obs"]` (N,).
`reset(options={"state": (K, 4), "shapes": (K,)})` starts from exactly that state (a vector
environment takes a leading N; shapes may be left out).

**Acting and watching.** `Episodes`, `evaluate` and the pictures at the end of this file serve any
vector environment that resets in the step that ends an episode, not Sprites alone.
"""

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

SIZE = 64  # pixels a side
LOW, HIGH = 0.1, 0.9  # walls for the sprites' centres
MAX_SPEED = 0.05  # frame widths per step and axis
CONTACT = 0.15  # distance, along an axis, of an agent and a square that touch
SQUARE_LOW, SQUARE_HIGH = LOW + CONTACT, HIGH - CONTACT  # walls for a square that is pushed
SHAPES = ("square", "circle", "triangle_right", "triangle_down", "triangle_left", "triangle_up")
AGENT, TARGET = 0, 1  # the first two objects
GOAL_TASKS = ("reach", "push")


# --- Dynamics and rewards: pure functions of states (..., K, 4) ------------------------------


def move(states):
    """Move every object by its velocity and reflect it at the walls. (..., 4) -> (..., 4)."""
    velocity = states[..., 2:]
    position = states[..., :2] + velocity
    below, above = position < LOW, position > HIGH
    position = np.where(below, 2 * LOW - position, np.where(above, 2 * HIGH - position, position))
    return np.concatenate([position, np.where(below | above, -velocity, velocity)], axis=-1)


def act(states, actions, task="follow"):
    """One environment step: the action sets the agent's velocity, then everything moves.

    states (N, K, 4), actions (N, 2) in [-1, 1] (clipped) -> new states (N, K, 4)."""
    states = states.copy()
    states[:, AGENT, 2:] = MAX_SPEED * np.clip(actions, -1, 1)
    states = move(states)
    return part(states) if task == "push" else states


def part(states):
    """Part agent and square where they overlap: the contact rule of `push`. (N, K, 4) -> same."""
    states, n = states.copy(), np.arange(len(states))
    gap = states[:, TARGET, :2] - states[:, AGENT, :2]  # (N, 2)
    axis = np.abs(gap).argmax(-1)  # of the shortest way out
    push = np.where(gap[n, axis] < 0, -CONTACT, CONTACT)
    square = np.clip(states[n, AGENT, axis] + push, SQUARE_LOW, SQUARE_HIGH)
    touch = np.abs(gap).max(-1) < CONTACT
    states[n, TARGET, axis] = np.where(touch, square, states[n, TARGET, axis])
    states[n, AGENT, axis] = np.where(touch, square - push, states[n, AGENT, axis])
    return states


def reward(states, task="follow"):
    """follow: 1 - d / sqrt(2); repel: d / sqrt(2); goal tasks: 0. states (..., K, 4) -> (...)."""
    if task in GOAL_TASKS:
        return np.zeros(states.shape[:-2])
    difference = states[..., TARGET, :2] - states[..., AGENT, :2]
    distance = np.sqrt((difference * difference).sum(-1)) / np.sqrt(2)
    return 1 - distance if task == "follow" else distance


# What can be predicted in pretraining: the four position rewards of the paper, and the two tasks.
PRETRAINING_REWARDS = {
    "agent_x": lambda states: states[..., AGENT, 0],
    "agent_y": lambda states: states[..., AGENT, 1],
    "target_x": lambda states: states[..., TARGET, 0],
    "target_y": lambda states: states[..., TARGET, 1],
    "follow": lambda states: reward(states, "follow"),
    "repel": lambda states: reward(states, "repel"),
}


def toward(states, goal):
    """The action that moves the agent to `goal` (N, 2), as far as one step reaches."""
    return np.clip((goal - states[:, AGENT, :2]) / MAX_SPEED, -1, 1)


# Hand-written policies, (rng, states (N, K, 4)) -> actions (N, 2): what a learner is held against.
CONTROLLERS = {
    "random": lambda rng, s: rng.uniform(-1, 1, (len(s), 2)),
    "still": lambda rng, s: np.zeros((len(s), 2)),
    "centre": lambda rng, s: toward(s, np.full(2, 0.5)),
    "chase": lambda rng, s: toward(s, s[:, TARGET, :2]),
    "chase_velocity": lambda rng, s: toward(s, move(s)[:, TARGET, :2]),
    "flee": lambda rng, s: toward(s, np.where(s[:, TARGET, :2] > 0.5, LOW, HIGH)),
}
REFERENCE_RETURNS = {  # of these controllers over 40 steps; the first and the last are the score
    "follow": {"random": 28.2, "centre": 31.2, "chase": 37.95, "chase_velocity": 38.9},
    "repel": {"random": 11.8, "flee": 19.1},
}


def score(episode_return, task="follow"):
    """(return - random) / (best - random): 0 acts blindly, 1 knows the target's velocity."""
    random, *_, best = REFERENCE_RETURNS[task].values()
    return (episode_return - random) / (best - random)


def summary(returns, task="follow"):
    """The part of summary.json that an evaluation gives: returns (M,) of as many episodes."""
    mean, sd = returns.mean(), returns.std()
    facts = {"eval_return_mean": mean, "eval_return_std": sd, "eval_episodes": len(returns)}
    return facts | {"score": score(mean, task)}


def sample_states(rng, batch, distractors, task="follow"):
    """Start states (batch, K, 4) and shapes (batch, K), uniform; everything has moved once."""
    return _start(rng.random((batch, 2 + distractors, 5)), task)


def _start(uniform, task):  # (N, K, 5) in [0, 1): four numbers for the state, one for the shape
    low, span = np.array([LOW, LOW, -MAX_SPEED, -MAX_SPEED]), np.array([0.8, 0.8, 0.1, 0.1])
    shapes = 2 + (4 * uniform[..., 4]).astype(np.intp)
    shapes[:, AGENT], shapes[:, TARGET] = SHAPES.index("circle"), SHAPES.index("square")
    states = low + span * uniform[..., :4]
    if task in GOAL_TASKS:
        states[:, 1:, 2:] = 0
    if task == "push":
        room = SQUARE_HIGH - SQUARE_LOW
        states[:, TARGET, :2] = SQUARE_LOW + room * uniform[:, TARGET, :2]
        return part(move(states)), shapes
    return move(states), shapes


def sample_trajectories(rng, batch, length, distractors, num_frames=None):
    """Reward-annotated trajectories for pretraining, in which every object, the agent too, keeps
    its velocity and bounces.

    Returns `frames` uint8 (batch, num_frames, 64, 64), drawn for the first `num_frames` steps only
    (all if None: drawing is the cost); `states` float64 (batch, length, K, 4); `rewards`, a dict of
    float32 (batch, length) by name of `PRETRAINING_REWARDS`."""
    num_frames = length if num_frames is None else min(num_frames, length)
    states, shapes = sample_states(rng, batch, distractors)
    trajectory = [states]
    for _ in range(length - 1):
        trajectory.append(move(trajectory[-1]))
    states = np.stack(trajectory, axis=1)
    drawn = states[:, :num_frames, :, :2].reshape(batch * num_frames, -1, 2)
    images = draw(drawn, np.repeat(shapes, num_frames, axis=0))
    rewards = {name: f(states).astype(np.float32) for name, f in PRETRAINING_REWARDS.items()}
    return images.reshape(batch, num_frames, SIZE, SIZE), states, rewards


def sample_walks(rng, batch, length, distractors, hold=1):
    """Trajectories to learn from actions: the agent acts at random, uniformly in [-1, 1]², and does
    the same for `hold` steps; the others keep their velocity and bounce.

    Returns `states` float64 (batch, length, K, 4), `shapes` (batch, K) and `actions` float32
    (batch, length - 1, 2): actions[:, t] led from states[:, t] to states[:, t + 1]. Nothing is
    drawn: drawing is the cost, and who learns needs few of the frames."""
    states, shapes = sample_states(rng, batch, distractors)
    actions = rng.uniform(-1, 1, (batch, -(-(length - 1) // hold), 2)).astype(np.float32)
    actions = actions.repeat(hold, axis=1)[:, : length - 1]
    walk = [states]
    for t in range(length - 1):
        walk.append(act(walk[-1], actions[:, t]))
    return np.stack(walk, axis=1), shapes, actions


# --- Drawing: a row of 64 pixels is one 64-bit word ------------------------------------------


def sprites():
    """The six sprites as bool (6, 12, 12); pixel (6, 6) is the centre."""
    i, j = np.mgrid[:12, :12]
    square = (1 <= i) & (i <= 10) & (1 <= j) & (j <= 10)
    circle = (i - 6) ** 2 + (j - 6) ** 2 <= 16
    right = (np.abs(2 * i - 11) <= 11 - j) & square
    return np.stack([square, circle, right, right.T, right[:, ::-1], right.T[::-1]])


def _sprite_words():
    """words[shape, column, i]: row i of the sprite, centred at `column`; bit j is pixel j."""
    words = np.zeros((len(SHAPES), SIZE, 12), "<u8")
    for shape, sprite in enumerate(sprites()):
        for column in range(SIZE):
            for i in range(12):
                pixels = [column - 6 + j for j in range(12) if sprite[i, j]]
                words[shape, column, i] = sum(1 << p for p in pixels if 0 <= p < SIZE)
    return words


_WORDS = _sprite_words()


def draw_packed(positions, shapes):
    """Like `draw`, packed: one bit a pixel, uint64 (N, 64), 512 bytes a frame instead of 4,096.

    Drawing a sprite is OR-ing 12 words into a column of rows: no pixel is ever touched."""
    pixel = (63 * np.asarray(positions)).astype(np.intp)  # (N, K, 2)
    rows = np.zeros((len(pixel), SIZE + 12), "<u8")  # six rows of margin above and below
    flat, first = rows.reshape(-1), np.arange(len(pixel)) * (SIZE + 12)
    for k in range(pixel.shape[1]):
        at = (first + pixel[:, k, 0])[:, None] + np.arange(12)  # (N, 12)
        flat[at] |= _WORDS[shapes[:, k], pixel[:, k, 1]]
    return rows[:, 6:-6]


def unpack(packed):
    """Packed frames, uint64 (..., 64) -> uint8 (..., 64, 64), 0 or 255."""
    bits = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), bitorder="little")
    return np.negative(bits, out=bits).reshape(*packed.shape, SIZE)  # -1 is 255 in uint8


def draw(positions, shapes):
    """Draw N frames. positions (N, K, 2) in [0, 1], shapes (N, K) indices into `SHAPES` ->
    uint8 (N, 64, 64), 255 where a sprite is."""
    return unpack(draw_packed(positions, shapes))


COLOURS = np.array([(0, 114, 178), (230, 159, 0), (150, 150, 150)], np.uint8)  # Okabe-Ito


def draw_rgb(positions, shapes, scale=4):
    """For people: uint8 (64 scale, 64 scale, 3), blue agent over orange target over grey
    distractors on white. positions (K, 2), shapes (K,)."""
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for k in reversed(range(len(shapes))):
        image[draw(positions[None, k : k + 1], shapes[None, k : k + 1])[0] > 0] = COLOURS[min(k, 2)]
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


# --- The environments ------------------------------------------------------------------------


def _is_integer(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _spaces(distractors, observation, task, horizon, render_mode, frame_stack):
    """Check the options and return the spaces of one environment."""
    if not (_is_integer(distractors) and distractors >= 0):
        raise ValueError(f"distractors must be an integer of 0 or more, not {distractors!r}")
    if observation not in ("image", "state"):
        raise ValueError(f"observation must be 'image' or 'state', not {observation!r}")
    if task not in ("follow", "repel", *GOAL_TASKS):
        raise ValueError(f"task must be 'follow', 'repel', 'reach' or 'push', not {task!r}")
    if not (_is_integer(horizon) and horizon >= 1):
        raise ValueError(f"horizon must be a positive integer, not {horizon!r}")
    if not (_is_integer(frame_stack) and frame_stack >= 1):
        raise ValueError(f"frame_stack must be a positive integer, not {frame_stack!r}")
    if observation == "state" and frame_stack > 1:
        raise ValueError("frame_stack is of images: states hold the velocities")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
    if observation == "image":
        observation_space = spaces.Box(0, 255, (frame_stack, SIZE, SIZE), np.uint8)
    else:
        low = np.array([LOW, LOW, -MAX_SPEED, -MAX_SPEED], np.float32)
        high = np.array([HIGH, HIGH, MAX_SPEED, MAX_SPEED], np.float32)
        tiles = 2 + distractors
        observation_space = spaces.Box(np.tile(low, tiles), np.tile(high, tiles), dtype=np.float32)
    return observation_space, spaces.Box(-1, 1, (2,), np.float32)


def _observe(recent, shapes, observation):  # S times (N, K, 4) -> (N, S, 64, 64) or (N, 4 K)
    if observation == "image":
        return np.stack([draw(states[:, :, :2], shapes) for states in recent], axis=1)
    return recent[-1].reshape(len(shapes), -1).astype(np.float32)


def _given_start(options, sampled, shapes, task):
    """The start that `reset(options=...)` asks for, checked against one sampled at random."""
    if set(options) - {"state", "shapes"}:
        raise ValueError(f"reset: options are 'state' and 'shapes', not {sorted(options)}")
    states = np.array(options.get("state", sampled))
    shapes = np.array(options.get("shapes", shapes))
    if states.dtype.kind not in "iuf" or shapes.dtype.kind not in "iu":
        raise ValueError("reset: state must be real numbers, shapes must be integers")
    states, shapes = states.astype(np.float64), shapes.astype(np.intp)
    if states.shape != sampled.shape or shapes.shape != sampled.shape[:-1]:
        raise ValueError(
            f"reset: state must have shape {sampled.shape}, shapes {sampled.shape[:-1]}, "
            f"not {states.shape} and {shapes.shape}"
        )
    position, velocity = states[..., :2], states[..., 2:]
    if not (
        (np.abs(position - 0.5) <= 0.4 + 1e-6) & (np.abs(velocity) <= MAX_SPEED + 1e-6)
    ).all():  # the slack admits states that went through float32
        raise ValueError(
            f"reset: positions must be in [{LOW}, {HIGH}], velocities within {MAX_SPEED}"
        )
    if task in GOAL_TASKS and velocity[..., 1:, :].any():
        raise ValueError(f"reset: in {task!r} only the agent moves, other velocities are 0")
    if task == "push":
        square = states[..., TARGET, :2]
        gap = np.abs(square - states[..., AGENT, :2]).max(-1)
        if (np.abs(square - 0.5) > SQUARE_HIGH - 0.5 + 1e-6).any() or (gap < CONTACT - 1e-6).any():
            raise ValueError(
                f"reset: in 'push' the square is in [{SQUARE_LOW}, {SQUARE_HIGH}] and, along an "
                f"axis, at least {CONTACT} from the agent"
            )
    if not ((0 <= shapes) & (shapes < len(SHAPES))).all():
        raise ValueError(f"reset: shapes must be indices into {SHAPES}")
    return states, shapes


def _checked(actions, shape):
    actions = np.asarray(actions)
    if actions.shape != shape or actions.dtype.kind not in "iuf":
        raise ValueError(f"action must be {shape} real numbers, not {actions}")
    if not np.isfinite(actions).all():
        raise FloatingPointError(f"action must be finite, not {actions}: has the policy diverged?")
    return actions.astype(np.float64)


class SpritesEnv(gym.Env):
    """One environment. Specification: this module's docstring."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        distractors=0,
        observation="image",
        task="follow",
        horizon=40,
        render_mode=None,
        frame_stack=1,
    ):
        self.observation_space, self.action_space = _spaces(
            distractors, observation, task, horizon, render_mode, frame_stack
        )
        self.distractors, self.observation, self.task = distractors, observation, task
        self.horizon, self.render_mode, self.frame_stack = horizon, render_mode, frame_stack
        self.states = self.shapes = None  # (1, K, 4) and (1, K) once reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.states, self.shapes = sample_states(self.np_random, 1, self.distractors, self.task)
        if options:
            states, shapes = _given_start(options, self.states[0], self.shapes[0], self.task)
            self.states, self.shapes = states[None], shapes[None]
        self.recent, self.elapsed = [self.states] * self.frame_stack, 0
        return _observe(self.recent, self.shapes, self.observation)[0], {}

    def step(self, action):
        if self.states is None:
            raise RuntimeError("call reset before step")
        self.states = act(self.states, _checked(action, (2,))[None], self.task)
        self.recent, self.elapsed = [*self.recent[1:], self.states], self.elapsed + 1
        obs = _observe(self.recent, self.shapes, self.observation)[0]
        return (
            obs,
            float(reward(self.states[0], self.task)),
            False,
            self.elapsed >= self.horizon,
            {},
        )

    def render(self):
        if self.states is None:
            raise RuntimeError("call reset before render")
        if self.render_mode == "rgb_array":
            return draw_rgb(self.states[0, :, :2], self.shapes[0])


class SpritesVectorEnv(gym.vector.VectorEnv):
    """`num_envs` environments in lockstep, as arrays. Specification: this module's docstring."""

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs=1,
        distractors=0,
        observation="image",
        task="follow",
        horizon=40,
        render_mode=None,
        max_episode_steps=None,
        frame_stack=1,
    ):
        horizon = horizon if max_episode_steps is None else max_episode_steps  # gymnasium's word
        if not (_is_integer(num_envs) and num_envs >= 1):
            raise ValueError(f"num_envs must be a positive integer, not {num_envs!r}")
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(
            distractors, observation, task, horizon, render_mode, frame_stack
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.distractors, self.observation, self.task = distractors, observation, task
        self.horizon, self.render_mode, self.frame_stack = horizon, render_mode, frame_stack
        self.generators = None  # one per environment, drawn from only at a start
        self.states = self.shapes = None  # (N, K, 4) and (N, K) once reset

    def reset(self, *, seed=None, options=None):
        if seed is not None or self.generators is None:
            if seed is None or isinstance(seed, (int, np.integer)):
                seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
            if len(seed) != self.num_envs:
                raise ValueError(f"reset: {len(seed)} seeds for {self.num_envs} environments")
            self.generators = [gym.utils.seeding.np_random(s)[0] for s in seed]
        self._restart()
        if options:
            self.states, self.shapes = _given_start(options, self.states, self.shapes, self.task)
            self.recent = [self.states] * self.frame_stack
        return _observe(self.recent, self.shapes, self.observation), {}

    def _restart(self):
        uniform = np.empty((self.num_envs, 2 + self.distractors, 5))
        for generator, row in zip(self.generators, uniform):
            generator.random(out=row)
        self.states, self.shapes = _start(uniform, self.task)
        self.recent, self.elapsed = [self.states] * self.frame_stack, 0

    def step(self, actions):
        if self.states is None:
            raise RuntimeError("call reset before step")
        self.states = act(self.states, _checked(actions, (self.num_envs, 2)), self.task)
        self.recent, self.elapsed = [*self.recent[1:], self.states], self.elapsed + 1
        rewards, info = reward(self.states, self.task), {}
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.full(self.num_envs, self.elapsed >= self.horizon)
        if truncated[0]:  # in lockstep: all of them
            info["final_obs"] = _observe(self.recent, self.shapes, self.observation)
            info["_final_obs"] = truncated.copy()
            self._restart()
        obs = _observe(self.recent, self.shapes, self.observation)
        return obs, rewards, terminated, truncated, info

    def render(self):
        if self.states is None:
            raise RuntimeError("call reset before render")
        if self.render_mode == "rgb_array":
            return tuple(draw_rgb(s[:, :2], k) for s, k in zip(self.states, self.shapes))


gym.register("Sprites-v0", entry_point=SpritesEnv, vector_entry_point=SpritesVectorEnv)


# --- Acting in, and watching, any vector environment that resets in the same step -------------


class Episodes:
    """Environments that are acted in: the observations (N, ...) that they show now, and the returns
    of the episodes that have finished."""

    def __init__(self, env, seed):
        self.env, self.finished, self.running = env, [], np.zeros(env.num_envs)
        self.obs, _ = env.reset(seed=seed)

    def step(self, actions):
        """(N, A) -> what followed (N, ...), rewards, terminated and truncated (N,). Where an
        episode ended, what followed is its own last observation; `obs` is the next one's first."""
        self.obs, rewards, terminated, truncated, info = self.env.step(actions)
        ended, successors = terminated | truncated, self.obs.copy()
        if ended.any():
            successors[ended] = np.stack(info["final_obs"][ended])
        self.running += rewards
        self.finished += self.running[ended].tolist()
        self.running[ended] = 0
        return successors, rewards, terminated, truncated


def evaluate(policy, env, frames=None, gamma=1.0):
    """Returns (N,) of one fresh episode per environment. `policy` maps observations (N, ...) to
    actions (N, A); a list `frames` collects what `env.render()` shows before each step; `gamma`
    discounts later rewards."""
    obs, _ = env.reset(seed=10**9)
    returns, discount, alive = np.zeros(env.num_envs), 1.0, np.ones(env.num_envs, bool)
    while alive.any():
        if frames is not None:
            frames.append(env.render())
        obs, rewards, terminated, truncated, _ = env.step(policy(obs))
        returns += discount * rewards * alive
        discount *= gamma
        alive &= ~(terminated | truncated)
    return returns


def film(policy, env):
    """What `env.render()` shows of these episodes, for `save_gif`. A renderer may fail where
    nothing else does: then there is no film, and the results are kept."""
    frames = []
    try:
        evaluate(policy, env, frames)
    except Exception as error:
        print(f"no film: {error!r}")
        return []
    return frames


def save_gif(path, frames):
    """frames: a list of tuples of images uint8 (height, width, 3), shown side by side."""
    from PIL import Image

    rows = [np.concatenate([np.pad(i, ((3, 3), (3, 3), (0, 0))) for i in row], 1) for row in frames]
    tree = Image.Quantize.FASTOCTREE  # the default loses the colours of small things
    first, *rest = [Image.fromarray(row).quantize(64, tree) for row in rows]
    first.save(path, save_all=True, append_images=rest, loop=0, duration=100)  # ms a frame


def draw_curve(rows, panels, x_label, levels=(), offline=0):
    """A figure of a run's `rows`, dicts with a "step": a panel for each (y label, columns), and in
    the first one dashed lines at `levels`, pairs (name, y), and grey up to the step `offline`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * max(1.2, len(panels)), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    if offline:
        axes[0].axvspan(0, offline, color="grey", alpha=0.15, lw=0)
    for name, y in levels:
        axes[0].axhline(y, color="grey", lw=0.8, ls="--", zorder=0)
        text = {"color": "grey", "size": 8, "va": "bottom"}
        axes[0].annotate(name, (0, y), xycoords=("axes fraction", "data"), **text)
    for axis, (y_label, names) in zip(axes, panels):
        for name in names:
            values = [row[name] for row in rows]
            axis.plot([row["step"] for row in rows], values, label=name.replace("_", " "))
        axis.set(xlabel=x_label, ylabel=y_label, yscale="log" if "error" in y_label else "linear")
        axis.legend(fontsize=8, framealpha=0.6)
    return figure


def draw_images(rows):
    """A figure of rows of images, label -> (M, height, width[, 3]), grey in [0, 1] or RGB."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(columns, len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items()):
        images = np.asarray(images)
        edge = images.shape[2] // SIZE
        pad = ((0, 0), (edge, edge), (edge, edge), (0, 0))[: images.ndim]  # a frame around each
        framed = np.pad(images, pad, constant_values=images.max() / 2)
        axis.imshow(np.concatenate(framed, axis=1), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], ylabel=label)
    return figure


# --- Runs of the scripts: arguments, folder, progress (with torch; the rest does without) -----


def require(condition, message):
    """End with one line unless the condition holds."""
    if not condition:
        raise SystemExit(f"error: {message}")


def require_positive(args, but=""):
    """All numbers must be positive and below 2**31; those named in `but`, and seeds, may be 0."""
    for name, value in vars(args).items():
        zero = name in ("seed", "torch_threads", "distractors", *but.split())
        flag, least = name.replace("_", "-"), "0 or more" if zero else "positive"
        for x in value if isinstance(value, tuple) else (value,):
            if type(x) in (int, float):
                good = (x > 0 or zero and x == 0) and x < 2**31  # also neither infinite nor nan
                require(good, f"--{flag} must be {least} and below 2**31, not {x}")
    # held-out data has seeds from 10**9 on
    require(args.seed < 10_000, f"--seed must be in 0 ... 9999, not {args.seed}")


def steps_of_episodes(env):
    """T, for scripts whose replay holds whole episodes. Ends with one line unless the environment
    says how long they are, and takes actions in [-1, 1]."""
    space, steps = env.single_action_space, getattr(env, "horizon", None)
    require(steps, "give the environment an attribute `horizon`: the steps of each of its episodes")
    unit = isinstance(space, gym.spaces.Box) and (space.low == -1).all() and (space.high == 1).all()
    require(unit, f"actions must be in [-1, 1], see gymnasium's RescaleAction; here: {space}")
    return steps


@contextlib.contextmanager
def one_line_errors():
    """What a user may meet ends with one line, not with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(
            "\ninterrupted: curve.csv and checkpoint.pt hold what was reported"
        ) from None
    except (ArithmeticError, MemoryError, OSError) as error:  # diverged; too large; disk full
        raise SystemExit(f"\nerror: {' '.join(str(error).split())[:200]}") from None
    except RuntimeError as error:  # torch's MemoryError
        if "memory" not in str(error):
            raise
        raise SystemExit(f"\nerror: {' '.join(str(error).split())[:200]}") from None


class Run:
    """A run of a script: device, seeds, and a folder with args.json, curve.csv, and what is saved.

    Files are written whole or not at all. summary.json, the last one, says that the run has
    finished; a finished run, and one at work in another process, is left alone."""

    def __init__(self, args, total):
        """args: an instance of the script's `Args`; total: the last `step` to be reported."""
        import torch

        script = Path(sys.modules[type(args).__module__].__file__).resolve()
        self.folder = Path(args.out or Path("runs") / script.stem / args.run_name)
        self.rows, self.total, self.start = [], total, time.perf_counter()
        cuda = args.device != "cpu" and torch.cuda.is_available()
        require(cuda or args.device != "cuda", "--device cuda, but PyTorch finds no CUDA device")
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.manual_seed(args.seed)
        if args.torch_threads:
            torch.set_num_threads(args.torch_threads)
        keep_memory()
        commit = subprocess.getoutput(f'git -C "{script.parent}" rev-parse HEAD')
        facts = {"script": script.stem, "arguments": asdict(args), "device": str(self.device)}
        facts |= {m.__name__: m.__version__ for m in (gym, np, torch)}
        facts |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
        self.claim(script.stem, args.overwrite)
        self.save("args.json", facts | {"git_commit": commit if len(commit) == 40 else None})

    def claim(self, script, overwrite):
        """Make the folder, unless it is another run's."""
        hint = "use --overwrite, or --out FOLDER"
        summary, facts = self.folder / "summary.json", self.folder / "args.json"
        try:
            require(
                overwrite or not summary.exists(), f"{self.folder} holds a finished run: {hint}"
            )
            owner = json.loads(facts.read_text()).get("script") if facts.exists() else script
            require(overwrite or owner == script, f"{self.folder} holds a run of {owner}: {hint}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.curve = os.open(self.folder / "curve.csv", os.O_RDWR | os.O_CREAT)
            if sys.platform != "win32":
                import fcntl

                fcntl.lockf(self.curve, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            os.ftruncate(self.curve, 0)
            summary.unlink(missing_ok=True)  # an earlier run's must not be taken for this one's
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        except BlockingIOError:
            require(False, f"another run is at work in {self.folder}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            require(False, f"cannot write to {self.folder}: {reason}")

    def save(self, name, content):
        """A dict as .json or .pt, a figure as .png, or a film as .gif."""
        import torch

        file = self.folder / f"unfinished_{name}"
        if file.suffix == ".json":
            file.write_text(json.dumps(content, indent=1))
        elif file.suffix == ".pt":
            try:
                torch.save(content, file)
            except RuntimeError:  # torch's word for a full disk
                raise OSError(f"cannot write {file}: is the disk full?") from None
        elif file.suffix == ".png":
            content.savefig(file)
        elif content:
            save_gif(file, content)
        else:  # no film, and no earlier one either
            return (self.folder / name).unlink(missing_ok=True)
        file.replace(self.folder / name)

    def report(self, step, **metrics):
        """A row of curve.csv, and a line of progress: on a terminal one line that changes.

        FloatingPointError if a number is not finite (but there may be no `train_return` yet)."""
        seconds = time.perf_counter() - self.start
        speed, left = step / seconds, seconds * (self.total / step - 1)
        row = {"step": step, "seconds": round(seconds, 2), "steps_per_second": round(speed, 1)}
        self.rows.append(row | metrics)
        lines = [self.rows[-1].values()]
        if len(self.rows) == 1:
            lines.insert(0, self.rows[0])  # its keys: the header
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        os.write(self.curve, text.encode())
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        line = f"{step:,}/{self.total:,}  {speed:,.0f}/s  {left:.0f} s left  {shown}"
        live = sys.stdout.isatty()
        end = "" if live and step < self.total else "\n"
        print(f"\r\033[K{line}" if live else line, end=end, flush=True)
        bad = [name for name, x in metrics.items() if not np.isfinite(x) and name != "train_return"]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} is not finite: the run has diverged")

    def finish(self, summary, panels, x_label, levels=(), offline=0):
        """curve.png (see `draw_curve`) and summary.json, whose content it returns."""
        figure = draw_curve(self.rows, panels, x_label, levels, offline)
        figure.suptitle(self.folder.name, fontsize=10)
        self.save("curve.png", figure)
        summary = summary | {"minutes": round((time.perf_counter() - self.start) / 60, 2)}
        self.save("summary.json", summary)
        os.close(self.curve)
        return summary


def keep_memory():
    """By default glibc returns large activations to the system after every update, and maps them
    anew, page by page: up to half of the time. Here it is told to keep them."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 30)):
            ctypes.CDLL(None).mallopt(option, value)  # M_TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD


if __name__ == "__main__":  # the table of reference returns above
    for task, names in {
        "follow": list(CONTROLLERS)[:5],
        "repel": ["random", "still", "centre", "flee"],
    }.items():
        env = SpritesVectorEnv(4000, observation="state", task=task)
        for name in names:
            env.reset(seed=1)
            rng, returns = np.random.default_rng(2), 0
            while not np.any((out := env.step(CONTROLLERS[name](rng, env.states)))[3]):
                returns = returns + out[1]
            returns = returns + out[1]
            error = returns.std() / np.sqrt(len(returns))
            print(f"{task:7} {name:15} {returns.mean():6.2f} ± {error:.2f} (standard error)")
