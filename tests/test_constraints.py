# SPDX-License-Identifier: Apache-2.0
"""What `make setup` installs is what `constraints.txt` names, all of it."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than that of `make setup`")
def test_everything_installed_is_pinned_to_its_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in requirements}
    found = distributions(path=[sysconfig.get_paths()["purelib"]])  # not what setuptools carries along
    brought = [each for each in found if each.read_text("REQUESTED") is None]  # by something else: not a developer's own
    installed = {canonicalize_name(each.metadata["Name"]): each.version.partition("+")[0] for each in brought}
    assert len(installed) > 50
    assert {name: version for name, version in installed.items() if pins.get(name) != version} == {}
