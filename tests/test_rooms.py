"""The rooms of the house: who may import whom, lazy and type-only imports included."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "platform" / "vlrank"
FLOORS = [
    *(
        "version",
        "errors",
        "compat",
        "installation",
        "cuda_graphs",
        "storage",
        "console",
        "text_template",
        "config",
        "supervisor",
        "runtime",
        "ray_processes",
        "ray_train",
        "options",
    ),
    *("data", "prompting", "retrieval", "engines", "bulk", "generation", "reranking", "evaluation"),
    *(
        "training",
        "tuning",
        "reranker",
        "export",
        "serving",
        "__init__",
        "stages",
        "paths",
        "recipes",
        "doctor",
        "demo",
    ),
    *("submit", "jobs", "cli", "__main__"),
]


def imports() -> dict[str, set[str]]:
    """File -> files of the package that it imports, as dotted paths below the package."""
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        inside = {t.removeprefix("vlrank").lstrip(".") for t in targets if t == "vlrank" or t.startswith("vlrank.")}
        found[name] = {_file_of(target, files) for target in inside} - {name}
    return found


def _file_of(target: str, files: dict[str, Path]) -> str:
    while target and target not in files:
        target = target.rpartition(".")[0]
    return target or "__init__"


def test_imports_go_down_only() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if FLOORS.index(target.partition(".")[0]) > FLOORS.index(name.partition(".")[0])
    ]
    assert not upward


def test_no_circle_of_files() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
