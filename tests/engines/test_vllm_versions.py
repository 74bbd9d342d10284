"""What differs between versions of vLLM."""

import subprocess
import sys

import pytest
from vllm_names import USED_NAMES, installed_vllm, missing_names

# As vLLM from 0.31 does on a CPU, in `vllm/triton_utils/dispatcher.py`.
SEARCH = """
import sys
for module in list(sys.modules.values()):
    for value in list((getattr(module, "__dict__", None) or {}).values()):
        if hasattr(value, "__dict__"):
            vars(value).get("kernel")
"""


@pytest.mark.parametrize(
    ("imported", "fault"),
    [
        ("llvmlite.binding", "'_lib_fn_wrapper' object has no attribute 'get'"),
        ("llvmlite.binding, rewarded_lines.engines.vllm_models", ""),
    ],
)
def test_vllm_can_search_the_modules_of_a_process_that_merges(imported, fault):
    done = subprocess.run([sys.executable, "-c", f"import {imported}\n{SEARCH}"], capture_output=True, text=True)
    assert (fault in done.stderr and done.returncode == 1) if fault else (done.returncode == 0), done.stderr


def test_the_installed_vllm_has_every_name_that_is_used():
    """`python tests/vllm_names.py FOLDER...` says it for any other."""
    vllm = installed_vllm()
    if vllm is None:
        pytest.skip("vLLM is not installed in this environment")
    assert len(USED_NAMES) > 30 and missing_names(vllm) == []


def test_a_name_that_is_missing_is_told(tmp_path):
    (tmp_path / "outputs.py").write_text("class CompletionOutput:\n    token_ids: list\n    logprobs: list\n")
    missing = missing_names(tmp_path)
    assert "outputs.py: CompletionOutput.finish_reason" in missing and "outputs.py: RequestOutput.__init__" in missing
    assert "envs.py: the file" in missing and "outputs.py: CompletionOutput.logprobs" not in missing
