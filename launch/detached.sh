#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker: starts launch/train.sh so that it outlives the connection, and shows its log. A lost connection ends
# the showing alone. While it trains, the same arguments, or none, show it again, others are refused, and `stop` lets it save and end.
# With none, afterwards, the end of the log. The status is that of the training.
# usage: bash launch/detached.sh [running | stop | --config ... --workdir ... as for launch/train.sh]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .run
exec 9>>.run/lock # the training inherits it, and so holds the lock for as long as any of it lives
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
      echo "lavit: error: $(hostname) is training with$(cat .run/arguments); stop that first, or give no arguments to see what it says" >&2
      exit 2
    fi
    ;;
esac
exec 9>&-

if [ ! -e .run/log ]; then
  echo "lavit: error: nothing has been trained on $(hostname)" >&2
  exit 2
fi
[ -z "$running" ] || show+=(--follow --pid="$(cat .run/pid)")
tail "${show[@]}" .run/log
status=$(ls .run/statuses)
exit "${status:-137}" # it was killed, if there is none
