"""What does the code of a finished run of curl.py tell of cartpole, around the top?

    MUJOCO_GL=egl python benchmark/outside/pole.py RUN/checkpoint.pt

A small network is trained with labels to read the state off codes z of three frames in random
poses. Prints root mean square errors on other poses: how much is easily read off z, which is all
that the critic sees of a frame (the actor has a head of its own).
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

NAMES = ("cart (m)", "pole (rad)", "cart (m/s)", "pole (rad/s)")


@dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[Path]  # of a run from images, with three frames
    seed: int = 1  # of poses, network and batches
    poses: int = 6_000  # three quarters to train on
    updates: int = 5_000  # gradient steps


def random_stacks(count, rng):
    """Frames uint8 (M, 3, 64, 64), and position and velocity (M, 4) when the last one was taken."""
    env, stacks, states = dmc.DMC("cartpole", "swingup", 8, "image"), [], []
    env.reset(seed=0)
    physics = env.task.physics
    for actions in rng.uniform(-1, 1, (count, 3, 1)):
        env.task.reset()
        with physics.reset_context():
            physics.data.qpos[:] = rng.uniform(-1, 1), 0.3 * rng.normal()
            physics.data.qvel[:] = 0.7 * rng.normal(), 1.2 * rng.normal()
        stacks.append(np.concatenate([env.step(action)[0] for action in actions]))
        states.append([*physics.data.qpos, *physics.data.qvel])
    return np.stack(stacks), torch.tensor(states).float()


def main(args):
    """Load the encoder, train on its codes, test."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, train = np.random.default_rng(args.seed), args.poses * 3 // 4
    weights = torch.load(args.checkpoint, weights_only=True)["encoder"]
    z_dim, size = weights["1.0.weight"].shape
    patch = weights["0.0.weight"].shape[-1]
    encoder = nn.Sequential(curl.patch_convolutions(3, patch), curl.code_head(size, z_dim))
    encoder.load_state_dict(weights)
    stacks, y = random_stacks(args.poses, rng)
    with torch.no_grad():
        z = torch.cat([encoder(curl.to_tensor(part, "cpu")) for part in np.array_split(stacks, 12)])
    x, scale = (z - z.mean(0)) / z.std(0), y.std(0)
    network = curl.mlp(z_dim, 256, len(NAMES))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for update in range(args.updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / args.updates)
        i = torch.from_numpy(rng.integers(train, size=256))
        loss = (network(x[i]) - y[i] / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = network(x[train:]) * scale - y[train:]
    for name, value in zip(NAMES, error.square().mean(0).sqrt().tolist()):
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
