"""How long a plan takes, and of which models: every config.json of a folder, planned for a GPU without its weights.

python bench/plans.py [FOLDER]      # each in a process of its own: seconds with nothing remembered, and once more
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "configs"


def seconds(config: Path, cache: str) -> tuple[float, dict[str, object]]:
    """(seconds of the whole process, what it found)."""
    words = ["plan", str(config), "model.from_config=true", "--gpu", "H200", "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "whet", *words], capture_output=True, text=True, env=os.environ | {"WHET_CACHE": cache}
    )
    return time.perf_counter() - start, json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr}


def main() -> None:
    for config in sorted(Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER).glob("*.json")):
        with tempfile.TemporaryDirectory() as cache:
            (first, _), (again, found) = seconds(config, cache), seconds(config, cache)
        rests: dict[str, object] = found.get("assumed", {})  # type: ignore[assignment]
        print(
            f"{config.stem:16} {first:6.1f} s, once more {again:5.1f} s  {rests.get('activations', found)}", flush=True
        )


if __name__ == "__main__":
    main()
