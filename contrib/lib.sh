# Shared by the scripts in this folder; source it, do not run it.
#
# It finds the repository and the cache folder, and installs what the guest
# and the tests need. All of it is idempotent: with everything in place,
# `ensure_all` only looks and takes a few milliseconds.

# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${STRATABLK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/stratablk}
VENV=$CACHE/venv
export STRATABLK_CACHE=$CACHE

# Cargo builds where the scripts and tests look for the programs, whatever its configuration says.
# A relative folder is one of the repository, where the scripts call cargo.
CARGO_TARGET_DIR=$(cd "$ROOT" && realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR

# Some tools (mke2fs, debugfs) live where an ordinary user's PATH does not look.
export PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# apt_get ARG...: apt-get without questions, as root, quiet unless it fails.
# Fetching is tried again when a mirror is being updated under our feet.
apt_get() {
    [ "$(id -u)" = 0 ] || die "root is needed once, to run: apt-get $*"
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=3 "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

APT_UPDATED=
apt_update_once() {
    [ -n "$APT_UPDATED" ] && return 0
    note "apt-get update"
    apt_get update || die "apt-get update failed (see above)"
    APT_UPDATED=yes
}

apt_install() {
    apt_update_once
    note "apt-get install $*"
    apt_get install --no-install-recommends "$@"
}

# The mirror that apt's configuration names for bookworm, in either notation of its sources.
configured_mirror() {
    local found
    found=$({
        sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) bookworm .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list
        awk '/^URIs:/ { uri = $2 } /^Suites:/ && / bookworm( |$)/ { print uri }' \
            /etc/apt/sources.list.d/*.sources
    } 2>/dev/null | sed 's,/*$,,' | head -n 1) || true
    [ -n "$found" ] && printf '%s\n' "$found"
}

# Make bookworm-backports known to apt. Backports have a low priority: apt
# takes nothing from there unless asked to by name.
add_backports() {
    local file=/etc/apt/sources.list.d/stratablk-backports.sources
    grep -rqs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d/ && return 0
    [ "$(id -u)" = 0 ] || die "root is needed once, to write $file"
    note "adding bookworm-backports to apt ($file)"
    # From the mirror that bookworm itself comes from, however it is written down.
    local uri
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 2>/dev/null |
        sed 's,/*$,,' | sort -u | head -n 1) || true
    # Before the first update apt has fetched nothing that it could tell about.
    [ -n "$uri" ] || uri=$(configured_mirror) || return 1
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' \
        "$uri" /usr/share/keyrings/debian-archive-keyring.gpg >"$file"
    APT_UPDATED=
}

# QEMU: on bookworm from backports (10.0), with Debian's own (7.2) to fall
# back on. Elsewhere whatever the distribution has.
ensure_qemu() {
    local want=()
    have qemu-system-x86_64 || want+=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
    have qemu-img && have qemu-storage-daemon || want+=(qemu-utils)
    [ ${#want[@]} -eq 0 ] && return 0
    say "Installing QEMU"
    if grep -qs bookworm /etc/os-release; then
        add_backports && apt_update_once &&
            apt_install "${want[@]/%//bookworm-backports}" && return 0
        note "not to be had from backports; taking the release's own"
    fi
    apt_install "${want[@]}" || die "QEMU could not be installed"
}

ensure_tools() {
    local want=()
    have fio || want+=(fio)
    [ -x /bin/busybox ] || [ -x /usr/bin/busybox ] || want+=(busybox-static)
    have mke2fs || want+=(e2fsprogs)
    have strace || want+=(strace)
    [ ${#want[@]} -eq 0 ] && return 0
    say "Installing tools"
    apt_install "${want[@]}" || die "could not install: ${want[*]}"
}

# The guest's kernel: Debian's cloud kernel, unpacked into the cache and not
# installed. $CACHE/kernel holds boot/vmlinuz-* and lib/modules/*.
ensure_kernel() {
    local dir=$CACHE/kernel
    compgen -G "$dir/boot/vmlinuz-*" >/dev/null && return 0
    say "Fetching the guest's kernel"
    apt_update_once
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64 (is this Debian on amd64?)"
    mkdir -p "$CACHE"
    local tmp
    tmp=$(mktemp -d "$CACHE/kernel.XXXXXX")
    note "apt-get download $package"
    (cd "$tmp" && apt-get -q -o Acquire::Retries=3 -o APT::Sandbox::User=root download "$package" >log 2>&1) || {
        cat "$tmp/log" >&2
        die "$package could not be downloaded"
    }
    dpkg -x "$tmp"/linux-image-*.deb "$tmp"
    rm -f "$tmp"/*.deb "$tmp/log"
    rm -rf "$dir"
    mv "$tmp" "$dir"
}

# A Python of our own with the QMP client and pytest in it. Debian's python3
# makes it when there is one, so that no version manager's shim comes between.
ensure_venv() {
    local wanted=$ROOT/tests/python/requirements.txt
    cmp -s "$wanted" "$VENV/requirements.txt" && return 0
    say "Setting up Python for the tests"
    local python=/usr/bin/python3
    [ -x $python ] || python=$(command -v python3) || {
        apt_install python3 python3-venv || die "python3 could not be installed"
        python=/usr/bin/python3
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv ||
        die "python3-venv could not be installed"
    rm -rf "$VENV"
    mkdir -p "$CACHE"
    "$python" -m venv "$VENV"
    note "pip install -r tests/python/requirements.txt"
    "$VENV/bin/pip" install -q --disable-pip-version-check -r "$wanted" ||
        die "the Python packages could not be installed"
    cp "$wanted" "$VENV/requirements.txt"
}

# What the quickstart needs: a guest, and the tools that judge its disk.
ensure_guest() {
    have python3 || {
        say "Installing Python"
        apt_install python3 || die "python3 could not be installed"
    }
    ensure_qemu
    ensure_tools
    ensure_kernel
    python3 "$ROOT/contrib/guest.py" build >/dev/null
}

# What counts instructions, in tests only.
ensure_valgrind() {
    have valgrind && return 0
    say "Installing valgrind"
    apt_install valgrind || die "valgrind could not be installed"
}

# All that the tests need.
ensure_all() {
    ensure_guest
    ensure_valgrind
    ensure_venv
}

ensure_cargo() {
    have cargo || die "cargo is missing; install a Rust toolchain, with rustup for example"
    have cc || {
        say "Installing a C compiler"
        apt_install gcc libc6-dev || die "no C compiler could be installed"
    }
}
