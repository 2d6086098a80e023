#!/usr/bin/env bash
# Scores policies on BUCKET/questions.jsonl, and copies the report here.
#
#   ./evaluate.sh [swaa eval's flags]        default: --policies full,naive,instruct-no-train
source "$(dirname "$0")/common.sh"
need_bucket

if (($# == 0)); then set -- --policies full,naive,instruct-no-train; fi
gcloud_copy="gcloud storage cp $(printf '%q' "$BUCKET/questions.jsonl") questions.jsonl"
on_host 0 "$gcloud_copy && $(swaa_line eval --model "$BUCKET/model" --data questions.jsonl \
  --output eval_output --mesh auto "$@")"
gcloud compute tpus tpu-vm scp --recurse "$NAME":eval_output . --zone "$ZONE" --worker=0
echo "open eval_output/report.html"
