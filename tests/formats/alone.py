"""Runs what may kill or hang a process in one of its own."""

import subprocess
import sys

HUNG = "hung"


def run_alone(program, *arguments, timeout=250):
    """Run a program; return its exit status (`HUNG` if it was still running), and what it printed."""
    script = f"import sys\nsys.path[:0] = {sys.path!r}\n{program}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return HUNG, output
    return process.returncode, output
