"""Who may import whom, read off the syntax trees, and that the model library stays free of Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .source_tree import PACKAGES, REPOSITORY, imports, sources

STANDARD = sys.stdlib_module_names

# What the model library may use besides torch and the standard library, inside functions of these modules only.
LOADERS = {
    "qformer/backbones.py": {"transformers"},
    "qformer/audio/loading.py": {"transformers"},
    "qformer/text.py": {"transformers"},
    "qformer/conversion/checkpoint.py": {"safetensors"},
    "qformer/generation/passes/encoder_decoder.py": {"transformers"},
    "qformer/adapters/lora.py": {"peft"},
    "qformer/conversion/bert.py": {"transformers"},
    "qformer/conversion/frozen.py": {"transformers"},
    "qformer/conversion/huggingface.py": {"transformers"},
    "qformer/conversion/layouts.py": {"safetensors"},
    "qformer/conversion/vision.py": {"safetensors", "transformers"},
    "qformer/torch_build/torchvision.py": {"timm", "torchvision"},
}
# The folder -> the project's own packages it may import besides itself.
OWN = {
    "qformer": (),
    "pipelines/data": ("qformer",),
    "pipelines/inference": ("qformer", "pipelines.data"),
    "pipelines/evaluation": ("qformer", "pipelines.data", "pipelines.inference"),
    "pipelines/serving": ("qformer", "pipelines.data", "pipelines.inference"),
    "pipelines/training": ("qformer", "pipelines.data", "pipelines.inference"),
    "jobs": ("qformer", "pipelines"),
    "cluster": (),
}


def is_within(module, package):
    return module == package or module.startswith(f"{package}.")


def violations(path, text):
    """Forbidden imports of the file at `path` (relative to the repository), one sentence each."""
    place = path.as_posix()
    folder = next((name for name in OWN if place.startswith(f"{name}/")), None)
    allowed_own = (folder.replace("/", "."), *OWN[folder]) if folder else ()
    found = []
    for module, is_top in imports(ast.parse(text), ".".join(path.parts[:-1])):
        root = module.partition(".")[0]
        if root in PACKAGES and not any(is_within(module, own) for own in allowed_own):
            found.append(f"{place} imports {module}")
        if folder == "qformer" and root not in {*STANDARD, "torch", "qformer"}:
            in_loader = root in LOADERS.get(place, ()) and not is_top
            if not in_loader:
                found.append(f"{place} imports {module}: torch and the standard library only")
        if folder == "pipelines/data" and root == "ray" and path.name != "dataset.py":
            found.append(f"{place} imports ray: dataset.py alone wires it in")
        if folder == "pipelines/inference" and root == "ray":
            found.append(f"{place} imports ray: inference runs without it")
        if folder == "cluster" and root not in {*STANDARD, "ray"}:
            found.append(f"{place} imports {module}: cluster uses Ray alone")
    return found


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_follow_the_rule(path):
    assert violations(path, (REPOSITORY / path).read_text()) == []


@pytest.mark.parametrize("path", [path for path in sources() if path.name == "__init__.py"], ids=str)
def test_package_files_hold_only_docstring_and_reexports(path):
    for node in ast.parse((REPOSITORY / path).read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_docstring or is_all or isinstance(node, ast.ImportFrom), ast.unparse(node)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("qformer/model.py", "import ray"),
        ("qformer/model.py", "def load():\n    import timm"),  # not a loader
        ("qformer/backbones.py", "import transformers"),  # a loader, but at the top
        ("qformer/model.py", "from pipelines.data import order"),
        ("pipelines/data/order/global_batches.py", "from ray import data"),
        ("pipelines/data/order/global_batches.py", "def late():\n    import ray.data"),
        ("pipelines/data/order/global_batches.py", "from ...training import step"),
        ("pipelines/serving/app/app.py", "from pipelines import evaluation"),
        ("pipelines/training/step/loop.py", "import jobs.settings.train"),
        ("pipelines/inference/models.py", "def late():\n    import ray"),
        ("pipelines/inference/models.py", "from pipelines.training.step import loop"),
        ("cluster/local.py", "import torch"),
    ],
)
def test_the_rule_notices(path, text):
    assert violations(Path(path), text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("qformer/backbones.py", "def load():\n    import transformers"),
        ("pipelines/data/dataset.py", "import ray"),
        (
            "pipelines/training/step/loop.py",
            "import ray\nfrom pipelines.data.order.global_batches import plan\nfrom . import optim",
        ),
        ("jobs/train/job.py", "from pipelines.training import loop\nfrom jobs.settings.train import TrainSettings"),
    ],
)
def test_the_rule_allows(path, text):
    assert violations(Path(path), text) == []


def test_the_model_library_and_its_benchmark_run_without_the_pipeline_s_packages():
    """A machine may have torch, timm and transformers alone."""
    blocked = ("ray", "decord", "peft", "av", "pydantic")
    code = f"""
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import qformer, jobs.bench.engine, jobs.bench.stage1
for module in pkgutil.walk_packages(qformer.__path__, "qformer."):
    importlib.import_module(module.name)
print(jobs.bench.stage1.PAPER.hidden_size)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("768", "")


def test_a_reader_can_hold_the_model_library_in_the_head():
    """The modules at the top alone: a room is read when it is needed."""
    assert sum(len(path.read_text().splitlines()) for path in (REPOSITORY / "qformer").glob("*.py")) < 2500


def test_importing_qformer_loads_no_ray():
    modules = [".".join(path.with_suffix("").parts) for path in sources() if path.parts[0] == "qformer"]
    names = [name.removesuffix(".__init__") for name in modules]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += "print({'ray', 'pipelines', 'jobs', 'transformers', 'timm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_decoding_needs_no_torch():
    """Decode workers and their children stay small: torch costs seconds and hundreds of megabytes each."""
    names = [
        "qformer.preprocessing",
        "pipelines.data.media.images",
        "pipelines.data.media.transforms",
        "pipelines.data.media.frame_sampling",
    ]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
