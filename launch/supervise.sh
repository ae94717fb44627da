# What launch/mpirun and launch/srun share: run a launcher, hand it the signals, and tidy its exit code. Sourced.
# shellcheck shell=bash

# supervise NAME SOFT COMMAND...
# Runs COMMAND (an mpirun or srun) and exits with its code: 0, 2, 3 and 75 as they are, every other one as 70, or as 75
# where a signal has cut the job short: the second one, or the first before anything had begun.
# The first TERM, INT, HUP or USR1 asks the job to stop: the launcher gets SOFT (a signal that it passes on to every
# rank, where its own answer to TERM may be to kill them). A second one makes it leave at once.
supervise() {
    local name=$1 soft=$2 code=0 is_interrupted
    shift 2
    # Not under SIGKILL's reach: should this shell be killed, the kernel tells the launcher to go too.
    if setpriv --pdeathsig TERM true 2>/dev/null; then
        set -- setpriv --pdeathsig TERM "$@"
    fi
    supervise_signals=0
    supervise_child=
    # shellcheck disable=SC2064  # the signal is meant to be filled in now
    trap "supervise_stop $soft; is_interrupted=yes" TERM INT HUP USR1
    # A process group of its own (set -m), so that Ctrl-C reaches the ranks once, from here, and not twice.
    set -m
    "$@" </dev/null &
    supervise_child=$!
    set +m
    # A signal that came before the child was known has been counted, and is handed over now.
    [ "$supervise_signals" -eq 0 ] || kill -s "$soft" "$supervise_child" 2>/dev/null || true
    while :; do
        is_interrupted=no
        wait "$supervise_child" && code=0 || code=$?
        [ "$is_interrupted" = yes ] || break
    done
    case $code in
    0 | 2 | 3 | 75) exit "$code" ;;
    70) exit 70 ;;
    *)
        # SOFT kills a rank that has not got as far as heeding it. MPICH's mpirun tells that by the bare number, or'd
        # with KILL's where that is how it then ended the others.
        soft=$(kill -l "$soft")
        case $supervise_signals:$code in
        "1:$soft" | "1:$((soft | 9))" | "1:$((128 + soft))" | [2-9]*)
            echo "$name: left at once, as asked; exit code 75. Start the same command again to resume." >&2
            exit 75
            ;;
        esac
        echo "$name: the launcher ended with code $code; exit code 70. Start the same command again to resume." >&2
        exit 70
        ;;
    esac
}

supervise_stop() {
    supervise_signals=$((supervise_signals + 1))
    [ -n "$supervise_child" ] || return 0
    case $supervise_signals in
    1) kill -s "$1" "$supervise_child" 2>/dev/null || true ;;
    2) kill -s TERM "$supervise_child" 2>/dev/null || true ;;
    *) kill -s KILL "$supervise_child" 2>/dev/null || true ;;
    esac
}
