#!/usr/bin/env bash
# Makes an environment for a peer in FOLDER, apart from the project's own, from NAME-requirements.txt beside this script:
#
#     benchmarks/peers/environment.sh mergekit|peft FOLDER
#
# TORCH_INDEX names another wheel index for torch, as in the Makefile; PYTHON another interpreter (3.11).
set -euo pipefail
name=${1:?name a peer: mergekit or peft}
folder=${2:?name a folder for the environment, such as /tmp/mergekit}
requirements=$(cd "$(dirname "$0")" && pwd)/$name-requirements.txt

if [ ! -e "$folder/.complete" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  # torch comes first and exactly: any looser requirement takes whatever is newest
  "$folder/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$(sed -n 's/^torch==//p' "$requirements")"
  "$folder/bin/pip" install --quiet --requirement "$requirements"
  touch "$folder/.complete"
fi
