#!/usr/bin/env bash
# Serves the model on a TPU VM of one host, at http://localhost:8000/v1 of this machine.
#
#   ./serve.sh [swaa serve's flags]          e.g. --policy instruct-no-train --also full
#
# It listens on the VM's own address only; the tunnel brings it here. Ctrl-C ends both.
source "$(dirname "$0")/common.sh"
need_bucket

: "${PORT:=8000}"
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=0 \
  --command "$(swaa_line serve "$BUCKET/model" --mesh auto --port "$PORT" "$@")" \
  -- -t -L "$PORT:localhost:$PORT"
