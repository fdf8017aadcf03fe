#!/bin/sh
# build.sh OUT_DIRECTORY: makes OUT_DIRECTORY/libcuda.so.1 and the name libcuda.so beside it. Needs g++ and a CPU with AVX2, FMA and F16C.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mkdir -p "$out"
# Those of other sources would be linked, too.
rm -f "$out"/*.o
compile() {
    source=$1
    shift
    g++ -std=c++17 -fPIC -fvisibility=hidden -Wall "$@" -c "$here/$source.cpp" -o "$out/$source.o"
}
level=$(grep -qw avx512vl /proc/cpuinfo && echo v4 || echo v3)
# Every PTX operation rounds by itself: nothing is contracted.
for source in ops interp; do
    compile $source -O3 -march=x86-64-$level -ffp-contract=off -fno-strict-aliasing -fno-math-errno -fno-trapping-math &
    all="${all-} $!"
done
compile race -O3
for source in driver memory module stream ptx; do compile $source -O2; done
for one in $all; do wait "$one"; done
# The SONAME is the first name that cudarc tries: a test that has opened this file by its path needs
# no LD_LIBRARY_PATH.
g++ -shared -Wl,-soname,libcuda.so -Wl,-z,defs -o "$out/libcuda.so.1" "$out"/*.o -lpthread -ldl
ln -sf libcuda.so.1 "$out/libcuda.so"
