"""Puts the C++ sources into the wheel; everything else is in pyproject.toml.

They are built on the machine that runs them, so a wheel carries ``csrc/`` as ``dsft/_csrc``. An editable install reads
``csrc/`` in the checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSources(build_py):
    """``build_py`` that also copies ``csrc/``."""

    def run(self) -> None:
        """Copy the package, then the sources."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dsft" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("csrc", target)


setup(cmdclass={"build_py": BuildWithSources})
