# What the commands of the documentation need around them. It runs in namespaces of its own, which
# end with it: network, mounts and processes. $VIRTIONETD, $VIRTIONETCTL: the programs.
set -euo pipefail
mount -t tmpfs none /run
mkdir -m 777 /run/user
export XDG_RUNTIME_DIR=/run/user
cd /run
ip link set lo up
ip link add eth0 up type veth peer name eth1

# Starts the daemon in the background instead of the one before, which was another way to do it, and
# waits until it has made its socket and its uplink.
virtionetd() {
    if [ -n "${DAEMON:-}" ]; then kill "$DAEMON"; wait "$DAEMON"; fi
    rm -f daemon.log
    : >daemon.log
    chmod 666 daemon.log
    # shellcheck disable=SC2086
    ${AS_USER:-} "$VIRTIONETD" "$@" 2>daemon.log &
    DAEMON=$!
    for _ in $(seq 200); do
        grep -q 'waiting for a front-end' daemon.log && return
        kill -0 "$DAEMON" 2>/dev/null || break
        sleep 0.05
    done
    cat daemon.log >&2
    return 1
}

virtionetctl() { "$VIRTIONETCTL" "$@"; }

# Starts the guest without a disk that it could boot, and waits until the daemon serves its card.
qemu-system-x86_64() {
    [ -e guest.qcow2 ] || truncate -s 1M guest.qcow2
    command qemu-system-x86_64 "$@" -display none -daemonize -pidfile qemu.pid
    for _ in $(seq 200); do
        grep -q 'front-end connected' daemon.log && return
        sleep 0.05
    done
    cat daemon.log >&2
    return 1
}

curl() { command curl --silent --show-error --fail "$@" >/dev/null; }
sysctl() { command sysctl "$@" >/dev/null; }
