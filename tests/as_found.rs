//! Checkpoints as people have them: what Transformers 5.24 makes of each, on the CPU in f32, and what is said of it.

#[path = "support/command.rs"]
mod command;
mod support;

use safetensors::Dtype;
use serde_json::json;
use support::bent::{Bent, Tensor, Tensors};

const LLAMA: &str = "parity/llama";
/// A prompt, and what the fixture says behind it.
const PROMPT: [u32; 12] = [271, 136, 122, 55, 226, 269, 241, 30, 74, 59, 274, 243];
const PLAIN: [u32; 8] = [120, 256, 10, 58, 100, 125, 198, 292];
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const SINGLE: &str = "model.safetensors";

/// Holds the tokens behind [`PROMPT`], and what is said, against what they must be.
#[track_caller]
fn assert_says(what: &str, bent: &Bent, tokens: [u32; 8], notes: &[&str]) {
    assert_eq!(bent.notes(), notes, "{what}");
    assert_eq!(bent.greedy(&PROMPT, 8, None), tokens, "{what}");
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor { shape: shape.to_vec(), values: vec![1.0; shape.iter().product()] }
}

#[test]
fn a_head_beside_a_tied_embedding() {
    let own = "`lm_head.weight` differs from the embedding and is used, though config.json has \
               `tie_word_embeddings: true`";
    let rows: fn(&mut Tensors) = |tensors| {
        let mut head = tensors[EMBEDDING].clone();
        head.values[319 * 64..].iter_mut().for_each(|value| *value *= -8.0);
        tensors.insert(HEAD.to_owned(), head);
    };
    let copy: fn(&mut Tensors) = |tensors| {
        tensors.insert(HEAD.to_owned(), tensors[EMBEDDING].clone());
    };
    let head_alone: fn(&mut Tensors) = |tensors| {
        let embedding = tensors.remove(EMBEDDING).unwrap();
        tensors.insert(HEAD.to_owned(), embedding);
    };
    let embedding_alone: fn(&mut Tensors) = |tensors| drop(tensors.remove(HEAD));
    let tied = [37, 241, 198, 147, 155, 234, 77, 77];
    for (what, change, tokens, notes) in [
        ("another", (|_| ()) as fn(&mut Tensors), PLAIN, &[own][..]),
        ("one row of another", rows, [319, 65, 319, 54, 319, 54, 54, 303], &[own]),
        ("the same", copy, tied, &[]),
        ("under the head's name", head_alone, tied, &[]),
        ("under the embedding's name", embedding_alone, tied, &[]),
    ] {
        let bent = Bent::of(LLAMA);
        bent.change_tensors(change);
        bent.configure(&json!({"tie_word_embeddings": true}));
        assert_says(what, &bent, tokens, notes);
    }
}

/// A few rows of a large head may pass unseen where samples are compared; they do not where it is loaded.
#[test]
fn a_head_that_samples_take_for_the_embedding() {
    let bent = Bent::of(LLAMA);
    bent.change_tensors(|tensors| {
        let large = Tensor { shape: vec![20_000, 64], values: vec![0.5; 20_000 * 64] };
        let mut other = large.clone();
        other.values[5000] = 0.25;
        tensors.extend([(EMBEDDING.to_owned(), large), (HEAD.to_owned(), other)]);
    });
    bent.configure(&json!({"tie_word_embeddings": true, "vocab_size": 20_000}));
    let mut checkpoint = bent.open().unwrap();
    assert!(checkpoint.is_head_sampled && checkpoint.config.tie_word_embeddings);
    let plan = evenkeel::Plan::new(&checkpoint, &support::roomy(), evenkeel::PlanOptions::default()).unwrap();
    let error = support::load_plan(&plan).err().unwrap().to_string();
    assert!(error.ends_with("a few rows of `lm_head.weight` differ from the embedding"), "{error}");
    checkpoint.compare_head().unwrap();
    assert!(!checkpoint.is_head_sampled && !checkpoint.config.tie_word_embeddings);
}

#[test]
fn a_whole_file_beside_an_index() {
    let whole = "`model.safetensors` is read, and `model.safetensors.index.json` beside it is not";
    let other = Bent::of(LLAMA);
    let mut tensors = other.tensors();
    let head = tensors.get_mut(HEAD).unwrap();
    head.values = head.values.chunks(64).rev().flatten().copied().collect();
    other.save_into(SINGLE, &tensors);
    assert_says("both", &other, [199, 36, 111, 176, 121, 247, 311, 239], &[whole]);

    let stale = Bent::of(LLAMA);
    let (tensors, index) = (stale.tensors(), stale.read("model.safetensors.index.json"));
    stale.without_weights();
    stale.save_into(SINGLE, &tensors);
    stale.write("model.safetensors.index.json", index);
    assert_says("an index of shards that are gone", &stale, PLAIN, &[whole]);
    stale.write("model.safetensors.index.json", "{");
    assert_says("half an index", &stale, PLAIN, &[whole]);
}

#[test]
fn tensors_in_other_shards_than_the_index_says() {
    let bent = Bent::of(LLAMA);
    let index = bent.read("model.safetensors.index.json");
    let moved =
        index.replace("\"model.norm.weight\": \"model-00004-of-00005", "\"model.norm.weight\": \"model-00001-of-00005");
    assert_ne!(index, moved);
    bent.write("model.safetensors.index.json", &moved);
    let notes = ["1 tensor not in the shard that the index names, taken where they are: `model.norm.weight`"];
    assert_says("another shard", &bent, PLAIN, &notes);
    bent.write("model.safetensors.index.json", moved.replace("model.norm.weight", "model.no_such.weight"));
    assert_says("left out", &bent, PLAIN, &notes);
}

#[test]
fn tensors_that_the_model_has_no_place_for() {
    for (names, shape, note) in [
        (&["score.weight"][..], &[2, 64][..], "1 tensor not read, for which the model has no place: `score.weight`"),
        (
            &["v_head.summary.weight"],
            &[1, 64],
            "1 tensor not read, for which the model has no place: `v_head.summary.weight`",
        ),
        (
            &["mtp.fc.weight", "mtp.norm.weight"],
            &[64],
            "2 tensors not read, for which the model has no place: `mtp.fc.weight`, `mtp.norm.weight`",
        ),
    ] {
        let bent = Bent::of(LLAMA);
        bent.change_tensors(|tensors| tensors.extend(names.iter().map(|name| ((*name).to_owned(), tensor(shape)))));
        assert_says(names[0], &bent, PLAIN, &[note]);
    }
    let bent = Bent::of(LLAMA);
    bent.change_tensors(|tensors| {
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), tensor(&[8]));
    });
    assert_says("frequencies", &bent, PLAIN, &[]);
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"num_hidden_layers": 2}));
    let note = "9 tensors not read, for which the model has no place: `model.layers.2.input_layernorm.weight`, \
                `model.layers.2.mlp.down_proj.weight`, `model.layers.2.mlp.gate_proj.weight`, \
                `model.layers.2.mlp.up_proj.weight`, `model.layers.2.post_attention_layernorm.weight` and 4 more";
    assert_says("two of three layers", &bent, [120, 63, 44, 32, 181, 15, 16, 69], &[note]);
}

#[test]
fn names_with_what_wrappers_put_before_them() {
    for (before, shown) in [
        ("_orig_mod.", "_orig_mod."),
        ("module.", "module."),
        ("base_model.model.", "base_model.model."),
        ("language_model.", "language_model."),
        ("module._orig_mod.", "module._orig_mod."),
    ] {
        let bent = Bent::of(LLAMA);
        bent.change_tensors(|tensors| {
            *tensors = std::mem::take(tensors).into_iter().map(|(name, t)| (format!("{before}{name}"), t)).collect();
        });
        let note = format!("the names of the tensors are taken without their `{shown}`");
        assert_says(before, &bent, PLAIN, &[&note]);
    }
    let bent = Bent::of(LLAMA);
    bent.change_tensors(|tensors| {
        let inner = |name: String| name.replacen("model.", "model._orig_mod.", 1);
        *tensors = std::mem::take(tensors).into_iter().map(|(name, t)| (inner(name), t)).collect();
    });
    assert_says("inside", &bent, PLAIN, &["the names of the tensors are taken without their `_orig_mod.`"]);
    // A language model within another, whose parts of another kind are not read; and a wrapper within a model.
    let bent = Bent::of(LLAMA);
    bent.change_tensors(|tensors| {
        let inner = |name: String| match name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}").replace("self_attn.", "self_attn._orig_mod."),
            None => name,
        };
        *tensors = std::mem::take(tensors).into_iter().map(|(name, t)| (inner(name), t)).collect();
        tensors.insert("model.visual.patch.weight".to_owned(), tensor(&[4]));
    });
    let notes = [
        "the names of the tensors are taken without their `model.language_model.`",
        "1 tensor not read, for which the model has no place: `model.visual.patch.weight`",
    ];
    assert_says("model.language_model.", &bent, PLAIN, &notes);
}

#[test]
fn weights_of_f64() {
    for (name, tokens) in [(LLAMA, Some(PLAIN)), ("parity/gpt2", None)] {
        let (plain, bent) = (Bent::of(name), Bent::of(name));
        plain.change_tensors(|tensors| tensors.retain(|name, _| !name.ends_with("masked_bias")));
        let mut tensors = bent.tensors();
        bent.without_weights();
        // What only f64 can tell from what f32 has.
        let f64s = |tensor: &Tensor| {
            let bits = |value: &f32| f64::from(*value).to_bits() + u64::from(*value != 0.0);
            tensor.values.iter().flat_map(|value| f64::from_bits(bits(value)).to_le_bytes()).collect()
        };
        tensors.retain(|name, _| !name.ends_with("masked_bias"));
        bent.save_as(SINGLE, Dtype::F64, &tensors, f64s);
        let options = evenkeel::PlanOptions::default();
        let planned =
            |bent: &Bent| evenkeel::Plan::new(&bent.open().unwrap(), &support::roomy(), &options).unwrap().modules;
        assert_eq!(planned(&bent), planned(&plain), "{name}");
        let theirs = tokens.map_or_else(|| plain.greedy(&PROMPT, 8, None), |tokens| tokens.to_vec());
        assert_eq!(bent.greedy(&PROMPT, 8, None), theirs, "{name}");
        for scheme in [evenkeel::Scheme::Int8, evenkeel::Scheme::Int4] {
            let bytes = |bent: &Bent| {
                let output = bent.path().join(scheme.to_string());
                let options = evenkeel::SaveOptions { output: output.clone(), ..save(scheme) };
                evenkeel::save_quantized(&bent.open().unwrap(), &options, |_| ()).unwrap();
                std::fs::read(output.join(SINGLE)).unwrap()
            };
            assert!(bytes(&bent) == bytes(&plain), "{name} in {scheme}");
        }
    }
}

fn save(scheme: evenkeel::Scheme) -> evenkeel::SaveOptions {
    evenkeel::SaveOptions {
        scheme,
        format: evenkeel::SaveFormat::Evenkeel,
        output: String::new().into(),
        shard_size: evenkeel::DEFAULT_SHARD_SIZE,
        pool: std::sync::Arc::default(),
        cancel: evenkeel::Cancel::new(),
    }
}

/// 40 tokens.
const LONG: [u32; 40] = [
    133, 186, 274, 17, 241, 130, 29, 83, 60, 193, 243, 129, 197, 281, 55, 296, 130, 9, 113, 211, 146, 96, 202, 84, 39,
    74, 230, 67, 70, 3, 5, 110, 113, 87, 88, 151, 163, 104, 279, 107,
];

#[test]
fn the_model_type_counts() {
    let types = json!(["full_attention", "sliding_attention", "sliding_attention"]);
    let read = "read as `MinistralForCausalLM`, as its `model_type` says; `architectures` has `MistralForCausalLM`";
    for (what, types, tokens) in [
        ("mixed", Some(types.clone()), [16, 6, 0, 6, 288, 157]),
        ("full", Some(json!(["full_attention", "full_attention", "full_attention"])), [16, 6, 170, 152, 153, 2]),
        ("not said", None, [210, 15, 15, 53, 252, 153]),
    ] {
        let bent = Bent::of("parity/mistral");
        bent.configure(&json!({"model_type": "ministral", "sliding_window": 8, "layer_types": types}));
        assert_eq!(bent.notes(), [read], "{what}");
        assert_eq!(bent.greedy(&LONG, 6, None), tokens, "{what}");
    }
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"model_type": "mistral", "sliding_window": 8}));
    assert_eq!(bent.greedy(&LONG, 6, None), [160, 76, 161, 34, 252, 151]);
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"architectures": ["LlamaForSequenceClassification"]}));
    let read =
        "read as `LlamaForCausalLM`, as its `model_type` says; `architectures` has `LlamaForSequenceClassification`";
    assert_says("another head's name", &bent, PLAIN, &[read]);

    let refusal = |name: &str, keys: serde_json::Value| {
        let bent = Bent::of(name);
        bent.configure(&keys);
        bent.open().unwrap_err().to_string()
    };
    let unknown = refusal(LLAMA, json!({"model_type": "warp"}));
    assert!(unknown.contains(": model type `warp` is not supported; supported: "), "{unknown}");
    assert!(unknown.ends_with("; it counts, not the architecture `LlamaForCausalLM` beside it"), "{unknown}");
    for name in ["parity/mistral", LLAMA] {
        let several = refusal(name, json!({"layer_types": types}));
        assert!(several.contains(": blocks of several types are not supported in `"), "{several}");
    }
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"layer_types": ["full_attention", "full_attention", "full_attention"]}));
    assert_says("all of one type", &bent, PLAIN, &[]);
}

#[test]
fn names_of_activations() {
    let gelu = [120, 256, 10, 181, 223, 157, 225, 1];
    for (names, tokens) in [
        (&["silu", "swish"][..], PLAIN),
        (&["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu"], gelu),
        (&["relu"], [120, 7, 10, 100, 33, 25, 72, 167]),
    ] {
        for name in names {
            let bent = Bent::of(LLAMA);
            bent.configure(&json!({"hidden_act": name}));
            assert_says(name, &bent, tokens, &[]);
        }
    }
}

#[test]
fn configurations_that_say_more_or_less() {
    for (what, keys) in [
        ("no end of text", json!({"eos_token_id": -1})),
        ("a part of a head, which Llama does not know", json!({"partial_rotary_factor": 0.5})),
        (
            "the same in the newer form",
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ),
    ] {
        let bent = Bent::of(LLAMA);
        bent.configure(&keys);
        assert_says(what, &bent, PLAIN, &[]);
    }
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"eos_token_id": [-1, 7]}));
    assert_eq!(bent.open().unwrap().config.eos_token_ids, [7]);
    let config = bent.read("config.json");
    for (key, value) in
        [("some_limit", "[0.0, Infinity, -Infinity]"), ("some_limit", "NaN"), ("some_limit", "1, \"some_limit\": 2")]
    {
        bent.write("config.json", config.replacen('{', &format!("{{\"{key}\": {value}, "), 1));
        assert_says(value, &bent, PLAIN, &[]);
    }
    // What is for neither kind of attention counts for nothing.
    let last = |keys: serde_json::Value| {
        let bent = Bent::of("parity/gemma3");
        bent.configure(&keys);
        let mut last = Vec::new();
        bent.load(None)
            .score(&support::numbers::<u32>(&support::expected("parity/gemma3")["input_ids"]), |_, logits| {
                last = logits[..4].to_vec();
            })
            .unwrap();
        last
    };
    let flat = [0.026, 0.203, 0.6989, -1.0834];
    for (keys, logits) in [
        (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}), flat),
        (json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}}), flat),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
            [0.2459, 0.0678, 0.5121, -1.285],
        ),
    ] {
        for (ours, theirs) in last(keys.clone()).iter().zip(logits) {
            assert!((ours - theirs).abs() < 1e-3, "{keys}: {ours} {theirs}");
        }
    }
}

/// What Transformers gives with a cache: keys stay as they were rotated when their token was the last, but where a
/// Phi-3 comes to its long factors.
#[test]
fn frequencies_follow_the_length_of_the_sequence() {
    let factors = |by: f64, from: f64| (0..8).map(|at| from + by * f64::from(at)).collect::<Vec<_>>();
    let longrope = |original: usize| {
        json!({
            "original_max_position_embeddings": original,
            "rope_scaling": {"type": "longrope", "short_factor": factors(0.1, 1.0), "long_factor": factors(0.5, 2.0)},
        })
    };
    let in_llama = |original: usize| {
        let mut keys = longrope(original);
        keys["rope_scaling"]["factor"] = 4.0.into();
        keys["rope_scaling"]["original_max_position_embeddings"] = keys["original_max_position_embeddings"].take();
        keys
    };
    let dynamic = |longest: usize| json!({"max_position_embeddings": longest, "rope_scaling": {"type": "dynamic", "factor": 2.0}});
    for (name, keys, tokens) in [
        ("parity/phi3", longrope(64), &[218, 137, 272, 125, 196, 174][..]),
        ("parity/phi3", longrope(44), &[218, 53, 193, 151, 317, 39, 201, 97, 110, 226, 11, 36]),
        ("parity/phi3", longrope(32), &[45, 54, 110, 226, 162, 242]),
        (LLAMA, in_llama(44), &[103, 130, 48, 160, 30, 145, 189, 30, 26, 243, 192, 90]),
        (LLAMA, in_llama(32), &[103, 130, 239, 24, 143, 311, 68, 100, 47, 312, 299, 191]),
        (LLAMA, dynamic(256), &[]),
        (LLAMA, dynamic(44), &[192, 298, 148, 8, 264, 105, 267, 30, 187, 100, 192, 192]),
        (LLAMA, dynamic(32), &[264, 280, 128, 30, 298, 168, 163, 1, 160, 195, 16, 90]),
    ] {
        let bent = Bent::of(name);
        bent.configure(&keys);
        if tokens.is_empty() {
            assert_eq!(bent.greedy(&PROMPT, 8, None), PLAIN);
            continue;
        }
        for chunk in [512, 7] {
            let mut model = bent.load(None);
            model.limit_prefill_chunk(chunk);
            assert_eq!(support::bent::greedy(&mut model, &LONG, tokens.len()), tokens, "{name} in {chunk}s: {keys}");
        }
    }
}

#[test]
fn sampling_as_the_checkpoint_asks_for() {
    let sampling = |json: &str| {
        let bent = Bent::of(LLAMA);
        bent.write("generation_config.json", json);
        let config = bent.open().unwrap().config;
        (evenkeel::Sampling::of_model(&config), config.generation.undone.clone())
    };
    let greedy = evenkeel::Sampling::greedy();
    let all = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.5, "num_beams": 1, "suppress_tokens": [], "transformers_version": "5"}"#;
    let wanted = evenkeel::Sampling {
        temperature: 0.6,
        top_k: Some(20),
        top_p: Some(0.9),
        min_p: Some(0.1),
        repetition_penalty: 1.5,
        seed: 0,
    };
    for (json, wanted, undone) in [
        (all, wanted, &[][..]),
        (r#"{"temperature": 0.6, "top_k": 20, "top_p": 7}"#, greedy.clone(), &[]),
        (r#"{"do_sample": false, "repetition_penalty": 3}"#, greedy.clone(), &[]),
        (r#"{"do_sample": true, "top_k": 0}"#, evenkeel::Sampling { temperature: 1.0, ..greedy.clone() }, &[]),
        (
            r#"{"do_sample": true, "num_beams": 4, "suppress_tokens": [120], "bad_words_ids": [[3]]}"#,
            evenkeel::Sampling { temperature: 1.0, top_k: Some(50), ..greedy.clone() },
            &["bad_words_ids", "num_beams", "suppress_tokens"],
        ),
    ] {
        let (ours, said) = sampling(json);
        let penalty = if json.contains("penalty\": 3") { 3.0 } else { wanted.repetition_penalty };
        assert_eq!((ours, &said[..]), (evenkeel::Sampling { repetition_penalty: penalty, ..wanted }, undone), "{json}");
    }
    // Of Transformers, greedy, with a penalty.
    let bent = Bent::of("parity/gemma3");
    bent.write("generation_config.json", r#"{"repetition_penalty": 3.0}"#);
    let prompt: Vec<u32> = support::numbers(&support::expected("parity/gemma3")["input_ids"]);
    let sampling = evenkeel::Sampling::of_model(&bent.open().unwrap().config);
    let options = evenkeel::GenerateOptions {
        sampling,
        max_new_tokens: Some(8),
        ignore_eos: true,
        ..evenkeel::GenerateOptions::default()
    };
    let mut model = bent.load(None);
    let tokens: Vec<u32> =
        model.generate_from(&prompt, options).unwrap().filter_map(|piece| piece.unwrap().token).collect();
    assert_eq!(tokens, [87, 140, 262, 181, 248, 53, 60, 112]);
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let refusal = |files: &[(&str, &str)]| {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = directory.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let error = evenkeel::Checkpoint::open(directory.path()).unwrap_err();
        let hints: Vec<_> = error.hints().iter().map(ToString::to_string).collect();
        format!("{error}; {}", hints.join("; ")).replace(directory.path().to_str().unwrap(), "DIR")
    };
    let adapter = ("adapter_config.json", r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#);
    let config = Bent::of(LLAMA).read("config.json");
    let config = ("config.json", config.as_str());
    let merge = "merge it into its base and name the result: `python -c 'from peft import AutoPeftModelForCausalLM as M; \
                 M.from_pretrained(\"DIR\").merge_and_unload().save_pretrained(\"DIR-merged\")'`";
    let is_adapter = format!("`DIR` is an adapter (LORA) of `org/base`, not a whole model; {merge}");
    let converted = |more: &str| {
        format!(
            "Transformers makes safetensors of it: `python -c 'from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained(\"DIR\"{more}).save_pretrained(\"DIR-safetensors\")'`"
        )
    };
    let gguf = format!(
        "`DIR` holds weights in GGUF (`m-q4.GGUF`), which are not read; {}",
        converted(", gguf_file=\"m-q4.GGUF\"")
    );
    let pickle = format!(
        "`DIR/model.safetensors` is missing, and so is `model.safetensors.index.json`; `pytorch_model.bin` is a Python \
         pickle, which can run code and is never read; {}",
        converted("")
    );
    let cached =
        "`DIR` is a repository in a Hugging Face cache, whose snapshots are checkpoints; name `DIR/snapshots/b0`";
    for (files, wanted) in [
        (&[adapter][..], is_adapter.as_str()),
        (&[adapter, config], &is_adapter),
        (&[("m-q4.GGUF", "GGUF")], &gguf),
        (&[("m-q4.GGUF", "GGUF"), config], &gguf),
        (&[("pytorch_model.bin", ""), config], &pickle),
        (&[("refs/main", "b0"), ("snapshots/a0/x", ""), ("snapshots/b0/x", "")], cached),
    ] {
        assert_eq!(refusal(files), wanted);
    }
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    let error = evenkeel::Checkpoint::open(file.path()).unwrap_err().to_string();
    assert!(error.ends_with("` is in GGUF, which is not read"), "{error}");
}

#[test]
fn weights_that_another_tool_has_quantized_are_named() {
    for (file, json, form) in [
        ("quantize_config.json", r#"{"bits": 4, "quant_method": "gptq"}"#, "GPTQ, `gptq`"),
        ("quantize_config.json", r#"{"bits": 4}"#, "GPTQ"),
        ("hf_quant_config.json", r#"{"quantization": {"quant_algo": "NVFP4"}}"#, "ModelOpt, `NVFP4`"),
    ] {
        let bent = Bent::of(LLAMA);
        bent.write(file, json);
        assert_says("weights that are not", &bent, PLAIN, &[]);
        let mut tensors = bent.tensors();
        bent.without_weights();
        tensors.retain(|name, _| name.ends_with("q_proj.weight"));
        let bytes = |tensor: &Tensor| vec![0; 4 * tensor.values.len()];
        bent.save_as(SINGLE, Dtype::I32, &tensors, bytes);
        let error = bent.open().unwrap_err().to_string();
        assert!(
            error.contains(&format!("is already quantized in the form of {form}, which is not supported; `")),
            "{error}"
        );
        assert!(error.ends_with(&format!("{file}` says so")), "{error}");
    }
}

#[test]
fn the_command_says_it_once() {
    let bent = Bent::of(LLAMA);
    bent.configure(&json!({"tie_word_embeddings": true}));
    bent.write("generation_config.json", r#"{"suppress_tokens": [120], "do_sample": true, "top_k": 1}"#);
    let (path, prompt) = (bent.path().to_str().unwrap(), PROMPT.map(|id| format!("t{id}")).join(" "));
    let arguments = ["generate", path, "--prompt", &prompt, "--max-new-tokens", "8", "--ignore-eos"];
    let output = command::run(&arguments);
    let warnings = "`lm_head.weight` differs from the embedding and is used, though config.json has \
                    `tie_word_embeddings: true`\nwarning: generation_config.json has what is not done: `suppress_tokens`\n";
    let stderr = command::stderr(&output);
    assert!(stderr.starts_with("warning: `") && stderr.ends_with(&format!("`: {warnings}")), "{stderr}");
    assert_eq!(stderr.lines().count(), 2, "{stderr}");
    let text = PLAIN.map(|id| format!("t{id}")).join(" ");
    assert_eq!(command::stdout(&output).trim(), text);
}
