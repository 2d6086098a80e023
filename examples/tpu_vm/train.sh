#!/usr/bin/env bash
# Trains on all hosts; the same command again goes on from the newest checkpoint.
#
#   ./train.sh [CONFIG] [KEY=VALUE ...]      default: paper-qwen3-4b
#
# The data is BUCKET/train.parquet, the model BUCKET/model (convert.sh), the run BUCKET/runs/RUN.
source "$(dirname "$0")/common.sh"
need_bucket

: "${RUN:=a}"
config=${1:-paper-qwen3-4b}
shift || true
several=()
if (($(count_hosts) > 1)); then several=(--distributed); fi
on_host all "$(swaa_line train "$config" "model=$BUCKET/model" \
  "data.files=$BUCKET/train.parquet" "output_dir=$BUCKET/runs/$RUN" "$@" "${several[@]}")"
