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


def main(args):
    """Load the encoder, train on its codes, test."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    weights = torch.load(args.checkpoint, weights_only=True)["encoder"]
    z_dim, size = weights["1.0.weight"].shape
    patch = weights["0.0.weight"].shape[-1]
    encoder = nn.Sequential(curl.patch_convolutions(3, patch), curl.code_head(size, z_dim))
    encoder.load_state_dict(weights)
    seen, positions, _, velocities = dmc.cartpole_near_the_top("image", args.poses, 3, rng)
    stacks, train = seen[:, :, 0], len(seen) * 3 // 4
    y = torch.tensor(np.hstack([positions[:, -1], velocities])).float()
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
    for name, value, whole in zip(NAMES, error.square().mean(0).sqrt(), y.std(0)):
        print(f"{name}: {value:.3f} (standard deviation {whole:.3f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
