"""Writes the folded blocks of README.md: answers from tries.json and results/, bugs from bugs.json.

python classroom/fold.py
"""

import json
import re
from pathlib import Path

from answers import RESULTS, questions
from bugs import diff, read

HERE = Path(__file__).resolve().parent
NOT_YET = "Not measured yet: `python classroom/answers.py --run --only {}`."


def fold(summary, *paragraphs):
    text = "\n\n".join(paragraphs)
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>\n"


def code(text):
    """Backquotes are not read inside a summary."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def answers():
    blocks = []
    for script, tries in json.loads((HERE / "tries.json").read_text()).items():
        blocks.append(f"### `{script}.py`\n")
        for n, (wanted, question) in enumerate(zip(tries, questions(script)), 1):
            pictures = [RESULTS / f"{script}_{n}.png", *sorted(RESULTS.glob(f"{script}_{n}_*.png"))]
            shown = [f"![{p.stem}](results/{p.name})" for p in pictures if p.exists()]
            said = [wanted.get("answer", NOT_YET.format(f"{script}_{n}"))]
            blocks.append(fold(f"{n}. {code(question)}", *said, *shown))
    return blocks


def bugs():
    blocks, script = [], None
    for bug in read():
        if bug["script"] != script:
            script = bug["script"]
            blocks.append(f"### `{script}`\n")
        paragraphs = ["```diff", *diff(bug), "```"]
        seen = f"*Seen* ({bug['column']}, `{bug['flags']}`): {bug['symptom']}"
        name = f"bug_{script.removesuffix('.py')}_{bug['name']}.png"
        said = ["\n".join(paragraphs), *([seen] if bug["symptom"] else [])]
        said += [f"![{bug['name']}](results/{name})"] if (RESULTS / name).exists() else []
        said += [f"*Why.* {bug['explanation']} *Noticed by* `{bug['test']}`."]
        blocks.append(fold(f"{bug['number']}. {code(bug['question'])}", *said))
    return blocks


def folded(text):
    """The README with both sections as they should be."""
    for name, blocks in (("answers", answers()), ("bugs", bugs())):
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, rest = text.split(start)
        text = before + start + "\n" + "\n".join(blocks) + "\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(folded(readme.read_text()))
