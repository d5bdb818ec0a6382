"""For tools that still call setup.py: the same CMake build through scikit-build-core's setuptools plugin."""

from setuptools import setup

setup(cmake_source_dir=".")
