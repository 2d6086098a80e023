#!/usr/bin/env bash
# train.sh on slices that are taken back: waits for the next one, and goes on there.
#
#   SPOT=1 TYPE=v6e-32 ./train_until_done.sh [CONFIG] [KEY=VALUE ...]
#
# A slice that is taken back gets SIGTERM: all hosts save the same step, and exit with 0 as a run that
# is done does. So what counts is the run's last file, its adapter or model.
source "$(dirname "$0")/common.sh"
need_bucket

here=$(dirname "$0")
: "${RUN:=a}" "${TRIES:=50}"
is_done() {
  gcloud storage ls "$BUCKET/runs/$RUN/adapter/" "$BUCKET/runs/$RUN/model/" 2>/dev/null | grep -q .
}
# A mistake in the config fails on a slice that is alive: no other slice would help.
is_alive() {
  [[ $(gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" --format 'value(state)' \
    2>/dev/null) == READY ]]
}

for ((try = 1; try <= TRIES; try++)); do
  "$here/queue.sh"
  if "$here/setup.sh" && "$here/train.sh" "$@"; then
    if is_done; then
      echo "done: $BUCKET/runs/$RUN"
      exit 0
    fi
  elif is_alive; then
    echo "the command failed on a slice that is alive; see what it said" >&2
    exit 1
  fi
  echo "the slice was taken back; waiting for the next ($try of $TRIES)"
done
exit 1
