#!/usr/bin/env bash
# Gives the TPU VM back, which costs money as long as it is there; the bucket stays.
source "$(dirname "$0")/common.sh"

if gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" &>/dev/null; then
  gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
else
  gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" --quiet
fi
