//! Checkpoints as people have them: what Transformers 5.24 makes of each, on the CPU in f32, and what is said of it.

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
    for (name, tokens) in [(LLAMA, Some(PLAIN))] {
        let (plain, bent) = (Bent::of(name), Bent::of(name));
        plain.change_tensors(|_| ());
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
        let plan = |bent: &Bent| evenkeel::Plan::new(&bent.open().unwrap(), &support::roomy(), &options).unwrap();
        assert_eq!(plan(&bent).modules, plan(&plain).modules, "{name}");
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
