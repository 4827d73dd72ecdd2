#!/usr/bin/env bash
# tpu_pod.sh runs this on each worker: it starts launch/train.sh in a session of its own and follows the log. A lost connection ends only
# the output. During a training run, the same arguments or none follow the log again, other arguments are refused, and `stop` makes the run
# save and end. After a run, no arguments print the end of the log. The exit status is that of the training run.
# usage: bash launch/detached.sh [running | stop | --config ... --workdir ... as for launch/train.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .run
exec 9>>.run/lock # the training run inherits the lock, and holds it until its last process ends
if flock --nonblock 9; then running=''; else running=yes; fi
printf -v arguments ' %q' "$@"
show=(--lines=50)

case "$*" in
  running) [ "$running" ] && exit 0 || exit 1 ;;
  stop)
    [ "$running" ] || exit 0
    kill -TERM "$(cat .run/pid)" 2>/dev/null || pkill -TERM --session "$(cat .run/pid)"
    ;;
  '') ;;
  *)
    if [ -z "$running" ]; then
      rm -rf .run/statuses && mkdir .run/statuses
      echo "$arguments" >.run/arguments
      : >.run/log
      STATUSES=.run/statuses setsid bash launch/train.sh "$@" </dev/null >>.run/log 2>&1 &
      echo $! >.run/pid
      running=yes show=(--lines=+1)
    elif [ "$arguments" != "$(cat .run/arguments)" ]; then
      echo "lavit: error: $(hostname) is training with$(cat .run/arguments); stop that first, or give no arguments to see its log" >&2
      exit 2
    fi
    ;;
esac
exec 9>&-

if [ ! -e .run/log ]; then
  echo "lavit: error: there has been no training run on $(hostname); start one with --config and --workdir" >&2
  exit 2
fi
[ -z "$running" ] || show+=(--follow --pid="$(cat .run/pid)")
tail "${show[@]}" .run/log
status=$(ls .run/statuses)
exit "${status:-137}" # without a status, it was killed
