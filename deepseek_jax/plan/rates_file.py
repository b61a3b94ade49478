"""The file of measured rates: `plan calibrate --out=FILE` writes it, `plan --rates=FILE` reads it."""

import json
import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import paths
from deepseek_jax.errors import UserError

FORMAT = "deepseek_jax rates 1"
SECONDS = ("launch", "collective", "host")  # these may be 0
OF_BYTES = ("memory", "cached", "link", "network", "host_link")
_MEASURE = "Write it by: python -m deepseek_jax.plan calibrate --out={}"


def write(path: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    temporary = paths.temporary(path)
    try:
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(json.dumps(content, indent=1) + "\n")
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
    except OSError as e:
        raise UserError(f"--out={path} cannot be written ({e.strerror}).") from None


def read(path: str) -> dict[str, Any]:
    """What `plan calibrate` has written.

    Raises:
      UserError: there is no such file, or it is another.
    """
    try:
        with open(paths.expanded(path, "--rates"), encoding="utf-8") as f:
            found = json.load(f)
    except OSError as e:
        raise UserError(
            f"--rates={path} cannot be read ({e.strerror}). {_MEASURE.format(path)}"
        ) from None
    except ValueError:  # no JSON, or no UTF-8
        found = None
    of_it = found.get("rates") if isinstance(found, dict) else None
    whole = isinstance(found, dict) and found.get("format") == FORMAT
    if not whole or not isinstance(of_it, dict) or not {"f32", "memory"} <= of_it.keys():
        raise UserError(f"--rates={path} is no file of measured rates. {_MEASURE.format(path)}")
    for name, value in of_it.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf") or (not value and name not in SECONDS):
            raise UserError(
                f"--rates={path} gives {name} the value {value!r}, which is no rate. "
                f"{_MEASURE.format(path)}"
            )
    if not isinstance(found.get("device"), str) or not isinstance(found.get("devices"), int):
        raise UserError(
            f"--rates={path} does not say of which devices it is. {_MEASURE.format(path)}"
        )
    return found
