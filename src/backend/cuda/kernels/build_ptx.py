#!/usr/bin/env python3
"""Makes the PTX beside each kernel file with NVRTC: no GPU and no CUDA toolkit are needed.

    pip install --target DIRECTORY nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-runtime-cu12==12.4.127
    PYTHONPATH=DIRECTORY src/backend/cuda/kernels/build_ptx.py [--check]

With --check nothing is written; the exit status says whether the PTX is that of the sources.
"""
import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
OPTIONS = ["-default-device", "--std=c++17", "--fmad=false"]
# What a file's GPUs have at least; modules.rs says the same.
CAPABILITY, CAPABILITIES = 75, {"attention_mma": 80, "mma_few": 80, "mma_many": 80}


def nvrtc():
    for base in map(pathlib.Path, sys.path):
        for library in base.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
            return ctypes.CDLL(str(library)), base / "nvidia/cuda_runtime/include"
    sys.exit("NVRTC is not on PYTHONPATH; see the head of this file")


def compile_ptx(lib, include, source):
    def call(name, *arguments):
        return getattr(lib, "nvrtc" + name)(program, *arguments)

    def text(name):
        size = ctypes.c_size_t()
        call(f"Get{name}Size", ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"Get{name}", buffer)
        return buffer.value.decode()

    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    architecture = f"--gpu-architecture=compute_{CAPABILITIES.get(source.stem, CAPABILITY)}"
    options = [option.encode() for option in [architecture, *OPTIONS, f"-I{include}", f"-I{HERE}"]]
    failed = call("CompileProgram", len(options), (ctypes.c_char_p * len(options))(*options))
    if log := text("ProgramLog").strip():
        print(log, file=sys.stderr)
    if failed:
        sys.exit(f"{source.name}: NVRTC error {failed}")
    return text("PTX")


def main():
    lib, include = nvrtc()
    stale = []
    for source in sorted(HERE.glob("*.cu")):
        ptx, file = compile_ptx(lib, include, source), source.with_suffix(".ptx")
        if sys.argv[1:] != ["--check"]:
            file.write_text(ptx)
        elif not file.exists() or file.read_text() != ptx:
            stale.append(file.name)
    if stale:
        sys.exit(f"not what the sources give: {', '.join(stale)}; run {pathlib.Path(__file__).name}")


main()
