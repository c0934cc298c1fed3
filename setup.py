"""Puts the C++ sources and the libraries built from them into the wheel; everything else is in pyproject.toml.

A wheel carries ``csrc/`` as ``dsft/_csrc`` and the library for the CPU in ``dsft/_lib``; with ``DSFT_BUILD_CUDA=1``
also the one for CUDA (nvcc is needed, a GPU is not). An editable install reads ``csrc/`` in the checkout and builds
into the user's cache.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dsft.ops.build import PREBUILT_FOLDER, build_ahead


class BuildWithLibraries(build_py):
    """``build_py`` that also copies ``csrc/`` and builds it."""

    def run(self) -> None:
        """Copy the package, then the sources, then build them."""
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "dsft"
            for name in ("_csrc", PREBUILT_FOLDER):
                shutil.rmtree(package / name, ignore_errors=True)
            shutil.copytree("csrc", package / "_csrc")
            build_ahead(package / PREBUILT_FOLDER, cuda=os.environ.get("DSFT_BUILD_CUDA") == "1")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and every Python 3: its libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """Says that there are compiled files, so that all lies at the wheel's root and its tag names the platform."""

    def has_ext_modules(self) -> bool:
        """They are made by ``BuildWithLibraries``."""
        return True


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
