# SPDX-License-Identifier: Apache-2.0
"""One scene for all refusals, and a ground for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusal import Ground
from scene import Scene, make_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def ground(tmp_path: Path, scene: Scene) -> Ground:
    return Ground(tmp_path, scene)
