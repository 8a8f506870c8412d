"""What is tested on one CUDA device. STACKGROW_TEST_DEVICE=cpu runs what needs none of its kernels on a CPU instead:
slow, and no part of the suite, but it shows that the tests themselves work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import RECIPE, VOCABULARY, Workplace
from random_store import random_store

import stackgrow.titan  # noqa: F401  (the device comes before torchtitan)
from stackgrow.titan import device as cpu_device

DEVICE = os.environ.get("STACKGROW_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of one, in this process."""
    cpu_device.default_environment()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "tiny.toml").write_text(RECIPE)
    random_store(folder / "store", VOCABULARY, 2**17)
    return Workplace(folder)
