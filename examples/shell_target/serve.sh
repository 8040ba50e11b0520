#!/bin/sh
# A target in plain shell: it reads its greeting at the start and again at SIGHUP, and knows nothing of asyncsup.
root=${ASYNCSUP_ROOT:-$(dirname "$0")}

load() {
    greeting=$(cat "$root/greeting.txt")
    echo "pid $$ says: $greeting"
}

trap load HUP
trap 'echo "pid $$ ends"; exit 0' TERM

load
while :; do
    # A shell runs its traps between commands: `wait` is one that a signal ends.
    sleep 3600 &
    wait $! || kill $! 2>/dev/null
done
