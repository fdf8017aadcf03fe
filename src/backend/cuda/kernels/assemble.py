#!/usr/bin/env python3
"""Assembles the PTX for the GPUs that there are, as the driver does when kernels are first used: without an error, and
without more spilled bytes than spills.txt has for a kernel and an architecture.

    pip install --no-deps --target DIRECTORY nvidia-cuda-nvcc-cu12==12.9.86
    src/backend/cuda/kernels/assemble.py DIRECTORY/nvidia/cuda_nvcc/bin/ptxas [--write]

With --write spills.txt is made anew.
"""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SPILLS = HERE / "spills.txt"
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
# From here on kernels begin early; modules.rs says the same.
EARLY, EARLY_MARK = 90, "//sm_90 "
KERNEL = re.compile(r"Function properties for (\w+)\n.*?(\d+) bytes spill stores", re.S)


def text_for(file, architecture):
    text = file.read_text()
    if architecture < EARLY:
        return text
    return re.sub(r"^\.target \S+$", ".target sm_90", text.replace(EARLY_MARK, ""), flags=re.M)


def assemble(ptxas, file, architecture):
    """What each kernel of a file spills."""
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory, file.name)
        source.write_text(text_for(file, architecture))
        command = [ptxas, f"-arch=sm_{architecture}", "-v", str(source), "-o", f"{directory}/cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{file.name} for sm_{architecture}:\n{run.stderr}")
    return [(kernel, f"sm_{architecture}", int(bytes)) for kernel, bytes in KERNEL.findall(run.stderr)]


def main():
    ptxas = sys.argv[1]
    files = sorted(HERE.glob("*.ptx"))
    least = {file: int(re.search(r"^\.target sm_(\d+)", file.read_text(), re.M)[1]) for file in files}
    jobs = [(ptxas, file, each) for file in files for each in ARCHITECTURES if each >= least[file]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = sorted(spill for spills in pool.map(lambda job: assemble(*job), jobs) for spill in spills)
    if sys.argv[2:] == ["--write"]:
        SPILLS.write_text("".join(f"{kernel} {each} {bytes}\n" for kernel, each, bytes in found if bytes))
        return
    lines = (line.split() for line in SPILLS.read_text().splitlines())
    allowed = {(kernel, each): int(bytes) for kernel, each, bytes in lines}
    more = [f"{kernel} on {each}: {bytes} bytes" for kernel, each, bytes in found if bytes > allowed.get((kernel, each), 0)]
    if more:
        sys.exit("kernels spill more than spills.txt has: " + "; ".join(more))
    print(f"{len(found)} kernels assembled for {len(ARCHITECTURES)} architectures")


main()
