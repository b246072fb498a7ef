"""The API's process: what it loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "safetensors", "numpy")
SCRIPT = f"""
import sys
import app.asgi, app.factory
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def test_the_api_loads_no_torch_and_opens_nothing_when_imported(tmp_path):
    environment = {"PATH": "", "HOME": str(tmp_path), "PISSA_REDIS_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
