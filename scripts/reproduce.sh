#!/usr/bin/env bash
# The paper's tables, measured: generate, score, append to output/result.txt, report.
# All options are those of 'python -m erk_guid reproduce --help'.
set -euo pipefail
here="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
# A checkout works without having been installed; PYTHON chooses another interpreter.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    # The environment that 'make demo' made, unless one is active already.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/.venv/bin/python" ]; then
        PYTHON="$here/.venv/bin/python"
    fi
fi
exec "$PYTHON" -m erk_guid reproduce "$@"
