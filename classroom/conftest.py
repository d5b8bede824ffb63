"""`python -m pytest classroom --script my_ppo.py`: the tests of a script's equations, on a copy.

The copy (see blanks.py) is imported under the script's own name, so that the script's tests
exercise it. While the tests of one equation run, all the others are the script's own."""

import ast
import importlib.util
import inspect
import sys
from types import FunctionType

import pytest
from blanks import ROOT, SCRIPTS, equations

TESTS = {  # of the others: test_<script>.py
    "rig_td3": ["test_rig.py"],
    "skill_embedding": ["test_skill.py"],
    "cc_rig": ["test_cc_rig.py", "test_rig.py"],  # what they share is tested with rig_td3.py
}


def pytest_addoption(parser):
    parser.addoption("--script", help="a copy of a script, made by classroom/blanks.py")


def pytest_configure(config):
    path = config.getoption("--script")
    if not path:
        raise pytest.UsageError("classroom needs --script COPY, a copy made by classroom/blanks.py")
    sys.path.insert(0, str(ROOT))
    try:
        check = Check(config.invocation_params.dir / path)
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"--script {path} cannot be read: {error}") from None
    except SyntaxError as error:
        raise pytest.UsageError(f"--script {path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever a copy does when it is imported
        raise pytest.UsageError(f"--script {path}: {type(error).__name__}: {error}") from None
    config.pluginmanager.register(check)
    config.args[:] = [str(ROOT / "tests" / name) for name in check.tests]


def load(path, name):
    """A file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


class Check:
    """A pytest plugin: which tests ask which equation, and what they say."""

    def __init__(self, path):
        tree = ast.parse(path.read_text())
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        texts = {name[:-3]: (ROOT / name).read_text() for name in SCRIPTS}
        trees = {name: ast.parse(text) for name, text in texts.items()}
        titles = {ast.get_docstring(t).partition("\n")[0]: name for name, t in trees.items()}
        if first not in titles:
            raise ValueError("its docstring begins like that of none of the scripts")
        self.script = titles[first]
        self.tests = TESTS.get(self.script, [f"test_{self.script}.py"])
        script, self.functions = trees[self.script], equations(trees[self.script])
        own = {name for name, _ in equations(tree).values()}
        missing = [name for name, _ in self.functions.values() if name not in own]
        if missing:
            raise ValueError(f"{', '.join(missing)} must keep name and docstring")
        self.copy = load(path, self.script)
        original = load(ROOT / f"{self.script}.py", f"original_{self.script}")
        self.bodies = {}  # by number: the place in the copy, its name, the copy's, the script's
        for number, (name, function) in self.functions.items():
            places = [vars(module)[name] for module in (self.copy, original)]
            inside = function.name != name  # forward, of a network
            place = places[0] if inside else self.copy
            ours, theirs = (getattr(p, "forward", p) for p in places) if inside else places
            same = FunctionType(theirs.__code__, vars(self.copy), name, theirs.__defaults__)
            self.bodies[number] = place, function.name, ours, same
        # a test asks an equation if it names its function, or an update that calls it
        calls = {node.name: names(node) for node in script.body if hasattr(node, "name")}
        self.asks, self.results = {}, {number: {} for number in self.functions}
        for number, (name, _) in self.functions.items():
            users = {name} | {n for n, _ in self.functions.values() if name in calls[n]}
            self.asks[number] = {name} | {
                n for n in calls if n[:6] == "update" and users & calls[n]
            }

    @pytest.fixture(autouse=True)
    def equation(self, request, monkeypatch):
        for number, (place, name, ours, theirs) in self.bodies.items():
            monkeypatch.setattr(place, name, ours if number == request.param else theirs)
        relative = sys.modules.get(self.asked_in(request.module))
        if relative and relative is not self.copy:
            _, name, ours, _ = self.bodies[request.param]
            monkeypatch.setattr(relative, name, ours)

    def asked_in(self, module):
        """The name of the script that a file of tests is about."""
        file = module.__name__ + ".py"
        return next(s for s in (self.script, *TESTS) if TESTS.get(s, [f"test_{s}.py"])[0] == file)

    def pytest_generate_tests(self, metafunc):
        about = self.asked_in(metafunc.module)
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(metafunc.function))).body[0].body
        asked = set()
        for part in (part for statement in body for part in ast.walk(statement)):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                module = getattr(metafunc.module, part.value.id, None)
                if getattr(module, "__name__", "") == about:
                    asked.add(part.attr)
        numbers = [number for number, wanted in self.asks.items() if asked & wanted]
        if numbers:
            metafunc.parametrize("equation", numbers, indirect=True)

    def pytest_collection_modifyitems(self, items):
        asking = {n: [] for n in self.functions}
        for item in items:
            number = getattr(item, "callspec", None) and item.callspec.params.get("equation")
            if number:
                asking[number].append(item)
        items.clear()
        for found in asking.values():  # tests of another script, only where there are no own
            own = [item for item in found if item.path.name == self.tests[0]]
            items += own or found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" or report.failed:
            blank = call.excinfo and call.excinfo.errisinstance(NotImplementedError)
            verdict = "not yet" if blank else "wrong" if report.failed else "right"
            if blank:
                report.outcome, report.longrepr = "skipped", (str(item.path), 0, "not yet")
            found = self.results[item.callspec.params["equation"]].setdefault(
                item.originalname, set()
            )
            found.add(verdict)
        return report

    def verdict(self, number):
        said = set().union(*self.results[number].values())
        return next((word for word in ("not yet", "wrong", "right") if word in said), "not asked")

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"equations of {self.script}.py")
        for number, found in self.results.items():
            verdict = self.verdict(number)
            wrong = [test for test, said in found.items() if "wrong" in said]
            why = f", says {', '.join(wrong)}" if verdict == "wrong" else ""
            terminalreporter.line(
                f"eq. ({number})".ljust(10) + f"{self.functions[number][0]:26}{verdict}{why}"
            )

    def pytest_sessionfinish(self, session):
        if {self.verdict(number) for number in self.functions} != {"right"}:
            session.exitstatus = 1
