#!/usr/bin/env python3
"""Times evenkeel beside Transformers with bitsandbytes on the first GPU, in turn, in one run.

    cargo build --release
    cargo bench --bench gpu -- model 8b       # makes target/synthetic-8b
    pip install torch transformers accelerate bitsandbytes
    python benches/bitsandbytes.py

Both load the same checkpoint of random weights from the page cache, in a process of their own, take the
same prompt and generate as many tokens behind it. For Transformers, loading is `from_pretrained` on a GPU
that is in use already, and the rest is timed after a first generation; for evenkeel, it is all of the
load, and the first generation. Memory is the most that nvidia-smi shows, less what it showed before.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `import bitsandbytes` is to find the package, not this file.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benches"]
PACKAGES = ["torch", "transformers", "accelerate", "bitsandbytes"]
# evenkeel's scheme and the format of bitsandbytes beside it.
FORMATS = [("int4", "nf4"), ("int8", "8bit")]
# What is reported of each run.
FIGURES = ["load s", "memory MiB", "prefill tok/s", "decode tok/s"]


def words(config, tokens):
    """The tokens of the prompt."""
    return [3 + i * 61 % (config["vocab_size"] - 3) for i in range(tokens)]


def transformers(model, format, tokens, new):
    """Seconds of load, prefill and decode; run in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers import __version__ as version

    if format == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    else:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    config = json.loads((Path(model) / "config.json").read_text())
    prompt = torch.tensor([words(config, tokens)], device="cuda:0")
    dtype = {"dtype" if int(version.split(".")[0]) >= 5 else "torch_dtype": torch.bfloat16}
    torch.cuda.synchronize()
    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantization, device_map={"": 0}, **dtype
    )
    torch.cuda.synchronize()
    load = time.perf_counter() - start

    def generate(count):
        start = time.perf_counter()
        output = loaded.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        assert output.shape[1] == tokens + count, output.shape
        return time.perf_counter() - start

    generate(2)
    prefill = generate(1)
    return load, prefill, generate(new) - prefill


def evenkeel(binary, model, scheme, tokens, new):
    """Seconds of load, prefill and decode."""
    config = json.loads((model / "config.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        device_map, prompt = Path(directory) / "map.json", Path(directory) / "prompt.txt"
        device_map.write_text('{"": "cuda:0"}')
        prompt.write_text(" ".join(f"w{token}" for token in words(config, tokens)))
        command = [binary, "generate", model, "--quantize", scheme, "--device-map", device_map]
        command += ["--prompt-file", prompt, "--context", tokens + new, "--max-new-tokens", new]
        command += ["--ignore-eos", "--format", "json", "--quiet"]
        done = json.loads(run(command).splitlines()[-1])
    assert (done["prompt_tokens"], done["generated_tokens"]) == (tokens, new), done
    return done["loaded"]["seconds"], done["prefill_seconds"], done["decode_seconds"]


def run(command):
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if output.returncode != 0:
        sys.exit(output.stderr)
    return output.stdout


def figures(time_it, tokens, new):
    """What `time_it` gives, and the memory that it takes of the GPU meanwhile."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    before = int(run(query))
    with tempfile.TemporaryFile("w+") as log:
        watch = subprocess.Popen([*query, "--loop-ms=20"], stdout=log)
        try:
            load, prefill, decode = time_it()
        finally:
            watch.terminate()
            watch.wait()
        log.seek(0)
        used = max(int(line) for line in log.read().split() if line.isdigit())
    return load, used - before, tokens / prefill, (new - 1) / decode


def missing(binary, model):
    """What is not there."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            yield f"the package `{package}`: pip install {' '.join(PACKAGES)}"
    if not binary.exists():
        yield f"`{binary}`: cargo build --release"
    if not model.exists():
        yield f"`{model}`: cargo bench --bench gpu -- model {model.name.removeprefix('synthetic-')}"
    try:
        subprocess.run(["nvidia-smi"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        yield "an NVIDIA GPU: `nvidia-smi` shows none"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/evenkeel", help="evenkeel")
    parser.add_argument("--model", type=Path, default=ROOT / "target/synthetic-8b")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", metavar="FORMAT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.tokens, options.new)
    if options.transformers:
        print(json.dumps(transformers(options.model, options.transformers, *size)))
        return
    lacking = list(missing(options.binary, options.model))
    if lacking:
        sys.exit("\n".join(["nothing is measured; these are missing:", *(f"- {what}" for what in lacking)]))

    print(run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]).strip())
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES))
    print(f"{options.tokens} tokens of prompt, {options.new} new ones; medians of {options.rounds} rounds")
    print("format       what           evenkeel  bitsandbytes  ratio  (of each round)")
    for scheme, format in FORMATS:
        worker = [sys.executable, __file__, "--transformers", format, "--model", options.model]
        worker += ["--tokens", options.tokens, "--new", options.new]
        rounds = []
        for _ in range(options.rounds):
            for shard in options.model.glob("*.safetensors"):
                run(["cp", shard, "/dev/null"])
            ours = figures(lambda: evenkeel(options.binary, options.model, scheme, *size), *size)
            theirs = figures(lambda: json.loads(run(worker).splitlines()[-1]), *size)
            rounds.append((ours, theirs))
        for at, what in enumerate(FIGURES):
            ours = statistics.median(ours[at] for ours, _ in rounds)
            theirs = statistics.median(theirs[at] for _, theirs in rounds)
            each = [ours[at] / theirs[at] for ours, theirs in rounds]
            ratios = " ".join(f"{ratio:.2f}" for ratio in each)
            median = statistics.median(each)
            print(f"{scheme:<4} / {format:<5} {what:<13} {ours:9.1f} {theirs:13.1f} {median:6.2f}  ({ratios})")


if __name__ == "__main__":
    main()
