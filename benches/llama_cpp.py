#!/usr/bin/env python3
"""Times evenkeel beside llama.cpp on the same shapes, in turn, in one run.

    cargo build --release
    cargo bench --bench cpu -- one            # makes target/synthetic-1b
    pip install llama-cpp-python gguf numpy   # from source, for this processor
    python benches/llama_cpp.py

Both have random weights: time does not depend on their values. For each format, evenkeel and
llama.cpp take the same prompt and generate as many tokens, each in a process of its own.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "target/synthetic-1b"
# evenkeel's scheme and the format of ggml beside it.
FORMATS = [("int4", "Q4_0"), ("int8", "Q8_0")]


def write_gguf(path, format):
    """The shapes of `MODEL` in `format`, with random weights; the head is Q8_0, as evenkeel's is int8."""
    import gguf

    config = json.loads((MODEL / "config.json").read_text())
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(hidden // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(1)

    def matrix(name, rows, cols, type):
        weights = random.standard_normal((rows, cols), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(weights, type), raw_dtype=type)

    def norm(name):
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    block_type, eight = gguf.GGMLQuantizationType[format], gguf.GGMLQuantizationType.Q8_0
    matrix("token_embd.weight", config["vocab_size"], hidden, eight)
    for block in range(config["num_hidden_layers"]):
        norm(f"blk.{block}.attn_norm.weight")
        norm(f"blk.{block}.ffn_norm.weight")
        for name, rows, cols in [
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", feed_forward, hidden),
            ("ffn_up", feed_forward, hidden),
            ("ffn_down", hidden, feed_forward),
        ]:
            matrix(f"blk.{block}.{name}.weight", rows, cols, block_type)
    norm("output_norm.weight")
    matrix("output.weight", config["vocab_size"], hidden, eight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path, tokens, new, threads):
    """Prefill and decode of llama.cpp in tokens a second; run in a process of its own."""
    import llama_cpp as llama

    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = tokens + new, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(ids):
        ids = (ctypes.c_int32 * len(ids))(*ids)  # The batch points into it.
        batch = llama.llama_batch_get_one(ids, len(ids))
        assert llama.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,))
        return int(logits.argmax())

    prompt = [3 + i * 61 % 31000 for i in range(tokens)]
    # The first run finds the weights on the disk and the buffers untouched.
    decode(prompt[:16])
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    start = time.perf_counter()
    for at in range(0, tokens, 512):
        token = decode(prompt[at : at + 512])
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new - 1):
        token = decode([token])
    return tokens / prefill, (new - 1) / (time.perf_counter() - start)


def evenkeel(binary, model, tokens, new, threads):
    """Prefill and decode of evenkeel in tokens a second."""
    prompt = " ".join(f"w{3 + i * 61 % 31000}" for i in range(tokens))
    command = [binary, "generate", model, "--prompt", prompt, "--max-new-tokens", new, "--context", tokens + new]
    command += ["--threads", threads, "--ignore-eos", "--format", "json", "--quiet", "--max-memory", "cpu=64GiB"]
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if output.returncode != 0:
        sys.exit(output.stderr)
    done = json.loads(output.stdout.splitlines()[-1])
    assert (done["prompt_tokens"], done["generated_tokens"]) == (tokens, new), done
    return tokens / done["prefill_seconds"], (new - 1) / done["decode_seconds"]


def bandwidth(threads):
    """How fast all threads together read memory, in GB/s."""
    memory = np.ones(1 << 27, dtype=np.int64)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(np.max, np.array_split(memory, 16 * threads)))
            fastest = min(fastest, time.perf_counter() - start)
    return memory.nbytes / fastest / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=ROOT / "target/release/evenkeel", help="evenkeel")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", metavar="GGUF", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.tokens, options.new, options.threads)
    if options.llama_cpp:
        print(json.dumps(llama_cpp(options.llama_cpp, *size)))
        return

    read = bandwidth(options.threads)
    print(f"{options.threads} threads read memory at {read:.1f} GB/s")
    print(f"{options.tokens} tokens of prompt, {options.new} new ones; medians of {options.rounds} rounds, in tok/s")
    print("format       what     evenkeel  llama.cpp  ratio  (of each round)")
    for scheme, format in FORMATS:
        packed, gguf = MODEL.with_name(f"synthetic-1b-{scheme}"), MODEL.with_name(f"synthetic-1b-{format}.gguf")
        if not packed.exists():
            subprocess.run([options.binary, "quantize", MODEL, "--quantize", scheme, "--output", packed], check=True)
        if not gguf.exists():
            write_gguf(gguf, format)
        rounds = []
        for _ in range(options.rounds):
            ours = evenkeel(options.binary, packed, *size)
            # -P: `import llama_cpp` is to find the package, not this file.
            worker = [sys.executable, "-P", __file__, "--llama-cpp", gguf, "--tokens", size[0], "--new", size[1]]
            worker += ["--threads", size[2]]
            output = subprocess.run([str(part) for part in worker], capture_output=True, text=True)
            if output.returncode != 0:
                sys.exit(output.stderr)
            rounds.append((ours, json.loads(output.stdout.splitlines()[-1])))
        for at, what in enumerate(["prefill", "decode"]):
            ours = statistics.median(ours[at] for ours, _ in rounds)
            theirs = statistics.median(theirs[at] for _, theirs in rounds)
            each = [ours[at] / theirs[at] for ours, theirs in rounds]
            ratios = " ".join(f"{ratio:.2f}" for ratio in each)
            median = statistics.median(each)
            print(f"{scheme:<4} / {format:<5} {what:<7} {ours:9.1f} {theirs:10.1f} {median:6.2f}  ({ratios})")


if __name__ == "__main__":
    main()
