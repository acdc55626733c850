"""Style as tests: sizes, signatures, exceptions, imports, words. CONTRIBUTING.md says why each rule is there."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator

import pytest

from source_tree import Function, Source, library_files, python_files, text_files

FUNCTION_LINES_P90 = 30
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
FILE_LINES_MEDIAN = 200
PARAMETERS_MAX = 6

# Heavy modules that may be imported inside a function, by the path's beginning; "*" is any module.
LAZY_IMPORTS = {
    "client/kvstore_client/": {"grpc", "numpy", "torch", "xxhash"},
    "kvstore/cli/": {"*"},
    "kvstore/bench/": {"kvstore_client", "torch", "zipnn"},
    "kvstore/agents/": {"kvstore", "torch"},
    "kvstore/codec/": {"numba", "torch"},
    "kvstore/replay/": {"matplotlib"},
    "kvstore/tiers/": {"torch"},
}

# What turns bytes into code or objects of any class. multiprocessing pickles what it hands to a child.
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "multiprocessing", "pickle", "shelve"}
FORBIDDEN_CALLS = {"__import__", "compile", "eval", "exec"}
FORBIDDEN_METHODS = {
    ("os", "popen"),
    ("os", "system"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("torch", "load"),
    ("yaml", "full_load"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
}

# To be False wherever they are said: np.load's, and those of whatever starts a process.
FORBIDDEN_FLAGS = {"allow_pickle", "shell"}

# Only these read the environment: a setting has one way in.
ENVIRONMENT_READERS = ("kvstore/config.py", "client/kvstore_client/")

# Put together here so that this file does not hold them.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
FOREIGN = re.compile(
    "|".join(
        (
            "py" + r"pi\.org",
            "python" + "hosted",
            "npm" + r"js\.(org|com)",
            "debian" + r"\.org",
            "index" + r"-url",
            *(rf"(?<![\w.])/{folder}/" for folder in ("wo" + "rk", "fa" + "rm", "ro" + "ot")),
        )
    )
)
SAMPLE_DATA = re.compile(r"\.\./" + "sha" + "red")
READS_SAMPLE_DATA_BY_PATH = ".ci/run"


def length(function: Function) -> int:
    """Lines from `def` to the last one, docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: Function) -> list[ast.arg]:
    """Every parameter but self and cls."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    variadic = [argument for argument in (given.vararg, given.kwarg) if argument]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return named + variadic


def listed(findings: list[str]) -> str:
    return "\n" + "\n".join(findings)


def library_functions() -> Iterator[tuple[Source, Function]]:
    for source in library_files():
        for function in source.functions():
            yield source, function


def test_functions_are_short() -> None:
    sizes = sorted(
        (length(function), f"{source.path}:{function.lineno} {function.name}")
        for source, function in library_functions()
    )
    too_long = [f"{place}: {lines} lines" for lines, place in sizes if lines > FUNCTION_LINES_MAX]
    assert not too_long, listed(too_long)
    p90 = sizes[len(sizes) * 9 // 10]
    assert p90[0] <= FUNCTION_LINES_P90, f"90th percentile is {p90[0]}; the ten longest:" + listed(
        [f"{n} {at}" for n, at in sizes[-10:]]
    )


def test_files_are_short() -> None:
    sizes = {source.path: len(source.text.splitlines()) for source in library_files() if source.text.strip()}
    too_long = [f"{path}: {lines} lines" for path, lines in sizes.items() if lines > FILE_LINES_MAX]
    assert not too_long, listed(too_long)
    assert statistics.median(sizes.values()) <= FILE_LINES_MEDIAN


def test_few_parameters() -> None:
    findings = [
        f"{source.path}:{function.lineno} {function.name}: {len(parameters(function))}"
        for source, function in library_functions()
        if len(parameters(function)) > PARAMETERS_MAX
    ]
    assert not findings, listed(findings)


def test_every_function_is_annotated() -> None:
    findings = []
    for source in library_files():
        for function in source.functions():
            bare = [argument.arg for argument in parameters(function) if argument.annotation is None]
            if function.returns is None:
                bare.append("return")
            if bare:
                findings.append(f"{source.path}:{function.lineno} {function.name}: {', '.join(bare)}")
    assert not findings, listed(findings)


def is_blind(handler: ast.ExceptHandler) -> bool:
    """Whether it takes every error, and does not hand it on."""
    if isinstance(handler.body[-1], ast.Raise):
        return False
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in kinds)


def reason_words(line: str) -> int:
    comment = line.partition("#")[2]
    return len(re.findall(r"[A-Za-z]{2,}", re.sub(r"noqa:\s*[A-Z0-9, ]+", "", comment)))


def test_no_blind_except_without_a_reason() -> None:
    findings = [
        f"{source.path}:{node.lineno}: {source.line(node.lineno).strip()}"
        for source in library_files()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and is_blind(node) and reason_words(source.line(node.lineno)) < 3
    ]
    assert not findings, listed(findings)


def imported(node: ast.AST) -> list[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").partition(".")[0]]
    return []


def test_no_imports_inside_functions_but_the_heavy_ones() -> None:
    findings = []
    for source, function in library_functions():
        allowed = set[str]().union(*(names for start, names in LAZY_IMPORTS.items() if source.path.startswith(start)))
        for node in ast.walk(function):
            strange = [name for name in imported(node) if name not in allowed and "*" not in allowed]
            findings += [f"{source.path}:{getattr(node, 'lineno', 0)}: {name}" for name in strange]
    assert not findings, listed(findings)


def names_called(node: ast.Call) -> tuple[str, str]:
    """("torch", "load") for torch.load(…), ("", "eval") for eval(…)."""
    if isinstance(node.func, ast.Attribute):
        return getattr(node.func.value, "id", "?"), node.func.attr
    return "", getattr(node.func, "id", "")


def may_run_code(node: ast.AST) -> str:
    """What is wrong with a node of the syntax tree, or nothing."""
    named = FORBIDDEN_MODULES.intersection(imported(node))
    if named:
        return f"imports {', '.join(named)}"
    if isinstance(node, ast.ImportFrom):
        taken = {(node.module or "", alias.name) for alias in node.names}
        return "".join(f"takes {owner}.{name}" for owner, name in taken & FORBIDDEN_METHODS)
    if isinstance(node, ast.Import) and any(alias.asname for alias in node.names):
        renamed = {alias.name for alias in node.names if alias.asname}
        return "".join(f"renames {owner}" for owner, _ in FORBIDDEN_METHODS if owner in renamed)
    if isinstance(node, ast.Call):
        owner, name = names_called(node)
        if (owner, name) in FORBIDDEN_METHODS or (owner in ("", "builtins") and name in FORBIDDEN_CALLS):
            return f"calls {owner}.{name}"
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_FLAGS and not is_false(keyword.value):
                return f"sets {keyword.arg}"
    return ""


@pytest.mark.parametrize(
    "line",
    ["subprocess.run(['ls'], shell=False)", "numpy.load(p, allow_pickle=False)", "re.compile('a')", "import torch"],
)
def test_the_rule_against_pickle_lets_the_rest_be(line: str) -> None:
    assert not any(may_run_code(node) for node in ast.walk(ast.parse(line)))


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_nothing_unpickles_or_evaluates() -> None:
    findings = [
        f"{source.path}:{getattr(node, 'lineno', 0)}: {wrong}"
        for source in python_files()
        for node in ast.walk(source.tree)
        if (wrong := may_run_code(node))
    ]
    assert not findings, listed(findings)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "import shelve",
        "exec(text)",
        "compile(text, '', 'exec')",
        "builtins.eval('1')",
        "yaml.load(text)",
        "from torch import load",
        "import torch as t",
        "from os import system",
        "os.popen('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen(command, shell=wanted)",
        "subprocess.getoutput('ls')",
    ],
)
def test_the_rule_against_pickle_can_fail(line: str) -> None:
    assert any(may_run_code(node) for node in ast.walk(ast.parse(line)))


def changes(target: ast.expr, names: set[str]) -> bool:
    """Whether an assignment changes one of the named objects (a.b = …, a[0].b = …) and not a variable of its own."""
    if isinstance(target, ast.Name):
        return False
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return getattr(target, "id", "") in names


def acts_on_import(statement: ast.stmt, imported_names: set[str]) -> bool:
    """Whether a top-level statement does more than to define names, or to finish what the module itself made."""

    def any_acts(statements: list[ast.stmt]) -> bool:
        return any(acts_on_import(inner, imported_names) for inner in statements)

    match statement:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return False
        case ast.Assign(targets=targets):
            return any(changes(target, imported_names) for target in targets)
        case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
            return changes(target, imported_names)
        case ast.Expr(value=ast.Constant()):
            return False
        case ast.Try(body=body, handlers=handlers):  # an optional import
            return any_acts([*body, *(inner for handler in handlers for inner in handler.body)])
        case ast.If(test=test, body=body, orelse=orelse):
            return "__main__" not in ast.dump(test) and any_acts([*body, *orelse])
    return True


def names_imported(tree: ast.Module) -> set[str]:
    """What a module's import statements bind: objects that belong to somebody else."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {(alias.asname or alias.name).partition(".")[0] for node in statements for alias in node.names}


def test_modules_have_no_side_effects_at_import() -> None:
    findings = [
        f"{source.path}:{statement.lineno}: {source.line(statement.lineno).strip()}"
        for source in library_files()
        for foreign in (names_imported(source.tree),)
        for statement in source.tree.body
        if acts_on_import(statement, foreign)
    ]
    assert not findings, listed(findings)


@pytest.mark.parametrize(
    "line", ["os.environ['OMP_NUM_THREADS'] = '1'", "print()", "os.register_at_fork()", "sys.x += 1"]
)
def test_the_rule_against_side_effects_can_fail(line: str) -> None:
    tree = ast.parse(f"import os, sys\n{line}")
    assert acts_on_import(tree.body[-1], names_imported(tree))


def reads_environment(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or getattr(node.value, "id", "") != "os":
        return False
    return node.attr in ("environ", "environb", "getenv")


def test_only_the_configuration_reads_the_environment() -> None:
    findings = [
        f"{source.path}:{getattr(node, 'lineno', 0)}"
        for source in library_files()
        for node in ast.walk(source.tree)
        if reads_environment(node) and not source.path.startswith(ENVIRONMENT_READERS)
    ]
    assert not findings, listed(findings)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (UNFINISHED, "unfinished work"),
        (FOREIGN, "a host or a folder of one machine"),
        (SAMPLE_DATA, "sample data by its path"),
    ],
    ids=["unfinished", "foreign", "sample data"],
)
def test_words_that_must_not_appear(pattern: re.Pattern[str], what: str) -> None:
    findings = [
        f"{path}:{number}: {what}: {line.strip()[:100]}"
        for path, text in text_files()
        if path != "LICENSE" and (pattern is not SAMPLE_DATA or path != READS_SAMPLE_DATA_BY_PATH)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not findings, listed(findings)


def asserts_something(function: Function) -> bool:
    if any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(function)):
        return True
    verbs = ("assert", "check", "eventually", "expect", "fail", "raises", "run_state_machine", "verify")
    called = (names_called(node)[1] for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(name.startswith(verbs) for name in called)


def test_every_test_can_fail() -> None:
    findings = [
        f"{source.path}:{function.lineno} {function.name}"
        for source in python_files()
        if source.path.startswith("tests/")
        for function in source.functions()
        if function.name.startswith("test_") and not asserts_something(function)
    ]
    assert not findings, listed(findings)


@pytest.mark.parametrize(
    ("path", "name", "members_max"),
    [
        ("kvstore/tiers/base.py", "Tier", 7),
        ("kvstore/core/policy.py", "EvictionPolicy", 8),
        ("kvstore/codec/base.py", "Codec", 6),
    ],
)
def test_what_is_plugged_in_stays_narrow(path: str, name: str, members_max: int) -> None:
    (source,) = (source for source in library_files() if source.path == path)
    (protocol,) = (node for node in source.tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    members = [node for node in protocol.body if isinstance(node, Function | ast.AnnAssign)]
    assert 0 < len(members) <= members_max
