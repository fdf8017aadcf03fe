#!/usr/bin/env python3
"""mutate.py BINARY [--sample N] [--seed N] [--tests N]: leaves out one instruction that orders something after the other,
and says which of them the kernel cases notice under the race detector.

BINARY is the built tests/cuda_kernels.rs. Of each mutant at most --tests cases run (4), quickest first, of those that reach
its line. redundant.txt lists what orders nothing: a file, lines of its PTX, `#`, and why. It takes hours without --sample.
"""
import argparse
import os
import pathlib
import random
import re
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ORDERS = re.compile(r"\b(bar\.sync|bar\.warp\.sync|membar\.gl|cp\.async\.wait_group|griddepcontrol\.wait)\b")
CAPABILITIES = ["9.0", "7.5"]
SKIPPED = re.compile("a_barrier_that|without_a_compiler|page_locked|products_are_the_same")  # long, or no kernels


def run(binary, test, capability, limit=None, **settings):
    settings = {f"FAKE_CUDA_{key}": value for key, value in settings.items()}
    environment = {**os.environ, "FAKE_CUDA_QUIET": "1", "EVENKEEL_CAPABILITIES": capability, **settings}
    try:
        return subprocess.run([binary, "--exact", test], env=environment, capture_output=True, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return "timeout"


def cases(binary):
    """(seconds, test, capability, the lines of each kernel that it does not reach) of all cases, quickest first."""
    listed = subprocess.run([binary, "--list"], capture_output=True, text=True).stdout
    out = []
    for test in re.findall(r"(\w+): test", listed):
        for capability in CAPABILITIES if not SKIPPED.search(test) else []:
            with tempfile.NamedTemporaryFile("r") as file:
                began = time.time()
                run(binary, test, capability, COVERAGE=file.name)
                kernels = dict(re.findall(r"coverage (\S+) \d+:(.*)", file.read()))
            missed = {kernel: set(map(int, lines.split())) for kernel, lines in kernels.items()}
            out.append((time.time() - began, test, capability, missed))
    return sorted(out, key=lambda case: case[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    for option, default in [("--sample", 0), ("--seed", 1), ("--tests", 4)]:
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    redundant = re.findall(r"^(\w+) ([^#\n]*)#", (HERE / "redundant.txt").read_text(), re.M)
    redundant = {(file, int(at)) for file, lines in redundant for at in lines.split()}
    mutants, kernel = [], None
    for ptx in sorted((HERE.parents[1] / "src/backend/cuda/kernels").glob("*.ptx")):
        for at, line in enumerate(ptx.read_text().splitlines(), 1):
            if entry := re.search(r"\.entry (\w+)\(", line):
                kernel = entry[1]
            if ORDERS.search(line) and (ptx.stem, at) not in redundant:
                mutants.append((kernel, at, line.strip()))
    if options.sample:
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    known, noticed, reached = cases(options.binary), 0, 0
    for kernel, at, text in mutants:
        fitting = [case for case in known if at not in case[3].get(kernel, {at}) and ("sm_90" not in text or case[2] == "9.0")]
        reached += bool(fitting)
        by = None
        for seconds, test, capability, _ in fitting[: options.tests]:
            code = run(options.binary, test, capability, 60 + 20 * seconds, RACE="1", LOG="/dev/null", DROP=f"{kernel}:{at}")
            if code != 0:
                by = f"{test} at {capability}"
                break
        noticed += by is not None
        print(f"{kernel}:{at} {text} {by or ('NOT NOTICED' if fitting else 'not reached')}", flush=True)
    print(f"{noticed} of {len(mutants)} noticed, {reached} reached")


main()
