"""What do the last frames of cartpole tell of its velocities, with and without the actions between?

    python benchmark/outside/velocity.py --seed 1
    python benchmark/outside/velocity.py --seed 1 --blur 0.03

Least squares from positions to velocities, near the top, where it matters; half of the states to
fit, half to test. Nothing is drawn. With `--blur 0` positions are exact: the error that the actions
remove came from unseen forces, the rest comes from the fit, linear but for one cubic term. Prints
root mean square errors in m/s and rad/s.
"""

from dataclasses import dataclass

import dmc
import numpy as np
import tyro


@dataclass(frozen=True)
class Args:
    seed: int = 1  # of poses, actions and blur
    poses: int = 5_000
    blur: float = 0.0  # standard deviation of an error in the positions (m, rad)


def main(args):
    """Fit, test, print."""
    rng = np.random.default_rng(args.seed)
    _, positions, actions, velocities = dmc.cartpole_near_the_top("state", args.poses, 5, rng)
    print("standard deviations: cart {:.3f} m/s, pole {:.3f} rad/s".format(*velocities.std(0)))
    positions = positions + args.blur * rng.normal(size=positions.shape)
    M, half = len(positions), len(positions) // 2
    for frames in (2, 3, 5):
        seen = positions[:, -frames:].reshape(M, -1)
        for name, more in (("", actions[:, :0]), (" and actions", actions[:, 1 - frames :])):
            x = np.column_stack([seen, more, seen[:, -1] ** 3, np.ones(M)])
            weights = np.linalg.lstsq(x[:half], velocities[:half], rcond=None)[0]
            error = np.sqrt(np.square(velocities[half:] - x[half:] @ weights).mean(0))
            print(f"{frames} frames{name}: cart {error[0]:.3f} m/s, pole {error[1]:.3f} rad/s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
