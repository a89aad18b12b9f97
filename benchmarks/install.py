"""What an installation takes, as users have it and with torch, in seconds and bytes, and what the installed command takes to start.

    python -m benchmarks.install --rounds 3

Each round makes both environments anew, one after the other, from what pip has or fetches; most of the seconds are the network's where pip
keeps no copies. Sizes are of all files of an environment but pip's own, as `compileall` leaves them. The started commands are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from streamconv.units import format_size

ROOT = Path(__file__).parent.parent
KINDS = {"default": [f"{ROOT}"], "with torch": [f"{ROOT}[torch]", "torch>=2.7,<2.14"]}  # the range that the tests pin
STARTS = 21  # of each command
OWN = ("pip", "setuptools", "_distutils_hack")  # of a new environment


def size_of(environment: Path) -> int:
    """Bytes of what was installed into an environment."""
    packages = next(environment.glob("lib/python*/site-packages"))
    files = (path for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if not path.relative_to(packages).parts[0].startswith(OWN))


def install(environment: Path, requirements: list[str]) -> dict[str, float]:
    """Makes an environment and installs these into it: seconds, and bytes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "-q", *requirements], check=True)
    return {"seconds": time.perf_counter() - start, "bytes": size_of(environment)}


def start_of(command: list[str]) -> float:
    """Seconds that a command takes, the median of `STARTS` runs after one that is not counted."""
    seconds = []
    for _ in range(STARTS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def small_checkpoint(folder: Path) -> Path:
    """A checkpoint of four tensors, without a library."""
    header = {f"model.layers.{k}.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [256 * k, 256 * k + 256]} for k in range(4)}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(1024))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(arguments).rounds
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for number in range(rounds):
            for kind, requirements in KINDS.items():
                found[kind].append(install(work / f"{kind}-{number}".replace(" ", "-"), requirements))
        command = str(work / "default-0" / "bin" / "streamconv")
        starts = {
            "python -c pass": start_of([str(work / "default-0" / "bin" / "python"), "-c", "pass"]),
            "streamconv --help": start_of([command, "--help"]),
            "streamconv inspect (four tensors)": start_of([command, "inspect", str(small_checkpoint(work / "small"))]),
        }
    for kind, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        print(f"{kind}: {seconds:.0f} s, {format_size(int(runs[0]['bytes']))}")
    for label, seconds in starts.items():
        print(f"{label}: {seconds:.3f} s")


if __name__ == "__main__":
    main()
