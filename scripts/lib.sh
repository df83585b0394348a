# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment for each Python, made where it is missing or out of date.

set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"

say() { printf '%s\n' "── $*" >&2; }

# Prints "VERSION PATH" for every Python from 3.11 to 3.13, newest last; one line a version.
pythons() {
    local candidate version
    for candidate in python3 python3.{11..13} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[123].*/bin/python /usr/local/bin/python3.1[123]; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        # A pyenv shim exists for versions that are not there: ask it. Inside an activated environment, take its base.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", sys.executable))' 2>/dev/null) || continue
        case $version in 3.11\ * | 3.12\ * | 3.13\ *) printf '%s\n' "$version" ;; esac
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
        say "setting up Python $version in $folder (first time: about 20 s)"
        if "$python" -m pip --version >/dev/null 2>&1; then
            # Debian's python3 has no ensurepip unless python3-venv is installed: use its pip from outside.
            "$folder/bin/python" -c '' 2>/dev/null || "$python" -m venv --without-pip "$folder"
            "$python" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check -e ".[$extra]"
        else
            "$python" -m venv "$folder" || { say "this Python has neither pip nor ensurepip: apt install python3-pip"; exit 1; }
            "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
        fi
        printf '%s' "$stamp" >"$folder/.stamp"
    fi
    exec {lock}<&-
}

# The main environment: the Python that "python3" is if that will do, else the newest one.
main_venv() {
    local found version python
    found=$(pythons)
    [ -n "$found" ] || { say "no Python from 3.11 to 3.13 found"; exit 1; }
    version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
    found=$(grep "^$version " <<<"$found" || tail -n 1 <<<"$found")
    version=${found%% *} python=${found#* }
    venv "$version" "$python" dev .venv
    main_version=$version
    export PATH="$top/.venv/bin:$PATH"
}
