"""A wrong kernel would give every GPU user wrong rankings, and no CPU runs it: so it runs in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_agree_with_pytorch() -> None:
    script = Path(__file__).with_name("check_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "all kernels agree" in done.stdout
