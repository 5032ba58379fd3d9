"""The layers of docs/architecture.md, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "knn_diffusion"

# A module belongs to the layer of the longest name here that it starts with.
LAYERS = {
    "errors": 0,
    "shapes": 0,
    "config": 0,
    "randomness": 0,
    "device": 0,
    "compiler": 0,
    "progress": 0,
    "images": 1,
    "stickers": 1,
    "checkpoint": 1,
    "hub": 1,
    "diffusion.process": 1,
    "diffusion.conditioning": 1,
    "evaluation": 1,
    "diffusion": 2,
    "models": 2,
    "retrieval": 2,
    "convert.legacy": 2,
    "convert.shards": 2,
    "model_card": 3,
    "models.encoders": 3,
    "models.transformers_encoder": 3,
    "models.text_states": 3,
    "tokens": 3,
    "image_index": 4,
    "model_folder": 4,
    "neighbor_tokens": 4,
    "request": 4,
    "convert": 4,
    "pipeline": 5,
    "assembly": 5,
    "training": 5,
    "presets": 6,
    "evaluation.features": 4,
    "evaluation.sides": 4,
    "evaluation.comparison": 4,
    "evaluation.examiner": 6,
    "evaluation.protocols": 6,
    "doctor": 6,
    "serving": 7,
    "cli": 8,
    "__main__": 9,
}
SEPARATE = ("diffusion", "models", "retrieval")
OPTIONAL = (
    "huggingface_hub",
    "transformers",
    "diffusers",
    "emoji",
    "tensorboard",
    "pyarrow",
    "torchvision",
    "matplotlib",
    "milvus_lite",
    "pandas",
    "pymilvus",
    "ray",
    "vtracer",
    "faiss",
    "rich",
    "resvg_py",
)


def layer(module: str) -> int:
    known = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    assert known, f"{module} has no layer: add it to LAYERS and to docs/architecture.md"
    return LAYERS[max(known, key=len)]


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = modules()
    inside = {name.removeprefix("knn_diffusion.") for name in found if name.startswith("knn_diffusion.")}
    return {name for name in inside if name in known}


def edges() -> list[tuple[str, str]]:
    return [(name, target) for name, path in modules().items() if name for target in imports(path) if target != name]


def violations(pairs: list[tuple[str, str]]) -> list[str]:
    wrong = []
    for source, target in pairs:
        rooms = source.split(".")[0], target.split(".")[0]
        if layer(target) > layer(source) or (
            layer(target) == layer(source) and rooms[0] != rooms[1] and layer(source) > 1
        ):
            wrong.append(f"{source} (layer {layer(source)}) imports {target} (layer {layer(target)})")
        elif rooms[0] != rooms[1] and set(rooms) <= set(SEPARATE) and layer(source) == layer(target) == 2:
            wrong.append(f"{source} imports {target}: diffusion, models and retrieval never import each other")
    return wrong


def test_imports_go_strictly_downwards() -> None:
    assert violations(edges()) == []


def test_training_never_imports_the_pipeline() -> None:
    assert not [pair for pair in edges() if pair[0].startswith("training") and pair[1] == "pipeline"]


@pytest.mark.parametrize(
    "pair", [("errors", "pipeline"), ("retrieval.store", "models.denoiser"), ("training.loop", "pipeline")]
)
def test_a_wrong_import_would_be_noticed(pair: tuple[str, str]) -> None:
    assert violations([pair])


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_optional_dependency() -> None:
    assert loaded_by("import knn_diffusion; knn_diffusion.KnnDiffusion").isdisjoint(OPTIONAL)


def test_an_optional_dependency_would_be_noticed() -> None:
    assert not loaded_by("import rich").isdisjoint(OPTIONAL)


def test_nothing_executes_code_from_files() -> None:
    banned = (
        "import pickle",
        "pickle.load",
        "Unpickler",
        "torch.load(",
        "allow_pickle=True",
        "yaml.load",
        "import torchvision",
        "weights_only=False",
    )
    found = [
        f"{path.name}: {word}" for name, path in modules().items() if name != "convert.legacy"
        for word in banned if any(word in line.split("#")[0] for line in _code(path))
    ]  # fmt: skip
    assert found == []


def _code(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for number, line in enumerate(lines, 1) if number not in docstrings]
