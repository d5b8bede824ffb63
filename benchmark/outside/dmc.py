"""DeepMind Control for curl.py: a vector environment of images or of states.

    pip install -r benchmark/outside/requirements.txt

and, where no screen is there, the libraries of `MUJOCO_GL=egl` (Debian: libegl1, libgl1-mesa-dri).
README.md shows the lines of curl.py that change. An action is repeated, as the papers have it, and
rewards add up: a step of the environment here is `repeat` of theirs, and an episode of 1,000 of
theirs has 1,000 / repeat. An image is the red channel, where bodies stand out from floor and sky.
"""

from functools import partial

import gymnasium as gym
import numpy as np
from dm_control import suite
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv

TASKS = {"cartpole": ("swingup", 8), "ball_in_cup": ("catch", 4)}  # and repeats of an action
SIZE = 64  # pixels of a side
FAST = {"shadow": False, "reflection": False}  # seven times as fast without


class DMC(gym.Env):
    """One of TASKS. Observations uint8 (1, 64, 64) or float32 (D,), actions scaled to [-1, 1].
    `noise`: standard deviation of a fresh error in each dimension of a state."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, domain, observation, render_mode=None, noise=0.0):
        task, self.repeat = TASKS[domain]
        self.original = suite.load(domain, task)
        self.original.physics.model.vis.quality.offsamples = 0  # `_see` smooths, faster
        self.observation, self.render_mode, self.noise = observation, render_mode, noise
        spec = self.original.action_spec()
        self.low, self.high = spec.minimum, spec.maximum
        self.action_space = Box(-1, 1, spec.shape, np.float32)
        size = sum(int(np.prod(x.shape)) for x in self.original.observation_spec().values())
        images = Box(0, 255, (1, SIZE, SIZE), np.uint8)
        states = Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = images if observation == "image" else states

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.original.task.random.seed(seed % 2**32)
        return self._see(self.original.reset()), {}

    def step(self, action):
        action, reward = self.low + (np.asarray(action) + 1) / 2 * (self.high - self.low), 0.0
        for _ in range(self.repeat):
            step = self.original.step(action)
            reward += step.reward
            if step.last():
                break
        return self._see(step), reward, step.last() and step.discount == 0, step.last(), {}

    def _see(self, step):
        if self.observation == "image":
            red = self.render()[..., 0].reshape(SIZE, 2, SIZE, 2).mean((1, 3))
            return red.round().astype(np.uint8)[None]
        state = np.concatenate([np.ravel(x) for x in step.observation.values()])
        return np.float32(state + self.noise * self.np_random.normal(size=len(state)))

    def render(self):
        physics, size = self.original.physics, 2 * SIZE
        return physics.render(size, size, camera_id=0, render_flag_overrides=FAST)


def make_vec(domain, num_envs, observation, **options):
    """Environments in lockstep that reset in the step that ends an episode; `horizon` is its
    number of steps."""
    make = partial(DMC, domain, observation, **options)
    env = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    env.horizon = 1000 // TASKS[domain][1]
    return env


def cartpole_near_the_top(observation, count, steps, rng):
    """`count` times a random pose and `steps` random actions, kept where the pole ends within 0.5
    rad of the top: observations (M, steps, ...), positions (M, steps, 2), actions (M, steps),
    velocities after the last one (M, 2)."""
    env, rows = DMC("cartpole", observation), []
    env.reset(seed=0)
    physics = env.original.physics
    for actions in rng.uniform(-1, 1, (count, steps)):
        env.original.reset()
        with physics.reset_context():
            physics.data.qpos[:] = rng.uniform(-1, 1), 0.2 * rng.normal()
            physics.data.qvel[:] = 0.7 * rng.normal(), rng.normal()
        seen, positions = [], []
        for action in actions:
            seen.append(env.step([action])[0])
            positions.append(physics.data.qpos.copy())
        if abs(positions[-1][1]) < 0.5:
            rows.append((np.stack(seen), np.stack(positions), actions, physics.data.qvel.copy()))
    return [np.stack(column) for column in zip(*rows)]
