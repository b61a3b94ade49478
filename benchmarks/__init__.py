"""Programs that measure and print: `python -m benchmarks NAME`. `__main__.py` lists them.

Each writes its result as JSON with --out=FILE; results/ holds those that the documentation quotes.
"""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]  # of the repository
