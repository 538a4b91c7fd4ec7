"""Nothing in the package turns data into code: read off its syntax trees, so that a new file is judged like the old ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ernie45

PACKAGE = Path(ernie45.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_METHODS = {("os", "system"), ("os", "popen"), ("torch", "save")}
MAY_START_PROCESSES = {"engine/client.py", "cli/serve.py", "bench/peers.py", "store/default_model.py"}
MAY_READ_YAML = {"config/run_file.py"}
SAFE_YAML = {
    *("SafeLoader", "compose", "safe_load", "safe_dump", "YAMLError", "constructor"),
    *("MappingNode", "ScalarNode", "SequenceNode"),
}
MAY_NAME_ENVIRONMENTS = {"processing/sandbox.py"}


def faults(path: str, source: str) -> Iterator[str]:
    """What a file does that it must not."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"{path}:{line} imports {module}"
                if module.split(".")[0] == "yaml" and (path not in MAY_READ_YAML or isinstance(node, ast.ImportFrom)):
                    yield f"{path}:{line} imports {module}"
                if module.split(".")[0] == "subprocess" and path not in MAY_START_PROCESSES:
                    yield f"{path}:{line} starts processes"
                if module.split(".")[0] == "jinja2" and "Environment" in names and path not in MAY_NAME_ENVIRONMENTS:
                    yield f"{path}:{line} renders outside of the sandbox"
        if isinstance(node, ast.Attribute) and _is_name(node.value, "yaml") and node.attr not in SAFE_YAML:
            yield f"{path}:{line} uses yaml.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{path}:{line} {fault}" for fault in _call_faults(node))


def _call_faults(call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    function = call.func
    if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
        yield f"calls {function.id}"
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        whole = (function.value.id, function.attr)
        if whole in FORBIDDEN_METHODS:
            yield f"calls {'.'.join(whole)}"
        if whole == ("torch", "load") and not _is(given.get("weights_only"), True):
            yield "calls torch.load without weights_only=True"
    if isinstance(function, ast.Attribute) and _is_name(function.value, "yaml") and function.attr == "compose":
        loader = given.get("Loader")
        if not (isinstance(loader, ast.Attribute) and loader.attr == "SafeLoader"):
            yield "calls yaml.compose without the SafeLoader"
    for name, value in (("shell", False), ("allow_pickle", False), ("trust_remote_code", False)):
        if name in given and not _is(given[name], value):
            yield f"passes {name}"


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_turns_data_into_code() -> None:
    assert len(FILES) > 100
    found = [
        fault
        for file in FILES
        for fault in faults(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "import subprocess",
        "eval('1')",
        "exec(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "os.system('x')",
        "from jinja2 import Environment",
        "import yaml",
    ],
)
def test_each_fault_is_seen(source: str) -> None:
    assert list(faults("x.py", source))


@pytest.mark.parametrize(
    "source",
    [
        "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "yaml.full_load(x)",
        "yaml.compose(x)",
        "yaml.compose(x, Loader=yaml.UnsafeLoader)",
        "from yaml import load",
    ],
)
def test_the_one_file_that_reads_yaml_does_it_safely(source: str) -> None:
    assert list(faults("config/run_file.py", source))
    assert not list(
        faults("config/run_file.py", "import yaml\nyaml.safe_load(x)\nyaml.compose(x, Loader=yaml.SafeLoader)")
    )


def test_templates_run_in_the_sandbox() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from ernie45.processing.sandbox import GuardedEnvironment

    assert issubclass(GuardedEnvironment, ImmutableSandboxedEnvironment)
