#!/usr/bin/env bash
# Make venv/ and install what the pipeline needs. Safe to run again; quick when nothing is to do.
#
#   bash setup.sh          what training needs
#   bash setup.sh --dev    and what `make check` needs
#
# PYTHON=...             interpreter to use, 3.11 to 3.14 (default: python3; where that is another
#                        version, the newest of python3.14 ... python3.11)
# VENV=...               where the environment goes (default: venv/ beside this script)
# CONSTRAINTS=...        file of the exact versions (default: constraints.txt; constraints-oldest.txt has
#                        the lowest that requirements.txt allows)
# TORCH_INDEX_URL=...    package index for torch alone, for example one of CPU-only builds;
#                        other packages follow pip's own settings (PIP_INDEX_URL, pip.conf)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV="${VENV:-venv}"
CONSTRAINTS="${CONSTRAINTS:-constraints.txt}"
requirements=requirements.txt
[ "${1:-}" = "--dev" ] && requirements=requirements-dev.txt
versions="3.14 3.13 3.12 3.11"

fail() { printf 'setup.sh: %s\n' "$*" >&2; exit 2; }

case "$(uname -s)" in
MINGW* | MSYS* | CYGWIN*)
    fail "this runs on Linux and macOS. On Windows use WSL (wsl --install), and run this in its Ubuntu."
    ;;
esac

# Whether an interpreter runs (a python3.12 of pyenv may only say that it is not selected), is of one of
# the versions, and has the module $2.
can_use() {
    "$1" -c "import sys, ${2:-os}
sys.exit('%d.%d' % sys.version_info[:2] not in '$versions'.split())" >/dev/null 2>&1
}

find_python() {
    local version candidate
    can_use python3 && echo python3 && return
    for version in $versions; do
        # uv installs into ~/.local/bin, which need not be on the path.
        for candidate in "python$version" ~/.local/bin/"python$version"; do
            can_use "$candidate" && echo "$candidate" && return
        done
    done
    return 1
}

install_command() {
    local version
    command -v uv >/dev/null 2>&1 && echo "uv python install 3.13" && return
    command -v brew >/dev/null 2>&1 && echo "brew install python@3.13" && return
    for version in $versions; do
        if apt-cache show "python$version-venv" 2>/dev/null | grep "^Package:" >/dev/null; then
            echo "sudo apt-get install -y python$version-venv"
            return
        fi
    done
    echo "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv python install 3.13"
}

refuse_python() {
    local found
    found="$("$1" --version 2>&1)" || found="it is missing or does not run"
    fail "$1 cannot be used ($found): Python 3.11 to 3.14 is needed." \
        "Set PYTHON=/path/to/python, or run: $(install_command)"
}

refuse_environment() {
    local made
    made="$(sed -n '/^version/{s/.*= *//p;q;}' "$VENV/pyvenv.cfg" 2>/dev/null)" || true
    fail "$VENV cannot be used (made with Python ${made:-of another kind}): a Python 3.11 to 3.14 that" \
        "works, and pip, are needed there. Remove it and run this again: rm -r $VENV"
}

bin="$VENV/bin"

has_environment=
if [ -e "$VENV/pyvenv.cfg" ] || [ -x "$bin/python" ]; then
    has_environment=1
    can_use "$bin/python" pip || refuse_environment
fi

# What was installed last, by what it was installed from.
fingerprint() { echo "$(cat "$CONSTRAINTS" requirements.txt "$1" setup.sh | cksum) ${TORCH_INDEX_URL:-}"; }
stamp() { echo "$VENV/.installed-$1"; }
if [ -n "$has_environment" ] && [ "$(cat "$(stamp "$requirements")" 2>/dev/null)" = "$(fingerprint "$requirements")" ]; then
    echo "setup.sh: $VENV is up to date."
    exit 0
fi

if [ -z "$has_environment" ]; then
    if [ -n "${PYTHON:-}" ]; then
        can_use "$PYTHON" || refuse_python "$PYTHON"
    else
        PYTHON="$(find_python)" || refuse_python python3
    fi
    echo "setup.sh: making $VENV with $("$PYTHON" --version)."
    if ! "$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        fail "this Python cannot make virtual environments. Run: sudo apt-get install -y python${version}-venv"
    fi
    "$PYTHON" -m venv "$VENV"
fi

# A terminal gets pip's own bars, a log a line for each package that is fetched: it takes minutes.
# $1 is the environment's Python.
pip() {
    if [ -t 1 ]; then
        "$1" -m pip --disable-pip-version-check "${@:2}"
        return
    fi
    "$1" -m pip --disable-pip-version-check "${@:2}" | awk '
    /^ *(Downloading|Using cached|Processing) / && !/metadata/ {
        size = $1 == "Processing" ? "" : " " $(NF - 1) " " $NF
        file = $2 == "cached" ? $3 : $2; sub(/.*\//, "", file); split(file, part, "-")
        print "setup.sh:   " part[1], part[2] size; fflush()
    }
    /^Installing collected packages/ { print "setup.sh: unpacking", NF - 3, "packages."; fflush() }'
}
rm -f "$VENV"/.installed-* # nothing is up to date until all is installed
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    echo "setup.sh: installing torch from TORCH_INDEX_URL."
    pip "$bin/python" install --index-url "$TORCH_INDEX_URL" --constraint "$CONSTRAINTS" torch
fi
echo "setup.sh: installing $requirements (some minutes the first time)."
pip "$bin/python" install --constraint "$CONSTRAINTS" --requirement "$requirements"

# gsutil pins an old google-auth, so it gets an environment of its own inside this one.
if ! command -v gsutil >/dev/null 2>&1 && [ ! -x "$bin/gsutil" ]; then
    echo "setup.sh: no gsutil found, installing it into $VENV."
    if "$bin/python" -m venv "$VENV/gsutil" &&
        pip "$VENV/gsutil/bin/python" install gsutil; then
        ln -sf ../gsutil/bin/gsutil "$bin/gsutil"
    else
        echo "setup.sh: gsutil could not be installed; uploads to gs:// will use the Python client." >&2
    fi
fi

# The project's bytecode too, as pip does for packages: the first start need not, nor one that cannot
# write here.
"$bin/python" -m compileall -q train.py debug_gpu.py configs utils scripts || true

fingerprint "$requirements" >"$(stamp "$requirements")"
fingerprint requirements.txt >"$(stamp requirements.txt)" # the others include it
echo "setup.sh: done. Activate with: source $bin/activate"
