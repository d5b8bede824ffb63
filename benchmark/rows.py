"""What the studies compare, and their rows of results: for plot.py and tables.py."""

import csv
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sprites_env  # noqa: E402, F401 - for the other two

RESULTS = Path("benchmark") / "results"  # in ROOT
RETURN = "eval_return_mean"


def kinds(name, styles):
    """{label: (style, what its rows have)} of "label style, ..."; column `name` has the label."""
    pairs = (pair.split() for pair in styles.split(", "))
    return {label: (style, {name: label}) for label, style in pairs}


# What is compared, in the order of the tables. A style is a letter for one of plot.py's colours,
# which survive colour blindness, and dashes, which survive greyscale.
ENCODERS = kinds(
    "encoder",
    "oracle k-, reward_prediction_finetune r-, reward_prediction o--, image_scratch b-, cnn s-., "
    "image_reconstruction_finetune g-, image_reconstruction p--",
)
ALGORITHMS = kinds("algorithm", "awac r-, sac_from_buffer b-, sac s-., filtered_bc g--, bc k--")
MODES = kinds(
    "mode", "state k-, pixel s-., rad b-, curl r-, curl_unaugmented_sac o--, contrastive_only p:"
)
PARTS = kinds(
    "mode", "rad k-, aat g-., cat o--, correspondence b-, full r-, full_shuffled_actions p:"
)
MIXED = "0.2 0.4 0.4"  # shares of rig_td3.py's goals: as practised, from the prior, from the future
GOALS = {
    "true positions": ("k-", {"goals": "oracle", "goal_fractions": MIXED}),
    "latent, mixed relabelling": ("r-", {"goals": "latent", "goal_fractions": MIXED}),
    "distance between pixels": ("b--", {"goals": "pixel", "goal_fractions": MIXED}),
    "latent, future only": ("g-.", {"goals": "latent", "goal_fractions": "0.2 0 0.8"}),
    "latent, prior only": ("o--", {"goals": "latent", "goal_fractions": "0.2 0.8 0"}),
    "latent, none": ("p:", {"goals": "latent", "goal_fractions": "1 0 0"}),
}
SKILLS = {
    "skills": ("r-", {"embedding": "gaussian", "alpha2": 0.2}),
    "skills, α₂ = 0": ("b--", {"embedding": "gaussian", "alpha2": 0}),
    "one-hot tasks": ("g-.", {"embedding": "one_hot", "alpha2": 0}),
}
GRASP2VEC = {"objective": "grasp2vec"}
GRASPS = {  # how the towers of grasp2vec.py are trained
    "subtraction": ("r-", GRASP2VEC | {"same_place": "False", "jitter": 2, "lam": 5e-4}),
    "outcome in the same place": ("b--", GRASP2VEC | {"same_place": "True"}),
    "no jitter": ("g-.", GRASP2VEC | {"jitter": 0}),
    "λ = 0": ("o:", GRASP2VEC | {"lam": 0}),
    "reconstruction": ("p:", {"objective": "reconstruction"}),
}
GRASP_SHARES = [f"{a}_{b}" for a in ("retrieval", "localisation") for b in ("seen", "novel")]
ATTRIBUTES = ("shape", "size", "grey")
PRETEXTS = {  # objectives of pretext.py, and the measure of whether each is met
    "inverse": "action_r2",
    "forward_inverse": "action_r2",
    "forward": "code_r2",
    "forward_slow_target": "code_r2",
    "time_contrast": "top_1",
    "augmentation_contrast": "top_1",
    "shuffle": "order_accuracy",
    "temporal_disentanglement": "pair_accuracy",
    "autoencoder": "mse_image",
    "beta_vae": "bce",
    "reward_prediction": "mse",
    "none": "",
}
CONTEXTS = {"CC-RIG": ("r-", {"context": "frame"}), "no context": ("b--", {"context": "none"})}
KEPT = ("agent", "agent_displacement", "target", "target_velocity", "distractors")
STITCHED = ({"episodes": 200}, {"episodes": 60})  # data of the study of stitching
ROUNDS = {
    "oracle, 8 steps": ("r-", {"encoder": "oracle", "rollout_steps": 8}),
    "oracle, 40 steps": ("k-", {"encoder": "oracle", "rollout_steps": 40}),
    "image_scratch, 8 steps": ("b--", {"encoder": "image_scratch", "rollout_steps": 8}),
}
NEW_TASKS = ("interpolation", "sequencing")
OUTSIDE = {  # tasks of DeepMind Control, how often an action is repeated, the papers' returns
    "cartpole": (8, {"state": 835, "pixel": 419, "rad": 828, "curl": 582}),
    "ball_in_cup": (4, {"state": 746, "rad": 840}),
}


def read(name):
    """The rows of a results file, numbers as numbers, nan where there is nothing; no rows if there
    is no such file."""

    def value(text):
        try:
            return float(text or "nan")
        except ValueError:
            return text

    if not (ROOT / RESULTS / name).exists():
        return []
    with open(ROOT / RESULTS / name, newline="") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def where(rows, **wanted):
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def split(rows, kinds):
    """(label, style, its rows) for each kind that has rows."""
    for label, (style, wanted) in kinds.items():
        if here := where(rows, **wanted):
            yield label, style, here


def runs_of(rows):
    """One list for each seed, in the order of steps. (Skills are compared across embeddings.)"""
    runs = {}
    for row in rows:
        runs.setdefault((row["seed"], row.get("embedding")), []).append(row)
    return [sorted(run, key=lambda row: row["step"]) for run in runs.values()]


def values_of(rows, name):
    """One column: (M,) of rows, (S, M) of runs; nan where nothing was measured."""
    if rows and isinstance(rows[0], list):
        return np.array([values_of(run, name) for run in rows])
    return np.array([row.get(name, np.nan) for row in rows])


def usual(rows):
    """Without the PPO runs that are longer than the rest."""
    return where(rows, total_steps=min(values_of(rows, "total_steps")))


def outside(rows, task):
    """Runs in DeepMind Control as its table has them: images with the flags that did best."""
    best = {"updates": 4, "patch": 8, "past_actions": 2}
    return where(rows, task=task, mode="state") + where(rows, task=task, **best)


def interval(values):
    """(mean, low, high) over axis 0 (seeds): 95 % percentile bootstrap. values (S, ...)."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def from_scratch(rows):
    """The policies from scratch, a run for each seed: beside other skills they are the same."""
    return where(rows, experiment="transfer", **SKILLS["skills"][1])


def kept(finals, distractors):
    """(label, objective, its rows, prefix of its R²) for every line of the matrix: raw pixels and
    an untrained encoder, then those that were trained."""
    lines = [("raw pixels", "none", "pixels_"), ("none (untrained)", "none", "")]
    for label, objective, prefix in lines + [(name, name, "") for name in list(PRETEXTS)[:-1]]:
        if rows := where(finals, objective=objective, distractors=distractors):
            yield label, objective, rows, prefix
