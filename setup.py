"""For tools that still call setup.py: the same CMake build, by scikit-build-core's plugin (setuptools 77 or newer)."""

from setuptools import setup

setup(cmake_source_dir=".")
