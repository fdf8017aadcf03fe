//! What schemes cost: the squared error of weights, and what a model predicts.
#![allow(clippy::print_stdout, reason = "the figures are wanted")]

mod support;
#[path = "support/weights.rs"]
mod weights;

use std::path::Path;

use evenkeel::Cancel;
use evenkeel::Tokenizer;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::generate::{Comparison, Perplexity, Predictions, Windows};
use evenkeel::plan::{Plan, PlanOptions, Quantize};
use evenkeel::quant::{QuantizeRules, Scheme, Storage};
use support::{fixture, load_plan, roomy};

#[test]
fn weights_keep_what_the_search_promises() {
    let (rows, cols) = (64, 1024);
    for (distribution, int4, nl4) in weights::DISTRIBUTIONS {
        let matrix = weights::matrix(distribution, rows, cols);
        for (storage, bar) in [(Storage::Int4, int4), (Storage::Nl4, nl4)] {
            let error = weights::relative_error(storage, cols, &matrix);
            println!("{distribution} {storage:?}: {error:.2}e-3");
            // So small a matrix is a few percent from a large one.
            assert!(error <= 1.03 * bar, "{distribution} {storage:?}: {error}");
        }
    }
}

/// Block projections quantized, embedding and head not, as `reference_quality.json` says.
fn rules(scheme: Scheme) -> QuantizeRules {
    let kept = ["model.embed_tokens", "lm_head"].map(|path| (path.to_owned(), Scheme::None));
    QuantizeRules::new([(String::new(), scheme)].into_iter().chain(kept).collect())
}

/// The figures of every scheme on the tokens of eval.txt that `part` takes.
fn measure(part: impl Fn(Vec<u32>) -> Vec<u32>) -> Vec<(Scheme, Perplexity)> {
    let directory = fixture("ferris-7m");
    let checkpoint = Checkpoint::open(&directory).unwrap();
    let text = std::fs::read_to_string(directory.join("eval.txt")).unwrap();
    let tokenizer = Tokenizer::open(&directory, checkpoint.config.vocab_size).unwrap();
    let tokens = part(tokenizer.encode(&text, false).unwrap());
    let windows = Windows::new(512, 512).unwrap();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut predictions =
        Predictions::new(scratch, windows.scored(tokens.len()), checkpoint.config.vocab_size).unwrap();
    let measured = Scheme::ALL.map(|scheme| {
        let options = PlanOptions { quantize: Some(Quantize::Rules(rules(scheme))), ..PlanOptions::default() };
        let plan = Plan::new(&checkpoint, &roomy(), &options).unwrap();
        let mut model = load_plan(&plan).unwrap();
        let comparison = match scheme {
            Scheme::None => Comparison::Keep(&mut predictions),
            _ => Comparison::Against(&mut predictions),
        };
        let measured = model.perplexity(&tokens, &windows, comparison, &Cancel::new(), |_| ()).unwrap();
        println!("{scheme}: {measured:?}");
        (scheme, measured)
    });
    measured.to_vec()
}

fn assert_bars(measured: &[(Scheme, Perplexity)], unquantized: f64) {
    let none = measured[0].1.perplexity;
    assert!((none / unquantized - 1.0).abs() <= 1e-3, "none: {none}");
    for (scheme, measured) in &measured[1..] {
        let kl = measured.divergence.unwrap().mean_kl;
        let holds = match scheme {
            Scheme::Int4 => kl <= 0.038,
            Scheme::Nl4 => kl <= 0.031,
            _ => measured.perplexity <= 1.001 * none,
        };
        assert!(holds, "{scheme}: {measured:?}");
    }
}

#[test]
fn schemes_cost_no_more_than_the_bars_on_a_part_of_the_text() {
    let measured = measure(|tokens| tokens[16 * 512..18 * 512].to_vec());
    assert_bars(&measured, 10.187);
}

#[test]
#[ignore = "takes minutes"]
fn schemes_cost_no_more_than_the_bars_on_the_whole_text() {
    let reference = std::fs::read_to_string(fixture("ferris-7m").join("reference_quality.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&reference).unwrap();
    let measured = measure(|tokens| {
        assert_eq!(Some(tokens.len() as u64), reference["tokens"].as_u64());
        tokens
    });
    assert_bars(&measured, reference["none"]["perplexity"].as_f64().unwrap());
}
