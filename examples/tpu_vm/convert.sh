#!/usr/bin/env bash
# Writes MODEL into the bucket once: hosts then read their own slices of the weights from there.
source "$(dirname "$0")/common.sh"
need_bucket

on_host 0 "$(swaa_line convert "$MODEL" "$BUCKET/model" "$@")"
