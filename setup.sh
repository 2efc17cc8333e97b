#!/usr/bin/env bash
# Make venv/ and install what the pipeline needs. Safe to run again; quick when nothing is to do.
#
#   bash setup.sh          what training needs
#   bash setup.sh --dev    and what `make check` needs
#
# PYTHON=...             interpreter to use (default: python3, 3.10 or newer)
# VENV=...               where the environment goes (default: venv/ beside this script)
# TORCH_INDEX_URL=...    package index for torch alone, for example one of CPU-only builds;
#                        other packages follow pip's own settings (PIP_INDEX_URL, pip.conf)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-venv}"
requirements=requirements.txt
[ "${1:-}" = "--dev" ] && requirements=requirements-dev.txt

fail() { printf 'setup.sh: %s\n' "$*" >&2; exit 2; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON is not installed. Install Python 3.10 or newer, or set PYTHON=/path/to/python."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$PYTHON" --version) is too old: 3.10 or newer is needed. Set PYTHON=/path/to/python3.10."

bin="$VENV/bin"
[ -d "$VENV/Scripts" ] && bin="$VENV/Scripts" # Windows (Git Bash)

# What was installed last, by what it was installed from.
fingerprint() { echo "$(cat constraints.txt requirements.txt "$1" setup.sh | cksum) ${TORCH_INDEX_URL:-}"; }
stamp() { echo "$VENV/.installed-$1"; }
if [ -x "$bin/python" ] && [ "$(cat "$(stamp "$requirements")" 2>/dev/null)" = "$(fingerprint "$requirements")" ]; then
    echo "setup.sh: $VENV is up to date."
    exit 0
fi

if [ ! -x "$bin/python" ]; then
    echo "setup.sh: making $VENV with $("$PYTHON" --version)."
    if ! "$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        fail "this Python cannot make virtual environments. Run: sudo apt-get install -y python${version}-venv"
    fi
    "$PYTHON" -m venv "$VENV"
    [ -d "$VENV/Scripts" ] && bin="$VENV/Scripts"
fi

pip() { "$bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    echo "setup.sh: installing torch from TORCH_INDEX_URL."
    pip install --index-url "$TORCH_INDEX_URL" --constraint constraints.txt torch
fi
echo "setup.sh: installing $requirements (some minutes the first time)."
pip install --constraint constraints.txt --requirement "$requirements"

# gsutil pins an old google-auth, so it gets an environment of its own inside this one.
if ! command -v gsutil >/dev/null 2>&1 && [ ! -x "$bin/gsutil" ]; then
    echo "setup.sh: no gsutil found, installing it into $VENV."
    if "$PYTHON" -m venv "$VENV/gsutil" &&
        "$VENV/gsutil/${bin##*/}/python" -m pip --disable-pip-version-check --quiet install gsutil; then
        ln -sf "../gsutil/${bin##*/}/gsutil" "$bin/gsutil" 2>/dev/null ||
            cp "$VENV/gsutil/${bin##*/}/gsutil" "$bin/gsutil"
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
