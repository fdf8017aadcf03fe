#!/bin/sh
# The first minutes on a real GPU: what matters most first, one page of Markdown on standard output.
#
#     benches/silicon.sh [SHAPE] > benches/results/DEVICE.md
#
# Nothing is built here. `cargo build --release && cargo test --release --test gpu --no-run && cargo bench --bench gpu
# --no-run`, at the same path as here, makes what it runs; $BIN is where that is (target/release). SHAPE is one of
# benches/support/synthetic.rs, `8b` unless another is named. A part that fails or takes too long says so, and the next
# one begins. On the stand-in for the driver it takes minutes with shapes and tests that are small:
#
#     BIN=target/debug TESTS=norms LD_LIBRARY_PATH=target/fake_cuda benches/silicon.sh tiny
set -u
cd "$(dirname "$0")/.." || exit 1
shape=${1:-8b}
bin=${BIN:-target/release}
ferris=tests/fixtures/ferris-7m
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
begun=$(date +%s)

# The newest executable of the pattern $1 that holds the text $2.
find_binary() {
    for file in $(ls -t $1 2>/dev/null); do
        [ -x "$file" ] && grep -q -a "$2" "$file" && echo "$file" && return
    done
    echo "missing:$1"
}
evenkeel=$bin/evenkeel
tests=$(find_binary "$bin/deps/gpu-*" models_over_gpus_are_transformers)
bench=$(find_binary "$bin/deps/gpu-*" "nothing to measure")

# Runs the rest as a command of at most $1 seconds: what it says on both outputs, how it ended, and when.
run() {
    limit=$1
    shift
    start=$(date +%s)
    timeout -k 10 "$limit" "$@" 2>&1
    code=$?
    end=$(date +%s)
    [ $code = 124 ] && echo "*** stopped after $limit s"
    [ $code != 0 ] && echo "*** exit code $code"
    echo "($((end - start)) s; $((end - begun)) s since the beginning)"
}
# The same in a block of code, with the command above it; only the last lines of what is long.
part() {
    printf '\n## %s\n\n```text\n' "$1"
    shift
    lines=$1
    shift
    seconds=$1
    shift
    echo "\$ $*"
    run "$seconds" "$@" | tail -n "$lines"
    echo '```'
}
# A page of the bench itself from its first part on: the machine's data stand above. What is no table is said, too.
measure() {
    run "$1" "$bench" --bench "$2" "$shape" | awk '/^## /{on = 1; print ""} on || !/^$|^#|^Compute|^`cargo/'
}
smi() {
    command -v nvidia-smi >/dev/null || { echo "no nvidia-smi" && return; }
    nvidia-smi --query-gpu=index,"$1" --format=csv 2>&1
}

echo "# First run: $(smi name 2>/dev/null | sed -n '2s/^[^,]*, //p')"
printf '\n```text\n'
echo "$(date -u +%Y-%m-%dT%H:%MZ), evenkeel $(git describe --always --dirty 2>/dev/null), shapes \`$shape\`, $bin"
uname -srm
grep -m1 'model name' /proc/cpuinfo
grep MemTotal /proc/meminfo
smi driver_version,compute_cap,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.max.memory
nvidia-smi topo -m 2>/dev/null
echo '```'

part "Devices" 60 60 "$evenkeel" devices
part "Memory before" 20 20 nvidia-smi --query-gpu=index,memory.used,memory.reserved,memory.free --format=csv
part "Verified" 100 300 env XDG_CACHE_HOME="$scratch/verify" "$evenkeel" devices --verify
part "tests/gpu.rs" 60 600 "$tests" --ignored ${TESTS:-}

# Kernels that are compiled, kept by evenkeel, and kept by nobody: the difference is what compiling takes.
cache=$scratch/cache
generate="$evenkeel generate $ferris --device-map cuda:0 --prompt Ownership --ignore-eos --max-new-tokens 100 --stats"
part "First start: kernels are compiled" 30 300 env XDG_CACHE_HOME="$cache" CUDA_CACHE_DISABLE=1 $generate
part "Second start: kernels are kept" 30 120 env XDG_CACHE_HOME="$cache" CUDA_CACHE_DISABLE=1 $generate
part "A start without anything kept, by one thread" 30 300 \
    env XDG_CACHE_HOME="$scratch/other" CUDA_CACHE_DISABLE=1 taskset -c 0 $generate
part "Memory behind it" 20 20 nvidia-smi --query-gpu=index,memory.used,memory.reserved,memory.free --format=csv

for page in driver step late products attention model choice quantize; do
    case $page in
        model) limit=600 ;;
        *) limit=180 ;;
    esac
    measure $limit $page
done
