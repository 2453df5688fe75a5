#!/bin/sh
# Installs Mergeyard from this source tree into a virtual environment of its own: what the Dockerfile runs, what a host
# without containers runs, and what the tests run.
#
#   deploy/install.sh api       the service and the command line, without torch
#   deploy/install.sh worker    that, and what computes
#
# VENV         where to (default /opt/mergeyard)
# PYTHON       which Python makes it (default python3; 3.11 or newer)
# TORCH_INDEX  a wheel index with another build of the pinned torch (default: pip's own, whose build is CUDA's)
set -eu

target=${1:-}
case "$target" in
    api | worker) ;;
    *) echo "usage: deploy/install.sh api|worker" >&2; exit 2 ;;
esac
venv=${VENV:-/opt/mergeyard}
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

if [ "$target" = worker ]; then
    # First and exactly: any looser requirement takes whatever is newest.
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    if [ -n "${TORCH_INDEX:-}" ]; then
        pip install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" "torch==$torch"
    else
        pip install --no-cache-dir --constraint constraints.txt "torch==$torch"
    fi
fi
# A worker also scores what it has merged.
extra=$([ "$target" = worker ] && echo evaluation || echo "$target")
pip install --no-cache-dir --constraint constraints.txt ".[$extra]"
pip check
