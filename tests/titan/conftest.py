"""A process group of one, in this process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)
from stackgrow.recipe.keys import Model
from stackgrow.titan import device


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    device.default_environment()
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@pytest.fixture
def small() -> Model:
    """Grouped-query attention, and an FFN width that no multiple of 256 gives."""
    return Model(
        family="llama2",
        dim=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=176,
        vocab_size=97,
    )
