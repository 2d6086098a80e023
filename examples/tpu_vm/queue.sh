#!/usr/bin/env bash
# Asks for a TPU VM or a slice, and waits until it is there.
source "$(dirname "$0")/common.sh"

: "${POLL:=60}" # seconds between two looks

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" \
    --format 'value(state.state)' 2>/dev/null || echo NONE
}

# What is left of an earlier one, such as a slice that was taken back, has the name.
now=$(state)
if [[ $now == SUSPENDED || $now == FAILED ]]; then
  gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
  now=NONE
fi
if [[ $now == NONE ]]; then
  gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  now=$(state)
fi
while [[ $now != ACTIVE ]]; do
  if [[ $now == FAILED || $now == NONE ]]; then
    echo "queue.sh: expected $NAME to be queued, got $now; see" \
      "gcloud compute tpus queued-resources describe $NAME --zone $ZONE" >&2
    exit 1
  fi
  echo "$(date +%T) $now"
  sleep "$POLL"
  now=$(state)
done
echo "$NAME is there"
