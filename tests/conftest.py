"""Settings for all tests: no network, two threads, and the packaged model loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from taskvec.lm import LM


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def smollm() -> LM:
    """The default model (real weights), float32."""
    return LM.load("smollm2-135m")
