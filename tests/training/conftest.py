"""A finished run, for the tests of a file."""

import pytest
from tiny_model import make_recipe

from holdfast.training import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return train(make_recipe(directory)), make_recipe(directory)
