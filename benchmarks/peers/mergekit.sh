#!/usr/bin/env bash
# Makes an environment for mergekit in FOLDER (kept apart from the project's own: mergekit is LGPL) and writes the
# figures of tests/conformance anew:
#
#     benchmarks/peers/mergekit.sh FOLDER
#
# TORCH_INDEX and PYTHON as in environment.sh.
set -euo pipefail
folder=${1:?name a folder for the environment, such as /tmp/mergekit}
here=$(cd "$(dirname "$0")" && pwd)

"$here/environment.sh" mergekit "$folder"
cd "$here/../.."
# what mergekit keeps in sets comes in the order of hashes; every model is a local folder
exec env HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 OMP_NUM_THREADS=1 "$folder/bin/python" -m benchmarks.peers.mergekit_figures
