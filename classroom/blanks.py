"""A copy of a script whose equations are to be filled in.

    python classroom/blanks.py ppo_encoder.py --out my_ppo.py
    python -m pytest classroom --script my_ppo.py    # which are right, which not yet, which wrong

Each numbered equation of a script's docstring has one function (or a network, of which it is
`forward`). In the copy its body is gone; signature and docstring, with equation and shapes, stay.
The tests are those of the script: numbers worked by hand. Each equation is checked by itself, with
the others as the script has them, so it does not matter which one is written first.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = sorted(f"{name}.py" for name in json.loads((HERE / "tries.json").read_text()))


@dataclass(frozen=True)
class Args:
    script: tyro.conf.Positional[str]  # one of the scripts, such as ppo_encoder.py
    out: str  # file to write the copy to; it must not exist


def equations(tree):
    """Number -> (name, the function to be filled in), in the order of the numbers."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for number in re.findall(r"eq\. \((\d+)\)", ast.get_docstring(node) or ""):
                methods = [part for part in node.body if getattr(part, "name", "") == "forward"]
                function = methods[0] if isinstance(node, ast.ClassDef) else node
                found[int(number)] = node.name, function
    return dict(sorted(found.items()))


def blank(text):
    """The text of a script without the bodies of its equations."""
    lines = text.splitlines()
    functions = [function for _, function in equations(ast.parse(text)).values()]
    for function in sorted(functions, key=lambda f: -f.lineno):  # from the end: numbers stay
        first = function.body[0]
        start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
        indent = " " * first.col_offset
        lines[start : function.end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def main(args):
    name, out = Path(args.script).name, Path(args.out)
    if name not in SCRIPTS:
        raise SystemExit(f"error: {args.script} is none of {', '.join(SCRIPTS)}")
    text = blank((ROOT / name).read_text())
    try:
        with open(out, "x") as file:  # x: never one that exists
            file.write(text)
    except FileExistsError:
        raise SystemExit(f"error: {out} exists: it may be somebody's work") from None
    except OSError as error:
        raise SystemExit(f"error: cannot write {out}: {error.strerror}") from None
    for number, (name, function) in equations(ast.parse(text)).items():
        print(f"eq. ({number})  {name}, line {function.lineno}")
    print(f"Fill them in, and check: python -m pytest classroom --script {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
