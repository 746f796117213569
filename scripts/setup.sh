#!/bin/sh
# Makes .venv with the build tools in it, and looks for what pip can't install: Python's headers, its venv module, a
# C++ compiler and, for the tests, GoogleTest, what the simulated Metal needs and a cross compiler. Installs what is
# missing where it may, else says how to.
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

# Whether a compiler is clang 16 or newer.
is_new_clang() {
  version=$("$1" -dM -E -x c++ /dev/null 2>/dev/null | sed -n 's/^#define __clang_major__ //p')
  [ "${version:-0}" -ge 16 ]
}

find_clang() {
  for candidate in clang++-19 clang++-21 clang++-20 clang++-18 clang++-17 clang++-16 clang++; do
    if is_new_clang "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# The version that is tested most if the distribution has it, else its newest from 16 on.
clang_version_on_offer() {
  versions=$(apt-cache search --names-only '^clang-[0-9]+$' | sed 's/^clang-\([0-9]*\) .*/\1/' | sort -n)
  for version in 19 $(echo "$versions" | sort -rn); do
    if [ "$version" -ge 16 ] && echo "$versions" | grep -qx "$version"; then
      echo "$version"
      return
    fi
  done
  die "the simulated Metal needs clang 16 or newer, which this distribution's packages lack: see https://apt.llvm.org"
}

has_sanitizers() {
  echo 'int main() {}' | "$1" -fsanitize=address,undefined -x c++ - -o /dev/null 2>/dev/null
}

# The tests run the Metal backend on a simulated GPU where there is no real one.
make_metal_sim() {
  [ "$(uname)" = Darwin ] && return
  clang=$(find_clang) || clang=""
  if [ -z "$clang" ] || ! has_sanitizers "$clang"; then
    version=19
    if command -v apt-get >/dev/null; then
      [ "$(id -u)" != 0 ] || apt-get update -qq
      version=$(clang_version_on_offer)
    fi
    install_packages "clang-$version libclang-rt-$version-dev" "" "clang for the simulated Metal is missing"
  fi
  echo '#include <boost/context/fiber.hpp>' | "${CXX:-c++}" -std=c++17 -E -x c++ - >/dev/null 2>&1 ||
    install_packages libboost-context-dev "" "Boost.Context for the simulated Metal is missing"
}

# The tests run for 64-bit ARM, too, where the distribution has a cross compiler.
make_arm64() {
  command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null &&
    [ -d /usr/src/googletest ] ||
    install_packages "g++-aarch64-linux-gnu qemu-user-static googletest" "" \
      "a cross compiler for 64-bit ARM, QEMU or GoogleTest's sources are missing"
}

case "${1:-}" in
  venv) make_venv ;;
  googletest) has_googletest || install_packages libgtest-dev googletest "GoogleTest is missing" ;;
  arm64) make_arm64 ;;
  metal-sim) make_metal_sim ;;
  clang) find_clang || die "no clang 16 or newer was found" ;;
  *) die "usage: setup.sh venv | googletest | arm64 | metal-sim | clang" ;;
esac
