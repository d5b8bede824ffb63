"""What can the encoder of curl.py tell of a pole, if it is trained with labels?

    MUJOCO_GL=egl python benchmark/outside/pole.py --seed 1
    MUJOCO_GL=egl python benchmark/outside/pole.py --seed 1 --shift 0

Stacks of three frames of cartpole in random poses, four fifths to train on; prints R² on the rest.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import dmc  # noqa: E402

import curl  # noqa: E402

NAMES = ("x", "cos of the angle", "sin of the angle", "velocity of x", "angular velocity")


@dataclass(frozen=True)
class Args:
    seed: int = 1  # of poses, network and batches
    stacks: int = 5_000  # of three frames
    updates: int = 2_000  # gradient steps
    shift: int = 4  # pixels, of random shifts while training


def random_stacks(count, rng):
    """Frames uint8 (M, 3, 64, 64) and what the last one shows, standardised (M, 5)."""
    env, stacks, labels = dmc.DMC("cartpole", "swingup", 8, "image"), [], []
    env.reset(seed=0)
    physics = env.task.physics
    for _ in range(count):
        env.task.reset()
        with physics.reset_context():
            physics.data.qpos[:] = rng.uniform(-1.2, 1.2), rng.uniform(-np.pi, np.pi)
            physics.data.qvel[:] = rng.uniform(-1.5, 1.5), rng.uniform(-6, 6)
        stacks.append(np.concatenate([env.step(rng.uniform(-1, 1, 1))[0] for _ in range(3)]))
        (x, angle), velocities = physics.data.qpos, physics.data.qvel
        labels.append((x, np.cos(angle), np.sin(angle), *velocities))
    labels = torch.tensor(labels).float()
    return np.stack(stacks), (labels - labels.mean(0)) / labels.std(0)


def main(args):
    """Train by regression, and test."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    stacks, y = random_stacks(args.stacks, rng)
    convolutions = curl.patch_convolutions(3)
    size = convolutions(torch.zeros(1, 3, 64, 64)).shape[1]
    network = nn.Sequential(convolutions, curl.code_head(size, 50), curl.mlp(50, 256, len(NAMES)))
    optimizer, train = torch.optim.Adam(network.parameters(), lr=1e-3), args.stacks * 4 // 5
    for _ in range(args.updates):
        i = rng.integers(train, size=64)
        offsets = rng.integers(2 * args.shift + 1, size=(2, 64))
        x = curl.to_tensor(curl.random_shift(stacks[i], offsets, args.shift), "cpu")
        loss = (network(x) - y[i]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = network(curl.to_tensor(stacks[train:], "cpu")) - y[train:]
    r2 = 1 - error.square().mean(0) / y[train:].var(0, correction=0)
    print(", ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, r2.tolist())))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
