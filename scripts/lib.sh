# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment for each Python, made where it is missing or out of date.

set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"

say() { printf '%s\n' "── $*" >&2; }

# A long command whose output matters only if it fails. Its last line is a sign of life: on a terminal each second, else
# each ten.
quietly() {
    local output ticker passed=0 status=0
    output=$(mktemp)
    # The command is not the one in the background: what is there ignores Ctrl-C. The ticker ends with us.
    while sleep 1 && kill -0 $$ 2>/dev/null && [ -e "$output" ]; do
        passed=$((passed + 1))
        if [ -t 2 ]; then
            printf '\r\033[K   %s s: %.60s' "$passed" "$(tail -n 1 "$output")" >&2
        elif [ $((passed % 10)) -eq 0 ]; then
            say "still at it after $passed s: $(tail -n 1 "$output" | cut -c 1-60)"
        fi
    done &
    ticker=$!
    "$@" >"$output" 2>&1 || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    [ "$status" -eq 0 ] || cat "$output" >&2
    rm -f "$output"
    return "$status"
}

# Prints "VERSION PATH" for every Python from 3.11 to 3.14, newest last; one line a version.
pythons() {
    local candidate version
    for candidate in python3 python3.{11..14} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-4].*/bin/python /usr/local/bin/python3.1[1-4]; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        # A pyenv shim exists for versions that are not there: ask it. Inside an activated environment, take its base.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", sys.executable))' 2>/dev/null) || continue
        case $version in 3.1[1-4]\ *) printf '%s\n' "$version" ;; esac
    done | sort -V -u -k1,1
}

# venv VERSION PYTHON EXTRA FOLDER: an editable install of the project with an extra, renewed when what it needs changes.
venv() {
    local version=$1 python=$2 extra=$3 folder=$4 stamp lock
    stamp="$version $extra $(sed '/^\[tool\./,$d' pyproject.toml | cksum)"
    [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ] && return
    mkdir -p "$folder"
    exec {lock}<"$folder"
    flock "$lock"
    if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
        say "setting up Python $version in $folder (first time: 20 s to minutes, by the network)"
        if "$python" -m pip --version >/dev/null 2>&1; then
            # Debian's python3 has no ensurepip unless python3-venv is installed: use its pip from outside.
            "$folder/bin/python" -c '' 2>/dev/null || "$python" -m venv --without-pip "$folder"
            quietly "$python" -m pip --python "$folder/bin/python" install --progress-bar off --disable-pip-version-check -e ".[$extra]"
        else
            "$python" -m venv "$folder" || { say "this Python has neither pip nor ensurepip: apt install python3-pip"; exit 1; }
            quietly "$folder/bin/python" -m pip install --progress-bar off --disable-pip-version-check -e ".[$extra]"
        fi
        printf '%s' "$stamp" >"$folder/.stamp"
    fi
    exec {lock}<&-
}

# The main environment: the Python that "python3" is if that will do, else the newest one.
main_venv() {
    local found version python
    found=$(pythons)
    [ -n "$found" ] || { say "no Python from 3.11 to 3.14 found"; exit 1; }
    version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
    found=$(grep "^$version " <<<"$found" || tail -n 1 <<<"$found")
    version=${found%% *} python=${found#* }
    venv "$version" "$python" dev .venv
    main_version=$version
    export PATH="$top/.venv/bin:$PATH"
}
