"""Shared by all tests: the small shop, tiny models, and the research data where it lies beside the checkout."""

from pathlib import Path

import pytest

from vlrank.data.dataset import Dataset
from vlrank.data.shop import make_shop

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A small shop with pictures; read-only, copy it to change it."""
    return make_shop(tmp_path_factory.mktemp("shop") / "shop", n_items=60, n_users=80)


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 folder with random weights."""
    from vlrank.demo.base_models import save_model, text_model, train_tokenizer

    tokenizer = train_tokenizer(_corpus())
    return save_model(tmp_path_factory.mktemp("models") / "text", text_model(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL folder with random weights."""
    from vlrank.demo.base_models import save_model, train_tokenizer, vision_model

    tokenizer = train_tokenizer(_corpus())
    return save_model(tmp_path_factory.mktemp("models") / "vision", vision_model(tokenizer), tokenizer)


def _corpus() -> list[str]:
    from vlrank.demo.base_models import corpus

    return corpus()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Research data; never part of the project."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Configs and tokenizers of the real models, without weights."""
    return _present(SHARED / "models")


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{folder.name}/ is not beside the checkout")
    return folder
