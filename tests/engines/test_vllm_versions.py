"""What differs between versions of vLLM."""

import subprocess
import sys

import pytest

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
    [("numba", "'_lib_fn_wrapper' object has no attribute 'get'"), ("numba, rewarded_lines.engines.vllm_models", "")],
)
def test_vllm_can_search_the_modules_of_a_process_that_merges(imported, fault):
    done = subprocess.run([sys.executable, "-c", f"import {imported}\n{SEARCH}"], capture_output=True, text=True)
    assert (fault in done.stderr and done.returncode == 1) if fault else (done.returncode == 0), done.stderr
