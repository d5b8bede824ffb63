"""What do the last frames of cartpole tell of its velocities, with and without the actions between?

    python benchmark/outside/velocity.py --seed 1
    python benchmark/outside/velocity.py --seed 1 --blur 0.02

Least squares from positions to velocities, near the top, where it matters; half of the states to
fit, half to test. Nothing is drawn: with `--blur 0` the positions are exact, so what error is left
comes from forces that no position shows and, as far as it is there with the actions, too, from a
map that is not quite linear. Prints root mean square errors in m/s and rad/s.
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


def histories(count, rng, steps=5):
    """Positions (M, steps, 2), velocities after the last step (M, 2), actions (M, steps)."""
    env = dmc.DMC("cartpole", "swingup", 8, "state")
    env.reset(seed=0)
    physics, rows = env.task.physics, []
    for actions in rng.uniform(-1, 1, (count, steps)):
        env.task.reset()
        with physics.reset_context():
            physics.data.qpos[:] = rng.uniform(-1, 1), 0.2 * rng.normal()
            physics.data.qvel[:] = 0.7 * rng.normal(), rng.normal()
        positions = []
        for action in actions:
            env.step(np.array([action]))
            positions.append(physics.data.qpos.copy())
        if abs(positions[-1][1]) < 0.5:
            rows.append((np.stack(positions), physics.data.qvel.copy(), actions))
    return [np.stack(column) for column in zip(*rows)]


def main(args):
    """Fit, test, print."""
    rng = np.random.default_rng(args.seed)
    positions, velocities, actions = histories(args.poses, rng)
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
