"""Another library's PPO on MuJoCo's Reacher, to compare with the README's example.

    pip install -r benchmark/outside/requirements.txt
    python benchmark/outside/reacher_sb3.py --seed 1
    python benchmark/outside/reacher_sb3.py --seed 1 --num-envs 16 --n-steps 128 --gamma 0.95 \\
        --learning-rate 1e-3

Without flags it has the library's defaults. Prints the return of 200 held-out episodes.
"""

import time
from dataclasses import dataclass

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


@dataclass(frozen=True)
class Args:
    seed: int = 1  # of network and environments
    num_envs: int = 1  # side by side
    n_steps: int = 2048  # of each environment, in a round
    gamma: float = 0.99  # discount factor
    learning_rate: float = 3e-4  # of Adam
    total_steps: int = 200_000  # environment steps


def main(args):
    """Train, then evaluate without noise."""
    torch.set_num_threads(1)
    env = make_vec_env("Reacher-v5", args.num_envs, seed=args.seed)
    flags = {"n_steps": args.n_steps, "gamma": args.gamma, "learning_rate": args.learning_rate}
    model, start = PPO("MlpPolicy", env, seed=args.seed, device="cpu", **flags), time.perf_counter()
    model.learn(args.total_steps)
    seconds = time.perf_counter() - start
    held_out = make_vec_env("Reacher-v5", 1, seed=10**6)
    mean, deviation = evaluate_policy(model, held_out, n_eval_episodes=200)
    print(f"return {mean:.2f}, deviation between episodes {deviation:.2f}, {seconds:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
