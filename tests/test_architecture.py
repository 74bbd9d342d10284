"""The house rules: imports point down, light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rewarded_lines"
# Highest first; a wing may import from those that stand later in the list, never from an earlier one.
WINGS = [
    "cli",
    "demo",
    "training",
    "rewarding",
    "learning",
    "publishing",
    "reporting",
    "pages",
    "drawing",
    "summaries",
    "sweeping",
    "evaluation",
    "engines",
    "scoring",
    "inspecting",
    "translating",
    "merging",
    "planning",
    "rules",
    "measuring",
    "streaming",
    "checkpoints",
    "fronts",
    "data",
]
GROUND = [
    *("config", "config_values", "doctor", "doctor_probes", "errors", "folders", "processes", "progress", "projects"),
    *("references", "signatures"),
]


def imports():
    """Yield (wing, imported wing, file) for every import inside the package, wherever in the file it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.startswith("rewarded_lines."):
                    yield here, name.split(".")[1], path


def test_imports_point_down():
    found = list(imports())
    assert len(found) > 100
    order = {wing: height for height, wing in enumerate(WINGS)}
    order |= dict.fromkeys(GROUND, len(WINGS))
    for here, there, path in found:
        if here != "__init__":
            assert order[there] >= order[here], f"{path} imports {there}, which stands above"
    grounded = {(here, there) for here, there, _ in found if here in GROUND}
    assert all(there in GROUND for _, there in grounded)


def test_every_wing_is_in_the_list():
    wings = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert wings == set(WINGS)
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(GROUND)


def test_heavy_libraries_wait_until_they_are_needed(tiny):
    script = (
        "import sys\n"
        "import rewarded_lines, rewarded_lines.cli\n"
        "light = [m for m in ('torch', 'transformers', 'numpy', 'pyarrow') if m in sys.modules]\n"
        "rewarded_lines.merge('sft', ['first', 'second'], 0.5, out='out')\n"
        "heavy = [m for m in ('vllm', 'trl', 'matplotlib', 'ray', 'transformers', 'datasets') if m in sys.modules]\n"
        "print(light, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_the_verbs_are_functions_even_once_their_wings_are_loaded():
    script = (
        "import rewarded_lines.reporting.report, rewarded_lines.merging.merge, rewarded_lines.sweeping.sweep\n"
        "import rewarded_lines.inspecting.inspect, rewarded_lines.cli\n"
        "import rewarded_lines.sweeping.score, rewarded_lines.sweeping.search, rewarded_lines.sweeping.choose\n"
        "from rewarded_lines import choose, inspect, merge, push, report, score, search, sweep\n"
        "print([callable(verb) for verb in (choose, inspect, merge, push, report, score, search, sweep)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([True] * 8)
