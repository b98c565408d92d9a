"""Which folders are which packages; everything else is in pyproject.toml.

`models/` stands beside `natten/` and is installed inside it, as `natten.models`. The packages are
found rather than listed, so that a new one cannot be forgotten.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["natten", "natten.*"]),
        *(f"natten.{name}" for name in find_packages(include=["models", "models.*"])),
    ],
    py_modules=["natten_command"],
    package_dir={"natten": "natten", "natten.models": "models"},
)
