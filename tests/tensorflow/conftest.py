"""TensorFlow without GPUs and without its lines on stderr; and each test with Keras as it was at first."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import pytest


def pytest_configure(config):
    """Keras' own lines, with NumPy 2.4, and with a loss scale that overflows."""
    copy = "__array__ implementation doesn't accept a copy keyword"
    config.addinivalue_line("filterwarnings", f"ignore:{copy}:DeprecationWarning:keras.*")


@pytest.fixture(autouse=True)
def fresh_keras():
    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
    keras.utils.clear_session(free_memory=False)
