"""Returns of a finished run of curl.py on DeepMind Control, over more episodes than its own five.

    MUJOCO_GL=egl python benchmark/outside/evaluate.py RUN --task cartpole

Acts without noise; the first episodes are those of the run. Prints the mean, and all returns.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import dmc  # noqa: E402

import curl  # noqa: E402
import sprites_env  # noqa: E402


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]  # folder with args.json and checkpoint.pt
    task: Literal[*dmc.TASKS] = "cartpole"
    episodes: int = 20


def main(args):
    """Load the agent, act, print."""
    torch.set_num_threads(1)
    given = json.loads((args.run / "args.json").read_text())["arguments"]
    options = curl.Args(**given)
    env = dmc.make_vec(args.task, args.episodes, options.environment["observation"])
    action_dim = env.single_action_space.shape[0]
    agent = curl.CURLAgent(env.single_observation_space, action_dim, options, "cpu")
    weights = torch.load(args.run / "checkpoint.pt", weights_only=True)
    agent.encoder.load_state_dict(weights["encoder"])
    agent.actor.load_state_dict(weights["actor"])
    policy = curl.without_noise(agent, args.episodes, options)
    returns = sprites_env.evaluate(policy, env)
    print(f"mean {returns.mean():.1f} of", *returns.round().astype(int))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
