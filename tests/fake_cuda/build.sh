#!/bin/sh
# build.sh OUT_DIRECTORY: makes OUT_DIRECTORY/libcuda.so.1 and the name libcuda.so beside it. Needs g++ only.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mkdir -p "$out"
# AVX2, FMA and F16C make conversions and fused multiply-adds several times faster.
arch=$(grep -qw avx2 /proc/cpuinfo && grep -qw f16c /proc/cpuinfo && grep -qw fma /proc/cpuinfo && echo "-march=x86-64-v3" || true)
common="-std=c++17 -fPIC -fvisibility=hidden -Wall -I$here"
for source in driver engine fibers memory module stream; do
    g++ $common -O2 -c "$here/$source.cpp" -o "$out/$source.o"
done
# -fno-strict-aliasing: device code puns pointers freely. -fno-extern-tls-init: plain TLS arrays.
# -fsanitize=alignment: a misaligned vector access traps, as on the GPU. -ffp-contract=off: as --fmad=false.
g++ $common -O3 $arch -ffp-contract=off -fno-strict-aliasing -fno-extern-tls-init -fno-math-errno -Wno-unused -Wno-sign-compare \
    -Wno-unknown-pragmas -fsanitize=alignment -fsanitize-undefined-trap-on-error -c "$here/host.cpp" -o "$out/host.o"
# The SONAME is the first name that cudarc tries: a test that has opened this file by its path needs
# no LD_LIBRARY_PATH.
g++ -shared -Wl,-soname,libcuda.so -Wl,-z,defs -o "$out/libcuda.so.1" "$out"/*.o -lpthread -ldl
ln -sf libcuda.so.1 "$out/libcuda.so"
