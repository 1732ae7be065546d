#!/usr/bin/env bash
# All tables and figures: the runs that are missing, one seed of every cell after the other, then benchmark/results/README.md.
# A failed run fails the script, which names its command and log. Can be stopped and started again at any time.
#
#   bash benchmark/all.sh --scale smoke --num-processes 2     to see that everything runs, in 4 minutes; nothing is kept in git
#   bash benchmark/all.sh --scale cpu                         ten core-hours
#   bash benchmark/all.sh --scale paper                       the paper's sizes
set -euo pipefail
cd "$(dirname "$0")"
status=0
./table.sh all "$@" || status=$?
case $status in 2 | 130 | 143) exit $status ;; esac # a mistake in the flags, or stopped
case " $* " in
*" -h "* | *" --help "*) ;;
*print*commands*) ./table4.sh --print-commands ;;
*" smoke "* | *=smoke*) ./table4.sh --num-seeds 2 --num-datasets 5 --result-path benchmark/results/smoke/table4.md ;;
*) ./table4.sh ;;
esac
exit $status
