"""The campaign keeps up with the recipes; what it does is in tests/README.md, and `make campaign` runs it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_recipe_is_killed_by_the_campaign() -> None:
    jobs = re.findall(r'\bJob\(\s*"(\w+)', (ROOT / "tests" / "campaign" / "kills.py").read_text(encoding="utf-8"))
    assert set(jobs) == {path.stem for path in (ROOT / "recipes").glob("*.py")}
