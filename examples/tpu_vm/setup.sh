#!/usr/bin/env bash
# Installs this checkout on all hosts, from the lock, and has swaa doctor look at them.
source "$(dirname "$0")/common.sh"

cd "$ROOT"
stage=$(mktemp -d)/tpu_vm
python3 -m pip wheel --quiet --no-deps --wheel-dir "$stage" .
cp requirements/lock-py311-tpu.txt "$stage/"
gcloud compute tpus tpu-vm scp --recurse "$stage" "$NAME": --zone "$ZONE" --worker=all

# The images have Python 3.10, which is too old; uv brings 3.11, the lock's.
on_host all "set -e
command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --clear --python 3.11 $VENV
~/.local/bin/uv pip install --quiet --python $VENV --require-hashes -r tpu_vm/lock-py311-tpu.txt
~/.local/bin/uv pip install --quiet --python $VENV --no-deps tpu_vm/*.whl"
on_host all "$(swaa_line doctor)"
