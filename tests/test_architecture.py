"""The rules that are not about imports between our modules, executed (see CONTRIBUTING.md)."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "loramux_protos": ROOT / "protos",
    "loramux_adapters": ROOT / "adapters",
    "loramux_server": ROOT / "server",
    "loramux_trainer": ROOT / "trainer",
    "loramux": ROOT / "client",
}
MAX_LINES = 400
MAX_MODULE_DOCSTRING_LINES = 6
BOUNDARIES = (
    "adapters/loramux_adapters/formats/",
    "adapters/loramux_adapters/store/",
    "client/loramux/",
    "server/loramux_server/api/",
    "server/loramux_server/config.py",
    "server/loramux_server/registry.py",
    "trainer/loramux_trainer/job.py",
    "trainer/loramux_trainer/job_file.py",
    "trainer/loramux_trainer/schema/",
    "trainer/loramux_trainer/sweep.py",
)
HEAVY = ("torch", "transformers", "bitsandbytes", "peft", "numpy", "safetensors")
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def _sources() -> Iterator[Path]:
    for package, root in PACKAGES.items():
        for path in (root / package).rglob("*.py"):
            if "_pb2" not in path.name:
                yield path


def _tests() -> Iterator[Path]:
    yield from (ROOT / "tests").rglob("*.py")


SOURCES = sorted(_sources())
EVERYTHING = sorted([*SOURCES, *_tests()])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _is_boundary(path: Path) -> bool:
    """Whether what users, files and other processes send is first looked at here."""
    return _name(path).startswith(BOUNDARIES)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names of every module imported anywhere in `tree`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )


def _modules_under(package: str, root: Path) -> list[str]:
    """Dotted names of all modules of a package below `root`, found without importing any."""
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted((root / Path(*package.split("."))).rglob("*.py"))
        if path.name != "__init__.py"
    ]


def test_there_are_sources_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {root.name for root in PACKAGES.values()}


@pytest.mark.parametrize("path", EVERYTHING, ids=_name)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=_name)
def test_a_module_says_what_it_is_in_six_lines(path: Path) -> None:
    docstring = ast.get_docstring(_parse(path))
    assert docstring, "no module docstring"
    assert len(docstring.splitlines()) <= MAX_MODULE_DOCSTRING_LINES


@pytest.mark.parametrize("path", [path for path in EVERYTHING if path.name == "__init__.py"], ids=_name)
def test_init_files_are_empty(path: Path) -> None:
    """import-linter does not see what a package's own `__init__` imports. The client's names what users import."""
    if path == ROOT / "client/loramux/__init__.py":
        assert _imported(_parse(path)) <= {"loramux", "__future__", "typing", "importlib"}
    else:
        assert path.read_text(encoding="utf-8").strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_is_unpickled(path: Path) -> None:
    tree = _parse(path)
    assert not _imported(tree) & UNSAFE
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
            assert not (is_torch and node.func.attr in {"load", "save"}), f"line {node.lineno}: torch.{node.func.attr}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_child_imports_nothing_from_where_the_user_is(path: Path) -> None:
    """`python -m` looks for modules in the working directory first: a `statistics.py` there would be ours. `-I` leaves
    it out too.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.List(elts=[ast.Attribute(attr="executable"), ast.Constant(value=flag), *_]):
                assert flag in ("-P", "-I"), f"{_name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", EVERYTHING, ids=_name)
def test_no_comment_leaves_work_behind(path: Path) -> None:
    with tokenize.open(path) as file:
        comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    left = [
        f"{token.start[0]}: {token.string}"
        for token in comments
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string)
    ]
    assert not left


@pytest.mark.parametrize("path", [path for path in SOURCES if _is_boundary(path)], ids=_name)
def test_input_never_meets_an_assert(path: Path) -> None:
    """`python -O` drops assertions: where input enters, what a caller may get wrong is raised."""
    assert [node.lineno for node in ast.walk(_parse(path)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize(
    ("package", "root"),
    [("loramux_server.engine", ROOT / "server"), ("loramux_protos", ROOT / "protos")],
    ids=["engine", "protos"],
)
def test_importing_it_does_not_load_torch(package: str, root: Path) -> None:
    modules = _modules_under(package, root)
    done = _run(f"""
        import importlib, sys
        for name in {modules!r}:
            importlib.import_module(name)
        print(sorted(set({HEAVY!r}) & set(sys.modules)))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_light_client_needs_nothing_heavy() -> None:
    """As after a plain `pip install loramux`: the client and every command's help work with the extras out of reach."""
    done = _run(f"""
        import sys
        from importlib.abc import MetaPathFinder

        class Absent(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {(*HEAVY, "prometheus_client", "grpc_reflection")!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
                return None

        sys.meta_path.insert(0, Absent())
        from loramux import AsyncClient, Client

        loaded = {{name.split(".")[0] for name in sys.modules}}
        assert not loaded & {{"loramux_server", "loramux_trainer", "loramux_adapters"}}, loaded

        from loramux.cli.main import app
        from typer.testing import CliRunner

        result = CliRunner().invoke(app, ["--help"])
        assert result.exit_code == 0, result.output
        assert "serve" in result.output and "adapters" in result.output, result.output
    """)
    assert done.returncode == 0, done.stderr


def test_the_distribution_is_what_it_says() -> None:
    distribution = importlib.metadata.distribution("loramux")
    metadata = distribution.metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"serve", "train", "dev"} <= set(metadata.get_all("Provides-Extra") or [])
    light = {
        re.split(r"[^A-Za-z0-9-]", requirement)[0]
        for requirement in distribution.requires or []
        if "extra ==" not in requirement
    }
    grpc = {"grpcio", "grpcio-health-checking", "grpcio-status", "googleapis-common-protos", "protobuf"}
    assert light == grpc | {"typer", "rich", "pyyaml", "platformdirs", "pydantic"}


def test_there_is_one_command() -> None:
    commands = [
        entry for entry in importlib.metadata.distribution("loramux").entry_points if entry.group == "console_scripts"
    ]
    assert [(entry.name, entry.value) for entry in commands] == [("loramux", "loramux.cli.main:app")]


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_shipped(package: str) -> None:
    assert (PACKAGES[package] / package / "py.typed").is_file()


def test_every_direct_dependency_is_pinned() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    needed = {
        re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")
        for requirement in importlib.metadata.requires("loramux") or []
    }
    assert needed - {"loramux"} <= pins


def test_torch_is_pinned_without_a_local_version() -> None:
    """With +cpu or +cu in the pin, one of the two kinds of machine could not install."""
    assert re.search(r"^torch==[0-9.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_the_import_contracts_hold() -> None:
    """Who may import whom, and no cycle between siblings at any depth."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No cycle between siblings" in done.stdout
