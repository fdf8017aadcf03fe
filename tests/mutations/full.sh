#!/bin/sh
# full.sh [SEEDS]: what .ci/run has no time for. Kernels under the race detector at every capability and in SEEDS (5) random
# orders, models under the race detector, and the instructions that order something left out one after the other.
set -eu
cd "$(dirname "$0")/../.."
kernels() { env "$@" cargo test --locked --test cuda_kernels; }
kernels EVENKEEL_CAPABILITIES=7.5,8.6,9.0 FAKE_CUDA_RACE=1
for seed in $(seq "${1:-5}"); do
    kernels EVENKEEL_CAPABILITIES=7.5,8.6,9.0 FAKE_CUDA_CHAOS=1 FAKE_CUDA_SEED="$seed" FAKE_CUDA_MMA=truncate
done
env FAKE_CUDA_RACE=1 FAKE_CUDA_FORCE_CC=9.0 cargo test --locked --test cuda
binary=$(cargo test --locked --test cuda_kernels --no-run 2>&1 | sed -n 's/.*(\(.*\))$/\1/p')
tests/mutations/mutate.py "$binary"
