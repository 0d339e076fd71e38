"""What some tests need of the machine: without it they are skipped, but not in CI, where it is installed."""

import os

import pytest

from trainstep.benchmarks.datasets import DEBIAN_FASHION_MNIST

fashion_mnist = pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.exists() and not os.environ.get("CI"),
    reason="needs Debian's package dataset-fashion-mnist; elsewhere the data would be downloaded",
)
