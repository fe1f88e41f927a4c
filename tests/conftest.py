"""Settings for all tests: no network, one thread, and the packaged model loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "TASKVEC_TEST_DEVICE" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator

import pytest
import torch

from taskvec.lm import LM


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """On tiny models a second thread only waits; the real one takes two."""
    torch.set_num_threads(2 if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm() -> LM:
    """The default model (real weights), float32."""
    return LM.load("smollm2-135m")
