"""What pyproject.toml cannot say: a wheel also has train.py and configs/, which lie beside the package."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
ENTRY = "deepseek_jax/_entry"  # deepseek_jax/cli/packaged.py looks there


class BuildWithEntry(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are where they are
            return
        for source in (ROOT / "train.py", *sorted((ROOT / "configs").rglob("*.py"))):
            target = pathlib.Path(self.build_lib, ENTRY, source.relative_to(ROOT))
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithEntry})
