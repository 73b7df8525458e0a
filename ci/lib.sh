# Shared by the scripts in this folder: where things are, how a step is shown,
# how a failure is said. Source it; it runs nothing by itself.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$ROOT/ci/cache
ME=$(basename "$0")
# A Rust that rustup installed comes before a distribution's.
PATH=$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin
# The suite of the guest's kernel: 'own' is this machine's.
GUEST=${GUEST:-own}
GUEST_DIR=$CACHE/guest-$GUEST
export DEBIAN_FRONTEND=noninteractive

# A step's child, ended with us: nothing is left running after Ctrl-C.
STEP_PID=
trap 'stop_step; exit 130' INT
trap 'stop_step; exit 143' TERM HUP

stop_step() {
    [ -n "$STEP_PID" ] && kill -TERM "$STEP_PID" 2>/dev/null && wait "$STEP_PID" 2>/dev/null
    STEP_PID=
}

say() { printf '%s: %s\n' "$ME" "$*"; }

# One sentence to stderr, then out.
die() {
    printf '%s: %s\n' "$ME" "$*" >&2
    exit 1
}

check_guest() {
    case $GUEST in
        own | bookworm | trixie | sid) ;;
        *) die "GUEST is '$GUEST', which is no suite that guests can have: set it to bookworm, trixie or sid, or unset it." ;;
    esac
}

have() { command -v "$1" >/dev/null 2>&1; }

# The address that this Debian machine's packages come from, in whichever format its sources are
# written.
mirror() {
    local uri
    uri=$(apt-get indextargets --format '$(REPO_URI)|$(COMPONENT)|$(CODENAME)' 'Identifier: Packages' |
        awk -F'|' '$2 == "main" && $3 !~ /-/ { print $1; exit }')
    [ -n "$uri" ] || die "no apt source of a Debian release's main component was found: add one to /etc/apt/sources.list."
    echo "$uri"
}

# step TEXT COMMAND...: one line for the step, the seconds while it runs
# longer than 5 s, and how it ended. Its output is kept, and shown on failure.
step() {
    local text=$1 log began shown=0 rc=0 took
    shift
    log=$(mktemp)
    began=$SECONDS
    printf '%s: %s ' "$ME" "$text"
    "$@" </dev/null >"$log" 2>&1 &
    STEP_PID=$!
    while kill -0 "$STEP_PID" 2>/dev/null; do
        sleep 0.2
        took=$((SECONDS - began))
        if [ "$took" -ge $((shown + 5)) ]; then
            shown=$took
            if [ -t 1 ]; then printf '\r%s: %s (%s s) ' "$ME" "$text" "$took"; else printf '.'; fi
        fi
    done
    wait "$STEP_PID" || rc=$?
    STEP_PID=
    took=$((SECONDS - began))
    if [ "$rc" -ne 0 ]; then
        printf 'FAILED (%s s)\n' "$took"
        tail -n 40 "$log" >&2
        rm -f "$log"
        return "$rc"
    fi
    printf 'done (%s s)\n' "$took"
    rm -f "$log"
}

# The names of all fuzz targets. Like fuzz_command, to be called in the root of the repository.
fuzz_targets() { cargo fuzz list; }

# fuzz_command TARGET SECONDS CORPUS [OPTION...]: sets FUZZ_COMMAND to the command that runs a fuzz
# target for that time. libFuzzer writes new inputs to the folder CORPUS and only reads the seeds.
fuzz_command() {
    local target=$1 seconds=$2 corpus=$3
    shift 3
    mkdir -p "$corpus"
    # With RUSTC_BOOTSTRAP, the stable compiler accepts the sanitizer's unstable flags.
    FUZZ_COMMAND=(env RUSTC_BOOTSTRAP=1
        cargo fuzz run "$target" "$corpus" "fuzz/seeds/$target" --
        "-max_total_time=$seconds" -timeout=10 "$@")
}

# need_root WHY: this script goes on only as root.
need_root() {
    [ "$(id -u)" -eq 0 ] || die "$1 needs root: run 'sudo $0' (or run it as root in a container with CAP_NET_ADMIN, CAP_SYS_ADMIN and /dev/net/tun)."
}
