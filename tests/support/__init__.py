"""What tests of several packages share: references, small models and runs, checkpoints, files."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FILES = ROOT / "tests" / "files"
