#!/usr/bin/env python3
"""coverage.py FILE [--write]: compares the PTX that has run, as FAKE_CUDA_COVERAGE told it to FILE, with uncovered.txt.

A line there is a kernel, ranges of lines of its PTX that no case of tests/cuda_kernels.rs runs, `#`, and why. The exit status
says whether anything else has not run. --write writes the ranges, and keeps the reasons of kernels.
"""
import collections
import pathlib
import re
import sys

LIST = pathlib.Path(__file__).with_name("uncovered.txt")
KERNELS = pathlib.Path(__file__).resolve().parents[2] / "src/backend/cuda/kernels"


def lines_of(ranges):
    return {line for a, b in re.findall(r"(\d+)-(\d+)", ranges) for line in range(int(a), int(b) + 1)}


def read(file):
    """For each kernel the lines that no process has run, and how many it has."""
    missed, counts = {}, {}
    for line in open(file):
        name, count, lines = re.match(r"coverage (\S+) (\d+):(.*)", line).groups()
        lines = set(map(int, lines.split()))
        missed[name] = missed.get(name, lines) & lines
        counts[name] = int(count)
    return missed, counts


def ranges_of(lines, instructions):
    """Ranges between which there is an instruction that has run."""
    out, is_open = [], False
    for line in instructions:
        if line in lines and is_open:
            out[-1][1] = line
        elif line in lines:
            out.append([line, line])
        is_open = line in lines
    return " ".join(f"{a}-{b}" for a, b in out)


def main():
    known = collections.defaultdict(lambda: ("", "?"))
    for line in LIST.read_text().splitlines() if LIST.exists() else []:
        name, ranges, why = re.match(r"(\S+) ([^#]*)# (.*)", line).groups()
        known[name] = (ranges, why)
    missed, counts = read(sys.argv[1])
    shipped = {}  # of each kernel the lines of the file with instructions
    for ptx in KERNELS.glob("*.ptx"):
        lines = ptx.read_text().splitlines()
        instructions = [at for at, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("//")]
        shipped |= {name: instructions for line in lines for name in re.findall(r"\.entry (\w+)\(", line)}
    new = {name: lines - lines_of(known[name][0]) for name, lines in missed.items()}
    if sys.argv[2:] == ["--write"]:
        LIST.write_text("".join(f"{n} {ranges_of(missed[n], shipped[n])} # {known[n][1]}\n" for n in sorted(missed) if missed[n]))
    total, rest = sum(counts.values()), sum(map(len, missed.values()))
    print(f"{len(counts)} of {len(shipped)} kernels ran, {100 - 100 * rest / total:.2f} % of their {total} lines")
    for name, lines in sorted(new.items()):
        if lines:
            print(f"{name}: not run, and not in {LIST.name}: {ranges_of(lines, shipped[name])}")
    for name in sorted(shipped.keys() - missed.keys()):
        print(f"{name}: not run")
    sys.exit(bool(any(new.values()) or shipped.keys() - missed.keys()))


main()
