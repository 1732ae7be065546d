#!/usr/bin/env bash
# Table 1: the datasets, four mixtures of three games. Flags of all table scripts: see settings.sh; --print shows commands.
source "$(dirname "$0")/settings.sh"
for mixture in diversified mix-unilateral mix-expert pure-expert; do
  for game in $games; do collect $game $mixture; done
done | run
