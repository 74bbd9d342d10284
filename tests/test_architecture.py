"""The house rules: imports point down, light stays light."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import packages_distributions
from inspect import isfunction
from pathlib import Path

import rewarded_lines

PACKAGE = Path(__file__).parents[1] / "rewarded_lines"
# Highest first: a package imports from those that stand later in the list, never from an earlier one.
PACKAGES = [
    *("cli", "demo", "pipelines", "training", "serving", "hub", "reports", "evaluator"),
    *("rewards", "engines", "merger", "kernels", "checkpoints", "pareto", "data"),
]
GROUND = [
    *(
        "config",
        "config_values",
        "doctor",
        "engine_settings",
        "errors",
        "extras",
        "folders",
        "judge_settings",
        "options",
        "out_of_memory",
        "processes",
    ),
    *(
        "options",
        "processes",
        "progress",
        "projects",
        "recipe_files",
        "references",
        "reward_settings",
        "trace",
        "versions",
        "yaml_files",
    ),
]
# The files of merger/, highest first, too.
MERGER = [
    *("mergekit", "merge", "merge_outputs", "model_card", "input_cards", "greedy_soup", "inspect"),
    *("compare_policies", "record", "open_inputs", "low_rank_plan", "adapter_plan", "adapter_settings"),
    *("lora_stacking", "model_plan", "merge_device", "plan", "carried_files"),
    *("mergekit_methods", "mergekit_file", "mergekit_gradients", "preferences", "merge_options", "spec"),
    *("methods", "method_row", "merge_rules", "schedule_forms", "lines_schedule"),
    *("adapter_checks", "adapter_origins", "input_names", "model_checks", "config_checks"),
    *("tied_embeddings", "lora_folding", "carried_settings", "tokenizer_checks"),
]
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


@cache
def files():
    """Return every file of the package with its parsed text; the `__init__` of a package stands for the package."""
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("rewarded_lines", *parts)).removesuffix(".__init__")


@cache
def imports():
    """Return for every module the modules of the package that it imports, wherever in the file that stands."""
    modules = {module_of(path): tree for path, tree in files().items()}
    found = {module: set() for module in modules}
    for module, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rewarded_lines"):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= (full & modules.keys()) or {node.module}
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & modules.keys()
    return found


def test_imports_point_down():
    found = [(here, there) for here, others in imports().items() for there in others]
    assert len(found) > 300
    order = {name: height for height, name in enumerate(PACKAGES)} | dict.fromkeys(GROUND, len(PACKAGES))
    order["__main__"] = -1
    for here, there in found:
        if here != "rewarded_lines" and there != "rewarded_lines":
            above, below = here.split(".")[1], there.split(".")[1]
            assert order[below] >= order[above], f"{here} imports {there}, which stands above"
            assert above not in GROUND or below in GROUND, f"{here} imports {there}"


def test_imports_point_down_inside_the_merger():
    order = {f"rewarded_lines.merger.{name}": height for height, name in enumerate(MERGER)}
    for here, others in imports().items():
        for there in others & order.keys() if here in order else ():
            assert order[there] > order[here], f"{here} imports {there}, which stands above"
    assert {path.stem for path in (PACKAGE / "merger").glob("*.py")} - {"__init__"} == set(MERGER)


def test_no_file_imports_itself_by_way_of_others():
    """Lazy imports count: one that only breaks a circle shows that something stands in the wrong place."""
    with_parents = {module: others - {module} for module, others in imports().items()}
    order = list(TopologicalSorter(with_parents).static_order())
    assert len(order) == len(with_parents)


def test_transformers_never_asks_whether_a_models_code_may_run():
    """Without the argument, transformers asks on stdin."""
    others = [path for root in ("recipes", "eval") for path in (PACKAGE.parent / root).rglob("*.py")]
    trees = [*files().values(), *(ast.parse(path.read_text()) for path in others)]
    calls = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    asking = [node for node in calls if re.match(r"Auto|kind", ast.unparse(node.func))]
    assert len(asking) > 10
    for node in asking:
        assert "trust_remote_code" in [word.arg for word in node.keywords], ast.unparse(node)


def test_every_package_is_in_the_list():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(PACKAGES)
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(GROUND)


def test_no_two_files_have_one_name_and_none_is_a_verb_as_a_package():
    names = [path.name for path in files() if path.name != "__init__.py"]
    assert sorted(set(names)) == sorted(names)
    assert not set(PACKAGES) & {"choose", "inspect", "merge", "push", "report", "score", "search", "sweep"}


def test_files_and_functions_are_short():
    long_files = [path.name for path in files() if len(path.read_text().splitlines()) > LONGEST_FILE]
    functions = (node for tree in files().values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    long_functions = [one.name for one in functions if one.end_lineno - one.lineno >= LONGEST_FUNCTION]
    assert (long_files, long_functions) == ([], [])


def test_what_is_imported_is_declared():
    """A package that another brings may go away with it; these three are parts of a declared one's own interface."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.match(r"[\w.-]+", one)[0].lower().replace("_", "-") for one in wanted}
    known, found = packages_distributions(), set()
    for node in (node for tree in files().values() for node in ast.walk(tree)):
        modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    others = {one for one in found if not declared & {name.lower().replace("_", "-") for name in known.get(one, [one])}}
    assert len(found) > 20 and others <= {"rewarded_lines", "recipes", "pydantic_core", "cycler", "referencing"}


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
    """An import makes a module an attribute of its package, in whatever process."""
    for module in rewarded_lines._VERBS.values():
        import_module(module)
    import_module("rewarded_lines.cli")
    assert len(rewarded_lines._VERBS) > 9
    for verb in rewarded_lines._VERBS:
        assert isfunction(getattr(rewarded_lines, verb)), verb
