"""The shape of the repository: imports point one way, planning needs no torch, the README's map is true."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_kernels

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"launch": 3, "recipes": 2, "epochal": 1, "triton_kernels": 0}
"""A file may import its own layer and those below it."""

LIGHT = (
    "run", "optimizer_config", "records", "scale", "config", "stopping", "provenance", "cli", "scaling", "search", "report",
    "campaign", "models/config", "training/schedule", "data/documents", "data/tokenizer",
)  # fmt: skip
"""Parts of epochal that import no torch at module level."""

OPTIONAL = {
    "datasets",
    "deepspeed",
    "gguf",
    "triton",
    "scipy",
    "jinja2",
    "matplotlib",
    "mpld3",
    "submitit",
    "lm_eval",
    "pyarrow",
    "zstandard",
}
HEAVY = ("torch", "transformers", "accelerate", "numpy", "scipy", "matplotlib", "datasets")


def sources() -> list[tuple[str, Path]]:
    folders = {"launch": ROOT / "launch", "recipes": ROOT / "recipes", "triton_kernels": ROOT / "triton_kernels"}
    folders["epochal"] = ROOT / "src" / "epochal"
    return [(layer, path) for layer, folder in folders.items() for path in sorted(folder.rglob("*.py"))]


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports; `if TYPE_CHECKING` blocks are left out."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and module_level:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        todo += ast.iter_child_nodes(node)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for layer, path in sources()
        for name in imports(path)
        if LAYERS.get(name.split(".")[0], -1) > LAYERS[layer]
    ]
    assert wrong == []


def room(module: str) -> str:
    """Return the package of a module, or the module itself at the top: epochal.data.store -> data, epochal.run -> run."""
    return module.split(".")[1]


def import_graph() -> dict[str, set[str]]:
    """Draw the imports between the packages and top modules of epochal, late imports counted."""
    graph: dict[str, set[str]] = {}
    package = ROOT / "src" / "epochal"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        targets = {room(name) for name in imports(path) if name.startswith("epochal.")}
        graph.setdefault(parts[0], set()).update(targets - {parts[0]})
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the rooms of one import circle, or an empty list: what remains after taking leaves off the graph."""
    rest = {name: set(targets) & set(graph) for name, targets in graph.items()}
    while leaves := [name for name, targets in rest.items() if not targets]:
        for name in leaves:
            del rest[name]
        for targets in rest.values():
            targets.difference_update(leaves)
    return sorted(rest)


def test_packages_import_without_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert circle(import_graph()) == []


def test_modules_of_one_package_import_without_circles() -> None:
    package = ROOT / "src" / "epochal"
    for folder in [package, *sorted(path for path in package.rglob("*") if path.is_dir())]:
        graph = {}
        for path in folder.glob("*.py"):
            dotted = ".".join(("epochal", *folder.relative_to(package).parts, ""))
            names = [name.removeprefix(dotted).split(".")[0] for name in imports(path) if name.startswith(dotted)]
            graph[path.stem] = {name for name in names if (folder / f"{name}.py").is_file()} - {path.stem}
        assert circle(graph) == [], folder


def test_optimizers_know_no_data_model_or_record() -> None:
    allowed = {"epochal.optim", "epochal.optimizer_config"}
    for path in (ROOT / "src" / "epochal" / "optim").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "epochal":
                assert ".".join(parts[:2]) in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_import_no_torch(part: str) -> None:
    place = ROOT / "src" / "epochal" / part
    for path in sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        found = {name.split(".")[0] for name in imports(path, module_level=True)}
        assert not found & {"torch", "transformers", "accelerate"}, path


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for layer, path in sources():
        if layer in ("epochal", "recipes", "launch"):
            found = {name.split(".")[0] for name in imports(path, module_level=True)}
            assert not found & OPTIONAL, f"{path.relative_to(ROOT)} imports {found & OPTIONAL}"


def test_triton_kernels_is_the_folder_of_this_repository() -> None:
    assert Path(str(triton_kernels.__file__)).resolve().parent == ROOT / "triton_kernels"


def loaded_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level modules that are loaded at its end."""
    script = f"import sys\ntry:\n{code}\nexcept SystemExit:\n    pass\nprint('loaded', *sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in found.stdout.splitlines()[-1].split()}


def test_help_and_plan_load_nothing_heavy() -> None:
    for arguments in (["--help"], ["plan"]):
        code = f"    sys.argv = ['epochal', *{arguments}]\n    from epochal.cli import main\n    main()"
        loaded = loaded_after(code)
        assert "epochal" in loaded
        wanted = HEAVY if arguments == ["--help"] else ("torch", "transformers", "accelerate", "matplotlib")
        assert not loaded & set(wanted), arguments


def test_words_without_torch() -> None:
    modules = ", ".join(
        f"epochal.{part}" for part in ("run", "records", "scaling", "report.write", "campaign.plan", "scale")
    )
    assert not loaded_after(f"    import {modules}") & {"torch", "transformers", "accelerate", "matplotlib"}


def test_the_map_of_the_readme_matches_the_disk() -> None:
    """Every path at the start of a line of the README's tree exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    trees = [block for block in blocks if re.search(r"^recipes/", block, flags=re.MULTILINE)]
    for line in (line for tree in trees for line in tree.splitlines()):
        words = re.split(r"\s{2,}", line.strip())[0].split() if line and not line.startswith(" ") else []
        for word in words:
            if re.fullmatch(r"[\w./-]+", word) and ("/" in word or "." in word):
                assert (ROOT / word).exists(), f"README.md names {word}, which does not exist"


PRIVATE_LANGUAGE = (
    r"\bfor ever\b", r"\bbeside\b",
    r"\bin turn\b", r"\bin other hands\b", r"\bin (no|nobody's) hands\b", r"\bnobody\b", r"\bwhoever\b",
    r"\banew\b", r"\blies? under\b", r"\bwithout a word\b", r"\blast word\b", r"\bspeaks? (together|as one)\b", r"\bgoes on\b",
    r"\bis no (multiple|number|text|duration|model|table|record|kind|list|name)\b", r"\bare no (models|numbers|matrices)\b",
    r"\bwhat is left\b", r"\bits own\b.*\bits own\b", r"\bfar and wide\b", r"\bto hand\b", r"\bby nature\b",
)  # fmt: skip
"""Phrases that a reader stops at; say "must be X, got ...", "next to", "resume", "claimed" and so on instead."""


def test_the_prose_is_plain_english() -> None:
    specifications = {"fira.md", "spectra.md", "infinite_compute.md"}  # notes on the papers
    files = [path for _, path in sources()] + [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md"]
    files += [path for path in (ROOT / "docs").glob("*.md") if path.name not in specifications]
    files += [*(ROOT / "configs").rglob("*.toml"), *(ROOT / "benchmarks").glob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(re.search(phrase, line, flags=re.IGNORECASE) for phrase in PRIVATE_LANGUAGE)
    ]
    assert wrong == []


def test_docstrings_begin_with_a_short_sentence() -> None:
    """The first sentence of a docstring has at most 15 words."""
    long = []
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
            first = re.split(r"(?<=[.?!:;])\s|\n\n", text or "")[0]
            if len(first.split()) > 15:
                long.append(f"{path.relative_to(ROOT)}: {first}")
    assert long == []


def test_no_file_names_an_absolute_path_of_a_machine() -> None:
    for _, path in sources():
        assert not re.search(r"[\"'](/home/|/root/|/work/|/Users/)", path.read_text(encoding="utf-8")), path
