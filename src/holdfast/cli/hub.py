"""Models on the Hugging Face hub, named OWNER/NAME or OWNER/NAME@REVISION where a directory could stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from holdfast.cli.errors import UsageError

__all__ = ["fetch_model", "hub_name", "is_hub_name"]

_NAME = re.compile(r"(?P<model>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>\w(?!.*\.\.)[\w./-]*))?")
# Of the repository's own folder: below it lie checkpoints and other formats. No pickled weights, which nothing reads.
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "recipe.toml")
_CONFIGURATION = ("config.json",)
_NOT = ("*/*",)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be meant for the hub; what begins with a directory that is here is a path."""
    return _NAME.fullmatch(name) is not None and not Path(name).parent.is_dir()


def fetch_model(name: str, *, weights: bool = True) -> Path:
    """The directory in the hub's cache that holds the model `name`, downloaded where it is not there yet.

    It says so on standard error: a mistyped path can be somebody's model.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        weights: False downloads its configuration alone.

    Raises:
        UsageError: if the hub has no such model or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found = _NAME.fullmatch(name)
    assert found is not None
    model, revision = found["model"], found["revision"]
    print(f"There is no directory {name}; taking the model {model} of the Hugging Face hub.", file=sys.stderr)
    try:
        files = list(_FILES if weights else _CONFIGURATION)
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=list(_NOT)))
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"There is no model directory {name}, and the hub cannot be reached; give a directory, or try again online."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"There is no model directory {name}, and the hub does not give one: {first}") from error


def hub_name(directory: Path) -> str | None:
    """OWNER/NAME of a directory in the hub's cache, models--OWNER--NAME/snapshots/COMMIT; None of any other."""
    kept = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not kept.startswith("models--"):
        return None
    return kept.removeprefix("models--").replace("--", "/", 1)
