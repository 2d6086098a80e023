#!/usr/bin/env bash
# Makes a TPU VM now, or fails where there is none free; queue.sh waits for one.
source "$(dirname "$0")/common.sh"

gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
  --version "$RUNTIME" ${SPOT:+--spot}
