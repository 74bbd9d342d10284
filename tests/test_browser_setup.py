"""CI without a browser, with stand-ins for the package manager's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "browser"
BASH = "/bin/bash"


def run(folder: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """Run the script with only these commands, each a line of bash."""
    folder.mkdir()
    for name, line in ({"env": '"${@:2}"'} | commands).items():
        command = folder / name.replace("_", "-")
        command.write_text(f"#!{BASH}\n{line}\n")
        command.chmod(0o755)
    return subprocess.run(
        [BASH, str(SCRIPT)], env={"PATH": str(folder), "FOLDER": str(folder)}, capture_output=True, text=True
    )


def test_a_browser_that_is_there_is_named_and_nothing_installed(tmp_path: Path) -> None:
    done = run(tmp_path / "bin", google_chrome="true", apt_get="exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'bin' / 'google-chrome'}\n", "")


INSTALL = r"""
[ "$1" = update ] && echo updated && exit
[[ " $* " == *" install -y "*" chromium "* ]] || exit 8
printf '#!/bin/bash\n' > "$FOLDER/chromium"; /bin/chmod 755 "$FOLDER/chromium"
"""


def test_root_installs_one(tmp_path: Path) -> None:
    done = run(tmp_path / "bin", id="echo 0", apt_get=INSTALL)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'bin' / 'chromium'}\n"), done.stderr


def test_others_install_one_through_sudo(tmp_path: Path) -> None:
    refused = 'export ROOT="${ROOT:-}"; [ "$ROOT" ] || exit 7' + INSTALL
    done = run(tmp_path / "bin", id="echo 1000", sudo='ROOT=1 "$@"', apt_get=refused)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'bin' / 'chromium'}\n"), done.stderr


def test_without_one_ci_fails_and_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "bin", id="echo 0", apt_get="exit 100")
    assert done.returncode == 1 and done.stdout == ""
    assert "could not be installed" in done.stderr


def test_ci_runs_no_test_without_it(tmp_path: Path) -> None:
    text = (SCRIPT.parent / "run").read_text()
    assert text.index("/browser") < text.index("make test")
    assert os.access(SCRIPT, os.X_OK)
