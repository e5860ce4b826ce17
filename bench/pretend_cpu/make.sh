#!/bin/bash
# make.sh FOLDER [REVISION]: makes FOLDER/python, which runs this checkout on a pretended i7-13700K (README.md).
# REVISION: what to install of this checkout's history (default HEAD). Another run installs another one in the same FOLDER.
# VENV: the virtual environment that is copied (default .venv of this checkout); it stays as it is.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: make.sh FOLDER [REVISION]" >&2
  exit 2
fi
here=$(dirname "$(realpath "$0")")
root=$(realpath "$here/../..")
venv=$(realpath "${VENV:-$root/.venv}")
for program in gcc g++ git objdump; do
  command -v $program >/dev/null || { echo "$program is not installed. Run: apt-get install g++ git binutils" >&2; exit 1; }
done
[ -x "$venv/bin/python" ] || { echo "$venv is no virtual environment. Run: make test, or name one with VENV" >&2; exit 1; }
revision=$(git -C "$root" rev-parse --quiet --verify --end-of-options "${2:-HEAD}^{commit}") ||
  { echo "${2:-HEAD} is no commit of $root. Run: git log" >&2; exit 1; }
if [ -e "$1" ] && [ ! -x "$1/python" ] && [ -n "$(ls -A "$1")" ]; then
  echo "$1 exists, and this program did not make it. Name another folder" >&2
  exit 1
fi
mkdir -p "$1"
folder=$(realpath "$1")

cp "$here/python" "$folder/python"
# General registers only: libraries ask CPUID where vector registers are in use.
gcc -O2 -Wall -Wextra -mgeneral-regs-only -shared -fPIC -Wl,-z,now -o "$folder/pretend_cpu.so.new" "$here/pretend_cpu.c" -ldl
mv "$folder/pretend_cpu.so.new" "$folder/pretend_cpu.so" # running processes keep the old one
if [ ! -d "$folder/env" ]; then
  echo "copying $venv" >&2
  rm -rf "$folder/env.new"
  cp -a --reflink=auto "$venv" "$folder/env.new"
  mv "$folder/env.new" "$folder/env"
fi
[ -d "$folder/checkout" ] || git clone -q --no-checkout "$root" "$folder/checkout"
git -C "$folder/checkout" fetch -q "$root" "$revision"
git -C "$folder/checkout" checkout -q --force --detach "$revision"

echo "compiling the kernels" >&2
rm -rf "$folder/checkout/build" "$folder"/checkout/runtimes/engines/*.so
(cd "$folder/checkout" && CC="gcc -B$here/" CXX="g++ -B$here/" LDCXXSHARED="g++ -shared" "$folder/python" -m pip install \
  -q --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .)
echo "patching the libraries" >&2
"$venv/bin/python" "$here/patch_libraries.py" "$folder/env" "$folder/checkout"

cd "$folder" # not in the checkout, whose folders have the names of packages
./python -c "
import ettin.runtimes
from ettin.runtimes.engines import openvino_kernels
assert openvino_kernels.compiled(), 'the kernels were not compiled'"
echo "$folder/python"
