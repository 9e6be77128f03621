# SPDX-License-Identifier: Apache-2.0
"""The README's blocks run as they stand, tables of all pages are committed results, links lead somewhere, recipes load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lord_quant.config import LordConfig, read_yaml


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", README, flags=re.DOTALL)


def test_readme_shows_the_three_ways_in_and_a_budget() -> None:
    assert [language for language, _ in RUNNABLE] == ["bash", "bash", "python", "bash"]


@pytest.mark.slow
def test_readme_blocks_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    for language, block in RUNNABLE:
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for folder in ("cli", "planned", "python-config", "python-quantizer"):
        config = json.loads((tmp_path / "out" / folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "lord_gptq"
    assert "pass@1" in done.stdout


def test_readme_table_is_the_committed_result() -> None:
    table = re.search(r"<!-- demo table -->\n(.*?)\n<!-- /demo table -->", README, flags=re.DOTALL)
    assert table is not None
    committed = (ROOT / "eval" / "results" / "demo.md").read_text(encoding="utf-8")
    assert table[1].strip() == committed.split("\n\n")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_the_committed_results(page: Path) -> None:
    tables = re.findall(r"<!-- table (\S+) -->\n(.*?)\n<!-- /table -->", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert tables
    for name, table in tables:
        committed = (ROOT / "eval" / "results" / name).read_text(encoding="utf-8")
        assert table.strip() in committed, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_legal_configuration(path: Path) -> None:
    config = LordConfig.from_dict(read_yaml(path))
    assert LordConfig.from_dict(config.to_dict()) == config
