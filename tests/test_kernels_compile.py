"""The kernels compile for GPUs that this machine need not have, spill nothing and load vectors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "bench" / "kernels.py"

KERNELS = {
    "backward_kernel",
    "forward_kernel",
    "rotary_kernel",
    "rotary_kernel back",
    "statistics_kernel",
    "sum_kernel",
    "value_kernel",
}


def compiled(tmp_path: Path) -> list[dict]:
    out = tmp_path / "kernels.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_kernels_compile_for_three_generations(tmp_path):
    results = compiled(tmp_path)
    assert {result["target"] for result in results} == {80, 90, 100}
    assert {result["kernel"] for result in results} == KERNELS
    for result in results:
        assert result["stack"] == 0, result
        assert 0 < result["registers"] <= 255, result
        # ld.global.v2 or .v4, or 16 bytes ahead into shared memory; a tensor of one number has no vectors
        assert result["load"] >= 2 or result["case"].startswith("one:"), result


def test_a_wrong_name_is_told(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), "--only", "soft max"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no case holds 'soft max'" in result.stderr
