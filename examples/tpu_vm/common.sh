# shellcheck shell=bash
# Settings of all scripts here: change them, or set them in the environment.

set -euo pipefail

: "${NAME:=swaa}"                        # the TPU VM's
: "${ZONE:=us-east5-b}"
: "${TYPE:=v6e-8}"                       # v5litepod-8, v5p-8, v6e-8: one host; v6e-32: four
: "${RUNTIME:=v2-alpha-tpuv6e}"          # v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
: "${SPOT:=}"                            # anything: cheaper, and taken back when others pay more
: "${MODEL:=Qwen/Qwen3-4B}"
: "${BUCKET:=}"                          # gs://bucket/folder: models, data and runs of all hosts
: "${CACHE:=}"                           # default: BUCKET/compiled, for compiled programs

# shellcheck disable=SC2034 # of setup.sh
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=swaa-venv # in the home directory of each host

need_bucket() {
  if [[ $BUCKET != gs://* ]]; then
    echo "BUCKET: expected gs://bucket/folder, got '$BUCKET'; export it" >&2
    exit 2
  fi
}

# A command on a host, or on all of them at once; Ctrl-C reaches it (-t).
on_host() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker="$1" --command "$2"; }

# swaa with these arguments, as one line for a shell, with the shared cache of compiled programs.
swaa_line() {
  local cache=${CACHE:-${BUCKET:+$BUCKET/compiled}}
  printf '%s' "${cache:+JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$cache") }"
  printf '%s' "$VENV/bin/swaa"
  printf ' %q' "$@"
}

count_hosts() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" \
    --format 'value(networkEndpoints[].ipAddress)' | tr ';' '\n' | grep -c .
}
