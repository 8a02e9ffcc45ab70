"""Looking into SB3's .zip without loading it."""

import zipfile
from typing import Any

from stable_baselines3.common.save_util import json_to_data, open_path


def saved_policy_kwargs(path: Any) -> dict[str, Any]:
    """The policy's arguments that a model was saved with.

    :param path: of the .zip, which may be left out, or an open file
    :raises FileNotFoundError: no such file
    """
    file = open_path(path, "r", verbose=0, suffix="zip")
    with zipfile.ZipFile(file) as archive:
        arguments: dict[str, Any] = json_to_data(archive.read("data").decode())["policy_kwargs"]
    if hasattr(path, "seek"):
        path.seek(0)  # for who reads it next
    else:
        file.close()
    return arguments
