#!/usr/bin/env bash
# Makes an environment for mergekit in FOLDER (kept apart from the project's own: mergekit is LGPL) and writes the
# figures of tests/conformance anew:
#
#     benchmarks/peers/mergekit.sh FOLDER
#
# TORCH_INDEX names another wheel index for torch, as in the Makefile; PYTHON another interpreter (3.11).
set -euo pipefail
folder=${1:?name a folder for the environment, such as /tmp/mergekit}
here=$(cd "$(dirname "$0")" && pwd)
requirements=$here/mergekit-requirements.txt

if [ ! -x "$folder/bin/mergekit-yaml" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  # torch comes first and exactly: any looser requirement takes whatever is newest
  "$folder/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$(sed -n 's/^torch==//p' "$requirements")"
  "$folder/bin/pip" install --quiet --requirement "$requirements"
fi
cd "$here/../.."
# what mergekit keeps in sets comes in the order of hashes; every model is a local folder
exec env HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 OMP_NUM_THREADS=1 "$folder/bin/python" -m benchmarks.peers.mergekit_figures
