"""Do the tests bite? Break one line after the other, and see which breakages no test notices.

    python tests/break_one_line.py                       # all: hours on one core
    python tests/break_one_line.py --files awac.py --every 10
    python tests/break_one_line.py --list                # how many there are

The breakages, [old text, new text] for each file, are in breakages.json. Each is made in a copy of
the repository, whose tests for that file then run up to the first failure.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # which tests are asked; of the others with the file's own name
    "rig_td3.py": "test_rig.py",
    "skill_embedding.py": "test_skill.py",
    "sprites_env.py": "test_env.py",
}


@dataclass(frozen=True)
class Args:
    files: tuple[str, ...] = ()  # which files to break (default: all)
    every: int = 1  # only each n-th breakage
    list: bool = False  # only count them


def survives(repository, name, old, new):
    """Whether the tests are green although `old` has become `new` in that file."""
    path = repository / name
    text = path.read_text()
    if old not in text:
        return None  # the line has changed since
    path.write_text(text.replace(old, new, 1))
    tests = TESTS.get(name, f"test_{name}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{tests}"]
    try:
        return (
            subprocess.run(command, cwd=repository, capture_output=True, timeout=300).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        return False  # it hangs: noticed as well
    finally:
        path.write_text(text)


def main(args):
    breakages = json.loads(Path(__file__).with_name("breakages.json").read_text())
    unknown = set(args.files) - set(breakages)
    if unknown or args.every < 1:
        raise SystemExit(f"error: --files are among {', '.join(breakages)}, --every at least 1")
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        shutil.copytree(
            ROOT, repository, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__")
        )
        for name in args.files or breakages:
            pairs, start = breakages[name][:: args.every], time.time()
            if args.list:
                print(f"{name}: {len(pairs)}")
                continue
            found = [survives(repository, name, *pair) for pair in pairs]
            killed, gone = found.count(False), found.count(None)
            print(f"{name}: {killed} of {len(found) - gone} noticed, {time.time() - start:.0f} s")
            for pair, result in zip(pairs, found):
                if result is not False:
                    print("  survives:" if result else "  is gone:", *pair, sep="\n    ")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
