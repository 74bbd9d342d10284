"""A Python that finds only some packages, as if no other were installed; for tests in a process of their own.

`python bare_python.py NAME,NAME…` reads lists of arguments from stdin as JSON, runs each as a command line, and prints
the answers and the third-party packages that were imported.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

# What a bare environment with the light core holds: the packages that pyproject.toml names, and theirs.
CORE = frozenset(
    """
    annotated_doc annotated_types anyio blake3 certifi click filelock fsspec h11 hf_xet httpcore httpcore2 httpx httpx2
    huggingface_hub idna llvmlite markdown_it mdurl numpy packaging pydantic pydantic_core pygments
    rewarded_lines rich safetensors shellingham sniffio tokenizers tqdm truststore typer typing_extensions
    typing_inspection yaml
    """.split()
)


class _Only(PathFinder):
    """Finds the standard library, and third-party packages with a known name."""

    known = frozenset[str]()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        name = fullname.partition(".")[0]
        found = name in cls.known or name in sys.stdlib_module_names or name.startswith("_sysconfigdata")
        return super().find_spec(fullname, path, target) if found else None


def find_only(names: Iterable[str]) -> None:
    """Let this process import only the standard library and the packages with these names."""
    _Only.known = frozenset(names)
    sys.meta_path = [_Only if finder is PathFinder else finder for finder in sys.meta_path]


def run_bare(lines: Sequence[Sequence[str]], folder: Path, names: Iterable[str] = CORE, **environment: str):
    """Run command lines one after the other in a bare Python; return the answers and what was imported.

    A line that begins with "python" is code instead.
    """
    done = subprocess.run(
        [sys.executable, __file__, ",".join(names)],
        input=json.dumps(lines),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _answer(line: Sequence[str]) -> dict[str, object]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["rewarded-lines", *line]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(line[1] if line[0] == "python" else "from rewarded_lines.cli import main; main()", {})
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except Exception as error:  # noqa: BLE001 - the test reads what it was
            code, _ = 70, err.write(f"{type(error).__name__}: {error}")
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _imported() -> list[str]:
    """Return the third-party packages in `sys.modules`."""
    names = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    # Names with an underscore are the interpreter's own, and sitecustomize is the system's.
    return sorted(name for name in names - sys.stdlib_module_names - {"sitecustomize"} if not name.startswith("_"))


if __name__ == "__main__":
    find_only(sys.argv[1].split(","))
    answers = [_answer(line) for line in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps({"answers": answers, "imported": _imported()}))
