"""The remedies for mixed stacks: each works where it is needed and does nothing where it is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlrank import compat


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_torchvision_imports_in_a_fresh_process() -> None:
    done = python("import torchvision; from torchvision.transforms import v2; print(torchvision.__version__)")
    assert done.returncode == 0, done.stderr


def test_without_the_remedy_torchvision_fails_here() -> None:
    # -S leaves the .pth files out. When this starts to pass, the remedy can go.
    if not compat.needs_pth():
        pytest.skip("torch and torchvision match in this environment")
    site = compat.pth_file().parent
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(site)!r}); import torchvision"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "nms" in done.stderr


def test_the_pth_file_does_not_load_torch() -> None:
    assert python("import sys; print('torch' in sys.modules)").stdout.strip() == "False"


def test_patching_twice_adds_one_hook_and_importing_removes_it() -> None:
    done = python(
        "import sys; from vlrank import compat; compat.patch_torchvision(); compat.patch_torchvision()\n"
        "hooks = lambda: [f for f in sys.meta_path if type(f).__name__ == '_DeclareBeforeImport']\n"
        "assert len(hooks()) == 1, hooks()\n"
        "import torchvision; assert not hooks(); compat.patch_torchvision(); assert not hooks()"
    )
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_without_pytorch_makes_the_same_tokens(tiny_text_model: Path) -> None:
    code = (
        "import sys; from vlrank import compat; {}\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tiny_text_model)!r})\n"
        "print(tokenizer('1. a red mug\\n12')['input_ids'], sys.modules.get('torch') is None)"
    )
    whole, light = (python(code.format(hide)).stdout.strip() for hide in ("", "compat.hide_torch()"))
    assert whole.endswith("False")
    assert light.endswith("True")
    assert whole.split("]")[0] == light.split("]")[0]


def test_a_cuda_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    defined: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.library, "define", lambda name, schema: defined.append(name))
    compat._declare_operators()
    assert defined == []
    assert not compat.needs_pth()


@pytest.mark.parametrize(("build", "needed"), [("cu130", True), ("cpu", False)])
def test_a_cpu_build_of_torchvision_declares_its_own_operators(
    build: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared twice, its compiled library ends the process."""
    import torch

    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").touch()
    (tmp_path / "torchvision/version.py").write_text(f"__version__ = '0.28.0+{build}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    defined: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: defined.append(name))
    compat._declare_operators()
    assert bool(defined) == compat.needs_pth() == needed


def test_hidden_vllm_looks_absent_and_a_loaded_one_is_refused() -> None:
    done = python("from vlrank.compat import hide_vllm; hide_vllm(); hide_vllm(); import vllm")
    assert "ModuleNotFoundError" in done.stderr
    refused = python(
        "import sys, types; sys.modules['vllm'] = types.ModuleType('vllm')\n"
        "from vlrank.compat import hide_vllm; hide_vllm()"
    )
    assert "process of its own" in refused.stderr


def test_what_is_hidden_is_not_missed_by_what_else_is_installed(tmp_path: Path) -> None:
    """transformers imports scikit-learn where it is installed, and that imports SciPy: no model could be loaded."""
    package = tmp_path / "sklearn"
    package.mkdir()
    (package / "__init__.py").write_text("import scipy\n")
    (package / "metrics.py").write_text("roc_curve = None\n")
    facts = tmp_path / "scikit_learn-1.7.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: scikit-learn\nVersion: 1.7.0\n")
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from vlrank.compat import hide_extras; hide_extras(bitsandbytes=True)\n"
        "from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Trainer"
    )
    assert done.returncode == 0, done.stderr


def test_training_goes_without_what_it_did_not_ask_for() -> None:
    done = python(
        "from vlrank.compat import hide_extras; hide_extras(bitsandbytes=True)\n"
        "import transformers, peft, sys; from transformers import Trainer\n"
        "hidden = ('torchao.', 'datasets.', 'bitsandbytes.', 'scipy.', 'boto3.')\n"
        "assert not any(name.startswith(hidden) for name in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_what_is_installed_is_read_once_for_all_libraries_that_ask() -> None:
    """Each reading costs a start of training with Unsloth most of a second."""
    done = python(
        "import importlib.metadata as metadata; from vlrank import compat\n"
        "read, readings = metadata.packages_distributions, []\n"
        "metadata.packages_distributions = lambda: readings.append(1) or read()\n"
        "compat.list_packages_once(); compat.list_packages_once()\n"
        "assert metadata.packages_distributions() == metadata.packages_distributions() == read()\n"
        "assert len(readings) == 1"
    )
    assert done.returncode == 0, done.stderr
