"""What the stand-ins of tracker packages share: they write down each call, and fail as they are told.

STAND_IN_CALLS names the file that gets a JSON line per call; STAND_IN_FAILS is "TOOL.CALL:HOW", how being
hang, raise, full, exit, or one of them with "@N" for the Nth call only.
"""

import errno
import json
import os
import time
from typing import Any

_counts: dict[str, int] = {}


def call(name: str, /, **values: Any) -> None:
    """Writes down a call: "wandb.log" and what it got."""
    _counts[name] = _counts.get(name, 0) + 1
    wanted, _, how = os.environ.get("STAND_IN_FAILS", "").partition(":")
    how, _, which = how.partition("@")
    if wanted == name and which in ("", str(_counts[name])):
        fail(how)
    with open(os.environ["STAND_IN_CALLS"], "a", encoding="utf-8") as f:
        f.write(json.dumps({"call": name, **values}) + "\n")


def calls() -> list[dict[str, Any]]:
    with open(os.environ["STAND_IN_CALLS"], encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def fail(how: str) -> None:
    if how == "hang":
        time.sleep(600)
    elif how == "exit":
        os._exit(9)
    elif how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    raise RuntimeError("the server is on fire")
