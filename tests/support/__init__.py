"""What several tests stand on: references, small runs, files."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
FILES = ROOT / "tests" / "files"
