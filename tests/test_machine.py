"""What is said of the machine beside numbers."""

import json
import platform

import torch

from holdfast.machine import available_cores, describe_machine


def test_the_description_is_complete_and_names_no_host() -> None:
    values = describe_machine()
    assert values["packages"]["holdfast"]
    assert values["packages"]["torch"] == torch.__version__
    assert 1 <= available_cores() == values["cores_available"] <= values["cores"]
    assert values["threads"] == torch.get_num_threads()
    assert values["processor"]
    assert values["commit"] is None or len(values["commit"].removesuffix("+")) == 40
    assert platform.node() not in json.dumps(values) or platform.node() in ("", "localhost")
