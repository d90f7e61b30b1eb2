"""Whether the hub answers is asked once, and where it does not, nothing is tried again."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest

from holdfast.data.hub import fail_fast_offline, hub_is_reachable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception | None], list[str]]]:
    """Lets the hub answer, or fail with an error; gives the addresses that are asked."""

    def arrange(error: Exception | None) -> list[str]:
        addresses: list[str] = []

        class Session:
            def head(self, address: str, **_: Any) -> None:
                addresses.append(address)
                if error is not None:
                    raise error

        monkeypatch.setattr("huggingface_hub.get_session", Session)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        hub_is_reachable.cache_clear()
        return addresses

    yield arrange
    hub_is_reachable.cache_clear()


@pytest.mark.parametrize("error", [None, OSError("no network"), RuntimeError("of a library")])
def test_data_sets_are_offline_where_the_hub_is(
    asked: Callable[[Exception | None], list[str]], error: Exception | None
) -> None:
    addresses = asked(error)
    for _ in range(2):
        with fail_fast_offline():
            assert datasets.config.HF_HUB_OFFLINE is (error is not None)
        assert datasets.config.HF_HUB_OFFLINE is False
    assert len(addresses) == 1


def test_who_is_offline_by_choice_is_not_asked(
    asked: Callable[[Exception | None], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = asked(None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()
    assert addresses == []
