#!/bin/sh
# Makes .venv with the build tools in it, and looks for what pip can't install: Python's headers, its venv module, a
# C++ compiler and, for `setup.sh test`, GoogleTest. Installs what is missing where it may, else says how to.
set -eu
cd "$(dirname "$0")/.."

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
  for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed; set PYTHON to its path"
}

# install_packages DEBIAN_PACKAGES BREW_PACKAGES WHY
install_packages() {
  if [ "$(uname)" = Darwin ]; then
    [ -n "$2" ] || die "$3: run 'xcode-select --install'"
    command -v brew >/dev/null || die "$3: install Homebrew, or $2 by other means"
    say "$3: brew install $2"
    brew install $2
  elif command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "$3: apt-get install $1"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $1 >/dev/null
  elif command -v apt-get >/dev/null; then
    die "$3: run 'sudo apt-get install $1'"
  else
    die "$3: install what your system calls $1"
  fi
}

# A Python that is not the system's own (pyenv, conda) brings its headers, and apt's would not match it.
has_python_headers() {
  "$1" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'
}

make_venv() {
  command -v "${CXX:-c++}" >/dev/null || install_packages g++ "" "a C++17 compiler is missing"
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv python "Python's venv module is missing"
  has_python_headers "$python" || install_packages python3-dev python "Python's headers are missing"
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
  say "installing the build tools into .venv"
  requires=$("$python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
  .venv/bin/python -m pip install -q --upgrade pip
  .venv/bin/python -m pip install -q -c constraints.txt cmake ninja $requires
}

has_googletest() {
  case "$(uname)" in
    Darwin) brew --prefix --installed googletest >/dev/null 2>&1 ;;
    *) echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1 ;;
  esac
}

case "${1:-}" in
  venv) make_venv ;;
  googletest) has_googletest || install_packages libgtest-dev googletest "GoogleTest is missing" ;;
  *) die "usage: setup.sh venv | googletest" ;;
esac
